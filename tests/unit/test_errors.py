"""The exception tree: its shape, what it inherits, what survives a process boundary."""

from __future__ import annotations

import copy
import pickle
import re

import pytest

import resolver
from resolver import _errors

ERRORS = sorted(
    (error for error in vars(_errors).values() if isinstance(error, type)),
    key=lambda error: error.__name__,
)
BUILT_IN = {
    "ResolverError": Exception,
    "InvalidWorkerUrlError": ValueError,
    "WorkerConnectError": ConnectionError,
    "WorkerConnectTimeoutError": TimeoutError,
    "ResolverClosedError": RuntimeError,
    "ForkedProcessError": RuntimeError,
}


def drawn_tree() -> dict[str, str]:
    """Child to parent, as the module's docstring draws them."""
    assert _errors.__doc__ is not None
    parents: dict[str, str] = {}
    path: list[tuple[int, str]] = []
    for line in _errors.__doc__.splitlines():
        node = re.match(r"(?P<indent>[ │├└─]*)(?P<name>\w*(?:Error|Exception))\b", line)
        if node is None or not node["indent"]:
            continue
        depth = len(node["indent"])
        while path and path[-1][0] >= depth:
            path.pop()
        if path:
            parents[node["name"]] = path[-1][1]
        path.append((depth, node["name"]))
    return parents


def test_the_docstring_draws_the_tree_as_it_is() -> None:
    drawn = drawn_tree()
    assert set(drawn) == {error.__name__ for error in ERRORS}
    for error in ERRORS:
        assert error.__bases__[0].__name__ == drawn[error.__name__]


@pytest.mark.parametrize("error", ERRORS)
def test_each_error_is_public_and_rooted(error: type[resolver.ResolverError]) -> None:
    assert getattr(resolver, error.__name__) is error
    assert error.__name__ in resolver.__all__
    assert issubclass(error, resolver.ResolverError)
    assert error.__doc__


@pytest.mark.parametrize("error", ERRORS)
def test_each_error_is_the_built_in_a_caller_would_catch(
    error: type[resolver.ResolverError],
) -> None:
    with pytest.raises(BUILT_IN[error.__name__]):
        raise error("it failed", url="http://w1:5")


@pytest.mark.parametrize("duplicate", [lambda e: pickle.loads(pickle.dumps(e)), copy.copy])
@pytest.mark.parametrize("url", ["http://w1:5", None])
@pytest.mark.parametrize("error", ERRORS)
def test_errors_survive_pickling_and_copying(
    error: type[resolver.ResolverError], url: str | None, duplicate: object
) -> None:
    original = error("it failed", url=url)
    again = duplicate(original)  # type: ignore[operator]
    assert type(again) is error
    assert str(again) == "it failed"
    assert again.url == url
    assert again.args == original.args


def test_a_timeout_is_not_printed_as_an_errno() -> None:
    # TimeoutError and ConnectionError are OSErrors, whose str() rewrites two arguments.
    error = resolver.WorkerConnectTimeoutError("worker http://w1:5 did not answer")
    assert str(error) == "worker http://w1:5 did not answer"
    assert error.url is None
    assert error.errno is None


def test_an_error_without_message_prints() -> None:
    error = resolver.ResolverError("x")
    error.args = ()
    assert str(error) == ""
