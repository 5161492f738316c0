/* SPDX-License-Identifier: MIT
 *
 * Writer: wfile of a Connection. It joins what is written while the reader still holds requests: a pipelining client gets
 * one packet for many answers. See pending.c. */
#include "files.h"
#include <errno.h>
#include <sys/socket.h>

HIDDEN PyTypeObject *Writer_Type;
static PyObject *sendall_word;

/* Under TLS the connection encrypts, and joins its records while more requests lie in the reader: see secured.c. */
static int put_foreign(Writer *writer, PyObject *data) {
    PyObject *sock = open_sock(writer->sock);
    if (sock == NULL)
        return -1;
    Hub *hub = hub_here();
    bool more = writer->reader != NULL && (held(writer->reader) > 0 || secured_holds(sock));
    Py_INCREF(sock);
    if (hub != NULL && more)
        hub->batch = sock;
    PyObject *done = PyObject_CallMethodOneArg(sock, sendall_word, data);
    if (hub != NULL && more)
        hub->batch = NULL;
    Py_DECREF(sock);
    Py_XDECREF(done);
    return done == NULL ? -1 : 0;
}

/* What was joined goes. It may wait, and another green thread close the file meanwhile, which may be all that holds the
 * connection. */
int flush_file(Writer *writer) {
    PyObject *sock = Py_NewRef(writer->sock), *done = NULL;
    int result;
    if (!writer->foreign)
        result = flush_to_leave(sock);
    else
        result = (done = PyObject_CallMethod(sock, "settle", NULL)) == NULL ? -1 : 0;
    Py_XDECREF(done);
    Py_DECREF(sock);
    return result;
}

/* `whole` is an object that has exactly these bytes and never others, or NULL. */
static int put(Writer *writer, const char *data, size_t size, PyObject *whole) {
    PyObject *sock = open_sock(writer->sock);
    if (sock == NULL)
        return -1;
    Hub *hub = hub_here();
    State *state = state_of(sock);
    bool more = writer->reader != NULL && held(writer->reader) > 0;
    bool mine = hub != NULL && hub->pending_owner == sock; /* what is pending is a green thread's: the running one's */
    bool begins = !mine && more && hub != NULL && hub->turning && !in_hub(hub);
    bool joins = size <= PENDING && !state->nonblocking && (mine || begins);
    begin_writing(state);
    if (joins && mine && more && hub->pending_size + size <= PENDING) { /* most answers of a batch */
        append(hub, data, size);
        return 0;
    }
    Py_INCREF(sock);
    int result = 0, kept = whole != NULL ? flow_join(sock, state, whole) : 0;
    if (kept != 0)
        result = kept < 0 ? -1 : 0;
    else if (joins)
        result = join(hub, sock, data, size) < 0 || (!more && flush_pending(hub) < 0) ? -1 : 0;
    else if ((result = flush_of(sock)) == 0) {
        int gone = whole != NULL ? put_off(sock, state, whole) : 0;
        result = gone < 0 || (gone == 0 && transmit(sock, state, data, size, 0, ALL) < 0) ? -1 : 0;
    }
    Py_DECREF(sock);
    return result;
}

/* As put(), without waiting: returns how much of the data was sent or joined. What is joined is sent where this green
 * thread next waits, which goes to the keeper with what the peer does not take: others may write meanwhile. */
static ssize_t try_put(Writer *writer, PyObject *sock, const char *data, size_t size) {
    int fd = begin(sock, state_of(sock));
    if (fd < 0)
        return -1;
    begin_writing(state_of(sock));
    if (settle_to_read(sock, state_of(sock), false) < 0)
        return -1;
    if (state_of(sock)->owed != NULL)
        return 0;
    Hub *hub = hub_here();
    bool more = writer->reader != NULL && held(writer->reader) > 0;
    bool mine = hub != NULL && hub->pending_owner == sock;
    if (mine && hub->pending_size + size > PENDING) {
        flush_pending_nowait(hub);
        if ((mine = hub->pending_owner == sock) && hub->pending_size + size > PENDING)
            return 0;
    }
    bool begins = !mine && more && size <= PENDING && hub != NULL && hub->pending_owner == NULL && hub->turning &&
                  !in_hub(hub);
    if (mine || begins) {
        if (join(hub, sock, data, size) < 0)
            return -1;
        Py_XSETREF(hub->pending_keeper, Py_XNewRef(writer->keeper));
        if (!more)
            flush_pending_nowait(hub);
        return (ssize_t)size;
    }
    ssize_t sent = send(fd, data, size, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (sent < 0 && errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR)
        return fail(errno);
    if (sent > 0)
        moved(sock, state_of(sock), WRITE, data, (size_t)sent);
    return sent < 0 ? 0 : sent;
}

static PyObject *writer_offer(PyObject *self, PyObject *data) {
    Py_buffer buffer;
    if (((Writer *)self)->foreign) {
        PyErr_SetString(PyExc_TypeError, "offer() is for a Connection's own bytes");
        return NULL;
    }
    PyObject *sock = open_sock(((Writer *)self)->sock);
    if (sock == NULL || PyObject_GetBuffer(data, &buffer, PyBUF_SIMPLE) < 0)
        return NULL;
    Py_INCREF(sock); /* who follows the connection may close the file */
    ssize_t done = try_put((Writer *)self, sock, buffer.buf, (size_t)buffer.len);
    Py_DECREF(sock);
    bool all = done == buffer.len;
    PyBuffer_Release(&buffer);
    if (done < 0)
        return NULL;
    return all ? Py_NewRef(Py_None) : PyLong_FromSsize_t(done);
}

static PyObject *writer_keep_by(PyObject *self, PyObject *function) {
    Py_XSETREF(((Writer *)self)->keeper, Py_NewRef(function));
    Py_RETURN_NONE;
}

static PyObject *writer_take_back(PyObject *self, PyObject *none) {
    PyObject *sock = open_sock(((Writer *)self)->sock);
    if (sock == NULL)
        return NULL;
    Hub *hub = hub_here();
    if (hub != NULL && hub->pending_owner == sock)
        flush_pending_nowait(hub);
    if (hub == NULL || hub->pending_owner != sock)
        return PyBytes_FromStringAndSize(NULL, 0);
    return take_joined(hub);
}

static PyObject *writer_write(PyObject *self, PyObject *data) {
    Writer *writer = (Writer *)self;
    Py_buffer buffer = {.len = PyBytes_CheckExact(data) ? PyBytes_GET_SIZE(data) : -1};
    PyObject *whole = buffer.len >= 0 ? data : NULL;
    if (whole != NULL) /* without the detour */
        buffer.buf = PyBytes_AS_STRING(data);
    else if (PyObject_GetBuffer(data, &buffer, PyBUF_SIMPLE) < 0)
        return NULL;
    Py_ssize_t size = buffer.len;
    int result = writer->foreign ? put_foreign(writer, data) : put(writer, buffer.buf, (size_t)size, whole);
    PyBuffer_Release(&buffer); /* of nothing, for bytes */
    return result < 0 ? NULL : PyLong_FromSsize_t(size);
}

static PyObject *writer_writelines(PyObject *self, PyObject *lines) {
    PyObject *iterator = PyObject_GetIter(lines), *line;
    while (iterator != NULL && (line = PyIter_Next(iterator)) != NULL) {
        PyObject *done = writer_write(self, line);
        Py_DECREF(line);
        if (done == NULL)
            break;
        Py_DECREF(done);
    }
    Py_XDECREF(iterator);
    return PyErr_Occurred() ? NULL : Py_NewRef(Py_None);
}

static PyObject *writer_flush(PyObject *self, PyObject *none) {
    return open_sock(((Writer *)self)->sock) == NULL || flush_file((Writer *)self) < 0 ? NULL : Py_NewRef(Py_None);
}

/* -- the type ----------------------------------------------------------------------------------------------------- */

static PyObject *set_reader(PyObject *writer, PyObject *reader) {
    if (writer != NULL && PyObject_TypeCheck(reader, Reader_Type))
        ((Writer *)writer)->reader = (Reader *)Py_NewRef(reader);
    return writer;
}

static PyObject *writer_new(PyTypeObject *type, PyObject *args, PyObject *words) {
    PyObject *sock, *reader = Py_None;
    if (!PyArg_ParseTuple(args, "O!|O:Writer", Socket_Type, &sock, &reader))
        return NULL;
    Writer *writer = (Writer *)attach_to(type->tp_alloc(type, 0), sock);
    if (writer != NULL)
        writer->foreign = !PyObject_TypeCheck(sock, Connection_Type);
    return set_reader((PyObject *)writer, reader);
}

/* Connection.open_writer(reader=None). */
PyObject *connection_open_writer(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    if (count > 1) {
        PyErr_SetString(PyExc_TypeError, "open_writer() takes the reader of the connection");
        return NULL;
    }
    return set_reader(attach_to(Writer_Type->tp_alloc(Writer_Type, 0), self), count > 0 ? args[0] : Py_None);
}

static PyMethodDef writer_methods[] = {
    FILE_METHODS{"readable", file_no, METH_NOARGS, "False."},
    REFUSED("read") REFUSED("read1") REFUSED("readinto") REFUSED("readinto1") REFUSED("readline") REFUSED("readlines")
    {"writable", file_yes, METH_NOARGS, "True."},
    {"offer", writer_offer, METH_O, "offer(data): as write, without waiting; how many bytes were taken, or None: all."},
    {"keep_by", writer_keep_by, METH_O, "keep_by(function): call it with what was offered, joined, and cannot be sent."},
    {"take_back", writer_take_back, METH_NOARGS, "take_back(): what was joined, and cannot be sent without waiting."},
    {"write", writer_write, METH_O, "write(data): send it, at once or before this green thread waits."},
    {"writelines", writer_writelines, METH_O, "writelines(lines): write each."},
    {"flush", writer_flush, METH_NOARGS, "Send what was written."},
    {NULL},
};

static PyGetSetDef writer_attributes[] = {
    {"closed", file_closed, NULL, "Whether it was closed.", NULL},
    {NULL},
};

static PyType_Slot writer_slots[] = {
    {Py_tp_doc, "Writer(connection, reader=None): writes to it, joining answers while the reader holds requests."},
    {Py_tp_new, writer_new},
    {Py_tp_finalize, file_finalize},
    {Py_tp_dealloc, file_dealloc},
    {Py_tp_traverse, file_traverse},
    {Py_tp_clear, file_clear},
    {Py_tp_methods, writer_methods},
    {Py_tp_getset, writer_attributes},
    {Py_tp_members, file_members},
    {0, NULL},
};

static PyType_Spec writer_spec = {
    .name = "harken._hub.compiled.Writer",
    .basicsize = sizeof(Writer),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .slots = writer_slots,
};

int writer_ready(PyObject *module) {
    if ((sendall_word = PyUnicode_InternFromString("sendall")) == NULL)
        return -1;
    Writer_Type = (PyTypeObject *)PyType_FromSpec(&writer_spec);
    return add_file_type(module, "Writer", Writer_Type);
}
