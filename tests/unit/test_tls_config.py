"""TlsConfig: what it takes, what it notices, and what it never shows."""

from __future__ import annotations

import itertools
import logging
import os
import pickle
import threading
import time

import pytest

from resolver import FlightConnector, TlsConfig
from tests.support.threads import Background, run_concurrently, wait_until

trustme = pytest.importorskip("trustme")

from tests.support.certificates import PemFiles, Signer  # noqa: E402 -- it needs trustme


@pytest.fixture(scope="module")
def signer() -> Signer:
    return Signer()


class Listener:
    """A resolver, as far as a TlsConfig is concerned."""

    def __init__(self) -> None:
        self.calls = 0

    def _credentials_changed(self) -> None:
        self.calls += 1


def test_bytes_paths_and_callables_give_the_same(tmp_path, signer) -> None:
    (tmp_path / "root.pem").write_bytes(signer.root)
    for source in (
        signer.root,
        tmp_path / "root.pem",
        str(tmp_path / "root.pem"),
        lambda: signer.root,
    ):
        assert TlsConfig(root_certificates=source).credentials().root_certificates == signer.root


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"root_certificates": 7}, TypeError, "root_certificates is PEM"),
        ({"root_certificates": "-----BEGIN CERTIFICATE-----"}, TypeError, "as bytes"),
        ({"root_certificates": b"no"}, ValueError, "not PEM"),
        ({"client_certificate": "a.pem"}, ValueError, "given together"),
        ({"server_key": "a.pem"}, ValueError, "given together"),
        ({"client_authorities": "a.pem"}, ValueError, "needs server_certificate"),
        ({"override_hostname": ""}, ValueError, "empty"),
        ({"override_hostname": b"w"}, TypeError, "str"),
        ({"check_interval": 0}, ValueError, "check_interval"),
        ({"check_interval": True}, TypeError, "check_interval"),
        ({"check_interval": float("nan")}, ValueError, "check_interval"),
    ],
)
def test_what_it_refuses(options, error, words) -> None:
    with pytest.raises(error, match=words):
        TlsConfig(**options)


def test_it_shows_no_secret(tmp_path, signer) -> None:
    pair = signer.issue()
    config = TlsConfig(
        root_certificates=tmp_path / "root.pem", client_certificate=pair[0], client_key=pair[1]
    )
    shown = repr(config) + repr(FlightConnector(tls=config))
    assert "BEGIN" not in shown
    assert "root.pem" in shown
    assert f"<{len(pair.key)} bytes>" in shown
    assert "BEGIN" not in repr(TlsConfig(**pair.as_client()).credentials())


def test_equal_sources_are_equal_and_travel(tmp_path, signer) -> None:
    pair = signer.issue()
    one = TlsConfig(root_certificates=tmp_path / "root.pem", **pair.as_client())
    other = TlsConfig(root_certificates=str(tmp_path / "root.pem"), **pair.as_client())
    assert one == other
    assert hash(one) == hash(other)
    assert one != TlsConfig(root_certificates=tmp_path / "root.pem")
    assert one != "one"
    assert pickle.loads(pickle.dumps(one)) == one
    assert pickle.loads(pickle.dumps(FlightConnector(tls=one))) == FlightConnector(tls=other)


def test_beside_pem_in_the_connector_it_is_refused(signer) -> None:
    with pytest.raises(ValueError, match="not both"):
        FlightConnector(tls=TlsConfig(), tls_root_certificates=signer.root)
    with pytest.raises(TypeError, match="TlsConfig"):
        FlightConnector(tls={"root_certificates": signer.root})


def test_a_file_written_twice_within_a_tick_is_read_again(tmp_path, signer) -> None:
    """Its second content may have the size, inode and even the time of its first."""
    other = Signer()
    path = tmp_path / "root.pem"
    size = max(len(signer.root), len(other.root))
    path.write_bytes(signer.root.ljust(size, b"\n"))
    stamp = path.stat().st_mtime_ns
    config = TlsConfig(root_certificates=path)
    assert config.credentials().root_certificates.strip() == signer.root.strip()
    path.write_bytes(other.root.ljust(size, b"\n"))
    os.utime(path, ns=(stamp, stamp))
    assert config.credentials().root_certificates.strip() == other.root.strip()


def test_a_file_that_settled_is_not_read_again(tmp_path, signer, monkeypatch) -> None:
    path = tmp_path / "root.pem"
    path.write_bytes(signer.root)
    long_ago = time.time() - 60
    os.utime(path, (long_ago, long_ago))
    config = TlsConfig(root_certificates=path)
    config.credentials()
    monkeypatch.setattr(type(path), "read_bytes", lambda _: pytest.fail("it was read again"))
    assert config.credentials().root_certificates == signer.root
    assert config.generation == 1


def test_subscribers_hear_of_changes_only_and_are_held_weakly(tmp_path, signer) -> None:
    files = PemFiles(tmp_path, signer.issue())
    config = TlsConfig(
        client_certificate=files.certificate, client_key=files.key, check_interval=3_600
    )
    listener, gone = Listener(), Listener()
    config.subscribe(listener)
    config.subscribe(gone)
    del gone
    config.credentials()
    config.credentials()
    assert (listener.calls, config.generation) == (0, 1)
    files.replace(signer.issue())
    wait_until(lambda: config.refresh() == 2)  # the watcher may be looking just now
    wait_until(lambda: listener.calls == 1)
    config.rotate()  # whatever the files say: somebody wants connections made anew
    assert (listener.calls, config.generation) == (2, 3)
    assert len(config._subscribers) == 1


def test_equal_configs_are_watched_each(tmp_path, signer) -> None:
    class Unhashable:
        __hash__ = None

        def __call__(self) -> bytes:
            return signer.root

    assert TlsConfig(root_certificates=Unhashable()).credentials().root_certificates == signer.root
    files = PemFiles(tmp_path, signer.issue())
    listeners = [Listener(), Listener()]
    configs = [
        TlsConfig(client_certificate=files.certificate, client_key=files.key, check_interval=0.05)
        for _ in listeners
    ]
    assert configs[0] == configs[1]
    for config, listener in zip(configs, listeners, strict=True):
        config.credentials()
        config.subscribe(listener)
    files.replace(signer.issue())
    wait_until(lambda: [listener.calls for listener in listeners] == [1, 1])


def test_a_subscriber_that_fails_does_not_stop_the_others(signer, caplog) -> None:
    class Broken:
        def _credentials_changed(self) -> None:
            raise RuntimeError("broken")

    config = TlsConfig(root_certificates=signer.root)
    broken, listener = Broken(), Listener()
    config.subscribe(broken)
    config.subscribe(listener)
    config.rotate()
    assert listener.calls == 1
    assert "subscriber" in caplog.text


def test_a_rotation_that_fails_raises_and_changes_nothing(tmp_path, signer) -> None:
    path = tmp_path / "root.pem"
    path.write_bytes(signer.root)
    config = TlsConfig(root_certificates=path)
    listener = Listener()
    config.subscribe(listener)
    config.credentials()
    path.write_bytes(b"half of it: -----BEGIN CERTIFICATE-----")
    with pytest.raises(ValueError, match="not whole PEM"):
        config.rotate()
    assert config.credentials().root_certificates == signer.root
    assert (listener.calls, config.generation) == (0, 1)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        config.rotate()


def test_a_failure_is_logged_once(tmp_path, signer, caplog) -> None:
    path = tmp_path / "root.pem"
    path.write_bytes(signer.root)
    config = TlsConfig(root_certificates=path)
    config.credentials()
    path.unlink()
    caplog.set_level(logging.WARNING, "resolver")
    for _ in range(5):
        assert config.credentials().root_certificates == signer.root
    told = [each for each in caplog.records if str(path) in each.getMessage()]
    assert len(told) == 1  # others of this process may have failures of their own


def test_a_key_of_another_certificate_and_one_with_a_password(signer) -> None:
    from cryptography.hazmat.primitives import serialization

    pair, other = signer.issue(), signer.issue()
    with pytest.raises(ValueError, match="could not be loaded together"):
        TlsConfig(client_certificate=pair.certificate, client_key=other.key).credentials()
    locked = serialization.load_pem_private_key(pair.key, None).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"s3cret"),
    )
    with pytest.raises(ValueError, match="has no password"):
        TlsConfig(client_certificate=pair.certificate, client_key=locked).credentials()


def test_a_callable_is_asked_at_most_once_per_interval(signer) -> None:
    asked = []

    def root() -> bytes:
        asked.append(1)
        return signer.root

    config = TlsConfig(root_certificates=root, check_interval=3_600)
    for _ in range(10):
        config.credentials()
    assert len(asked) == 1
    config.rotate()
    assert len(asked) == 2


def test_a_callable_is_asked_again_by_the_next_connect_until_it_gave_what_works(signer) -> None:
    answers = [b"", b"no", signer.root]
    config = TlsConfig(root_certificates=lambda: answers.pop(0), check_interval=3_600)
    for _ in range(2):
        with pytest.raises(ValueError, match="could not be loaded"):
            config.credentials()
    assert config.credentials().root_certificates == signer.root
    assert config.credentials().root_certificates == signer.root  # and not asked any more


def test_those_who_wait_for_the_first_reading_wait_no_longer_than_they_may(signer) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def slow() -> bytes:
        begun.set()
        assert go_on.wait(30)
        return signer.root

    config = TlsConfig(root_certificates=slow)
    first = Background(config.credentials)
    assert begun.wait(30)
    with pytest.raises(TimeoutError, match="still reading"):
        config.credentials(0.01)
    go_on.set()
    assert first.result().root_certificates == signer.root


def test_nobody_waits_for_what_is_only_newer(signer) -> None:
    begun, go_on = threading.Event(), threading.Event()
    calls = []

    def slow_later() -> bytes:
        calls.append(1)
        if len(calls) > 1:
            begun.set()
            assert go_on.wait(30)
        return signer.root

    config = TlsConfig(root_certificates=slow_later, check_interval=0.05)
    config.credentials()
    config.subscribe(Listener())
    wait_until(begun.is_set)  # the watcher asks, and waits
    assert config.credentials().root_certificates == signer.root
    go_on.set()


def test_a_rotation_waits_for_no_callable_that_hangs(signer) -> None:
    """And what that one gives in the end is older than what was rotated to."""
    begun, go_on = threading.Event(), threading.Event()
    renewed = Signer().root
    calls = itertools.count()

    def root() -> bytes:
        call = next(calls)
        if call == 1:
            begun.set()
            assert go_on.wait(30)
        return renewed if call == 2 else signer.root

    config = TlsConfig(root_certificates=root)
    config.credentials()
    config.check_interval = 0  # it is time to ask again
    look = Background(config.refresh)
    assert begun.wait(30)
    config.check_interval = 3_600
    Background(config.rotate).result()
    assert config.credentials().root_certificates == renewed
    go_on.set()
    assert look.result() == 2
    assert config.credentials().root_certificates == renewed
    assert config.generation == 2


def test_many_threads_read_once(signer) -> None:
    asked = []

    def root() -> bytes:
        asked.append(1)
        return signer.root

    config = TlsConfig(root_certificates=root, check_interval=3_600)
    read = run_concurrently([config.credentials] * 16)
    assert {each.root_certificates for each in read} == {signer.root}
    assert len(asked) == 1
