/* SPDX-License-Identifier: MIT
 *
 * Handle: a reference that does not keep its connection, at a third of a weak reference's size. */
#include "hub.h"

typedef struct Handle {
    PyObject_HEAD
    PyObject *target; /* borrowed; NULL once it is gone */
} Handle;

static PyTypeObject *Handle_Type;

static PyObject *handle_call(PyObject *self, PyObject *args, PyObject *words) {
    PyObject *target = ((Handle *)self)->target;
    return Py_NewRef(target == NULL ? Py_None : target);
}

static void handle_dealloc(PyObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyType_Slot handle_slots[] = {
    {Py_tp_doc, "Called, it returns its connection, or None when that is gone."},
    {Py_tp_call, handle_call},
    {Py_tp_dealloc, handle_dealloc},
    {0, NULL},
};

static PyType_Spec handle_spec = {
    .name = "harken._hub.compiled.Handle",
    .basicsize = sizeof(Handle),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = handle_slots,
};

PyObject *connection_handle(PyObject *self, PyObject *none) {
    State *state = state_of(self);
    if (state->handle == NULL) {
        if ((state->handle = (Handle *)Handle_Type->tp_alloc(Handle_Type, 0)) == NULL)
            return NULL;
        state->handle->target = PyObject_GC_IsFinalized(self) ? NULL : self; /* nothing would tell of its end */
    }
    return Py_NewRef(state->handle);
}

/* The connection goes. */
void handle_lose(State *state) {
    Handle *handle = state->handle;
    if (handle == NULL)
        return;
    state->handle = NULL;
    handle->target = NULL;
    Py_DECREF(handle);
}

int handle_ready(void) {
    Handle_Type = (PyTypeObject *)PyType_FromSpec(&handle_spec);
    return Handle_Type == NULL ? -1 : 0;
}
