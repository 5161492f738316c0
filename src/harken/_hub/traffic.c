/* SPDX-License-Identifier: MIT
 *
 * What a Connection notes of its traffic, and tells of it: see harken.stamps and harken.tracing. */
#include "hub.h"

/* The marks, which are made when first needed; NULL with an exception when there is no memory for them. */
Marks *marks_made(State *state) {
    if (state->marked == NULL) {
        Marks new = {.moved = now_ns()};
        state->marked = PyBytes_FromStringAndSize((char *)&new, sizeof new);
    }
    return marks_of(state);
}

/* Bytes have moved. */
void note_moved(State *state, int direction, size_t size) {
    Marks *marks = state->stream ? marks_of(state) : marks_made(state);
    if (marks == NULL) {
        PyErr_Clear();
        return;
    }
    marks->count[direction] += size;
    if (!state->stream)
        marks->moved = now_ns();
    if (direction == READ && marks->first == 0)
        begin_request(marks, state->stream ? now_ns() : marks->moved);
}

PyObject *connection_keep_stamps(PyObject *self, PyObject *none) {
    return marks_made(state_of(self)) == NULL ? NULL : Py_NewRef(Py_None);
}

PyObject *connection_stamps(PyObject *self, PyObject *none) {
    Marks *marks = marks_of(state_of(self)), nothing = {0};
    if (marks == NULL)
        marks = &nothing;
    int64_t reading = marks->waits[READ] ? marks->since[READ] : 0, writing = marks->waits[WRITE] ? marks->since[WRITE] : 0;
    return Py_BuildValue("ddddKKK", (double)reading / 1e9, (double)writing / 1e9, (double)marks->first / 1e9,
                         (double)marks->moved / 1e9, (unsigned long long)marks->count[READ],
                         (unsigned long long)marks->count[WRITE], (unsigned long long)marks->requests);
}

/* -- traces -------------------------------------------------------------------------------------------------------- */

#define SHOWN 4096 /* as MOST_SHOWN of harken.tracing: what is told of one piece */
static PyObject *traffic[2]; /* tell() and tell_call() of harken.tracing, once anything is traced */

static int find_listeners(void) {
    PyObject *module = PyImport_ImportModule("harken.tracing");
    if (module == NULL)
        return -1;
    Py_XSETREF(traffic[0], PyObject_GetAttrString(module, "tell"));
    Py_XSETREF(traffic[1], PyObject_GetAttrString(module, "tell_call"));
    Py_DECREF(module);
    return traffic[0] == NULL || traffic[1] == NULL ? -1 : 0;
}

/* Tell whoever follows the connection. An exception that is under way stays; one of the listener's is nobody's. */
static void tell(int which, PyObject *told) {
    PyObject *done = told == NULL || traffic[which] == NULL ? NULL : PyObject_CallObject(traffic[which], told);
    if (done == NULL && PyErr_Occurred())
        PyErr_WriteUnraisable(traffic[which]);
    Py_XDECREF(done);
    Py_XDECREF(told);
}

void tell_traffic(PyObject *self, int direction, const char *data, size_t size) {
    PyObject *type, *error, *trace;
    PyErr_Fetch(&type, &error, &trace);
    /* Other threads may run meanwhile, whose hubs receive into the same scratch. */
    PyObject *kept = data == scratch ? PyBytes_FromStringAndSize(data, (Py_ssize_t)size) : NULL;
    Py_ssize_t shown = data == NULL ? 0 : size < SHOWN ? (Py_ssize_t)size : SHOWN;
    tell(0, Py_BuildValue("OOy#n", self, direction == WRITE ? Py_True : Py_False, data == NULL ? "" : data, shown,
                          (Py_ssize_t)size));
    if (kept != NULL)
        memcpy(scratch, PyBytes_AS_STRING(kept), size);
    Py_XDECREF(kept);
    PyErr_Restore(type, error, trace);
}

void tell_call(PyObject *self, const char *name, PyObject *args, PyObject *result) {
    tell(1, Py_BuildValue("OsOO", self, name, args, result));
}

PyObject *connection_trace(PyObject *self, PyObject *yes) {
    int traced = PyObject_IsTrue(yes);
    if (traced < 0 || (traced && find_listeners() < 0) || settle_of(self) < 0)
        return NULL; /* what was said before is not told */
    state_of(self)->traced = traced;
    Py_RETURN_NONE;
}
