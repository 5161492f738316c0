/* SPDX-License-Identifier: MIT
 *
 * What Reader and Writer, rfile and wfile of a Connection, have in common. */
#include "files.h"

_Static_assert(offsetof(Reader, sock) == offsetof(Writer, sock), "Reader and Writer begin alike");

PyObject *file_fileno(PyObject *self, PyObject *none) {
    PyObject *sock = open_sock(SOCK(self));
    return sock == NULL ? NULL : PyObject_CallMethod(sock, "fileno", NULL);
}

PyObject *file_no(PyObject *self, PyObject *none) {
    return open_sock(SOCK(self)) == NULL ? NULL : Py_NewRef(Py_False);
}

PyObject *file_yes(PyObject *self, PyObject *none) {
    return open_sock(SOCK(self)) == NULL ? NULL : Py_NewRef(Py_True);
}

PyObject *file_nothing(PyObject *self, PyObject *none) { Py_RETURN_NONE; }

PyObject *file_enter(PyObject *self, PyObject *none) {
    return open_sock(SOCK(self)) == NULL ? NULL : Py_NewRef(self);
}

PyObject *file_closed(PyObject *self, void *closure) { return PyBool_FromLong(SOCK(self) == NULL); }

/* As makefile()'s files do: the socket stays open until its last file is closed. */
PyObject *file_close(PyObject *self, PyObject *none) {
    PyObject *sock = SOCK(self);
    if (sock == NULL)
        Py_RETURN_NONE;
    int flushed = Py_IS_TYPE(self, Writer_Type) ? flush_file((Writer *)self) : 0;
    if (SOCK(self) != sock) /* another green thread closed it while we sent */
        return flushed < 0 ? NULL : Py_NewRef(Py_None);
    PyObject *type, *error, *trace;
    PyErr_Fetch(&type, &error, &trace);
    SOCK(self) = NULL;
    if (Py_IS_TYPE(self, Writer_Type))
        Py_CLEAR(((Writer *)self)->keeper);
    if (PyObject_TypeCheck(self, Reader_Type) && held((Reader *)self) > 0)
        taken((Reader *)self, held((Reader *)self));
    PyObject *done = PyObject_CallMethod(sock, "_decref_socketios", NULL);
    Py_DECREF(sock);
    if (flushed < 0) {
        PyErr_Restore(type, error, trace);
        Py_CLEAR(done);
    }
    return done;
}

PyObject *file_exit(PyObject *self, PyObject *args) { return file_close(self, NULL); }

PyObject *attach_to(PyObject *file, PyObject *sock) {
    if (file == NULL)
        return NULL;
    PyObject *count = PyObject_GetAttrString(sock, "_io_refs");
    PyObject *one = count == NULL ? NULL : PyLong_FromLong(PyLong_AsLong(count) + 1);
    if (one == NULL || PyObject_SetAttrString(sock, "_io_refs", one) < 0)
        Py_CLEAR(file);
    else
        SOCK(file) = Py_NewRef(sock);
    Py_XDECREF(count);
    Py_XDECREF(one);
    return file;
}

int file_traverse(PyObject *self, visitproc visit, void *arg) {
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(SOCK(self));
    if (Py_IS_TYPE(self, Writer_Type)) {
        Py_VISIT(((Writer *)self)->reader);
        Py_VISIT(((Writer *)self)->keeper);
    }
    return 0;
}

int file_clear(PyObject *self) {
    if (Py_IS_TYPE(self, Writer_Type)) {
        Py_CLEAR(((Writer *)self)->reader);
        Py_CLEAR(((Writer *)self)->keeper);
    }
    return 0;
}

/* A method of io.BufferedIOBase that makes no sense here. Registered as one, a type has none by itself. */
PyObject *file_refuse(PyObject *self, PyObject *args, PyObject *names) {
    PyObject *io = PyImport_ImportModule("io");
    PyObject *kind = io == NULL ? NULL : PyObject_GetAttrString(io, "UnsupportedOperation");
    if (kind != NULL)
        PyErr_SetString(kind, "not supported by a connection's file");
    Py_XDECREF(kind);
    Py_XDECREF(io);
    return NULL;
}

/* Dropped without close(): like SocketIO, it lets the socket go. */
void file_finalize(PyObject *self) {
    PyObject *type, *error, *trace;
    PyErr_Fetch(&type, &error, &trace);
    PyObject *done = file_close(self, NULL);
    if (done == NULL)
        PyErr_Clear();
    Py_XDECREF(done);
    PyErr_Restore(type, error, trace);
}

void file_dealloc(PyObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    if (PyObject_CallFinalizerFromDealloc(self) < 0)
        return;
    PyObject_GC_UnTrack(self);
    if (((Reader *)self)->weak != NULL)
        PyObject_ClearWeakRefs(self);
    file_clear(self);
    if (PyObject_TypeCheck(self, Reader_Type))
        PyMem_Free(((Reader *)self)->data);
    Py_CLEAR(SOCK(self));
    type->tp_free(self);
    Py_DECREF(type);
}

PyMemberDef file_members[] = {
    {"__weaklistoffset__", T_PYSSIZET, offsetof(Reader, weak), READONLY, NULL},
    {NULL},
};

/* A C type cannot derive from io.BufferedIOBase (its layout is another), but it can be registered as one. */
int add_file_type(PyObject *module, const char *name, PyTypeObject *type) {
    if (type == NULL || PyModule_AddObjectRef(module, name, (PyObject *)type) < 0)
        return -1;
    PyObject *io = PyImport_ImportModule("io");
    PyObject *kind = io == NULL ? NULL : PyObject_GetAttrString(io, "BufferedIOBase");
    PyObject *done = kind == NULL ? NULL : PyObject_CallMethod(kind, "register", "O", type);
    Py_XDECREF(io);
    Py_XDECREF(kind);
    Py_XDECREF(done);
    return done == NULL ? -1 : 0;
}

int files_ready(PyObject *module) { return reader_ready(module) < 0 || writer_ready(module) < 0 ? -1 : 0; }
