"""The compiled hot path of asyncio: one call finds the running loop's client and wraps it.

Holds the way from the running loop to its caches, and `Found`, the awaitable of a hit.
Must not connect, wait, touch an event loop or decide policy; `_resolver.py` does.
`_hits_py.py` is the same contract in plain Python, and the same tests run against both.

A *route* is ``(weak reference to a loop, one weak reference per lane to a cache)``. Nothing
here keeps a loop or its clients alive, and since both ends of a route are weak references,
neither can be mistaken for a later object at the same address.
"""

cimport cython

from asyncio import _get_running_loop
from weakref import ref

from .._cache import ClientCache

cdef extern from "_hits.h":
    ctypedef struct PyObject
    ctypedef enum PySendResult:
        PYGEN_RETURN, PYGEN_ERROR, PYGEN_NEXT
    ctypedef PySendResult (*sendfunc)(PyObject *, PyObject *, PyObject **) noexcept
    ctypedef struct PyAsyncMethods:
        sendfunc am_send
    ctypedef PyObject *(*iternextfunc)(PyObject *) noexcept
    ctypedef void (*destructor)(PyObject *) noexcept
    ctypedef struct PyTypeObject:
        PyAsyncMethods *tp_as_async
        iternextfunc tp_iternext
        destructor tp_dealloc
    ctypedef PyObject *(*PyCFunction)(PyObject *, PyObject *) except NULL
    ctypedef struct PyMethodDef:
        PyCFunction ml_meth
        int ml_flags
    ctypedef struct PyMethodDescrObject:
        PyMethodDef *d_method
    int METH_O
    object PyDescr_NewMethod(PyTypeObject *, PyMethodDef *)
    PyObject *likely_running_loop() noexcept
    int lane_of_task(int) noexcept
    PyObject *weakly_held(PyObject *) noexcept
    object give(PyObject *)
    bint STEPS_BY_NEXT
    void raise_ended(PyTypeObject *, PyObject *) noexcept
    void keep_ended(PyTypeObject *, destructor)
    void free_ended(PyObject *) noexcept
    bint PyUnicode_CheckExact(object) noexcept
    PyObject *PyTuple_GET_ITEM(PyObject *, Py_ssize_t) noexcept
    Py_ssize_t PyTuple_GET_SIZE(PyObject *) noexcept
    void Py_XDECREF(PyObject *) noexcept
    void Py_INCREF(PyObject *) noexcept
    void PyErr_SetObject(object, object) noexcept

cdef str SPENT = "this look-up was awaited already; look the URL up again"

# The cache's own look-up, called without looking the method up.
cdef PyMethodDef *_look_up = (<PyMethodDescrObject *><PyObject *>(
    ClientCache.__dict__["get_flight_client_for_url"])).d_method
if _look_up.ml_flags != METH_O:
    raise ImportError("resolver._cache and resolver.aio._hits are not of one build")


cdef extern from *:
    ctypedef class builtins.StopIteration [object PyStopIterationObject]:
        pass


@cython.final
cdef class Ended(StopIteration):
    """What a hit ends with where `await` asks for its next item: its value is the client."""


@cython.final
@cython.freelist(64)
@cython.no_gc       # holds a client for the moment between look-up and await, in no cycle
cdef class Found:
    """A client that was found, to be awaited once; the first step returns it.

    Keeps the protocol of a coroutine, so `asyncio.create_task`, `gather` and `wait_for`
    take it too. It may be left alone without a warning.
    """

    cdef object client

    def __await__(self):
        return self

    def __next__(self):
        raise StopIteration(self._take())

    def send(self, value):
        """Ends, with the client."""
        raise StopIteration(self._take())

    def throw(self, kind, value=None, traceback=None):
        """Raises what it is given, at the place of the client."""
        self.client = None
        if isinstance(kind, BaseException):
            raise kind
        raise kind if value is None else value

    def close(self):
        """Lets go of the client."""
        self.client = None

    cdef _take(self):
        client, self.client = self.client, None
        if client is None:
            raise RuntimeError(SPENT)
        return client


cdef PySendResult send_found(PyObject *self, PyObject *value, PyObject **result) noexcept:
    cdef PyObject *client = <PyObject *>(<Found>self).client
    if client == <PyObject *>None:
        result[0] = NULL
        PyErr_SetObject(RuntimeError, SPENT)
        return PYGEN_ERROR
    Py_INCREF(client)
    (<Found>self).client = None
    result[0] = client
    return PYGEN_RETURN


cdef PyObject *next_found(PyObject *self) noexcept:
    cdef PyObject *client = <PyObject *>(<Found>self).client
    if client == <PyObject *>None:
        PyErr_SetObject(RuntimeError, SPENT)
        return NULL
    Py_INCREF(client)
    (<Found>self).client = None
    raise_ended(<PyTypeObject *>Ended, client)
    return NULL


# Cython fills these slots for its own coroutines only, or with what costs a traceback. With
# them, a step is a C call: one that returns the value, and where `await` asks for the next
# item instead, one that raises what was made before.
(<PyTypeObject *>Found).tp_as_async.am_send = send_found
if STEPS_BY_NEXT:
    (<PyTypeObject *>Found).tp_iternext = next_found
    keep_ended(<PyTypeObject *>Ended, free_ended)


cdef PyObject *hit(PyObject *routes, PyObject *loop, PyObject *url) except? NULL:
    """The client on `loop`; None if it has none; NULL, with no error, if there is no route."""
    cdef PyObject *route
    cdef PyObject *caches
    cdef PyObject *held
    cdef PyObject *client
    cdef Py_ssize_t at, lanes
    for at in range(PyTuple_GET_SIZE(routes)):
        route = PyTuple_GET_ITEM(routes, at)
        held = weakly_held(PyTuple_GET_ITEM(route, 0))
        Py_XDECREF(held)
        if held != loop:
            continue
        caches = PyTuple_GET_ITEM(route, 1)
        lanes = PyTuple_GET_SIZE(caches)
        held = weakly_held(PyTuple_GET_ITEM(caches, 0 if lanes == 1 else lane_of_task(<int>lanes)))
        if held == NULL:
            return NULL
        try:
            return _look_up.ml_meth(held, url)
        finally:
            Py_XDECREF(held)
    return NULL


cdef class LoopRouter:
    """Worker URL -> awaitable of the running loop's client, thread-safe.

    A base class: it calls ``_miss(url)`` for what it does not find and returns what that
    returns. The caches of `_routes` return None for what they do not hold.
    """

    cdef tuple routes
    cdef object __weakref__

    def __cinit__(self, *args, **options):
        self.routes = ()

    @cython.binding(False)
    @cython.always_allow_keywords(False)     # METH_O: no argument parsing
    def get_flight_client_for_url(self, url):
        """get_flight_client_for_url($self, url, /)\n--\n
        Await this for the client of a worker URL: the cached one, or one connected now.

        A hit is one compiled call and an awaitable that ends at once, without a coroutine
        and without the event loop; it gives the same object every time. A miss connects
        once however many tasks ask; they share its client or its error. Cancelling one
        of them leaves the connect to the others. Each event loop has clients of its own.
        Awaiting raises InvalidWorkerUrlError, WorkerConnectError,
        WorkerConnectTimeoutError, ResolverClosedError or ForkedProcessError.
        """
        cdef tuple routes
        cdef PyObject *loop
        cdef PyObject *client = NULL
        cdef Found found
        with cython.critical_section(self):
            routes = self.routes
        if PyUnicode_CheckExact(url) and PyTuple_GET_SIZE(<PyObject *>routes):
            loop = likely_running_loop()
            if loop != NULL:
                client = hit(<PyObject *>routes, loop, <PyObject *>url)
            if client == NULL:
                running = _get_running_loop()
                if <PyObject *>running != loop:
                    client = hit(<PyObject *>routes, <PyObject *>running, <PyObject *>url)
            if client != NULL:
                found = Found.__new__(Found)
                found.client = give(client)
                if found.client is not None:
                    return found
        return self._miss(url)

    def _miss(self, url):
        raise KeyError(url)

    def _lane(self, int lanes):
        """The lane of the running task, below `lanes`; a task keeps its lane."""
        return 0 if lanes == 1 else lane_of_task(lanes)

    @property
    def _routes(self):
        """Tuple of ``(reference to a loop, tuple of references to its caches)``."""
        with cython.critical_section(self):
            return self.routes

    @_routes.setter
    def _routes(self, tuple routes not None):
        for loop, caches in routes:
            # What a hit reads without checking.
            if type(loop) is not ref or type(caches) is not tuple or not caches:
                raise TypeError("a route is (weakref.ref, (weakref.ref, ...))")
            for cache in caches:
                if type(cache) is not ref or not isinstance(cache(), (ClientCache, type(None))):
                    raise TypeError("a route leads to weak references to caches")
        with cython.critical_section(self):
            self.routes = routes


def fast_hits(cls):
    """Class decorator for a subclass of LoopRouter, as `resolver._cache.fast_hits` is."""
    cdef PyObject *inherited = <PyObject *>LoopRouter.__dict__["get_flight_client_for_url"]
    cls.get_flight_client_for_url = PyDescr_NewMethod(
        <PyTypeObject *>cls, (<PyMethodDescrObject *>inherited).d_method)
    return cls
