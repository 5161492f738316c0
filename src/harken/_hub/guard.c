/* SPDX-License-Identifier: MIT
 *
 * Guard: what stands for the state of one connection's OpenSSL. A plain lock, which C takes and gives back without a
 * call by Python: Python's own costs 0.1 us each time, four times a message. */
#include "openssl.h"

typedef struct {
    PyObject_HEAD
    PyThread_type_lock lock;
} Guard;

HIDDEN PyTypeObject *Guard_Type;

bool guard_try(PyObject *self) { return PyThread_acquire_lock(((Guard *)self)->lock, NOWAIT_LOCK) == PY_LOCK_ACQUIRED; }

void guard_take(PyObject *self) {
    if (guard_try(self))
        return;
    Py_BEGIN_ALLOW_THREADS /* who has it may want the GIL first */
    PyThread_acquire_lock(((Guard *)self)->lock, WAIT_LOCK);
    Py_END_ALLOW_THREADS
}

void guard_give_back(PyObject *self) { PyThread_release_lock(((Guard *)self)->lock); }

static PyObject *guard_enter(PyObject *self, PyObject *none) {
    guard_take(self);
    Py_RETURN_NONE;
}

static PyObject *guard_exit(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    guard_give_back(self);
    Py_RETURN_NONE;
}

static PyObject *guard_new(PyTypeObject *type, PyObject *args, PyObject *words) {
    PyThread_type_lock lock = PyThread_allocate_lock();
    PyObject *self = lock == NULL ? PyErr_NoMemory() : type->tp_alloc(type, 0);
    if (self != NULL)
        ((Guard *)self)->lock = lock;
    else if (lock != NULL)
        PyThread_free_lock(lock);
    return self;
}

static void guard_dealloc(PyObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    PyThread_free_lock(((Guard *)self)->lock);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyMethodDef guard_methods[] = {
    {"__enter__", guard_enter, METH_NOARGS, "Take it, waiting without the GIL."},
    {"__exit__", FAST(guard_exit), METH_FASTCALL, "Give it back."},
    {NULL},
};

static PyType_Slot guard_slots[] = {
    {Py_tp_doc, "Stands for the state of one connection's OpenSSL: held by whoever calls it."},
    {Py_tp_new, guard_new},
    {Py_tp_dealloc, guard_dealloc},
    {Py_tp_methods, guard_methods},
    {0, NULL},
};

static PyType_Spec guard_spec = {
    .name = "harken._hub.compiled.Guard",
    .basicsize = sizeof(Guard),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = guard_slots,
};

int guard_ready(PyObject *module) {
    Guard_Type = (PyTypeObject *)PyType_FromSpec(&guard_spec);
    return Guard_Type == NULL ? -1 : PyModule_AddObjectRef(module, "Guard", (PyObject *)Guard_Type);
}
