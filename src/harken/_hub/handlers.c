/* SPDX-License-Identifier: MIT
 *
 * Calling handlers, and telling of those that raise. */
#include "hub.h"

static PyObject *words[4], *word_init, *no_args;

/* A handler raised. What `failed` raises, as it does what is no Exception, is shown as in a thread; GreenletExit goes on:
 * the hub is being closed. */
int tell_failure(PyObject *failed, PyObject *request, PyObject *address) {
    if (PyErr_ExceptionMatches(PyExc_GreenletExit))
        return -1;
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    PyErr_NormalizeException(&type, &value, &trace);
    if (trace != NULL)
        PyException_SetTraceback(value, trace);
    PyObject *before = PyErr_GetHandledException();
    PyErr_SetHandledException(value); /* handle_error() asks sys.exc_info() */
    PyObject *done = PyObject_CallFunctionObjArgs(failed, request, address, value, NULL);
    int result = 0;
    if (done == NULL && (result = PyErr_ExceptionMatches(PyExc_GreenletExit) ? -1 : 0) == 0)
        show_exception(failed);
    Py_XDECREF(done);
    PyErr_SetHandledException(before);
    Py_XDECREF(before);
    Py_XDECREF(type);
    Py_XDECREF(value);
    Py_XDECREF(trace);
    return result;
}

/* What BaseRequestHandler's constructor does when its setup() and finish() are its own, which do nothing. */
PyObject *handle_plainly(PyTypeObject *type, PyObject *const *args) {
    PyObject *handler = type->tp_new(type, no_args, NULL), *done = NULL;
    if (handler != NULL && PyObject_SetAttr(handler, words[0], args[0]) == 0 &&
        PyObject_SetAttr(handler, words[1], args[1]) == 0 && PyObject_SetAttr(handler, words[2], args[2]) == 0) {
        PyObject *self[] = {handler};
        done = PyObject_VectorcallMethod(words[3], self, 1, NULL);
    }
    Py_XDECREF(handler);
    return done;
}

/* Call the handler class as `type.__call__` would, with one frame of the C stack less to be kept while it waits. */
PyObject *handle_fully(PyObject *kind, PyObject *const *args) {
    PyTypeObject *type = (PyTypeObject *)kind;
    if (!PyType_CheckExact(kind) || type->tp_new != PyBaseObject_Type.tp_new)
        return PyObject_Vectorcall(kind, args, 3, NULL);
    PyObject *handler = type->tp_new(type, no_args, NULL), *done = NULL;
    if (handler != NULL) {
        PyObject *all[] = {handler, args[0], args[1], args[2]};
        done = PyObject_VectorcallMethod(word_init, all, 4, NULL);
    }
    Py_XDECREF(handler);
    return done;
}

int handlers_ready(void) {
    static const char *texts[] = {"request", "client_address", "server", "handle"};
    for (int i = 0; i < 4; i++)
        if ((words[i] = PyUnicode_InternFromString(texts[i])) == NULL)
            return -1;
    word_init = PyUnicode_InternFromString("__init__");
    no_args = PyTuple_New(0);
    return word_init == NULL || no_args == NULL ? -1 : 0;
}
