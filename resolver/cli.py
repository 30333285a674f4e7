"""The command line: ``python -m resolver sql``, ``demo`` and ``worker``.

Reads arguments and hands over; what a command does is in ``resolver.distributed``, which
is imported only once a command needs it, so that ``--help`` works without its extra.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._cli_files import folder_for, in_options, text_of, tls_of, token_of
from ._cli_signals import ending_by_signals

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ._flight import FlightConnector
    from ._tls import TlsConfig

__all__ = ["main"]

_LARGEST_SCALE_FACTOR = 100_000

_IN_OPTIONS = {
    "tls_certificate": "--tls-certificate",
    "tls_key": "--tls-key",
    "client_ca": "--client-ca",
    "a TLS certificate": "--tls-certificate with --tls-key",
    "a token": "--token-file",
    "insecure=True": "--insecure",
    "advertise='grpc://HOST:PORT'": "--advertise grpc://HOST:PORT",
}
"""What the Python API says in the errors of a worker's address, as options."""

_OF_CALLS = {
    "root_certificates (tls_root_certificates)": "--tls-root-certs",
    "client_certificate": "--tls-certificate",
    "client_key": "--tls-key",
    "the token or the client certificate of the connector": "--token-file and --tls-certificate",
}
"""The same for the errors of calls to workers."""

_DESCRIPTION = """\
Distributed DataFusion over Arrow Flight workers.

  see it work        python -m resolver demo
  query your files   python -m resolver sql --table t=FILE_OR_DIRECTORY "SELECT * FROM t"
  run one worker     python -m resolver worker --listen grpc://127.0.0.1:50051
  use that worker    python -m resolver sql --workers http://127.0.0.1:50051 ...
                     or, from Python, docs/distributed.md: SessionStateBuilder with a
                     StaticWorkerResolver(["http://127.0.0.1:50051"])
"""

_DEMO = """\
Makes TPC-H data with tpchgen-cli (once, then it is taken from a cache folder), starts
worker processes, runs seven TPC-H queries on them, joins included, and compares every
row with single-node DataFusion. Prints how two of them were staged, all results and
times, and what the channel resolvers of the coordinator and of the workers did.

Exit code 0: all rows equal. 1: some differ.

  python -m resolver demo                       scale factor 0.1, three workers
  SF=1 python -m resolver demo --workers 2      6 million rows of lineitem
"""

_SQL = """\
Runs SQL over files, spread over workers: by default one worker process per core, started
for these statements and stopped after them.

  python -m resolver sql --table lineitem=data/lineitem \\
      "SELECT l_shipmode, count(*) FROM lineitem GROUP BY l_shipmode"
  python -m resolver sql --table o=orders.csv --table c=customers.parquet \\
      "SELECT name, sum(price) FROM o JOIN c ON o.customer = c.id GROUP BY name"
  python -m resolver sql --table o=orders.csv --explain "SELECT ..."   how it would run
  python -m resolver sql --table o=orders.csv --analyze "SELECT ..."   run it, and say how
  python -m resolver sql --table o=orders.csv --output-file result.parquet --file query.sql
  echo "SELECT 1 AS one" | python -m resolver sql --output json -

A table is a .parquet, .csv (with a heading), .json or .ndjson (one object per line) or
.arrow file, or a directory of such; a directory called year=2026 in it makes a column
year. Several statements are separated by semicolons and run in order.

Workers that run already are named by URL. They read the same paths as this process:

  python -m resolver sql --workers https://10.0.0.7:50051,https://10.0.0.8:50051 \\
      --token-file token.txt --tls-root-certs ca.pem --table t=/data/t "SELECT ..."

Exit code 0: done. 1: a statement failed. 2: the command line makes no sense.
"""

_WORKER = """\
Serves tasks of distributed queries until SIGTERM or Ctrl-C. When ready, prints one line
of JSON with its URL, which is what a session's WorkerResolver must name.

Whoever can reach a worker can make it read any file that it can read. So it listens on
this machine only, unless it has a TLS certificate and a token (or a client CA):

  python -m resolver worker --listen grpc://127.0.0.1:50051
  python -m resolver worker --listen grpc+tls://0.0.0.0:50051 \\
      --advertise grpc+tls://worker7.example:50051 \\
      --tls-certificate server.pem --tls-key server.key --token-file token.txt

A custom ChannelResolver is registered here as in the session, by a session builder:

  # mycluster.py
  def build(query):
      return query.builder.with_distributed_channel_resolver(my_resolver).build()

  python -m resolver worker --session-builder mycluster:build
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code. ``argv`` excludes the program name."""
    parser = _parser()
    if not (sys.argv[1:] if argv is None else argv):
        parser.print_help(sys.stderr)
        return 2
    arguments = parser.parse_args(argv)
    if sys.stdout is None:  # Python was started with it closed
        print("resolver: stdout is closed, and there is nowhere to write", file=sys.stderr)
        return 2
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # plans are drawn with more than ASCII
    with contextlib.nullcontext() if arguments.serves else ending_by_signals() as ending:
        try:
            code = _run(arguments)
        except KeyboardInterrupt:
            code = 128 + signal.SIGINT
    return code if ending is None or not ending.signal else 128 + ending.signal


def _run(arguments: argparse.Namespace) -> int:
    command: Callable[[argparse.Namespace], int] = arguments.command
    try:
        code = command(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes once more on its way out; there is nobody to read that either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        if arguments.traceback:
            raise
        print(f"resolver: {error}", file=sys.stderr)
        return 2
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m resolver",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    commands = parser.add_subparsers(required=True, metavar="command")
    _add_sql(_command(commands, "sql", "run SQL over files on workers", _SQL))
    _add_demo(_command(commands, "demo", "run TPC-H queries on local workers", _DEMO))
    _add_worker(_command(commands, "worker", "serve tasks of distributed queries", _WORKER))
    return parser


def _command(commands: Any, name: str, summary: str, description: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return parser


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--scale-factor",
        type=_scale_factor,
        default=os.environ.get("SF", "0.1"),
        help="how much data: 1 is about 1 GB as text (default: $SF, or 0.1)",
    )
    parser.add_argument(
        "--workers", type=_count, default=3, help="worker processes (default: %(default)s)"
    )
    parser.add_argument(
        "--data-dir",
        type=Path,
        help="where the data is kept; made if missing, but not the directory that it is in "
        "(default: resolver/ in $XDG_CACHE_HOME, or ~/.cache)",
    )
    parser.set_defaults(command=_demo, serves=False)


def _add_sql(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("query", nargs="?", help="the SQL; - reads it from stdin")
    add("--file", type=Path, help="read the SQL from this file")
    add(
        "--table",
        metavar="NAME=PATH",
        action="append",
        default=[],
        help="a file or directory, and its name in the SQL; may be repeated",
    )
    add(
        "--workers",
        metavar="N|URL,URL",
        type=_workers,
        help="how many to start (default: one per core), or which running ones to use",
    )
    mode = parser.add_mutually_exclusive_group()
    for name, what in (("explain", "print the staged plan"), ("analyze", "run, print figures")):
        mode.add_argument(
            f"--{name}", dest="mode", action="store_const", const=name, default="run", help=what
        )
    mode.add_argument(
        "--output",
        choices=("csv", "json", "parquet", "arrow"),
        help="instead of a printed table (default: what the output file's name says)",
    )
    add("--output-file", metavar="FILE", type=Path, help="where the result goes (default: stdout)")
    add(
        "--max-rows",
        metavar="N",
        type=_count,
        default=100,
        help="rows of a printed table; all are counted (default: %(default)s)",
    )
    add(
        "--progress",
        action=argparse.BooleanOptionalAction,
        default=sys.stderr.isatty(),
        help="tell on stderr which stages and tasks have finished (default: on a terminal)",
    )
    add("--token-file", metavar="FILE", type=Path, help="bearer token that the workers demand")
    add("--tls-root-certs", metavar="PEM", type=Path, help="who is trusted to be a worker")
    add("--tls-certificate", metavar="PEM", type=Path, help="certificate that workers demand")
    add("--tls-key", metavar="PEM", type=Path, help="private key of the certificate")
    parser.set_defaults(command=_sql, serves=False)


def _add_worker(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--listen",
        metavar="URL",
        default="grpc://127.0.0.1:0",
        help="address to listen on; port 0 takes a free one (default: %(default)s)",
    )
    add("--advertise", metavar="URL", help="URL by which others reach it, if not the one above")
    add("--slots", metavar="N", type=_count, help="tasks to run at once (default: usable CPUs)")
    add("--worker-version", metavar="TEXT", default="", help="what it says its version is")
    add(
        "--exchange-dir",
        metavar="DIR",
        type=Path,
        help="where stage output goes while a query runs; made if missing, but not the "
        "directory that it is in (default: the system's temporary directory)",
    )
    add("--exchange-quota", metavar="BYTES", type=_count, help="most bytes to keep there")
    add(
        "--session-builder",
        metavar="MODULE:FUNCTION",
        help="function for Worker.from_session_builder",
    )
    add(
        "--allow-python-udfs",
        action="store_true",
        help="run pickled Python functions of queries, that is, any code of any caller",
    )
    add("--tls-certificate", metavar="PEM", type=Path, help="certificate chain; turns TLS on")
    add("--tls-key", metavar="PEM", type=Path, help="private key of the certificate")
    add("--client-ca", metavar="PEM", type=Path, help="demand client certificates signed by this")
    add("--token-file", metavar="FILE", type=Path, help="demand this bearer token")
    add("--tls-root-certs", metavar="PEM", type=Path, help="whom it trusts when it calls workers")
    add("--client-certificate", metavar="PEM", type=Path, help="what it shows to workers it calls")
    add("--client-key", metavar="PEM", type=Path, help="private key of that certificate")
    add("--insecure", action="store_true", help="serve other machines with none of the above")
    add("--owner", type=int, help=argparse.SUPPRESS)
    add("--owner-dir", type=Path, help=argparse.SUPPRESS)
    parser.set_defaults(command=_worker, serves=True)  # it has signals of its own


def _scale_factor(text: str) -> str:
    try:
        positive = 0 < float(text) <= _LARGEST_SCALE_FACTOR
    except ValueError:
        positive = False
    if not positive:
        raise argparse.ArgumentTypeError(f"a scale factor is a number above 0, not {text!r}")
    return f"{float(text):g}"


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, not {text!r}")
    return int(text)


def _workers(text: str) -> int | list[str]:
    if "/" in text:
        return [url.strip() for url in text.split(",")]
    try:
        return _count(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"expected a whole number from 1, or URLs such as http://10.0.0.7:50051, not {text!r}"
        ) from None


def _sql(arguments: argparse.Namespace) -> int:
    # Before gRPC starts: of a handshake that failed it would tell in lines of its own.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    from .distributed import _sql as sql

    query = _query(arguments)
    if isinstance(arguments.workers, list):
        connector = _connector(arguments)
    elif any(
        (
            arguments.token_file,
            arguments.tls_root_certs,
            arguments.tls_certificate,
            arguments.tls_key,
        )
    ):
        raise ValueError("a token or certificate is for running workers; name them with --workers")
    else:
        connector = None
    if arguments.mode != "run" and arguments.output_file is not None:
        raise ValueError(f"--{arguments.mode} prints; it writes no --output-file")
    request = sql.Request(
        query=query,
        tables=arguments.table,
        workers=arguments.workers,
        connector=connector,
        mode=arguments.mode,
        output=arguments.output,
        output_file=arguments.output_file,
        max_rows=arguments.max_rows,
        progress=arguments.progress,
    )
    try:
        sql.run(request)
    except sql.QueryError as error:
        if arguments.traceback:
            raise
        print(f"resolver: {in_options(str(error), _OF_CALLS)}", file=sys.stderr)
        return 1
    return 0


def _query(arguments: argparse.Namespace) -> str:
    if (arguments.query is None) == (arguments.file is None):
        raise ValueError('give the SQL either in quotes, such as "SELECT 1", or with --file')
    if arguments.file is not None:
        return text_of("--file", arguments.file, "SQL")
    query = sys.stdin.read() if arguments.query == "-" else str(arguments.query)
    if not query.isascii() and query != query.encode(errors="replace").decode():
        raise ValueError("the SQL is no text in UTF-8")
    return query


def _connector(arguments: argparse.Namespace) -> FlightConnector:
    from ._flight import FlightConnector

    token = token_of(arguments.token_file)
    return FlightConnector(
        headers=None if token is None else {"authorization": f"Bearer {token}"},
        tls=tls_of(
            {
                "root_certificates": ("--tls-root-certs", arguments.tls_root_certs),
                "client_certificate": ("--tls-certificate", arguments.tls_certificate),
                "client_key": ("--tls-key", arguments.tls_key),
            }
        ),
    )


def _demo(arguments: argparse.Namespace) -> int:
    from .distributed import _demo as demo

    return demo.run(
        scale_factor=arguments.scale_factor,
        workers=arguments.workers,
        data_dir=folder_for("--data-dir", arguments.data_dir),
    )


def _worker(arguments: argparse.Namespace) -> int:
    # Before DataFusion is loaded: by default its allocator gives memory back after 10 ms,
    # which is between two tasks of one query, and the next task has every page to fault in.
    os.environ.setdefault("MIMALLOC_PURGE_DELAY", "1000")
    from .distributed import Worker
    from .distributed._serve import Owner, inherited_token, serve

    builder = None if arguments.session_builder is None else _function(arguments.session_builder)
    worker = Worker(
        builder,
        allow_python_udfs=arguments.allow_python_udfs,
        exchange_quota=arguments.exchange_quota,
    ).with_version(arguments.worker_version)
    if arguments.slots is not None:
        worker.with_slots(arguments.slots)
    inherited = inherited_token()
    token = token_of(arguments.token_file)
    options: dict[str, Any] = {
        "exchange_dir": folder_for("--exchange-dir", arguments.exchange_dir, writable=True),
        "advertise": arguments.advertise,
        "tls": _tls_of_worker(arguments),
        "token": inherited if token is None else token,
        "insecure": arguments.insecure,
    }
    try:
        server = worker.into_flight_server(arguments.listen, **options)
    except ValueError as error:
        raise ValueError(in_options(str(error), _IN_OPTIONS)) from error
    owner = None if arguments.owner is None else Owner(arguments.owner, arguments.owner_dir)
    serve(server, owner)
    return 0


def _tls_of_worker(arguments: argparse.Namespace) -> TlsConfig | None:
    return tls_of(
        {
            "server_certificate": ("--tls-certificate", arguments.tls_certificate),
            "server_key": ("--tls-key", arguments.tls_key),
            "client_authorities": ("--client-ca", arguments.client_ca),
            "root_certificates": ("--tls-root-certs", arguments.tls_root_certs),
            "client_certificate": ("--client-certificate", arguments.client_certificate),
            "client_key": ("--client-key", arguments.client_key),
        }
    )


def _function(name: str) -> Any:
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise ValueError(f"--session-builder takes MODULE:FUNCTION, not {name!r}")
    try:
        function = getattr(importlib.import_module(module), attribute, None)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"--session-builder {name}: {error}; a module is looked for in the current directory "
            "and on PYTHONPATH"
        ) from error
    if not callable(function):
        raise ValueError(f"{module} has no function {attribute}")  # noqa: TRY004  # of a name
    return function
