"""The unit and the container file: their commands are accepted, and really start a worker.

No image is built and no unit is installed. What can be wrong without either is checked: the
command line, the time to stop, the port, the files that are copied, and the guard.
"""

from __future__ import annotations

import configparser
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import trustme

from resolver import DefaultChannelResolver, FlightConnector
from resolver.cli import _parser
from resolver.distributed import _serve
from resolver.distributed._listen import Guard, ListenAddress

TOP = Path(__file__).parents[2]
DEPLOY = TOP / "docs" / "deploy"
TOKEN = "correct horse battery staple"
URL = "https://worker-1.example:50051"


def joined(text: str) -> str:
    """Without comments, every instruction on a line of its own."""
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return "\n".join(lines).replace("\\\n", " ")


@pytest.fixture(scope="module")
def unit() -> configparser.RawConfigParser:
    # As systemd reads it: names are case-sensitive and may be repeated.
    parser = configparser.RawConfigParser(strict=False, delimiters="=", interpolation=None)
    parser.optionxform = str
    parser.read_string(joined((DEPLOY / "resolver-worker.service").read_text()))
    return parser


@pytest.fixture(scope="module")
def instructions() -> list[tuple[str, str]]:
    text = joined((DEPLOY / "Containerfile").read_text())
    pairs = (line.split(maxsplit=1) for line in text.splitlines() if line.strip())
    return [(name, rest) for name, rest in pairs]


def of_unit(unit):
    return shlex.split(unit["Service"]["ExecStart"])


def of_container(instructions):
    (entry,) = [json.loads(rest) for name, rest in instructions if name == "ENTRYPOINT"]
    return [*entry, "--advertise", URL]


@pytest.fixture(params=["unit", "container"])
def command(request, unit, instructions) -> list[str]:
    return of_unit(unit) if request.param == "unit" else of_container(instructions)


def test_the_command_is_accepted(command):
    assert command[1:4] == ["-m", "resolver", "worker"]
    arguments = _parser().parse_args(command[3:])
    assert not arguments.insecure
    assert not arguments.allow_python_udfs
    assert arguments.exchange_quota >= 1 << 30
    guard = Guard(tls_certificate=b"c", tls_key=b"k", token=TOKEN)
    address = ListenAddress.parse(arguments.listen, guard, advertise=arguments.advertise)
    assert address.worker_url(50051, guard) == URL


def test_the_command_starts_a_worker_and_sigterm_ends_it(command, tmp_path):
    """The same command, but for the place of its files and the port."""
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    certificate.cert_chain_pems[0].write_to_path(tmp_path / "server.pem")
    certificate.private_key_pem.write_to_path(tmp_path / "server.key")
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    here = [
        re.sub(r"^(\$\{CREDENTIALS_DIRECTORY\}|/run/secrets)", str(tmp_path), a) for a in command
    ]
    changed = {
        "--listen": "grpc+tls://127.0.0.1:0",
        "--advertise": "https://127.0.0.1:0",
        "--exchange-dir": str(tmp_path / "exchange"),
    }
    for option, value in changed.items():
        here[here.index(option) + 1] = value
    process = subprocess.Popen(
        [sys.executable, *here[1:]], cwd=TOP, stdout=subprocess.PIPE, text=True
    )
    try:
        url = json.loads(process.stdout.readline())["url"]
        connector = FlightConnector(
            tls_root_certificates=authority.cert_pem.bytes(),
            headers={"authorization": f"Bearer {TOKEN}"},
        )
        with DefaultChannelResolver(connector) as resolver:
            client = resolver.get_flight_client_for_url(url)
            (health,) = client.do_action("resolver.health")
            assert json.loads(health.body.to_pybytes()) == {"status": "serving"}
        assert [path.stat().st_mode & 0o777 for path in (tmp_path / "exchange").iterdir()] == [
            0o700
        ]
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert list((tmp_path / "exchange").iterdir()) == []
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_both_give_a_worker_time_to_stop(unit, instructions):
    needed = _serve._DRAIN_TIMEOUT + _serve._STOP_TIMEOUT
    assert float(unit["Service"]["TimeoutStopSec"]) > needed
    assert unit["Service"]["KillSignal"] == "SIGTERM"
    assert ("STOPSIGNAL", "SIGTERM") in instructions
    comment = (DEPLOY / "Containerfile").read_text()
    page = (TOP / "docs" / "workers.md").read_text()
    for said in (
        re.findall(r"--stop-timeout=(\d+)", comment),
        re.findall(r"--stop-timeout=(\d+)", page),
        re.findall(r"stop_grace_period: (\d+)s", page),
        re.findall(r"terminationGracePeriodSeconds: (\d+)", page),
        re.findall(r"more than (\d+) seconds\*\*", page),
    ):
        assert said
        assert all(float(seconds) >= needed for seconds in said)


def test_the_unit_hands_over_what_the_command_reads(unit):
    service = unit["Service"]
    # configparser keeps the last one of a repeated name.
    text = joined((DEPLOY / "resolver-worker.service").read_text())
    handed = set(re.findall(r"^LoadCredential=([\w.]+):/", text, re.MULTILINE))
    read = set(re.findall(r"\$\{CREDENTIALS_DIRECTORY\}/([\w.]+)", service["ExecStart"]))
    assert handed == read == {"server.pem", "server.key", "token"}
    arguments = _parser().parse_args(of_unit(unit)[3:])
    assert str(arguments.exchange_dir) == f"/var/cache/{service['CacheDirectory']}"
    assert service["User"] not in ("", "root")


def test_systemd_understands_the_unit(unit, tmp_path):
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("no systemd-analyze")
    # The interpreter of the unit is not on this machine; systemd looks for it.
    text = (DEPLOY / "resolver-worker.service").read_text()
    copy = tmp_path / "resolver-worker.service"
    copy.write_text(text.replace(of_unit(unit)[0], sys.executable))
    verified = subprocess.run(
        [analyze, "verify", "--man=no", str(copy)], capture_output=True, text=True, timeout=60
    )
    assert [line for line in verified.stderr.splitlines() if copy.name in line] == []


def test_the_container_is_made_of_what_there_is(instructions):
    copied = [
        source
        for name, rest in instructions
        if name == "COPY" and not rest.startswith("--from=")
        for source in rest.split()[:-1]
    ]
    assert [source for source in copied if not (TOP / source).exists()] == []
    project = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]
    needed = {
        "pyproject.toml",
        "setup.py",
        "resolver",
        project["readme"],
        *project["license-files"],
    }
    assert needed <= set(copied)
    (install,) = [rest for name, rest in instructions if name == "RUN" and "pip install" in rest]
    (extra,) = re.findall(r"\.\[(\w+)\]", install)
    assert extra in project["optional-dependencies"]


def test_the_container_serves_where_its_command_listens(instructions):
    given = dict(instructions)
    arguments = _parser().parse_args(of_container(instructions)[3:])
    assert arguments.listen.endswith(f":{given['EXPOSE']}")
    assert str(arguments.exchange_dir) == given["VOLUME"]
    assert given["USER"].isdecimal(), "Kubernetes proves only a number to be no root"
    assert given["USER"] != "0"
