/* What _hits.pyx needs from C: which loop this thread runs, which task, and weak references.
 *
 * Everything is static inline; no Python code runs from here.
 */
#pragma once

#include <Python.h>
#include <stdint.h>

/* This thread's state. CPython 3.12 and 3.13 keep the pointer to it in thread-local memory, which
 * costs two calls to find, while the state that the interpreter began with has a place in it and
 * is never freed. A state is active from when its thread takes the GIL until it gives it away, so
 * with the GIL an active state is this thread's. */
#if PY_VERSION_HEX >= 0x030C0000 && PY_VERSION_HEX < 0x030E0000 && !defined(Py_GIL_DISABLED)
static PyThreadState inactive;
static PyThreadState *first_state = &inactive;
static inline PyThreadState *this_state(void) {
    return first_state->_status.active ? first_state : PyThreadState_Get();
}
static inline void note_state(void) {
    PyThreadState *state = PyThreadState_Get();
    if (state->id == 1 && state->interp == PyInterpreterState_Main()) first_state = state;
}
#else
#define this_state() PyThreadState_Get()
static inline void note_state(void) {}
#endif

/* The event loop that this thread runs, as far as can be told at once; borrowed, or NULL.
 *
 * asyncio's own answer costs a system call before 3.12, more than all the rest of a hit. But
 * whoever runs a loop installs that loop's bound methods as this thread's asynchronous-generator
 * hooks for as long as it runs (PEP 525), so the method's owner is the loop. */
static inline PyObject *likely_running_loop(void) {
    PyObject *hook = this_state()->async_gen_firstiter;
    if (hook == NULL) return NULL;
    if (PyMethod_Check(hook)) return PyMethod_GET_SELF(hook);
    if (PyCFunction_Check(hook)) return PyCFunction_GET_SELF(hook);
    return NULL;
}

/* A number below `lanes` that stays the same for the life of a task: each has a context. */
static inline int lane_of_task(int lanes) {
    uint64_t context;
    if (lanes == 1) return 0;
    context = (uint64_t)(uintptr_t)this_state()->context;
    return (int)(((context >> 4) * UINT64_C(0x9E3779B97F4A7C15) >> 33) % (uint64_t)lanes);
}

/* With the GIL, what an object holds may be borrowed from it until something lets others run;
 * a look-up does not. Without, a reference of one's own is needed. */
#ifdef Py_GIL_DISABLED
#define MAY_BORROW 0
#else
#define MAY_BORROW 1
#endif

/* What a weakref.ref refers to, until `let_go`; NULL, without an error, once it is gone. */
static inline PyObject *hold(PyObject *reference) {
    PyObject *object = NULL;
#if MAY_BORROW
    object = ((PyWeakReference *)reference)->wr_object;
    if (object == Py_None || Py_REFCNT(object) == 0) object = NULL; /* its finalizer runs */
#else
    if (PyWeakref_GetRef(reference, &object) < 0) PyErr_Clear();
#endif
    return object;
}

static inline void let_go(PyObject *held) {
    if (!MAY_BORROW) Py_XDECREF(held);
}

/* Whether a weakref.ref refers to `object`. Not so if either of them is NULL. */
static inline int refers_to(PyObject *reference, PyObject *object) {
    PyObject *held;
    if (reference == NULL || object == NULL) return 0;
    held = hold(reference);
    let_go(held);
    return held == object;
}

/* Hands an owned reference to Cython, which would otherwise take one more. */
static inline PyObject *give(PyObject *owned) { return owned; }

/* What is in `where`, which is NULL from now on. Two threads never get the same. */
static inline PyObject *taken_from(PyObject **where) {
#if MAY_BORROW
    PyObject *object = *where;
    *where = NULL;
    return object;
#else
    return __atomic_exchange_n(where, NULL, __ATOMIC_ACQ_REL);
#endif
}

/* How `await` gets what a step returns. Until 3.11 it sends to whatever has am_send. From 3.12 on
 * it asks anything but a coroutine for its next item, and the value comes in a StopIteration. */
#if PY_VERSION_HEX >= 0x030C0000
#define STEPS_BY_NEXT 1
#else
#define STEPS_BY_NEXT 0
#endif

/* Raises a new StopIteration with `value`, which it takes over. */
static inline void raise_stop(PyObject *value) {
    PyObject *stop = PyObject_CallOneArg(PyExc_StopIteration, value);
    Py_DECREF(value);
    if (stop == NULL) return;
    PyErr_SetObject(PyExc_StopIteration, stop); /* or a tuple would become its arguments */
    Py_DECREF(stop);
}

/* To make a StopIteration costs as much as all the rest of a hit. So where `await` wants one and
 * the GIL is every lock, a Found has one of its own, and the next hit takes both of them again. */
#if STEPS_BY_NEXT && !defined(Py_GIL_DISABLED)
static inline PyObject *new_stop(void) {
    PyObject *stop = PyObject_CallNoArgs(PyExc_StopIteration);
    if (stop == NULL) PyErr_Clear(); /* it will be done without */
    else Py_CLEAR(((PyStopIterationObject *)stop)->value);
    return stop;
}

/* Raises `stop`, which has no value, with `value`, which it takes over. */
static inline void raise_own(PyObject *stop, PyObject *value) {
    ((PyStopIterationObject *)stop)->value = value;
    PyErr_SetRaisedException(Py_NewRef(stop)); /* and no __context__, which costs a walk */
}
#else
static inline PyObject *new_stop(void) { return NULL; }
static inline void raise_own(PyObject *stop, PyObject *value) {}
#endif

/* Whether whoever takes a step lets go of `found` right after it. Then nothing leads from a frame
 * to `found`, so none through its StopIteration back: no cycle that a collector would have to see. */
static inline int is_temporary(PyObject *found) {
#if PY_VERSION_HEX >= 0x030E0000
    return PyUnstable_Object_IsUniqueReferencedTemporary(found);
#else
    return Py_REFCNT(found) == 1;
#endif
}

/* Whether nobody has kept this StopIteration, nor seen and changed it. */
static inline int is_unseen(PyObject *stop) {
    PyStopIterationObject *self = (PyStopIterationObject *)stop;
    return Py_REFCNT(self) == 1 && self->dict == NULL && self->notes == NULL &&
           self->traceback == NULL && self->context == NULL && self->cause == NULL;
}

/* What it was raised with, as a new reference, or NULL; it has none any more. */
static inline PyObject *taken_value(PyObject *stop) {
    return taken_from(&((PyStopIterationObject *)stop)->value);
}

enum { MOST_KEPT = 64 };
static PyObject *kept[MOST_KEPT]; /* Founds with their StopIterations, owned */
static int kept_count = 0;

static inline PyObject *kept_found(void) { return kept_count ? kept[--kept_count] : NULL; }

/* Keeps `found`, which its last holder has let go of, unless there are enough. */
static inline int keep(PyObject *found) {
    if (kept_count == MOST_KEPT) return 0;
    Py_SET_REFCNT(found, 1);
    kept[kept_count++] = found;
    return 1;
}
