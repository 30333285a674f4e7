"""Files and folders named on the command line, and errors in its own words.

Reads what an option names and refuses what cannot be used, with the option, the path and
the remedy. Which options there are is ``cli``'s business.
"""

from __future__ import annotations

import re
import tempfile
from typing import TYPE_CHECKING, Any

from ._pem import PAIRS
from ._tls import TlsConfig

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__all__ = ["folder_for", "in_options", "text_of", "tls_of", "token_of"]


def text_of(option: str, path: Path, what: str) -> str:
    """The text of the file that ``option`` names and that holds ``what``."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise _unreadable(option, path, error, what) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{option} {path} is no text; give a file that holds {what}") from error


def token_of(path: Path | None) -> str | None:
    """The token in the file of ``--token-file``, if there is such; never shown in an error."""
    if path is None:
        return None
    token = text_of("--token-file", path, "a token").strip()
    if not token:
        raise ValueError(f"--token-file {path} is empty; write the token into it, on one line")
    if not (token.isascii() and token.isprintable()):
        raise ValueError(f"--token-file {path} holds no token; that is one line of plain ASCII")
    return token


def folder_for(option: str, path: Path | None, *, writable: bool = False) -> Path | None:
    """The folder that ``option`` names, made if it is missing, but not the one it is in."""
    if path is None:
        return None
    try:
        path.mkdir(exist_ok=True)
        if writable:
            with tempfile.TemporaryFile(dir=path):
                pass
    except OSError as error:
        remedy = "give a folder that can be written to"
        if not path.absolute().parent.is_dir():
            remedy = f"make {path.absolute().parent} first, or give another folder"
        raise OSError(f"{option} {path} cannot be used ({error.strerror}); {remedy}") from error
    return path


def tls_of(options: Mapping[str, tuple[str, Path | None]]) -> TlsConfig | None:
    """Certificates and keys, read once so that nobody has to connect to learn of an error.

    ``options`` are, by field of `TlsConfig`, the option and what it was given. ``None`` when
    none was given.
    """
    given: dict[str, Any] = {
        field: path for field, (_, path) in options.items() if path is not None
    }
    words = {field: option for field, (option, _) in options.items()}
    for pair in PAIRS:
        for present, absent in (pair, pair[::-1]):
            if present in given and absent not in given:
                raise ValueError(f"{words[present]} goes with {words[absent]}; give both")
    if "client_authorities" in given and "server_certificate" not in given:
        raise ValueError(
            f"{words['client_authorities']} is for TLS; give {words['server_certificate']} and "
            f"{words['server_key']} too"
        )
    if not given:
        return None
    config = TlsConfig(**given)
    try:
        config.credentials()
    except OSError as error:
        for field, path in given.items():
            if str(path.absolute()) == str(error.filename):
                raise _unreadable(words[field], path, error, "PEM") from error
        raise
    except ValueError as error:
        raise ValueError(in_options(str(error), words)) from error
    return config


def in_options(message: str, words: Mapping[str, str]) -> str:
    """``message`` of the Python API with its parameters named as on the command line."""
    longest_first = sorted(words, key=len, reverse=True)
    pattern = "|".join(rf"(?<![\w-]){re.escape(word)}(?!\w)" for word in longest_first)
    return re.sub(pattern, lambda found: words[found[0]], message)


def _unreadable(option: str, path: Path, error: OSError, what: str) -> OSError:
    return OSError(
        f"{option} {path} cannot be read ({error.strerror}); "
        f"give the path of a file that holds {what}"
    )
