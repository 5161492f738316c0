/* SPDX-License-Identifier: MIT
 *
 * The module harken._hub.compiled. */
#include "openssl.h"

HIDDEN void **greenlet_api;

static PyObject *before_fork(PyObject *module, PyObject *none) {
    hubs_before_fork();
    Py_RETURN_NONE;
}

static PyObject *after_fork(PyObject *module, PyObject *none) {
    hubs_after_fork();
    Py_RETURN_NONE;
}

static PyObject *after_fork_here(PyObject *module, PyObject *none) {
    forked = true;
    Py_RETURN_NONE;
}

static PyMethodDef functions[] = {
    {"current", hub_current, METH_NOARGS, "The hub whose green thread calls; None elsewhere."},
    {"on_growth", on_growth, METH_O, "on_growth(function): tell function(connection, bytes) what large readers hold."},
    {"quicken", quicken, METH_O, "quicken(class): give the connection under TLS what secured.c has."},
    {"reach_openssl", reach_openssl, METH_O, "reach_openssl(yes): use OpenSSL without the ssl module between, if it can be done; is it?"},
    {"openssl_keepers", openssl_keepers, METH_NOARGS, "How many connections keep OpenSSL's buffers over their messages."},
    {"accept", accept_one, METH_O, "accept(listener): take a connection, (Connection, address), without waiting."},
    {"rebuild", rebuild, METH_VARARGS, "Make a Connection that has travelled from another process."},
    {"_before_fork", before_fork, METH_NOARGS, "What os.register_at_fork calls before it."},
    {"_after_fork", after_fork, METH_NOARGS, "What os.register_at_fork calls in the child."},
    {"_after_fork_here", after_fork_here, METH_NOARGS, "What it calls in the parent."},
    {NULL},
};

static int watch_forks(PyObject *module) {
    PyObject *before = PyObject_GetAttrString(module, "_before_fork"), *done = NULL;
    PyObject *function = PyObject_GetAttrString(module, "_after_fork");
    PyObject *here = PyObject_GetAttrString(module, "_after_fork_here");
    PyObject *os = PyImport_ImportModule("os");
    PyObject *method = os == NULL ? NULL : PyObject_GetAttrString(os, "register_at_fork");
    PyObject *args = PyTuple_New(0);
    PyObject *words = before == NULL || function == NULL || here == NULL
                          ? NULL
                          : Py_BuildValue("{s:O,s:O,s:O}", "before", before, "after_in_child", function,
                                          "after_in_parent", here);
    if (method != NULL && args != NULL && words != NULL)
        done = PyObject_Call(method, args, words);
    Py_XDECREF(words);
    Py_XDECREF(args);
    Py_XDECREF(method);
    Py_XDECREF(os);
    Py_XDECREF(before);
    Py_XDECREF(function);
    Py_XDECREF(here);
    Py_XDECREF(done);
    return done == NULL ? -1 : 0;
}

static int fill(PyObject *module) {
    if (beat_ready(module) < 0 || timers_ready(module) < 0 || queue_ready(module) < 0 || hub_ready(module) < 0 || connection_ready(module) < 0 ||
        files_ready(module) < 0 || awaited_ready(module) < 0 || handlers_ready() < 0 ||
        datagrams_ready(module) < 0 || lane_ready(module) < 0 || guard_ready(module) < 0 || results_ready() < 0)
        return -1;
    if (PyModule_AddStringConstant(module, "KIND", "compiled") < 0 || watch_forks(module) < 0)
        return -1;
    /* Not said by the contract, but by `python -c`: which of the quick ways are in use here. */
    return PyModule_AddObjectRef(module, "STACKS_CACHED", chunks_install() ? Py_True : Py_False);
}

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "harken._hub.compiled",
    .m_doc = "The hub in C, on greenlet and epoll. The contract is the room's: see harken._hub.",
    .m_size = -1,
    .m_methods = functions,
};

PyMODINIT_FUNC PyInit_compiled(void) {
    PyGreenlet_Import();
    if (_PyGreenlet_API == NULL)
        return NULL;
    PyObject *module = PyModule_Create(&definition);
    if (module != NULL && fill(module) < 0)
        Py_CLEAR(module);
    return module;
}
