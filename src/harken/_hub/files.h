/* SPDX-License-Identifier: MIT
 *
 * What Reader and Writer share. */
#ifndef HARKEN_FILES_H
#define HARKEN_FILES_H
#include "hub.h"

typedef struct {
    PyObject_HEAD
    PyObject *weak;
    PyObject *sock;    /* a Connection, or another socket whose recv() waits; NULL once closed */
    char *data;        /* received, and unread from `at` to `end`; NULL when nothing is */
    Py_ssize_t at, end, room;
    Py_ssize_t most;   /* bytes to ask for at once */
    bool foreign;      /* the socket is another: a connection under TLS */
} Reader;

typedef struct {
    PyObject_HEAD
    PyObject *weak;
    PyObject *sock; /* NULL once closed */
    Reader *reader; /* of the same connection, or NULL */
    PyObject *keeper; /* of what was offered, joined, and cannot be sent at once; NULL: none */
    bool foreign;     /* as a Reader's */
} Writer;

extern HIDDEN PyTypeObject *Reader_Type, *Writer_Type;

/* files.c */
#define SOCK(self) (*(PyObject **)((char *)(self) + offsetof(Reader, sock)))
static inline PyObject *open_sock(PyObject *sock) {
    if (sock == NULL)
        PyErr_SetString(PyExc_ValueError, "I/O operation on closed file.");
    return sock;
}
HIDDEN PyObject *file_fileno(PyObject *self, PyObject *none);
HIDDEN PyObject *file_no(PyObject *self, PyObject *none);
HIDDEN PyObject *file_yes(PyObject *self, PyObject *none);
HIDDEN PyObject *file_nothing(PyObject *self, PyObject *none);
HIDDEN PyObject *file_refuse(PyObject *self, PyObject *args, PyObject *names);
HIDDEN PyObject *file_enter(PyObject *self, PyObject *none);
HIDDEN PyObject *file_exit(PyObject *self, PyObject *args);
HIDDEN PyObject *file_closed(PyObject *self, void *closure);
HIDDEN PyObject *file_close(PyObject *self, PyObject *none);
HIDDEN PyObject *attach_to(PyObject *file, PyObject *sock);
HIDDEN int file_traverse(PyObject *self, visitproc visit, void *arg);
HIDDEN int file_clear(PyObject *self);
HIDDEN void file_finalize(PyObject *self);
HIDDEN void file_dealloc(PyObject *self);
HIDDEN int add_file_type(PyObject *module, const char *name, PyTypeObject *type);
extern HIDDEN PyMemberDef file_members[];
/* What io.BufferedIOBase has, and cannot be done here. */
#define REFUSED(name) {name, FAST(file_refuse), METH_VARARGS | METH_KEYWORDS, "io.UnsupportedOperation."},
#define FILE_METHODS                                                                  \
    {"fileno", file_fileno, METH_NOARGS, "The connection's descriptor."},             \
        {"isatty", file_no, METH_NOARGS, "False."},                                   \
        {"seekable", file_no, METH_NOARGS, "False."},                                 \
        REFUSED("seek") REFUSED("tell") REFUSED("truncate") REFUSED("detach")         \
        {"close", file_close, METH_NOARGS, "Let the connection go."},                 \
        {"__enter__", file_enter, METH_NOARGS, NULL}, {"__exit__", file_exit, METH_VARARGS, NULL},

/* reader.c */
HIDDEN int reader_ready(PyObject *module);
HIDDEN void taken(Reader *reader, Py_ssize_t size);
static inline Py_ssize_t held(Reader *reader) { return reader->end - reader->at; }
static inline const char *start(Reader *reader) { return reader->data + reader->at; }

/* writer.c */
HIDDEN int writer_ready(PyObject *module);
HIDDEN int flush_file(Writer *writer);

/* pending.c */
#define PENDING 65536 /* joined at the most */
HIDDEN PyObject *take_joined(Hub *hub);
HIDDEN int join(Hub *hub, PyObject *sock, const char *data, size_t size);
static inline void append(Hub *hub, const char *data, size_t size) {
    memcpy(hub->pending + hub->pending_size, data, size);
    hub->pending_size += size;
}

#endif
