"""The cache against a plain model of its contract, in any order of operations.

The model is a dict and a clock. Both implementations run every sequence; a bound on
clients makes the order of use observable.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from tests.support import implementations
from tests.support.implementations import Client, Pending
from tests.support.urls import in_one_stripe

URLS = [*in_one_stripe(4, low_bits=3), "http://worker.example:1", "http://worker.example:2"]
SPELLINGS = {url: [url + "/" * slashes for slashes in range(1, 7)] for url in URLS}
REMEMBERED_SPELLINGS = 4
MINUTE = 60.0
"""The model counts minutes, of which a busy machine spends none by itself."""

urls = st.sampled_from(URLS)
spelling_numbers = st.integers(0, 5)
lanes = st.integers(0, 1)


@dataclass
class Modelled:
    """What the model knows of one URL on one lane."""

    state: str
    pending: Pending
    client: Client | None = None
    used: int = 0
    until: int = 0
    spellings: set[str] = field(default_factory=set)


class CacheMachine(RuleBasedStateMachine):
    """Runs the cache and the model side by side."""

    implementation: str

    @initialize(
        idle=st.sampled_from([None, 10]),
        limit=st.integers(1, 5),
        lane_count=st.sampled_from([1, 2]),
    )
    def create(self, idle, limit, lane_count):
        self.idle = idle
        self.limit = limit
        self.lane_count = lane_count
        self.cache = implementations.cache_type(self.implementation)(
            idle_timeout=None if idle is None else (idle + 0.5) * MINUTE,
            max_clients=limit,
            lanes=lane_count,
        )
        self.mine = self.cache._lane()
        self.model: dict[tuple[str, int], Modelled] = {}
        self.under_way: list[tuple[str, int, Pending]] = []
        self.dropped: list[Client] = []
        self.counts: dict[str, int] = dict.fromkeys(self.cache.counts, 0)
        self.clock = itertools.count(1)
        self.now = 0
        self.closed = False

    # -- the model's own steps -----------------------------------------------------------

    def tick(self, minutes: int = 1) -> None:
        """Every operation has a minute of its own, so that no two uses are equally old."""
        self.now += minutes
        self.cache._advance_clock(minutes * MINUTE)

    def usable(self, entry: Modelled | None) -> bool:
        return (
            entry is not None
            and entry.state == "live"
            and (self.idle is None or self.now - entry.used <= self.idle)
        )

    def remove(self, where: tuple[str, int], counter: str) -> None:
        entry = self.model.pop(where)
        if entry.state == "live":
            assert entry.client is not None
            self.dropped.append(entry.client)
            self.counts[counter] += 1
            self.counts["clients"] -= 1

    def retained(self) -> list[tuple[str, int]]:
        return [where for where, entry in self.model.items() if entry.state != "connecting"]

    def make_room(self, newest: tuple[str, int]) -> None:
        while len(self.retained()) > self.limit:
            candidates = [where for where in self.retained() if where != newest]
            failed = [w for w in candidates if self.model[w].state == "failed"]
            if failed:
                # Which of several remembered failures goes first is nobody's business.
                kept = {pending for _, pending in self.failures_in_cache()}
                remembered = [w for w in failed if self.now < self.model[w].until]
                gone = [w for w in remembered if self.model[w].pending not in kept]
                if gone:
                    self.remove(gone[0], "evicted_capacity")
                else:  # one that is over: nobody can tell which, so let all of them go
                    assert len(remembered) < len(failed), "no failure made room"
                    self.expire_both()
            else:
                oldest = min(candidates, key=lambda where: self.model[where].used)
                self.remove(oldest, "evicted_capacity")

    def failures_in_cache(self):
        """The remembered failures, asked for one by one; counted as waits in both."""
        found = []
        for (url, lane), entry in self.model.items():
            if entry.state == "failed" and self.now < entry.until:
                probe = Pending()
                _, shared = self.cache._begin(url, lane, probe)
                if shared is probe:
                    self.counts["misses"] += 1
                    self.cache._fail(url, lane, probe, 0.0, False)
                else:
                    self.counts["waits"] += 1
                    found.append((url, shared))
        return found

    # -- operations ----------------------------------------------------------------------

    @rule(url=urls, lane=lanes)
    def begin(self, url, lane):
        lane %= self.lane_count
        self.tick()
        entry = self.model.get((url, lane))
        pending = Pending()
        result = self.cache._begin(url, lane, pending)
        if self.usable(entry):
            entry.used = self.now
            self.counts["hits"] += 1
            assert result == (entry.client, None)
        elif entry is not None and (
            entry.state == "connecting" or (entry.state == "failed" and self.now < entry.until)
        ):
            self.counts["waits"] += 1
            assert result == (None, entry.pending)
        else:
            if entry is not None:
                self.remove((url, lane), "evicted_idle")
            self.model[url, lane] = Modelled("connecting", pending)
            self.under_way.append((url, lane, pending))
            self.counts["misses"] += 1
            assert result == (None, pending)

    @rule(data=st.data())
    def publish(self, data):
        if not self.under_way:
            return
        self.tick()
        which = self.under_way.pop(data.draw(st.integers(0, len(self.under_way) - 1)))
        url, lane, pending = which
        client = Client()
        stored = self.cache._publish(url, lane, pending, client)
        self.counts["connects"] += 1
        entry = self.model.get((url, lane))
        if entry is None or entry.state != "connecting" or entry.pending is not pending:
            assert not stored
        elif self.closed:
            assert not stored
            del self.model[url, lane]
        else:
            assert stored
            entry.state, entry.client, entry.used = "live", client, self.now
            self.counts["clients"] += 1
            self.make_room((url, lane))

    @rule(data=st.data(), ttl=st.sampled_from([0, 8]), counted=st.booleans())
    def fail(self, data, ttl, counted):
        if not self.under_way:
            return
        self.tick()
        which = self.under_way.pop(data.draw(st.integers(0, len(self.under_way) - 1)))
        url, lane, pending = which
        self.cache._fail(url, lane, pending, (ttl + 0.5) * MINUTE if ttl else 0.0, counted)
        self.counts["connect_failures"] += counted
        entry = self.model.get((url, lane))
        if entry is not None and entry.state == "connecting" and entry.pending is pending:
            if ttl and not self.closed:
                entry.state, entry.until = "failed", self.now + ttl + 1
                self.make_room((url, lane))
            else:
                del self.model[url, lane]

    @rule(url=urls, number=spelling_numbers, current=st.booleans())
    def alias(self, url, number, current):
        self.tick()
        spelling = SPELLINGS[url][number]
        entry = self.model.get((url, self.mine))
        live = entry is not None and entry.state == "live"
        client = entry.client if live and current else Client()
        self.cache._alias(spelling, url, self.mine, client)
        if live and current and len(entry.spellings) < REMEMBERED_SPELLINGS:
            entry.spellings.add(spelling)

    @rule(url=urls)
    def get(self, url):
        self.tick()
        entry = self.model.get((url, self.mine))
        found = self.cache.get(url)
        if found is not None:
            assert self.usable(entry)
            assert found is entry.client
            entry.used = self.now
            self.counts["hits"] += 1
        elif self.usable(entry):
            # A lookup by a spelling alone may leave this to the slow path, which hits.
            assert self.cache._begin(url, self.mine, Pending()) == (entry.client, None)
            entry.used = self.now
            self.counts["hits"] += 1
            assert entry.spellings

    @rule(url=urls, number=spelling_numbers)
    def get_by_spelling(self, url, number):
        self.tick()
        spelling = SPELLINGS[url][number]
        entry = self.model.get((url, self.mine))
        found = self.cache.get(spelling)
        if found is not None:
            assert self.usable(entry)
            assert found is entry.client
            assert spelling in entry.spellings
            entry.used = self.now
            self.counts["hits"] += 1
        elif self.usable(entry) and spelling in entry.spellings:
            assert self.cache._begin(url, self.mine, Pending()) == (entry.client, None)
            entry.used = self.now
            self.counts["hits"] += 1

    @rule(url=urls)
    def drop(self, url):
        self.tick()
        states = []
        dropped = self.cache._drop(url)
        for lane in range(self.lane_count):
            if (url, lane) in self.model:
                states.append(self.model[url, lane].state)
                self.remove((url, lane), "invalidated")
        assert dropped == any(state != "failed" for state in states)

    @rule(url=urls, lane=lanes, current=st.booleans())
    def drop_client(self, url, lane, current):
        lane %= self.lane_count
        self.tick()
        entry = self.model.get((url, lane))
        live = entry is not None and entry.state == "live"
        dropped = self.cache._drop(url, entry.client if live and current else Client())
        assert dropped == (live and current)
        if dropped:
            self.remove((url, lane), "invalidated")

    @rule()
    def clear(self):
        self.tick()
        self.forget_everything(self.cache._clear())

    @rule()
    def shut(self):
        self.tick()
        self.forget_everything(self.cache._shut())
        self.closed = True

    def forget_everything(self, returned: list[Any]) -> None:
        expected = {entry.pending for entry in self.model.values() if entry.state != "live"}
        assert set(returned) == expected
        assert len(returned) == len(expected)
        for where in list(self.model):
            self.remove(where, "invalidated")

    @rule()
    def expire(self):
        self.tick()
        self.expire_both()

    def expire_both(self) -> None:
        clients = 0
        for where, entry in list(self.model.items()):
            if entry.state == "live" and not self.usable(entry):
                clients += 1
                self.remove(where, "evicted_idle")
            elif entry.state == "failed" and self.now >= entry.until:
                del self.model[where]
        assert self.cache.expire() == clients

    @rule(minutes=st.integers(1, 12))
    def wait(self, minutes):
        self.tick(minutes)

    # -- what holds at any time ----------------------------------------------------------

    @invariant()
    def agrees(self):
        cache = self.cache
        cache._validate()
        assert cache.counts == self.counts
        live = {url for (url, _), entry in self.model.items() if entry.state == "live"}
        assert sorted(cache._keys()) == sorted(live)
        for url in URLS:
            entries = [self.model.get((url, lane)) for lane in range(self.lane_count)]
            assert cache._holds(url) == any(self.usable(entry) for entry in entries)
        assert len(cache.discarded) == len(self.dropped)
        assert {id(client) for client in cache.discarded} == {id(c) for c in self.dropped}


@pytest.mark.parametrize("implementation", implementations.TESTED)
def test_the_cache_does_what_its_model_does(implementation):
    implementations.load(implementation)
    machine = type("Machine", (CacheMachine,), {"implementation": implementation})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=120,
            stateful_step_count=50,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
