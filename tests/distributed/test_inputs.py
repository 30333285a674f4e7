"""What a task fetches of other workers: one that hangs is told from one that is slow."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.flight as flight
import pytest

from resolver.distributed._exchange import Exchange
from resolver.distributed._inputs import Fetcher, InputLostError
from resolver.distributed._wire import HEALTH, OutputKey, PartitionSource, StageInput, WireError
from tests.support.distributed import eventually, names

BATCH = pa.record_batch({"a": [1, 2, 3]})
QUERY = "0" * 32
URL = "http://127.0.0.1:1"


class Silent:
    """A worker, its client and the resolver for it: sends nothing until ``sends`` is set."""

    def __init__(self, *, lives: bool) -> None:
        self._lives = lives
        self.asked = threading.Event()
        self.sends = threading.Event()
        self.invalidated = []

    def get_flight_client_for_url(self, url):
        assert url == URL
        return self

    def invalidate(self, url, client):
        self.invalidated.append((url, client))

    def do_action(self, action, _options):
        assert action.type == HEALTH
        self.asked.set()
        if not self._lives:
            raise flight.FlightTimedOutError("Deadline Exceeded")
        return iter(())

    def do_get(self, _ticket, _options):
        assert self.sends.wait(20)
        return Reader([SimpleNamespace(data=BATCH)])


class Reader(list):
    def cancel(self):
        pass


@pytest.fixture
def bring(tmp_path):
    """Fetches one partition from ``worker``, as a task that is published or fails."""
    exchange = Exchange(tmp_path)

    def bring(worker, *files):
        output = OutputKey(QUERY, 1, 0, 0)
        source = PartitionSource(URL, output, 0, BATCH.num_rows, 1, 100, files)
        stage_input = StageInput(1, BATCH.schema.serialize().to_pybytes(), ((source,),))
        key = OutputKey(QUERY, 2, 0, 0)
        with exchange.task(key) as stem:
            fetcher = Fetcher(
                worker,
                exchange,
                key,
                stem,
                headers=[],
                silence=0.05,
                check=lambda: exchange.bytes,
            )
            return fetcher.bring([stage_input])[source]

    yield bring
    exchange.close()
    assert names(tmp_path) == []


def fetching():
    return [thread for thread in threading.enumerate() if thread.name.startswith("fetch-")]


def test_a_worker_that_is_silent_and_gives_no_sign_is_lost(bring):
    """Long before the deadline of the transfer, which allows for slow networks."""
    worker = Silent(lives=False)
    with pytest.raises(InputLostError) as raised:
        bring(worker)
    assert raised.value.url == URL
    assert worker.invalidated == [(URL, worker)]
    worker.sends.set()  # too late: nobody waits for it, and nothing of it is kept
    eventually(lambda: not fetching())


def test_what_comes_after_a_fetch_was_given_up_leaves_nothing(bring, tmp_path):
    class Late:
        @property
        def data(self):
            worker.sends.wait(20)
            return BATCH

    worker = Silent(lives=False)
    worker.do_get = lambda *_: Reader([Late()])
    with pytest.raises(InputLostError):
        bring(worker)
    assert not list(tmp_path.rglob("*.arrow"))
    worker.sends.set()
    eventually(lambda: not fetching())
    assert not list(tmp_path.rglob("*.arrow"))


def test_a_worker_that_is_silent_and_lives_is_waited_for(bring):
    worker = Silent(lives=True)
    threading.Thread(target=lambda: worker.asked.wait(20) and worker.sends.set()).start()
    (path,) = bring(worker)
    assert path.suffix == ".arrow"
    assert worker.asked.is_set()
    assert not worker.invalidated
    eventually(lambda: not fetching())


def test_what_came_along_is_written_anew(bring):
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, BATCH.schema) as writer:
        writer.write_batch(BATCH)
    content = sink.getvalue().to_pybytes()
    for garbage in (b"garbage", content[:-20], b"ARROW1\0\0" + content[-20:]):
        with pytest.raises(WireError, match="came along cannot be read"):
            bring(None, garbage)
    assert len(bring(None, content)) == 1
