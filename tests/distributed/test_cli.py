"""The command line, and what it says when something is missing."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import pyarrow.flight as flight
import pytest
import trustme

import resolver
from resolver.cli import main
from resolver.distributed import _demo, _requirements, _serve, _tpch
from tests.support.distributed import names

REPOSITORY = Path(resolver.__file__).parents[1]


@pytest.fixture
def data(tmp_path, tpch):
    """A cache folder in which the demo's data already is."""
    folder = _tpch.data_folder("0.01", tmp_path / "cache")
    folder.parent.mkdir()
    folder.symlink_to(tpch)
    return folder.parent


def test_the_demo_shows_everything_and_succeeds(data, capfd):
    assert main(["demo", "--scale-factor", "0.01", "--workers", "2", "--data-dir", str(data)]) == 0
    out = capfd.readouterr().out
    for part in (
        "Starting 2 workers … ",
        "NetworkShuffle: 2 partitions",
        "NetworkCoalesce: 2 partitions",
        "1193053.2253",
        "distributed  single node   rows",
        "Resolver statistics",
        "coordinator",
        "worker http://127.0.0.1:",
        "All rows equal",
    ):
        assert part in out, part


def test_the_demo_fails_when_rows_differ(data, capfd, monkeypatch):
    monkeypatch.setattr(_demo, "_rows", lambda table: [str(id(table))])
    assert main(["demo", "--scale-factor", "0.01", "--workers", "1", "--data-dir", str(data)]) == 1
    captured = capfd.readouterr()
    assert "DIFFERENT" in captured.out
    assert "7 of 7 queries gave wrong rows" in captured.err


def test_the_demos_data_is_made_once_and_whole(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("SF", "0.001")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert main(["demo", "--workers", "1"]) == 0
    assert "Making TPC-H scale factor 0.001" in capfd.readouterr().out
    folder = _tpch.data_folder("0.001")
    assert folder.is_relative_to(tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == sorted(_tpch.TABLES)
    assert len(list((folder / "lineitem").iterdir())) == _tpch.PARTS
    assert main(["demo", "--workers", "1"]) == 0
    assert "is in" in capfd.readouterr().out
    assert names(folder.parent) == [folder.name], "something half-made was left behind"


def test_data_that_somebody_else_made_meanwhile_is_taken(tmp_path):
    folder = tmp_path / "data"
    (folder / "lineitem").mkdir(parents=True)
    _tpch.generate("0.001", folder)
    assert names(folder) == ["lineitem"]


def test_data_that_has_no_place_is_an_error(tmp_path):
    (tmp_path / "data").write_text("in the way")
    with pytest.raises(OSError, match="data"):
        _tpch.generate("0.001", tmp_path / "data")


def test_a_generator_that_fails_leaves_no_data(tmp_path, monkeypatch, capsys):
    tool = tmp_path / "tpchgen-cli"
    tool.write_text("#!/bin/sh\necho 'no space left' >&2\nexit 3\n")
    tool.chmod(0o755)
    monkeypatch.setattr(_tpch, "_tool", lambda: str(tool))
    assert main(["demo", "--data-dir", str(tmp_path / "cache")]) == 2
    captured = capsys.readouterr()
    assert "failed\n" in captured.out
    assert "code 3: no space left" in captured.err
    assert names(tmp_path / "cache") == []


def test_a_missing_generator_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install tpchgen-cli"):
        _tpch._tool()
    monkeypatch.setattr(shutil, "which", lambda name: "/somewhere/else")
    assert _tpch._tool() == "/somewhere/else"


def test_the_cache_is_in_the_home_directory_by_default(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert _tpch.data_folder("1").parent == tmp_path / ".cache" / "resolver"


@pytest.mark.parametrize("arguments", [["--help"], ["demo", "--help"], ["worker", "--help"]])
def test_help_teaches(arguments, capsys):
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 0
    assert "python -m resolver worker --listen" in capsys.readouterr().out or arguments[0] == "demo"


@pytest.mark.parametrize(
    "arguments",
    [
        ["no-such-command"],
        ["demo", "--scale-factor", "big"],
        ["demo", "--scale-factor", "0"],
        ["demo", "--scale-factor", "nan"],
        ["demo", "--workers", "0"],
        ["demo", "--workers", "-1"],
    ],
)
def test_bad_arguments_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_no_command_shows_what_there_is(capsys):
    assert main([]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "python -m resolver worker --listen" in printed.err


def test_workers_without_a_scheme_are_told_how_to_be_named(capsys):
    with pytest.raises(SystemExit):
        main(["sql", "--workers", "127.0.0.1:50051", "SELECT 1"])
    assert "URLs such as http://" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--listen", "grpc://0.0.0.0:0"], "or say --insecure on a network"),
        (["--listen", "grpc://0.0.0.0:0", "--insecure"], "--advertise grpc://HOST:PORT"),
        (["--listen", "grpc+tls://127.0.0.1:0"], "give --tls-certificate and --tls-key"),
        (["--listen", "grpc://192.0.2.1:0", "--insecure"], "give an address of this machine"),
        (["--listen", "grpc://nobody.invalid:0", "--insecure"], "give an address of this machine"),
        (["--listen", "nonsense"], "scheme"),
        (["--session-builder", "os"], "MODULE:FUNCTION"),
        (["--session-builder", "os:no_such_function"], "os has no function"),
        (
            ["--session-builder", "no_such_module:f"],
            "--session-builder no_such_module:f: No module",
        ),
        (["--token-file", "/no/such/file"], "--token-file /no/such/file cannot be read (No such"),
        (["--token-file", os.devnull], f"--token-file {os.devnull} is empty; write the token"),
        (["--token-file", sys.executable], f"--token-file {sys.executable} is no text"),
        (["--token-file", __file__], f"--token-file {__file__} holds no token"),
        (["--tls-certificate", "x"], "--tls-certificate goes with --tls-key; give both"),
        (["--client-key", "x"], "--client-key goes with --client-certificate; give both"),
        (["--client-ca", "x"], "--client-ca is for TLS; give --tls-certificate and --tls-key too"),
        (["--tls-root-certs", "no.pem"], "--tls-root-certs no.pem cannot be read (No such file"),
        (["--tls-root-certs", __file__], f"--tls-root-certs in {__file__} could not be loaded"),
        (["--exchange-dir", "/no/such/x"], "--exchange-dir /no/such/x cannot be used (No such"),
        (["--exchange-dir", "/no/such/x"], "make /no/such first, or give another folder"),
        (["--exchange-dir", __file__], "give a folder that can be written to"),
    ],
)
def test_a_worker_that_cannot_start_says_why(arguments, message, capsys):
    assert main(["worker", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("resolver: ")
    assert message in error
    assert error.count("\n") == 1


def test_a_certificate_and_key_that_do_not_fit_are_named_as_options(tmp_path, capsys):
    authority = trustme.CA()
    for name in "ab":
        certificate = authority.issue_cert("127.0.0.1")
        certificate.private_key_pem.write_to_path(tmp_path / f"{name}.key")
        certificate.cert_chain_pems[0].write_to_path(tmp_path / f"{name}.pem")
    arguments = ["--tls-certificate", str(tmp_path / "a.pem"), "--tls-key", str(tmp_path / "b.key")]
    assert main(["worker", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("resolver: --tls-certificate and --tls-key could not be loaded")


def test_a_worker_whose_port_is_taken_says_so_in_one_line():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = subprocess.run(
            [sys.executable, "-m", "resolver", "worker", "--listen", f"grpc://127.0.0.1:{port}"],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"resolver: cannot listen on http://127.0.0.1:{port}: Address already in use; "
        "give another port, or port 0 for a free one\n"
    )


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("no/cache", "(No such file or directory); make {0}/no first, or give another folder"),
        ("file", "(File exists); give a folder that can be written to"),
    ],
)
def test_a_data_dir_that_cannot_be_used_is_named(tmp_path, capsys, folder, message):
    (tmp_path / "file").touch()
    assert main(["demo", "--data-dir", str(tmp_path / folder)]) == 2
    option = f"--data-dir {tmp_path / folder} cannot be used"
    assert capsys.readouterr().err == f"resolver: {option} {message.format(tmp_path)}\n"
    assert names(tmp_path) == ["file"]


def test_a_cache_that_cannot_be_written_names_the_option(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert main(["demo"]) == 2
    error = capsys.readouterr().err
    assert f"no data can be made in {tmp_path}/file/resolver (Not a directory)" in error
    assert "--data-dir" in error


def test_a_traceback_is_shown_on_demand():
    with pytest.raises(ValueError, match="MODULE:FUNCTION"):
        main(["--traceback", "worker", "--session-builder", "os"])


def test_an_interrupt_is_no_error(monkeypatch):
    def interrupt(**_):
        raise KeyboardInterrupt

    monkeypatch.setattr(_demo, "run", interrupt)
    assert main(["demo"]) == 130


@pytest.mark.parametrize(("given", "used"), [({}, "1000"), ({"MIMALLOC_PURGE_DELAY": "7"}, "7")])
def test_a_worker_keeps_freed_memory_for_its_next_task(given, used):
    code = """
import os, sys
from resolver.cli import main

class Loading:
    def find_spec(self, name, path=None, target=None):
        if name == "datafusion":
            sys.exit(os.environ["MIMALLOC_PURGE_DELAY"])

sys.meta_path.insert(0, Loading())
main(["worker"])
"""
    environment = {name: value for name, value in os.environ.items() if "MIMALLOC" not in name}
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, env=environment | given, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.stderr.strip() == used


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_a_worker_process_serves_until_it_is_told_to_stop(tmp_path, stop):
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    certificate.private_key_pem.write_to_path(tmp_path / "key.pem")
    certificate.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    (tmp_path / "token").write_text("secret\n")
    command = [sys.executable, "-m", "resolver", "worker", "--listen", "https://127.0.0.1:0"]
    command += ["--exchange-dir", str(tmp_path / "exchange")]
    command += ["--tls-certificate", str(tmp_path / "cert.pem")]
    command += ["--tls-key", str(tmp_path / "key.pem"), "--token-file", str(tmp_path / "token")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
    try:
        ready = json.loads(process.stdout.readline())
        assert ready["pid"] == process.pid
        roots = authority.cert_pem.bytes()
        location = ready["url"].replace("https://", "grpc+tls://")
        with flight.connect(location, tls_root_certs=roots) as client:
            options = flight.FlightCallOptions(headers=[(b"authorization", b"Bearer secret")])
            assert client.list_actions(options)
            with pytest.raises(flight.FlightUnauthenticatedError):
                list(client.list_actions())
        process.send_signal(stop)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.communicate()
    assert names(tmp_path / "exchange") == []


def test_a_worker_may_open_as_many_files_as_the_system_lets(tmp_path):
    """Each partition of a shuffle is one while it is written."""
    limited = ["sh", "-c", 'ulimit -Sn 200; exec "$@"', "sh", sys.executable, "-m", "resolver"]
    arguments = ["worker", "--listen", "http://127.0.0.1:0", "--exchange-dir", str(tmp_path)]
    process = subprocess.Popen([*limited, *arguments], stdout=subprocess.PIPE, cwd=REPOSITORY)
    try:
        assert process.stdout.readline()
        soft, hard = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
        assert 200 < soft == min(hard, 1 << 16)
    finally:
        process.kill()
        process.communicate()


def test_a_worker_whose_calls_do_not_end_is_cut_off(tmp_path):
    """Stopping must not wait for ever for a caller that reads nothing."""
    script = (
        "from resolver.distributed import Worker, _serve\n"
        "import os, signal, threading\n"
        "_serve._STOP_TIMEOUT = 0.2\n"
        f"server = Worker().into_flight_server(exchange_dir={str(tmp_path)!r})\n"
        "server._listener._server.shutdown = threading.Event().wait\n"
        "threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()\n"
        "_serve.serve(server)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, timeout=60, check=False
    )
    assert done.returncode == 1, done.stderr
    assert names(tmp_path) == []


def test_importing_resolver_brings_neither_datafusion_nor_protobuf():
    script = (
        "import sys, resolver, resolver.cli\n"
        "loaded = {name.partition('.')[0] for name in sys.modules}\n"
        "assert not loaded & {'datafusion', 'grpc'}, loaded\n"
        "assert 'google.protobuf' not in sys.modules\n"
        "assert 'resolver.distributed' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=REPOSITORY)


def test_what_is_to_be_installed_is_what_the_extra_installs():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    wanted = list(_requirements._WANTED.values())
    assert project["optional-dependencies"]["datafusion"] == wanted
    (line,) = [
        line
        for line in (REPOSITORY / "README.md").read_text().splitlines()
        if line.startswith("$ pip install '.[datafusion]'")
    ]
    assert line.endswith(": " + ", ".join(wanted))


@pytest.mark.parametrize(
    ("versions", "message"),
    [
        (
            {},
            r"needs datafusion, which the extra \[datafusion\] brings: pip install 'datafusion==55\.\*' 'protobuf>=5'",
        ),
        (
            {"datafusion": "55.0.0"},
            r"needs protobuf, which .* brings: pip install 'datafusion==55\.\*' 'protobuf>=5'",
        ),
        (
            {"datafusion": "56.1.0", "protobuf": "6"},
            r"datafusion 55, and datafusion 56\.1\.0 is installed: pip install 'datafusion==55\.\*'",
        ),
        ({"datafusion": "5", "protobuf": "6"}, "datafusion 5 is installed"),
    ],
)
def test_a_missing_or_other_datafusion_says_what_to_install(monkeypatch, versions, message):
    def version(name):
        if name not in versions:
            raise _requirements.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(_requirements.metadata, "version", version)
    with pytest.raises(ImportError, match=message):
        _requirements.check()


def test_a_missing_extra_is_told_on_the_command_line(tmp_path):
    script = (
        "import sys\n"
        "from importlib import metadata\n"
        "def version(name):\n"
        "    raise metadata.PackageNotFoundError(name)\n"
        "metadata.version = version\n"
        "from resolver.cli import main\n"
        "sys.exit(main(['demo']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "pip install 'datafusion==55.*' 'protobuf>=5'" in done.stderr


def test_an_owner_that_is_still_there_cleans_up_itself(tmp_path):
    folder = tmp_path / "cluster"
    folder.mkdir()
    _serve.Owner(os.getppid(), folder).clean_up()
    assert folder.exists()
    _serve.Owner(os.getppid(), None).clean_up()
    _serve.Owner(-1, folder).clean_up()
    assert not folder.exists()
