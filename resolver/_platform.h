/* What _cache.pyx needs from C: a lock, atomics, a clock, forks, thread numbers, str.
 *
 * Everything is static inline; no Python code runs from here.
 */
#pragma once

#include <Python.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <time.h>

#define get_relaxed(where) __atomic_load_n(where, __ATOMIC_RELAXED)
#define set_relaxed(where, value) __atomic_store_n(where, value, __ATOMIC_RELAXED)
#define get_acquire(where) __atomic_load_n(where, __ATOMIC_ACQUIRE)
#define set_release(where, value) __atomic_store_n(where, value, __ATOMIC_RELEASE)
#define add_and_get(where, amount) __atomic_add_fetch(where, amount, __ATOMIC_ACQ_REL)

/* Nanoseconds on a monotonic clock; coarse (a few ms) where the system has a coarse one,
 * because that is read without touching the hardware counter. */
#ifdef CLOCK_MONOTONIC_COARSE
#define COARSE_CLOCK CLOCK_MONOTONIC_COARSE
#else
#define COARSE_CLOCK CLOCK_MONOTONIC
#endif
static int (*read_clock)(clockid_t, struct timespec *) = clock_gettime;
static inline int64_t monotonic_now(void) {
    struct timespec now;
    read_clock(COARSE_CLOCK, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

/* Skips the C library on the way to what Linux maps into each process to read clocks, where that
 * can be found: a third of the time. */
static inline void find_clock(void) {
#if defined(__linux__) && defined(__LP64__)
    struct timespec now;
    void *mapped = dlopen("linux-vdso.so.1", RTLD_LAZY | RTLD_NOLOAD);
    void *found = mapped != NULL ? dlsym(mapped, "__vdso_clock_gettime") : NULL;
    if (found != NULL) memcpy(&read_clock, &found, sizeof found);
    if (read_clock(COARSE_CLOCK, &now) != 0) read_clock = clock_gettime;
#endif
}

/* A str keeps its hash once computed; computing it for an exact str runs no user code. */
static inline Py_hash_t known_hash(PyObject *text) {
    return get_relaxed(&((PyASCIIObject *)text)->hash);
}

static inline Py_hash_t exact_str_hash(PyObject *text) {
    Py_hash_t hash = known_hash(text);
    return hash != -1 ? hash : PyObject_Hash(text);
}

static inline int exact_str_equal(PyObject *a, PyObject *b) {
    Py_ssize_t length = PyUnicode_GET_LENGTH(a);
    int kind = (int)PyUnicode_KIND(a);
    return length == PyUnicode_GET_LENGTH(b) && kind == (int)PyUnicode_KIND(b)
           && memcmp(PyUnicode_DATA(a), PyUnicode_DATA(b), (size_t)length * kind) == 0;
}

/* Hands an owned reference to Cython, which would otherwise take one more. */
static inline PyObject *give(PyObject *owned) { return owned; }

/* Zeroed memory for what threads read and write at the same time; `free_lines` frees it.
 *
 * Without the GIL it shares no cache line. Lines count in pairs: some processors fetch the
 * neighbour along with the one that is wanted. */
#ifdef Py_GIL_DISABLED
static inline void *on_own_lines(size_t size) {
    const uintptr_t last = 127;
    char *memory = PyMem_RawCalloc(1, sizeof(void *) + last + ((size + last) & ~last));
    if (memory == NULL) return NULL;
    void **lines = (void **)(((uintptr_t)memory + sizeof(void *) + last) & ~last);
    lines[-1] = memory;
    return lines;
}
static inline void free_lines(void *lines) {
    if (lines != NULL) PyMem_RawFree(((void **)lines)[-1]);
}
#else
#define on_own_lines(size) PyMem_RawCalloc(1, size)
#define free_lines(lines) PyMem_RawFree(lines)
#endif

/* A spelling of a URL that the cache holds.
 *
 * With the GIL, the str itself. Without it, a copy among the cache's own memory: next to a
 * str that a caller made lie others that threads count their references to, and two threads
 * that only read the one would wait for whoever writes to the other. */
#ifdef Py_GIL_DISABLED
typedef struct {
    PyObject *text;
    Py_hash_t hash;
    Py_ssize_t length;
    unsigned char kind;
    char data[];
} Key;
static inline Key *new_key(PyObject *text) {
    size_t size = (size_t)PyUnicode_GET_LENGTH(text) * (size_t)PyUnicode_KIND(text);
    Key *key = PyMem_RawMalloc(offsetof(Key, data) + size);
    if (key == NULL) return NULL;
    key->text = Py_NewRef(text);
    key->hash = exact_str_hash(text);
    key->length = PyUnicode_GET_LENGTH(text);
    key->kind = (unsigned char)PyUnicode_KIND(text);
    memcpy(key->data, PyUnicode_DATA(text), size);
    return key;
}
static inline void free_key(Key *key) {
    if (key != NULL) Py_DECREF(key->text);
    PyMem_RawFree(key);
}
static inline PyObject *text_of(Key *key) { return key->text; }
static inline Py_hash_t hash_of(Key *key) { return key->hash; }
static inline int key_is(Key *key, PyObject *text, Py_hash_t hash) {
    return key->text == text
           || (key->hash == hash && key->length == PyUnicode_GET_LENGTH(text)
               && key->kind == (int)PyUnicode_KIND(text)
               && memcmp(key->data, PyUnicode_DATA(text), (size_t)key->length * key->kind) == 0);
}
#else
typedef PyObject Key;
#define new_key(text) Py_NewRef(text)
#define free_key(key) Py_XDECREF(key)
#define text_of(key) (key)
#define hash_of(key) known_hash(key)
static inline int key_is(Key *key, PyObject *text, Py_hash_t hash) {
    return key == text || (known_hash(key) == hash && exact_str_equal(key, text));
}
#endif

/* Counts the forks between the first process and this one, C-level forks included. */
static int fork_generation = 0;
static void count_fork(void) { fork_generation++; }
static inline int watch_forks(void) { return pthread_atfork(NULL, NULL, count_fork); }

/* Threads are numbered in the order in which they come, so that lanes fill evenly. */
static int64_t threads_seen = 0;
static _Thread_local int64_t thread_number = 0;
static inline int64_t this_thread_number(void) {
    if (thread_number == 0) {
        thread_number = add_and_get(&threads_seen, 1);
    }
    return thread_number - 1;
}

#define STRIPES 64      /* a power of two, and */
#define STRIPE_SHIFT (8 * (int)sizeof(Py_hash_t) - 6) /* the bits that do not choose it */

/* The locks of all stripes for one group of threads: one cache line, then their hits.
 *
 * With the GIL, the GIL is every lock: no critical section of the cache can release it.
 * A PyMutex lets a waiting thread detach, so it never holds up a garbage collection. */
#ifdef Py_GIL_DISABLED
#define READERS 16
#define ONE_LOCK 0
typedef struct {
    PyMutex locks[STRIPES];
    int64_t hits;
    char padding[56];
} Reader;
static inline int this_reader(void) { return (int)(this_thread_number() % READERS); }
#define count_hit(reader) ((void)__atomic_fetch_add(&(reader)->hits, 1, __ATOMIC_RELAXED))
#define lock_one(reader, stripe) PyMutex_Lock(&(reader)->locks[stripe])
#define unlock_one(reader, stripe) PyMutex_Unlock(&(reader)->locks[stripe])
static inline void lock_all(Reader *readers, int stripe) {
    for (int at = 0; at < READERS; at++) PyMutex_Lock(&readers[at].locks[stripe]);
}
static inline void unlock_all(Reader *readers, int stripe) {
    for (int at = READERS - 1; at >= 0; at--) PyMutex_Unlock(&readers[at].locks[stripe]);
}
#else
#define READERS 1
#define ONE_LOCK 1
typedef struct {
    int64_t hits;
    char padding[56];
} Reader;
#define this_reader() 0
#define count_hit(reader) ((void)(reader)->hits++)
#define lock_one(reader, stripe) ((void)(stripe))
#define unlock_one(reader, stripe) ((void)(stripe))
#define lock_all(readers, stripe) ((void)(stripe))
#define unlock_all(readers, stripe) ((void)(stripe))
#endif
