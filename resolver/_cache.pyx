"""The compiled hot path: a lock-striped map from worker URL to client.

Holds find, insert, remove, single flight and last-used times. Must not connect,
close, log, parse a URL or decide policy; `_resolver.py` does. `_cache_py.py` is the
same contract in plain Python, and the same tests run against both.

Shape
    A *stripe* is a lock and an open-addressing table of slots. A slot maps one exact
    ``str`` to an *entry*: the worker URL's client, or its connect under way, or its
    remembered failure. The canonical URL's slot is the entry's home; a few other
    spellings that callers really used have slots of their own pointing at the same
    entry, so a hit never parses. With several connections per URL there is one set of
    stripes per lane.

Locking
    Each stripe has one lock per *reader*, a group of threads. A hit takes its reader's
    own, so that two threads that hit write no cache line in common; everything else
    takes all of the stripe's. Two stripes are never locked at once. Under a lock: no
    Python call, no object allocation, no decref. What is displaced is chained, leaves
    the lock, and is handed to ``_discard``.

Life of an entry
    connecting -> live -> dead, or connecting -> failed -> dead, under its home lock.
    Clearing ``live`` makes every spelling miss at once. ``client`` keeps the reference
    until the last slot is gone, so a hit through another spelling's slot, which holds
    another lock, may still take a reference of its own.
"""

cimport cython
from libc.stdint cimport int64_t

cdef extern from "_platform.h":
    ctypedef struct PyObject
    ctypedef int (*visitproc)(PyObject *, void *) noexcept
    ctypedef struct PyTypeObject:
        int (*tp_traverse)(PyObject *, visitproc, void *) noexcept
        int (*tp_clear)(PyObject *) noexcept
    ctypedef struct PyMethodDef
    ctypedef struct PyMethodDescrObject:
        PyMethodDef *d_method
    object PyDescr_NewMethod(PyTypeObject *, PyMethodDef *)
    ctypedef struct Reader:
        int64_t hits
    enum:
        STRIPES, STRIPE_SHIFT, READERS
    int this_reader() noexcept
    void count_hit(Reader *) noexcept
    void lock_one(Reader *, int) noexcept
    void unlock_one(Reader *, int) noexcept
    void lock_all(Reader *, int) noexcept
    void unlock_all(Reader *, int) noexcept
    int64_t get_relaxed(int64_t *) noexcept
    void set_relaxed(int64_t *, int64_t) noexcept
    PyObject *get_acquire(PyObject **) noexcept
    void set_release(PyObject **, PyObject *) noexcept
    int64_t add_and_get(int64_t *, int64_t) noexcept
    int64_t monotonic_now() noexcept
    void find_clock() noexcept
    bint ONE_LOCK
    Py_hash_t known_hash(PyObject *) noexcept
    Py_hash_t exact_str_hash(PyObject *) except -1
    ctypedef struct Key
    Key *new_key(PyObject *) noexcept
    void free_key(Key *) noexcept
    PyObject *text_of(Key *) noexcept
    Py_hash_t hash_of(Key *) noexcept
    bint key_is(Key *, PyObject *, Py_hash_t) noexcept
    object give(PyObject *)
    int fork_generation
    int watch_forks() noexcept
    int64_t this_thread_number() noexcept
    void Py_INCREF(PyObject *) noexcept
    void Py_XDECREF(PyObject *) noexcept
    bint PyUnicode_CheckExact(object) noexcept
    void *PyMem_RawCalloc(size_t, size_t) noexcept
    void PyMem_RawFree(void *) noexcept
    void *on_own_lines(size_t) noexcept
    void free_lines(void *) noexcept

cdef enum:
    FIRST_CAPACITY = 8      # slots of a stripe that holds anything; a power of two
    MAX_ALIASES = 4         # spellings per URL that hit without a parse, beside the canonical
    EVICTION_SAMPLE = 512   # entries seen, at least, before the least recently used is chosen

cdef enum State:
    CONNECTING, LIVE, FAILED, DEAD

cdef struct Entry:
    PyObject *live          # the client while callers may have it, else NULL
    int64_t used            # last lookup by another spelling; if failed: remembered until (ns)
    PyObject *client        # the reference that `live` borrows
    Key *key                # canonical URL
    PyObject *pending       # the shared connect while connecting or failed
    Key **aliases           # MAX_ALIASES other spellings, or NULL
    Entry *next             # in a chain of displaced entries
    int64_t references      # slots that point here, and pins
    int alias_count
    int lane
    State state

cdef struct Slot:           # 32 bytes: a hit on a home slot reads no more than this
    Key *key                # the entry's; NULL: the slot is empty
    PyObject *live          # of a home slot: as in the entry; NULL in those of other spellings
    int64_t used            # of a home slot: last lookup through it
    Entry *entry

cdef struct Stripe:
    Slot *slots
    size_t mask
    size_t used

cdef struct Counters:
    int64_t misses
    int64_t waits
    int64_t connects
    int64_t connect_failures
    int64_t evicted_idle
    int64_t evicted_capacity
    int64_t invalidated
    int64_t clients         # live entries
    int64_t retained        # live and failed entries: what max_clients bounds

cdef Slot NO_SLOTS          # the table of a stripe that never held anything
cdef int64_t NEVER = 0x7FFFFFFFFFFFFFFF


cdef inline int64_t nanoseconds(double seconds) noexcept:
    return <int64_t>(min(seconds, 1e9) * 1e9)   # at most 30 years: sums cannot overflow


cdef inline int lock_number(Stripe *stripe, Stripe *first) noexcept:
    return <int>(stripe - first) & (STRIPES - 1)


cdef inline Slot *find(Stripe *stripe, PyObject *text, Py_hash_t hash) noexcept:
    cdef size_t at = <size_t>hash & stripe.mask
    cdef Slot *slot
    while True:
        slot = &stripe.slots[at]
        if slot.key == NULL:
            return NULL
        if key_is(slot.key, text, hash):
            return slot
        at = (at + 1) & stripe.mask


cdef inline int64_t last_used(Slot *home) noexcept:
    return max(get_relaxed(&home.used), get_relaxed(&home.entry.used))


cdef void place(Slot *slots, size_t mask, Slot what) noexcept:
    cdef size_t at = <size_t>hash_of(what.key) & mask
    while slots[at].key != NULL:
        at = (at + 1) & mask
    slots[at] = what


cdef bint insert_locked(Stripe *stripe, Key *key, Entry *entry) noexcept:
    """Adds a slot whose key is absent; False when there is no memory for it."""
    cdef size_t capacity = stripe.mask + 1, larger, at
    cdef Slot *slots
    cdef Slot what
    if (stripe.used + 1) * 2 > capacity:
        larger = FIRST_CAPACITY if stripe.slots == &NO_SLOTS else capacity * 2
        slots = <Slot *>on_own_lines(larger * sizeof(Slot))
        if slots == NULL:
            return False
        for at in range(capacity):
            if stripe.slots[at].key != NULL:
                place(slots, larger - 1, stripe.slots[at])
        if stripe.slots != &NO_SLOTS:
            free_lines(stripe.slots)
        stripe.slots = slots
        stripe.mask = larger - 1
    what.key = key
    what.live = NULL
    what.used = 0
    what.entry = entry
    place(stripe.slots, stripe.mask, what)
    stripe.used += 1
    return True


cdef void remove_locked(Stripe *stripe, Slot *slot) noexcept:
    """Empties a slot and moves later ones of its probe run back, so no tombstones exist."""
    cdef size_t mask = stripe.mask
    cdef size_t hole = <size_t>(slot - stripe.slots), at = hole, wanted
    while True:
        at = (at + 1) & mask
        if stripe.slots[at].key == NULL:
            break
        wanted = <size_t>hash_of(stripe.slots[at].key) & mask
        if ((at - wanted) & mask) >= ((at - hole) & mask):
            stripe.slots[hole] = stripe.slots[at]
            hole = at
    stripe.slots[hole].key = NULL
    stripe.slots[hole].live = NULL
    stripe.slots[hole].entry = NULL
    stripe.used -= 1


cdef Entry *new_entry(str key, int lane, object pending) except NULL:
    cdef Entry *entry = <Entry *>PyMem_RawCalloc(1, sizeof(Entry))
    cdef Key *owned = new_key(<PyObject *>key)
    if entry == NULL or owned == NULL:
        PyMem_RawFree(entry)
        free_key(owned)
        raise MemoryError
    entry.key = owned
    entry.pending = <PyObject *>pending
    entry.lane = lane
    entry.state = CONNECTING
    entry.references = 1
    Py_INCREF(entry.pending)
    return entry


cdef void free_entry(Entry *entry) noexcept:
    """Runs finalizers of what it drops; never under a lock."""
    cdef int at
    free_key(entry.key)
    Py_XDECREF(entry.pending)
    Py_XDECREF(entry.client)
    for at in range(entry.alias_count):
        free_key(entry.aliases[at])
    PyMem_RawFree(entry.aliases)
    PyMem_RawFree(entry)


cdef class ClientCache:
    """Worker URL -> client, one per URL and lane, thread-safe. See the module docstring.

    A base class: it calls ``_miss(url)`` for what it does not hold and ``_discard(list)``
    with clients that it no longer holds, outside any lock. Times are in seconds.
    """

    cdef Stripe *stripes            # lanes * STRIPES of them, or NULL
    cdef Reader *readers            # READERS of them
    cdef int generation             # of the process that may use this cache
    cdef bint closed
    cdef int lanes
    cdef int64_t idle_ns
    cdef int64_t skew_ns            # how far tests have moved this cache's clock
    cdef int64_t max_clients
    cdef int64_t eviction_cursor
    cdef Counters counters
    cdef object keeps_type_collectable  # an object member gives the type its GC slots
    cdef object __weakref__

    def __cinit__(self, *args, **options):
        self.generation = fork_generation
        self.idle_ns = NEVER
        self.max_clients = NEVER
        self._allocate(1)

    def __init__(self, *, idle_timeout=None, max_clients=None, lanes=1):
        if self.counters.misses:
            raise RuntimeError("a cache in use cannot be initialised again")
        self.idle_ns = NEVER if idle_timeout is None else nanoseconds(idle_timeout)
        self.max_clients = NEVER if max_clients is None else max_clients
        if lanes != self.lanes:
            self._allocate(lanes)

    def __dealloc__(self):
        # Clients inherited through a fork must not be freed: that can hang.
        if self.stripes == NULL or self.generation != fork_generation:
            return
        self._unlink_all(<list>None)
        self._free_tables()

    def __reduce__(self):
        raise TypeError(f"a {type(self).__name__} holds live connections and cannot be pickled")

    @cython.binding(False)
    @cython.always_allow_keywords(False)     # METH_O: no argument parsing
    def get_flight_client_for_url(self, url):
        """get_flight_client_for_url($self, url, /)\n--\n
        The client for a worker URL: the cached one, or one connected now.

        A hit is one compiled call and returns the same object every time. A miss
        connects once however many threads ask; they share its client or its error.
        Thread-safe. Raises InvalidWorkerUrlError, WorkerConnectError,
        WorkerConnectTimeoutError, ResolverClosedError or ForkedProcessError.
        """
        cdef PyObject *client
        if PyUnicode_CheckExact(url):
            client = self._hit(<PyObject *>url)
            if client != NULL:
                return give(client)
        return self._miss(url)

    @cython.final
    cdef inline PyObject *_hit(self, PyObject *url) noexcept:
        """Most hits are by the very str that the URL's home slot has, in the only lane."""
        cdef int64_t now = 0
        cdef size_t at = <size_t>known_hash(url)
        cdef Stripe *stripe
        cdef Slot *slot
        if ONE_LOCK and self.lanes == 1 and self.generation == fork_generation:
            now = monotonic_now() + self.skew_ns
            stripe = self._stripe(at, 0)
            while True:
                slot = &stripe.slots[at & stripe.mask]
                if slot.key == NULL:
                    break
                if text_of(slot.key) == url:
                    if slot.live == NULL or now - slot.used > self.idle_ns:
                        break
                    slot.used = now
                    Py_INCREF(slot.live)
                    count_hit(self.readers)
                    return slot.live
                at += 1
        return self._any_hit(url, now)

    # Virtual: what is inlined into `_hit` makes it save registers for nothing.
    cdef PyObject *_any_hit(self, PyObject *url, int64_t now) noexcept:
        cdef Py_hash_t hash = exact_str_hash(url)
        cdef Stripe *stripe = self._stripe(hash, self._this_lane())
        cdef Reader *reader = &self.readers[this_reader()]
        cdef PyObject *client = NULL
        cdef Slot *slot
        cdef int64_t *used_at
        cdef int64_t used
        if self.generation != fork_generation:
            return NULL
        lock_one(reader, lock_number(stripe, self.stripes))
        slot = find(stripe, url, hash)
        if slot != NULL:
            client = slot.live
            used_at = &slot.used
            if client == NULL:
                client = get_acquire(&slot.entry.live)
                used_at = &slot.entry.used
            if client != NULL:
                if now == 0:
                    now = monotonic_now() + self.skew_ns
                used = get_relaxed(used_at)
                if now - used > self.idle_ns:
                    used = last_used(slot)      # perhaps looked up by another spelling
                if now - used <= self.idle_ns:
                    if now != used:
                        set_relaxed(used_at, now)
                    Py_INCREF(client)
                    count_hit(reader)
                else:
                    client = NULL
        unlock_one(reader, lock_number(stripe, self.stripes))
        return client

    # -- what a subclass provides ------------------------------------------------------

    def _miss(self, url):
        raise KeyError(url)

    def _discard(self, clients):
        """Dropped clients, the only references this cache had; outside any lock."""

    # -- single flight -----------------------------------------------------------------

    def _begin(self, str key not None, int lane, pending):
        """(client, None) on a hit; else (None, the connect to wait for).

        That is `pending` itself for exactly one caller, who must then connect and call
        `_publish` or `_fail`.
        """
        cdef Py_hash_t hash = exact_str_hash(<PyObject *>key)
        cdef Stripe *stripe = self._stripe(hash, lane)
        cdef Entry *fresh = new_entry(key, lane, pending)
        cdef Entry *entry
        cdef Entry *gone = NULL
        cdef Slot *slot
        cdef PyObject *client = NULL
        cdef PyObject *shared = NULL
        cdef bint stored = False
        self._lock(stripe)
        cdef int64_t now = monotonic_now() + self.skew_ns
        slot = find(stripe, <PyObject *>key, hash)
        if slot != NULL:
            entry = slot.entry
            if entry.state == LIVE and now - last_used(slot) <= self.idle_ns:
                client = entry.client
                Py_INCREF(client)
                set_relaxed(&slot.used, now)
                set_relaxed(&entry.used, now)
                count_hit(&self.readers[this_reader()])
            elif entry.state == CONNECTING or (entry.state == FAILED and now < entry.used):
                shared = entry.pending
                Py_INCREF(shared)
            else:
                if entry.state == LIVE:
                    add_and_get(&self.counters.evicted_idle, 1)
                self._unlink_locked(stripe, slot, &gone)
        if client == NULL and shared == NULL:
            stored = insert_locked(stripe, fresh.key, fresh)
        self._unlock(stripe)
        self._release(gone)
        if client != NULL:
            free_entry(fresh)
            return give(client), None
        if shared != NULL:
            free_entry(fresh)
            add_and_get(&self.counters.waits, 1)
            return None, give(shared)
        if not stored:
            free_entry(fresh)
            raise MemoryError
        add_and_get(&self.counters.misses, 1)
        return None, pending

    def _publish(self, str key not None, int lane, pending, client):
        """Makes `client` the one for `key`, if `pending` is still its connect.

        False when it was invalidated or the cache closed meanwhile. May evict.
        """
        cdef Py_hash_t hash = exact_str_hash(<PyObject *>key)
        cdef Stripe *stripe = self._stripe(hash, lane)
        cdef Entry *gone = NULL
        cdef Entry *entry
        cdef PyObject *finished = NULL
        cdef bint stored = False
        cdef Slot *slot
        add_and_get(&self.counters.connects, 1)
        self._lock(stripe)
        slot = find(stripe, <PyObject *>key, hash)
        if slot != NULL and slot.entry.state == CONNECTING and slot.entry.pending == <PyObject *>pending:
            if self.closed:
                self._unlink_locked(stripe, slot, &gone)
            else:
                entry = slot.entry
                entry.client = <PyObject *>client
                Py_INCREF(entry.client)
                finished = entry.pending
                entry.pending = NULL
                entry.state = LIVE
                slot.live = entry.client
                slot.used = entry.used = monotonic_now() + self.skew_ns
                set_release(&entry.live, entry.client)
                add_and_get(&self.counters.clients, 1)
                add_and_get(&self.counters.retained, 1)
                stored = True
        self._unlock(stripe)
        Py_XDECREF(finished)
        self._release(gone)
        if stored:
            self._make_room(key, lane)
        return stored

    def _fail(self, str key not None, int lane, pending, double ttl, bint counted=True):
        """Ends the connect `pending` without a client; remembered for `ttl` seconds."""
        cdef Py_hash_t hash = exact_str_hash(<PyObject *>key)
        cdef Stripe *stripe = self._stripe(hash, lane)
        cdef Entry *gone = NULL
        cdef bint kept = False
        cdef Slot *slot
        if counted:
            add_and_get(&self.counters.connect_failures, 1)
        self._lock(stripe)
        slot = find(stripe, <PyObject *>key, hash)
        if slot != NULL and slot.entry.state == CONNECTING and slot.entry.pending == <PyObject *>pending:
            if ttl > 0 and not self.closed:
                slot.entry.state = FAILED
                slot.entry.used = monotonic_now() + self.skew_ns + nanoseconds(ttl)
                add_and_get(&self.counters.retained, 1)
                kept = True
            else:
                self._unlink_locked(stripe, slot, &gone)
        self._unlock(stripe)
        self._release(gone)
        if kept:
            self._make_room(key, lane)

    def _count_as_wait(self):
        """The connect of a miss was spared: somebody else's failure answers."""
        add_and_get(&self.counters.waits, 1)
        add_and_get(&self.counters.misses, -1)

    def _alias(self, str spelling not None, str key not None, int lane, client):
        """Lets `spelling` hit the entry of `key` directly, while that holds `client`."""
        cdef Py_hash_t hash = exact_str_hash(<PyObject *>key)
        cdef Py_hash_t other_hash = exact_str_hash(<PyObject *>spelling)
        cdef Stripe *home = self._stripe(hash, lane)
        cdef Stripe *stripe = self._stripe(other_hash, lane)
        cdef Entry *entry = NULL
        cdef Entry *stale = NULL
        cdef Key *owned = new_key(<PyObject *>spelling)
        cdef Slot *slot
        cdef int at
        if owned == NULL:
            raise MemoryError
        self._lock(home)
        slot = find(home, <PyObject *>key, hash)
        if slot != NULL and slot.entry.live == <PyObject *>client:
            entry = slot.entry
            if entry.aliases == NULL:
                entry.aliases = <Key **>PyMem_RawCalloc(MAX_ALIASES, sizeof(Key *))
            for at in range(entry.alias_count):
                if key_is(entry.aliases[at], <PyObject *>spelling, other_hash):
                    entry = NULL
                    break
            if entry != NULL and (entry.aliases == NULL or entry.alias_count == MAX_ALIASES):
                entry = NULL
            if entry != NULL:
                entry.aliases[entry.alias_count] = owned
                entry.alias_count += 1
                add_and_get(&entry.references, 1)
        self._unlock(home)
        if entry == NULL:
            free_key(owned)
            return
        # The pin above becomes the slot's reference. An entry that died in between is
        # not added: whoever unlinked it may already have passed by this stripe.
        self._lock(stripe)
        if get_acquire(&entry.live) != NULL:
            slot = find(stripe, <PyObject *>spelling, other_hash)
            if slot != NULL:
                stale = slot.entry
                slot.entry = entry
                slot.key = owned
            elif not insert_locked(stripe, owned, entry):
                stale = entry
        else:
            stale = entry
        self._unlock(stripe)
        if stale != NULL:
            self._unpin(stale)

    # -- removal -----------------------------------------------------------------------

    def _drop(self, str key not None, client=None):
        """Removes `key` on every lane; with `client`, only where that very one is held.

        True when a client or a connect under way was removed.
        """
        cdef Py_hash_t hash = exact_str_hash(<PyObject *>key)
        cdef Entry *gone = NULL
        cdef bint dropped = False
        cdef Stripe *stripe
        cdef Slot *slot
        cdef int lane
        for lane in range(self.lanes):
            stripe = self._stripe(hash, lane)
            self._lock(stripe)
            slot = find(stripe, <PyObject *>key, hash)
            if slot != NULL and (client is None or slot.entry.live == <PyObject *>client):
                if slot.entry.state == LIVE:
                    add_and_get(&self.counters.invalidated, 1)
                dropped |= slot.entry.state != FAILED
                self._unlink_locked(stripe, slot, &gone)
            self._unlock(stripe)
        self._release(gone)
        return dropped

    def _clear(self):
        """Removes everything; returns the connects that were under way or remembered."""
        pendings = []
        self._unlink_all(pendings)
        return pendings

    def _shut(self):
        """`_clear`, and nothing is stored from now on. Idempotent."""
        self.closed = True
        return self._clear()

    def _expire(self, int stripe_index):
        """Removes what is overdue in one stripe; returns how many clients that were."""
        cdef Stripe *stripe = &self.stripes[stripe_index]
        cdef Entry *gone = NULL
        cdef Entry *entry
        cdef int64_t now = monotonic_now() + self.skew_ns, clients = 0
        cdef size_t at = 0
        self._lock(stripe)
        while at <= stripe.mask:
            entry = stripe.slots[at].entry
            if entry != NULL and stripe.slots[at].key == entry.key and (
                (entry.state == LIVE and now - last_used(&stripe.slots[at]) > self.idle_ns)
                or (entry.state == FAILED and now >= entry.used)
            ):
                clients += entry.state == LIVE
                self._unlink_locked(stripe, &stripe.slots[at], &gone)
            else:
                at += 1
        self._unlock(stripe)
        add_and_get(&self.counters.evicted_idle, clients)
        self._release(gone)
        return clients

    # -- snapshots ---------------------------------------------------------------------

    def _keys(self):
        """Canonical URLs that hold a client, unordered. Stripe by stripe, not atomic."""
        cdef PyObject **found
        cdef Stripe *stripe
        cdef Entry *entry
        cdef size_t at, count
        cdef int index
        keys = set()
        for index in range(self.lanes * STRIPES):
            stripe = &self.stripes[index]
            count = 0
            self._lock(stripe)
            found = <PyObject **>PyMem_RawCalloc(stripe.used + 1, sizeof(PyObject *))
            if found != NULL:
                for at in range(stripe.mask + 1):
                    entry = stripe.slots[at].entry
                    if entry != NULL and entry.key == stripe.slots[at].key and entry.state == LIVE:
                        found[count] = text_of(entry.key)
                        Py_INCREF(found[count])
                        count += 1
            self._unlock(stripe)
            if found == NULL:
                raise MemoryError
            for at in range(count):
                keys.add(give(found[at]))
            PyMem_RawFree(found)
        return list(keys)

    def _holds(self, str key not None):
        """Whether `key` has a client that has not been idle too long, on any lane."""
        cdef Py_hash_t hash = exact_str_hash(<PyObject *>key)
        cdef int64_t now = monotonic_now() + self.skew_ns
        cdef bint found = False
        cdef Stripe *stripe
        cdef Slot *slot
        cdef int lane
        for lane in range(self.lanes):
            stripe = self._stripe(hash, lane)
            self._lock(stripe)
            slot = find(stripe, <PyObject *>key, hash)
            found |= (slot != NULL and slot.entry.live != NULL
                      and now - last_used(slot) <= self.idle_ns)
            self._unlock(stripe)
        return found

    def _counters(self):
        """The fields of ResolverStats, in order. Each is exact; together not atomic."""
        cdef Counters *counters = &self.counters
        cdef int64_t hits = 0
        cdef int index
        for index in range(READERS):
            hits += get_relaxed(&self.readers[index].hits)
        return (
            hits, get_relaxed(&counters.misses), get_relaxed(&counters.waits),
            get_relaxed(&counters.connects), get_relaxed(&counters.connect_failures),
            get_relaxed(&counters.evicted_idle), get_relaxed(&counters.evicted_capacity),
            get_relaxed(&counters.invalidated), get_relaxed(&counters.clients),
        )

    # -- lanes and processes -----------------------------------------------------------

    def _lane(self):
        """The lane of the calling thread; a thread keeps its lane."""
        return self._this_lane()

    @property
    def _stripe_count(self):
        """How many stripes `_expire` takes, over all lanes."""
        return self.lanes * STRIPES

    def _is_inherited(self):
        """Whether this process got the cache through a fork."""
        return self.generation != fork_generation

    def _adopt(self):
        """Makes an inherited cache this process's own; False if it ever connected."""
        with cython.critical_section(self):
            if self.generation == fork_generation:
                return True
            if self.counters.misses:
                return False
            # Nothing is cached, but threads that do not exist here may have held locks:
            # start from fresh tables, leave the old ones alone.
            self._allocate(self.lanes)
            self.generation = fork_generation
            return True

    def _advance_clock(self, double seconds):
        """Moves this cache's clock, for tests."""
        self.skew_ns += nanoseconds(seconds)

    def _validate(self):
        """Checks every invariant; for tests, on a cache that nobody is using."""
        cdef int64_t live = 0, retained = 0
        cdef size_t slots
        cdef Stripe *stripe
        cdef Slot *slot
        cdef Entry *entry
        cdef Py_hash_t hash
        cdef size_t at
        cdef int index, alias
        references = {}
        for index in range(self.lanes * STRIPES):
            stripe = &self.stripes[index]
            slots = 0
            for at in range(stripe.mask + 1):
                slot = &stripe.slots[at]
                if slot.key == NULL:
                    assert slot.entry == NULL
                    continue
                entry = slot.entry
                slots += 1
                hash = hash_of(slot.key)
                assert find(stripe, text_of(slot.key), hash) == slot, "a slot out of its probe run"
                assert self._stripe(hash, entry.lane) == stripe, "a slot in a wrong stripe"
                assert entry.state != DEAD, "a dead entry has a slot"
                seen, _ = references.get(<size_t>entry, (0, 0))
                references[<size_t>entry] = seen + 1, entry.references
                if slot.key == entry.key:
                    assert (entry.state == LIVE) == (entry.live != NULL)
                    assert slot.live == entry.live
                    assert (entry.state == LIVE) == (entry.client != NULL)
                    assert (entry.state == LIVE) == (entry.pending == NULL)
                    live += entry.state == LIVE
                    retained += entry.state != CONNECTING
                else:
                    assert slot.live == NULL
                    assert entry.state == LIVE, "another spelling of something not live"
                    assert any([entry.aliases[alias] == slot.key for alias in range(entry.alias_count)])
            assert slots == stripe.used
            assert slots == 0 or slots * 2 <= stripe.mask + 1, "a table too full"
        assert all(seen == counted for seen, counted in references.values()), "a leaked reference"
        assert live == self.counters.clients and retained == self.counters.retained
        assert retained <= self.max_clients, "more entries than max_clients"

    # -- inside ------------------------------------------------------------------------

    @cython.final
    cdef inline Stripe *_stripe(self, Py_hash_t hash, int lane) noexcept:
        return &self.stripes[lane * STRIPES + (<size_t>hash >> STRIPE_SHIFT)]

    @cython.final
    cdef inline int _this_lane(self) noexcept:
        return 0 if self.lanes == 1 else <int>(this_thread_number() % self.lanes)

    @cython.final
    cdef inline void _lock(self, Stripe *stripe) noexcept:
        lock_all(self.readers, lock_number(stripe, self.stripes))

    @cython.final
    cdef inline void _unlock(self, Stripe *stripe) noexcept:
        unlock_all(self.readers, lock_number(stripe, self.stripes))

    @cython.final
    cdef int _allocate(self, int lanes) except -1:
        cdef Stripe *stripes = <Stripe *>on_own_lines(lanes * STRIPES * sizeof(Stripe))
        cdef Reader *readers = <Reader *>on_own_lines(READERS * sizeof(Reader))
        cdef int index
        if stripes == NULL or readers == NULL:
            free_lines(stripes)
            free_lines(readers)
            raise MemoryError
        for index in range(lanes * STRIPES):
            stripes[index].slots = &NO_SLOTS
        if self.generation == fork_generation:
            self._free_tables()
        self.stripes = stripes
        self.readers = readers
        self.lanes = lanes
        return 0

    @cython.final
    cdef void _free_tables(self) noexcept:
        cdef int index
        for index in range(self.lanes * STRIPES if self.stripes != NULL else 0):
            if self.stripes[index].slots != &NO_SLOTS:
                free_lines(self.stripes[index].slots)
        free_lines(self.stripes)
        free_lines(self.readers)
        self.stripes = NULL
        self.readers = NULL

    @cython.final
    cdef void _unlink_locked(self, Stripe *stripe, Slot *home, Entry **gone) noexcept:
        """Takes an entry out of its home slot and puts it at the head of the chain."""
        cdef Entry *entry = home.entry
        if entry.state == LIVE:
            add_and_get(&self.counters.clients, -1)
        if entry.state != CONNECTING:
            add_and_get(&self.counters.retained, -1)
        entry.state = DEAD
        set_release(&entry.live, NULL)
        remove_locked(stripe, home)
        entry.next = gone[0]
        gone[0] = entry

    @cython.final
    cdef int _unlink_all(self, list pendings) except -1:
        cdef Entry *gone
        cdef Entry *entry
        cdef Stripe *stripe
        cdef size_t at
        cdef int index
        for index in range(self.lanes * STRIPES):
            stripe = &self.stripes[index]
            gone = NULL
            at = 0
            self._lock(stripe)
            while at <= stripe.mask:
                entry = stripe.slots[at].entry
                if entry != NULL and stripe.slots[at].key == entry.key:
                    if entry.state == LIVE:
                        add_and_get(&self.counters.invalidated, 1)
                    self._unlink_locked(stripe, &stripe.slots[at], &gone)
                else:
                    at += 1
            self._unlock(stripe)
            if pendings is not None:
                entry = gone
                while entry != NULL:
                    if entry.pending != NULL:
                        pendings.append(<object>entry.pending)
                    entry = entry.next
                self._release(gone)
            else:
                self._scrap(gone)
        return 0

    @cython.final
    cdef int _release(self, Entry *gone) except -1:
        """Ends a chain of unlinked entries and hands their clients to `_discard`."""
        if gone == NULL:
            return 0
        clients = []
        cdef Entry *entry = gone
        while entry != NULL:
            if entry.client != NULL:
                clients.append(<object>entry.client)
            entry = entry.next
        self._scrap(gone)
        if clients:
            self._discard(clients)
        return 0

    @cython.final
    cdef void _scrap(self, Entry *gone) noexcept:
        """Removes the other spellings of unlinked entries, then frees them."""
        cdef Entry *entry
        cdef Stripe *stripe
        cdef Slot *slot
        cdef Py_hash_t hash
        cdef bint found
        cdef int at
        while gone != NULL:
            entry = gone
            gone = entry.next
            for at in range(entry.alias_count):
                hash = hash_of(entry.aliases[at])
                stripe = self._stripe(hash, entry.lane)
                self._lock(stripe)
                slot = find(stripe, text_of(entry.aliases[at]), hash)
                found = slot != NULL and slot.entry == entry
                if found:
                    remove_locked(stripe, slot)
                self._unlock(stripe)
                if found:
                    add_and_get(&entry.references, -1)
            self._unpin(entry)

    @cython.final
    cdef void _unpin(self, Entry *entry) noexcept:
        if add_and_get(&entry.references, -1) == 0:
            free_entry(entry)

    @cython.final
    cdef int _make_room(self, str newest, int lane) except -1:
        """Evicts, least recently used first, until max_clients holds again."""
        while get_relaxed(&self.counters.retained) > self.max_clients:
            if not self._evict_one(newest, lane):
                break
        return 0

    @cython.final
    cdef bint _evict_one(self, str newest, int lane) except -1:
        """Evicts the oldest entry of a sample of whole stripes; exact when all fit in it."""
        cdef Entry *oldest = NULL
        cdef Entry *gone = NULL
        cdef Entry *entry
        cdef Entry *previous
        cdef Stripe *stripe
        cdef Slot *slot
        cdef int64_t age, oldest_age = 0, seen = 0, count = self.lanes * STRIPES, index
        cdef int64_t now = monotonic_now() + self.skew_ns
        cdef int64_t cursor = add_and_get(&self.eviction_cursor, 1)
        cdef Py_hash_t hash = exact_str_hash(<PyObject *>newest)
        cdef size_t at
        for index in range(count):
            stripe = &self.stripes[(cursor + index) % count]
            previous = oldest
            self._lock(stripe)
            for at in range(stripe.mask + 1):
                entry = stripe.slots[at].entry
                if entry == NULL or stripe.slots[at].key != entry.key or entry.state == CONNECTING:
                    continue
                seen += 1
                if entry.lane == lane and key_is(entry.key, <PyObject *>newest, hash):
                    continue
                # A remembered failure goes before any client.
                age = NEVER if entry.state == FAILED else now - last_used(&stripe.slots[at])
                if oldest == NULL or age > oldest_age:
                    oldest = entry
                    oldest_age = age
            if oldest != previous:
                add_and_get(&oldest.references, 1)
            self._unlock(stripe)
            if previous != NULL and oldest != previous:
                self._unpin(previous)
            if oldest != NULL and seen >= EVICTION_SAMPLE:
                break
        if oldest == NULL:
            return False
        hash = hash_of(oldest.key)
        stripe = self._stripe(hash, oldest.lane)
        self._lock(stripe)
        slot = find(stripe, text_of(oldest.key), hash)
        if slot != NULL and slot.entry == oldest:
            # Claimed first, so that two threads never make the same room twice; `_make_room`
            # looks again afterwards, for those who counted meanwhile.
            if add_and_get(&self.counters.retained, -1) >= self.max_clients:
                if oldest.state == LIVE:
                    add_and_get(&self.counters.evicted_capacity, 1)
                self._unlink_locked(stripe, slot, &gone)
            add_and_get(&self.counters.retained, 1)
        self._unlock(stripe)
        self._unpin(oldest)
        self._release(gone)
        return True


cdef void *live_client(void *cache, void *url) noexcept:
    return (<ClientCache>cache)._hit(<PyObject *>url)


# -- garbage collection ------------------------------------------------------------------
#
# A client may lead back to its resolver (through a middleware, say). The collector sees
# such cycles only if the type shows it what the tables hold. Entries are visited through
# their home slots; one that is between slots is not visited, which only delays.

cdef int (*traverse_members)(PyObject *, visitproc, void *) noexcept
cdef int (*clear_members)(PyObject *) noexcept


cdef int traverse(PyObject *self, visitproc visit, void *arg) noexcept:
    cdef Stripe *stripes = (<ClientCache>self).stripes
    cdef int count = (<ClientCache>self).lanes * STRIPES if stripes != NULL else 0
    cdef int index, stop
    if (<ClientCache>self).generation != fork_generation:
        count = 0   # what was inherited through a fork must look reachable for ever
    cdef Entry *entry
    cdef size_t at
    for index in range(count):
        for at in range(stripes[index].mask + 1):
            entry = stripes[index].slots[at].entry
            if entry == NULL or entry.key != stripes[index].slots[at].key:
                continue
            if entry.client != NULL:
                stop = visit(entry.client, arg)
                if stop:
                    return stop
            if entry.pending != NULL:
                stop = visit(entry.pending, arg)
                if stop:
                    return stop
    return traverse_members(self, visit, arg)


cdef int clear(PyObject *self) noexcept:
    if (<ClientCache>self).stripes != NULL and (<ClientCache>self).generation == fork_generation:
        (<ClientCache>self)._unlink_all(None)
    return clear_members(self)


traverse_members = (<PyTypeObject *>ClientCache).tp_traverse
clear_members = (<PyTypeObject *>ClientCache).tp_clear
(<PyTypeObject *>ClientCache).tp_traverse = traverse
(<PyTypeObject *>ClientCache).tp_clear = clear

find_clock()
if watch_forks() != 0:
    raise MemoryError("pthread_atfork")


def fast_hits(cls):
    """Class decorator for a subclass of ClientCache: makes its hits as fast as the base's.

    CPython skips its generic call machinery for a C method only on exact instances of
    the type that the method's descriptor names, so the subclass gets one of its own.
    """
    cdef PyObject *inherited = <PyObject *>ClientCache.__dict__["get_flight_client_for_url"]
    cls.get_flight_client_for_url = PyDescr_NewMethod(
        <PyTypeObject *>cls, (<PyMethodDescrObject *>inherited).d_method)
    return cls


def leak(thing):
    """Keeps `thing` for ever: what was inherited through a fork must never be freed."""
    Py_INCREF(<PyObject *>thing)
