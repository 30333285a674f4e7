"""The two implementations look the same from outside, and to the type checker."""

from __future__ import annotations

import ast
import copy
import inspect
import pickle
import weakref
from pathlib import Path

import pytest

import resolver
from tests.support.implementations import Client, load

URL = "http://10.0.0.7:50051"


def methods(module):
    """Names and signatures of what a subclass or the resolver may use."""
    found = {}
    for name, member in vars(module.ClientCache).items():
        if name.startswith("__") or inspect.isdatadescriptor(member):
            continue
        signature = inspect.signature(getattr(module.ClientCache, name))
        found[name] = [
            (parameter.name, parameter.kind, parameter.default)
            for parameter in signature.parameters.values()
        ]
    return found


CONTRACT = {
    "get_flight_client_for_url",
    "_miss",
    "_discard",
    "_begin",
    "_publish",
    "_fail",
    "_count_as_wait",
    "_alias",
    "_drop",
    "_clear",
    "_shut",
    "_expire",
    "_keys",
    "_holds",
    "_counters",
    "_lane",
    "_is_inherited",
    "_adopt",
    "_advance_clock",
    "_validate",
}


def test_each_implementation_has_every_method_of_the_contract(implementation):
    assert set(methods(load(implementation))) >= CONTRACT


def test_methods_and_parameters_are_the_same():
    compiled, python = methods(load("compiled")), methods(load("python"))
    assert set(compiled) == CONTRACT
    assert {name: python[name] for name in CONTRACT} == compiled


def test_the_rest_of_the_module_is_the_same_too():
    for name in ("fast_hits", "leak"):
        assert inspect.signature(getattr(load("compiled"), name)).parameters.keys() == (
            inspect.signature(getattr(load("python"), name)).parameters.keys()
        )


def test_the_stub_exports_what_both_have():
    stub = Path(resolver.__file__).with_name("_cache.pyi").read_text()
    names = {
        alias.asname
        for node in ast.walk(ast.parse(stub))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert names == {"ClientCache", "fast_hits", "leak"}


def test_the_hit_is_a_method_that_takes_one_positional_argument(new_cache):
    cache = new_cache()
    client = cache.store(URL)
    assert cache.get_flight_client_for_url(URL) is client
    for arguments in ((), (URL, URL)):
        with pytest.raises(TypeError):
            cache.get_flight_client_for_url(*arguments)
    with pytest.raises(TypeError):
        cache.get_flight_client_for_url(url=URL)


def test_a_cache_is_weakly_referable_and_subclassable(cache_type):
    class Sub(cache_type):
        def get_flight_client_for_url(self, url):
            return super().get_flight_client_for_url(url)

    cache = Sub()
    client = cache.store(URL)
    assert cache.get_flight_client_for_url(URL) is client
    reference = weakref.ref(cache)
    del cache
    assert reference() is None


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickling_is_refused(new_cache, protocol):
    with pytest.raises(TypeError, match="pickle"):
        pickle.dumps(new_cache(), protocol)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy])
def test_copying_is_refused(new_cache, duplicate):
    with pytest.raises(TypeError):
        duplicate(new_cache())


def test_fast_hits_makes_a_descriptor_of_the_subclass_own(implementation):
    module = load(implementation)

    class Cache(module.ClientCache):
        pass

    assert module.fast_hits(Cache) is Cache
    if implementation == "compiled":
        own = Cache.__dict__["get_flight_client_for_url"]
        assert own.__objclass__ is Cache
    cache = Cache()
    pending, client = object(), Client()
    cache._begin(URL, 0, pending)
    cache._publish(URL, 0, pending, client)
    assert cache.get_flight_client_for_url(URL) is client
    with pytest.raises(TypeError):
        Cache.get_flight_client_for_url(object(), URL) if implementation == "compiled" else (
            Cache.get_flight_client_for_url()
        )
