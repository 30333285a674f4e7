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

from .._cache cimport live_client

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
    ctypedef PyObject *(*PyCFunction)(PyObject *, PyObject *) noexcept
    ctypedef struct PyMethodDef:
        PyCFunction ml_meth
    ctypedef struct PyMethodDescrObject:
        PyMethodDef *d_method
    object PyDescr_NewMethod(PyTypeObject *, PyMethodDef *)
    void note_state() noexcept
    PyObject *likely_running_loop() noexcept
    int lane_of_task(int) noexcept
    bint refers_to(PyObject *, PyObject *) noexcept
    PyObject *hold(PyObject *) noexcept
    void let_go(PyObject *) noexcept
    object give(PyObject *)
    PyObject *taken_from(PyObject **) noexcept
    bint MAY_BORROW
    bint STEPS_BY_NEXT
    void raise_stop(PyObject *) noexcept
    PyObject *new_stop() noexcept
    void raise_own(PyObject *, PyObject *) noexcept
    bint is_temporary(PyObject *) noexcept
    bint is_unseen(PyObject *) noexcept
    PyObject *taken_value(PyObject *) noexcept
    PyObject *kept_found() noexcept
    bint keep(PyObject *) noexcept
    bint PyUnicode_CheckExact(object) noexcept
    bint Py_IS_TYPE(PyObject *, PyTypeObject *) noexcept
    PyTypeObject PyUnicode_Type
    int kept_count
    PyObject *PyTuple_GET_ITEM(PyObject *, Py_ssize_t) noexcept
    Py_ssize_t PyTuple_GET_SIZE(PyObject *) noexcept
    void Py_XDECREF(PyObject *) noexcept
    void Py_DECREF(PyObject *) noexcept
    void PyErr_SetObject(object, object) noexcept

cdef str SPENT = "this look-up was awaited already; look the URL up again"


@cython.final
@cython.freelist(64)
cdef class Found:
    """A client that was found, to be awaited once; the first step returns it.

    Keeps the protocol of a coroutine, so `asyncio.create_task`, `gather` and `wait_for`
    take it too. It may be left alone without a warning.
    """

    cdef PyObject *client       # owned; NULL once it was taken
    cdef PyObject *stop         # owned: a StopIteration to raise; NULL where there is none

    def __await__(self):
        return self

    def __next__(self):
        end(self)

    def send(self, value):
        """Ends, with the client."""
        end(self)

    def throw(self, kind, value=None, traceback=None):
        """Raises what it is given, at the place of the client."""
        self.close()
        if isinstance(kind, BaseException):
            raise kind
        raise kind if value is None else value

    def close(self):
        """Lets go of the client."""
        Py_XDECREF(taken(<PyObject *>self))


cdef inline PyObject *taken(PyObject *self) noexcept:
    """The client, no longer owned by `self`; NULL if it was taken before."""
    return taken_from(&(<Found>self).client)


cdef end(Found self):
    cdef PyObject *client = taken(<PyObject *>self)
    if client == NULL:
        raise RuntimeError(SPENT)
    raise StopIteration(give(client))


cdef PySendResult send_found(PyObject *self, PyObject *value, PyObject **result) noexcept:
    result[0] = taken(self)
    if result[0] != NULL:
        return PYGEN_RETURN
    PyErr_SetObject(RuntimeError, SPENT)
    return PYGEN_ERROR


cdef PyObject *next_found(PyObject *self) noexcept:
    cdef PyObject *client = taken(self)
    cdef PyObject *stop = (<Found>self).stop
    if client == NULL:
        PyErr_SetObject(RuntimeError, SPENT)
    elif stop != NULL and is_temporary(self):
        raise_own(stop, client)
    else:
        raise_stop(client)
    return NULL


cdef destructor really_free = (<PyTypeObject *>Found).tp_dealloc


cdef void free_found(PyObject *self) noexcept:
    cdef PyObject *client = taken(self)
    cdef PyObject *stop = (<Found>self).stop
    if stop == NULL:
        really_free(self)
    elif is_unseen(stop) and keep(self):
        if client == NULL:
            client = taken_value(stop)
    else:
        (<Found>self).stop = NULL
        really_free(self)
        Py_DECREF(stop)
    Py_XDECREF(client)      # last: it may run a finalizer, which may come back here


# Cython fills these slots for its own coroutines only, or with what costs a traceback. With
# them, a step is a C call: one that returns the value, and where `await` asks for the next
# item instead, one that raises what was made before.
(<PyTypeObject *>Found).tp_dealloc = free_found
(<PyTypeObject *>Found).tp_as_async.am_send = send_found
if STEPS_BY_NEXT:
    (<PyTypeObject *>Found).tp_iternext = next_found


cdef object found_of(PyObject *client):
    """An awaitable of `client`, a reference that it takes over."""
    cdef PyObject *again = kept_found()
    cdef Found found
    if again != NULL:
        (<Found>again).client = client
        return give(again)
    found = Found.__new__(Found)
    found.client = client
    found.stop = new_stop()
    return found


cdef inline PyObject *held_by(PyObject *cache, PyObject *url) noexcept:
    """The client in a cache, by a weak reference; NULL, without an error, if there is none."""
    cdef PyObject *alive = hold(cache)
    cdef PyObject *client = NULL
    if alive != NULL:
        client = <PyObject *>live_client(alive, url)
        let_go(alive)
    return client


cdef PyObject *held_on(PyObject *loop, PyObject *routes, PyObject *url) noexcept:
    """The client on `loop`; NULL, without an error, if there is none."""
    cdef PyObject *route
    cdef PyObject *caches
    cdef Py_ssize_t at, lanes
    for at in range(PyTuple_GET_SIZE(routes)):
        route = PyTuple_GET_ITEM(routes, at)
        if refers_to(PyTuple_GET_ITEM(route, 0), loop):
            caches = PyTuple_GET_ITEM(route, 1)
            lanes = PyTuple_GET_SIZE(caches)
            return held_by(PyTuple_GET_ITEM(caches, lane_of_task(<int>lanes)), url)
    return NULL


cdef PyObject *held_here(PyObject *routes, PyObject *url) except? NULL:
    """The client on the loop that this thread runs; NULL, without an error, if there is none."""
    cdef PyObject *likely = likely_running_loop()
    cdef PyObject *client = held_on(likely, routes, url)
    if client == NULL and PyTuple_GET_SIZE(routes):
        running = _get_running_loop()
        if <PyObject *>running != likely:
            client = held_on(<PyObject *>running, routes, url)
    return client


@cython.no_gc_clear     # what is borrowed from the routes stays valid; they are in no cycle
cdef class LoopRouter:
    """Worker URL -> awaitable of the running loop's client, thread-safe.

    A base class: it calls ``_miss(url)`` for what it does not find and returns what that
    returns. The caches of `_routes` return None for what they do not hold.
    """

    cdef tuple routes
    # Most processes have one loop and most resolvers one lane: the first route's, borrowed from
    # there; NULL if there is none or it has several lanes.
    cdef PyObject *first_loop
    cdef PyObject *first_cache
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
        cdef PyObject *client = NULL
        if PyUnicode_CheckExact(url):
            if not MAY_BORROW:
                with cython.critical_section(self):
                    routes = self.routes
                client = held_here(<PyObject *>routes, <PyObject *>url)
            elif refers_to(self.first_loop, likely_running_loop()):
                client = held_by(self.first_cache, <PyObject *>url)
            else:
                client = held_here(<PyObject *>self.routes, <PyObject *>url)
            if client != NULL:
                return found_of(client)
        return self._miss(url)

    def _miss(self, url):
        raise KeyError(url)

    def _lane(self, int lanes):
        """The lane of the running task, below `lanes`; a task keeps its lane."""
        return lane_of_task(lanes)

    @property
    def _routes(self):
        """Tuple of ``(reference to a loop, tuple of references to its caches)``."""
        with cython.critical_section(self):
            return self.routes

    @_routes.setter
    def _routes(self, tuple routes not None):
        for route in routes:
            loop, caches = route
            # What a hit reads without checking.
            if type(route) is not tuple or type(loop) is not ref:
                raise TypeError("a route is (weakref.ref, (weakref.ref, ...))")
            if type(caches) is not tuple or not caches:
                raise TypeError("a route is (weakref.ref, (weakref.ref, ...))")
            for cache in caches:
                if type(cache) is not ref or not isinstance(cache(), (ClientCache, type(None))):
                    raise TypeError("a route leads to weak references to caches")
        note_state()
        with cython.critical_section(self):
            self.first_loop = self.first_cache = NULL
            self.routes = routes
            if len(routes) and len(routes[0][1]) == 1:
                self.first_loop = <PyObject *>routes[0][0]
                self.first_cache = <PyObject *>routes[0][1][0]


cdef PyMethodDef *looking_up = (
    <PyMethodDescrObject *><PyObject *>LoopRouter.__dict__["get_flight_client_for_url"]).d_method
cdef PyCFunction look_up_anywhere = looking_up.ml_meth


cdef PyObject *look_up(PyObject *self, PyObject *url) noexcept:
    """What most calls of the method are: a hit on the first route, and a Found to use again.

    A function of its own, so that the compiler saves no registers for the others.
    """
    cdef PyObject *client
    cdef PyObject *found
    if kept_count and Py_IS_TYPE(url, &PyUnicode_Type) and \
            refers_to((<LoopRouter>self).first_loop, likely_running_loop()):
        client = held_by((<LoopRouter>self).first_cache, url)
        if client != NULL:
            found = kept_found()
            (<Found>found).client = client
            return found
    return look_up_anywhere(self, url)


if MAY_BORROW and STEPS_BY_NEXT:
    looking_up.ml_meth = look_up


def fast_hits(cls):
    """Class decorator for a subclass of LoopRouter, as `resolver._cache.fast_hits` is."""
    cdef PyObject *inherited = <PyObject *>LoopRouter.__dict__["get_flight_client_for_url"]
    cls.get_flight_client_for_url = PyDescr_NewMethod(
        <PyTypeObject *>cls, (<PyMethodDescrObject *>inherited).d_method)
    return cls
