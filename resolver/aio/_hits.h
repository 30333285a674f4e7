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
