/* What _hits.pyx needs from C: which loop this thread runs, which task, and weak references.
 *
 * Everything is static inline; no Python code runs from here.
 */
#pragma once

#include <Python.h>
#include <stdint.h>

/* The event loop that this thread runs, as far as can be told at once; borrowed, or NULL.
 *
 * asyncio's own answer costs a system call before 3.12, more than all the rest of a hit. But
 * whoever runs a loop installs that loop's bound methods as this thread's asynchronous-generator
 * hooks for as long as it runs (PEP 525), so the method's owner is the loop. */
static inline PyObject *likely_running_loop(void) {
    PyObject *hook = PyThreadState_Get()->async_gen_firstiter;
    if (hook == NULL) return NULL;
    if (PyMethod_Check(hook)) return PyMethod_GET_SELF(hook);
    if (PyCFunction_Check(hook)) return PyCFunction_GET_SELF(hook);
    return NULL;
}

/* A number below `lanes` that stays the same for the life of a task: each has a context. */
static inline int lane_of_task(int lanes) {
    uint64_t context = (uint64_t)(uintptr_t)PyThreadState_Get()->context;
    return (int)(((context >> 4) * UINT64_C(0x9E3779B97F4A7C15) >> 33) % (uint64_t)lanes);
}

/* What a weakref.ref refers to, as a new reference; NULL, without an error, once it is gone. */
static inline PyObject *weakly_held(PyObject *reference) {
    PyObject *object = NULL;
#if PY_VERSION_HEX >= 0x030D0000
    if (PyWeakref_GetRef(reference, &object) < 0) PyErr_Clear();
#else
    object = PyWeakref_GET_OBJECT(reference);
    object = object == Py_None ? NULL : Py_NewRef(object);
#endif
    return object;
}

/* Hands an owned reference to Cython, which would otherwise take one more. */
static inline PyObject *give(PyObject *owned) { return owned; }

/* How `await` gets what a step returns. Until 3.11 it sends to whatever has am_send. From 3.12 on
 * it asks anything but a coroutine for its next item, and the value comes in a StopIteration.
 * Making one costs as much as the rest of a hit, so a few are not freed but used again. They are
 * of a type of their own, whose dealloc is `free_ended`. */
#if PY_VERSION_HEX >= 0x030C0000
#define STEPS_BY_NEXT 1
#else
#define STEPS_BY_NEXT 0
#endif

#if STEPS_BY_NEXT && !defined(Py_GIL_DISABLED)
enum { MOST_KEPT = 64 };
static PyObject *kept_ended[MOST_KEPT]; /* without value, untracked, their count of 0 */
static int kept_count = 0;
static destructor really_free_ended;

static inline void keep_ended(PyTypeObject *type, destructor free_ended) {
    really_free_ended = type->tp_dealloc;
    type->tp_dealloc = free_ended;
}

static void free_ended(PyObject *self) {
    PyStopIterationObject *ended = (PyStopIterationObject *)self;
    PyObject *value = ended->value;
    if (kept_count < MOST_KEPT && ended->dict == NULL && ended->notes == NULL &&
        ended->traceback == NULL && ended->context == NULL && ended->cause == NULL) {
        PyObject_GC_UnTrack(self);
        ended->value = NULL;
        kept_ended[kept_count++] = self;
        Py_XDECREF(value); /* last: it may run a finalizer, which may come back here */
    } else {
        really_free_ended(self);
    }
}

/* Raises an exception of `type`, a StopIteration, with `value`, which it takes over. */
static inline void raise_ended(PyTypeObject *type, PyObject *value) {
    PyObject *ended;
    if (kept_count) {
        ended = kept_ended[--kept_count];
        _Py_NewReference(ended);
        PyObject_GC_Track(ended);
    } else {
        ended = PyObject_CallNoArgs((PyObject *)type);
        if (ended == NULL) {
            Py_DECREF(value);
            return;
        }
    }
    Py_XSETREF(((PyStopIterationObject *)ended)->value, value);
    PyErr_SetRaisedException(ended); /* and no __context__, which costs a walk */
}
#else
static inline void keep_ended(PyTypeObject *type, destructor free_ended) {}
static void free_ended(PyObject *self) {}
static inline void raise_ended(PyTypeObject *type, PyObject *value) {
    PyObject *ended = PyObject_CallOneArg((PyObject *)type, value);
    Py_DECREF(value);
    if (ended != NULL) {
        PyErr_SetObject((PyObject *)type, ended);
        Py_DECREF(ended);
    }
}
#endif
