/* SPDX-License-Identifier: MIT
 *
 * Reader: rfile of a Connection, or of one under TLS. It holds bytes only while some are unread. */
#include "files.h"

HIDDEN PyTypeObject *Reader_Type;

#define FREE 131072 /* as FREE_BYTES of harken.buffers: what a reader holds without saying so */
static PyObject *growth; /* told of those that hold more; NULL: nobody asks */

PyObject *on_growth(PyObject *module, PyObject *function) {
    Py_XSETREF(growth, function == Py_None ? NULL : Py_NewRef(function));
    Py_RETURN_NONE;
}

/* A reader has room for `size` bytes now, and did for `before`. It may wait, until there is memory for more. */
static int tell_growth(Reader *reader, Py_ssize_t before, Py_ssize_t size) {
    if (growth == NULL || (before <= FREE && size <= FREE) || reader->sock == NULL || PyErr_Occurred())
        return 0;
    PyObject *number = PyLong_FromSsize_t(size > FREE ? size : 0), *args[] = {reader->sock, number};
    PyObject *told = number == NULL ? NULL : PyObject_Vectorcall(growth, args, 2, NULL);
    Py_XDECREF(number);
    Py_XDECREF(told);
    return told == NULL ? -1 : 0;
}

/* `size` of the unread bytes are read. */
void taken(Reader *reader, Py_ssize_t size) {
    if ((reader->at += size) == reader->end) { /* an idle reader holds no memory */
        Py_ssize_t room = reader->room;
        PyMem_Free(reader->data);
        reader->data = NULL;
        reader->at = reader->end = reader->room = 0;
        if (tell_growth(reader, room, 0) < 0) /* room for more never waits */
            PyErr_Clear();
    }
}

static PyObject *slice(Reader *reader, Py_ssize_t size) {
    PyObject *piece = PyBytes_FromStringAndSize(size > 0 ? start(reader) : NULL, size);
    if (piece != NULL && size > 0)
        taken(reader, size);
    return piece;
}

/* Keep `size` more bytes behind those that are unread. The room doubles: a long line costs no more a byte than a short. */
static int keep(Reader *reader, const char *data, Py_ssize_t size) {
    Py_ssize_t before = held(reader);
    if (reader->room - reader->end < size) {
        Py_ssize_t room = before + size > 2 * before ? before + size : 2 * before;
        char *larger = PyMem_Malloc((size_t)room);
        if (larger == NULL) {
            PyErr_NoMemory();
            return -1;
        }
        if (before > 0)
            memcpy(larger, start(reader), (size_t)before);
        PyMem_Free(reader->data);
        reader->data = larger;
        reader->at = 0;
        reader->end = before;
        reader->room = room;
    }
    memcpy(reader->data + reader->end, data, (size_t)size);
    reader->end += size;
    return 0;
}

/* Keep what has come, and say how much that is; it may wait. */
static int keep_more(Reader *reader, const char *data, Py_ssize_t size) {
    Py_ssize_t had = reader->room;
    if (keep(reader, data, size) < 0)
        return -1;
    return reader->room > had ? tell_growth(reader, had, reader->room) : 0;
}

/* A call begins. If bytes lie here after an answer, they are the next request, which has come already. */
static inline int asked(Reader *reader) {
    PyObject *sock = open_sock(reader->sock);
    if (sock == NULL)
        return -1;
    if (reader->foreign)
        return 0;
    State *state = state_of(sock);
    begin_reading(state);
    if (state->marked != NULL && marks_of(state)->first == 0 && held(reader) > 0)
        begin_request(marks_of(state), now_ns());
    return 0;
}

/* As get(), by the socket's own method. */
static ssize_t get_foreign(PyObject *sock, char *into, Py_ssize_t size, PyObject **whole) {
    PyObject *data = PyObject_CallMethod(sock, "recv", "n", size);
    if (data == NULL)
        return -1;
    if (!PyBytes_Check(data) || PyBytes_GET_SIZE(data) > size) {
        PyErr_Format(PyExc_TypeError, "recv() is to return at most %zd bytes, not %.100R", size, data);
        Py_DECREF(data);
        return -1;
    }
    ssize_t got = PyBytes_GET_SIZE(data);
    if (whole != NULL && got > 0)
        *whole = data;
    else {
        memcpy(into, PyBytes_AS_STRING(data), (size_t)got);
        Py_DECREF(data);
    }
    return got;
}

/* Receive once; the target may be the scratch buffer, which is good until anybody waits again. With `whole` it is, and
 * see receive_whole(). */
static ssize_t get(Reader *reader, char *into, Py_ssize_t size, PyObject **whole) {
    PyObject *sock = open_sock(reader->sock);
    if (sock == NULL)
        return -1;
    Py_INCREF(sock); /* somebody may close us meanwhile */
    if (reader->foreign) {
        ssize_t got = get_foreign(sock, into, size, whole);
        Py_DECREF(sock);
        return got;
    }
    State *state = state_of(sock);
    if (state->marked != NULL)
        marks_of(state)->whole = true; /* however often a call receives, it is one operation; see asked() */
    ssize_t got = whole != NULL ? receive_whole(sock, state, (size_t)size, 0, whole)
                                : receive(sock, state, into, (size_t)size, 0);
    if (state->marked != NULL)
        marks_of(state)->whole = false;
    Py_DECREF(sock);
    return got;
}

/* One more piece to the unread bytes; 0 at the end. */
static ssize_t fill(Reader *reader) {
    ssize_t got = get(reader, scratch, reader->most, NULL);
    return got > 0 && keep_more(reader, scratch, got) < 0 ? -1 : got;
}

static PyObject *read_line(Reader *reader, Py_ssize_t limit) {
    Py_ssize_t searched = 0;
    if (limit < 0)
        limit = PY_SSIZE_T_MAX;
    for (;;) {
        Py_ssize_t size = held(reader), within = size < limit ? size : limit;
        if (searched > within)
            searched = 0; /* another reader was here while we waited */
        const char *end = within > searched ? memchr(start(reader) + searched, '\n', (size_t)(within - searched)) : NULL;
        if (end != NULL || size >= limit)
            return slice(reader, end != NULL ? end - start(reader) + 1 : limit);
        searched = size;
        PyObject *whole = NULL;
        ssize_t got = get(reader, scratch, reader->most, &whole);
        if (got <= 0)
            return got < 0 ? NULL : slice(reader, held(reader));
        const char *data = whole != NULL ? PyBytes_AS_STRING(whole) : scratch;
        if (held(reader) == 0 && got <= limit && memchr(data, '\n', (size_t)got) == data + got - 1)
            return whole != NULL ? whole : PyBytes_FromStringAndSize(data, got); /* the common case: one line, no more */
        int kept = keep_more(reader, data, got);
        Py_XDECREF(whole);
        if (kept < 0)
            return NULL;
    }
}

/* A read ends by a timeout: the next one finds what had come. */
static void put_back(Reader *reader, const char *data, Py_ssize_t size) {
    PyObject *type, *error, *trace;
    PyErr_Fetch(&type, &error, &trace);
    if (reader->sock != NULL && size > 0 && keep(reader, data, size) < 0)
        PyErr_Clear();
    PyErr_Restore(type, error, trace);
}

/* Read into the result itself, which grows with what comes: a peer that promises much and sends little costs little. */
static PyObject *read_straight(Reader *reader, Py_ssize_t size) {
    Py_ssize_t have = held(reader), room = have + SCRATCH;
    if (size >= 0 && size < room)
        room = size;
    PyObject *result = PyBytes_FromStringAndSize(NULL, room);
    if (result == NULL)
        return NULL;
    if (have > 0) {
        memcpy(PyBytes_AS_STRING(result), start(reader), (size_t)have);
        taken(reader, have);
    }
    while (have != size) {
        if (have == room) {
            Py_ssize_t had = room;
            room = size >= 0 && size < 2 * room ? size : 2 * room;
            if (_PyBytes_Resize(&result, room) < 0)
                return NULL;
            if (tell_growth(reader, had, room) < 0) {
                put_back(reader, PyBytes_AS_STRING(result), have);
                Py_DECREF(result);
                return NULL;
            }
        }
        ssize_t got = get(reader, PyBytes_AS_STRING(result) + have, room - have, NULL);
        if (got == 0)
            break;
        if (got < 0) {
            put_back(reader, PyBytes_AS_STRING(result), have);
            Py_DECREF(result);
            return NULL;
        }
        have += got;
    }
    if (tell_growth(reader, room, 0) < 0)
        PyErr_Clear();
    if (have < room)
        _PyBytes_Resize(&result, have);
    return result;
}

static PyObject *read_exactly(Reader *reader, Py_ssize_t size) {
    if (size < 0 || size - held(reader) > reader->most)
        return read_straight(reader, size);
    while (held(reader) < size) {
        ssize_t got = fill(reader);
        if (got < 0)
            return NULL;
        if (got == 0)
            break;
    }
    return slice(reader, held(reader) < size ? held(reader) : size);
}

static int size_of(PyObject *const *args, Py_ssize_t count, Py_ssize_t *size) {
    *size = -1;
    if (count > 1) {
        PyErr_SetString(PyExc_TypeError, "at most one argument is expected");
        return -1;
    }
    if (count == 0 || args[0] == Py_None)
        return 0;
    *size = PyNumber_AsSsize_t(args[0], PyExc_OverflowError);
    return *size == -1 && PyErr_Occurred() ? -1 : 0;
}

/* The next line, which of a batch lies here whole. */
static inline PyObject *next_line(Reader *reader) {
    if (asked(reader) < 0)
        return NULL;
    const char *end = held(reader) > 0 ? memchr(start(reader), '\n', (size_t)held(reader)) : NULL;
    return end != NULL ? slice(reader, end - start(reader) + 1) : read_line(reader, -1);
}

static PyObject *reader_readline(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    Py_ssize_t limit;
    if (count == 0)
        return next_line((Reader *)self);
    if (size_of(args, count, &limit) < 0 || asked((Reader *)self) < 0)
        return NULL;
    return read_line((Reader *)self, limit);
}

static PyObject *reader_next(PyObject *self) {
    PyObject *line = next_line((Reader *)self);
    if (line != NULL && PyBytes_GET_SIZE(line) == 0)
        Py_CLEAR(line);
    return line;
}

static PyObject *reader_readlines(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    Py_ssize_t hint, total = 0;
    PyObject *lines = size_of(args, count, &hint) < 0 ? NULL : PyList_New(0), *line;
    while (lines != NULL && (hint <= 0 || total <= hint) && (line = reader_next(self)) != NULL) {
        total += PyBytes_GET_SIZE(line);
        int result = PyList_Append(lines, line);
        Py_DECREF(line);
        if (result < 0)
            break;
    }
    if (PyErr_Occurred())
        Py_CLEAR(lines);
    return lines;
}

static PyObject *reader_read(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    Py_ssize_t size;
    if (size_of(args, count, &size) < 0 || asked((Reader *)self) < 0)
        return NULL;
    return read_exactly((Reader *)self, size);
}

static PyObject *reader_read1(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    Reader *reader = (Reader *)self;
    Py_ssize_t size;
    if (size_of(args, count, &size) < 0 || asked(reader) < 0)
        return NULL;
    if (size < 0)
        size = reader->most;
    if (size == 0)
        return PyBytes_FromStringAndSize(NULL, 0);
    if (held(reader) > 0)
        return slice(reader, held(reader) < size ? held(reader) : size);
    ssize_t got = get(reader, scratch, size < SCRATCH ? size : SCRATCH, NULL);
    return got < 0 ? NULL : PyBytes_FromStringAndSize(scratch, got);
}

static PyObject *reader_peek(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    Reader *reader = (Reader *)self;
    if (asked(reader) < 0 || (held(reader) == 0 && fill(reader) < 0))
        return NULL;
    return PyBytes_FromStringAndSize(held(reader) > 0 ? start(reader) : NULL, held(reader));
}

static PyObject *read_into(PyObject *self, PyObject *target, bool once) {
    Reader *reader = (Reader *)self;
    Py_buffer buffer;
    if (asked(reader) < 0)
        return NULL;
    if (PyObject_GetBuffer(target, &buffer, PyBUF_WRITABLE) < 0)
        return PyErr_Format(PyExc_TypeError, "a buffer that can be written to is needed, not %.100s",
                            Py_TYPE(target)->tp_name);
    Py_ssize_t done = 0;
    ssize_t got = 1;
    while (done < buffer.len && (done == 0 || !once)) {
        Py_ssize_t there = held(reader), left = buffer.len - done, take = there < left ? there : left;
        if (take > 0) {
            memcpy((char *)buffer.buf + done, start(reader), (size_t)take);
            taken(reader, take);
        } else if (left >= reader->most)
            take = got = get(reader, (char *)buffer.buf + done, left, NULL);
        else
            got = fill(reader);
        if (got <= 0)
            break;
        done += take;
    }
    if (got < 0)
        put_back(reader, buffer.buf, done);
    PyBuffer_Release(&buffer);
    return got < 0 ? NULL : PyLong_FromSsize_t(done);
}

/* Put back what was read last. */
static PyObject *reader_give_back(PyObject *self, PyObject *data) {
    Reader *reader = (Reader *)self;
    if (!PyBytes_Check(data)) {
        PyErr_SetString(PyExc_TypeError, "bytes are needed");
        return NULL;
    }
    Py_ssize_t size = PyBytes_GET_SIZE(data), there = held(reader);
    if (size == 0)
        Py_RETURN_NONE;
    PyObject *behind = PyBytes_FromStringAndSize(there > 0 ? start(reader) : NULL, there);
    if (behind == NULL)
        return NULL;
    reader->at = reader->end = 0;
    int result = keep(reader, PyBytes_AS_STRING(data), size);
    if (result == 0)
        result = keep(reader, PyBytes_AS_STRING(behind), there);
    Py_DECREF(behind);
    return result < 0 ? NULL : Py_NewRef(Py_None);
}

/* Put behind what is held what somebody else received after it. */
static PyObject *reader_add(PyObject *self, PyObject *data) {
    if (!PyBytes_Check(data)) {
        PyErr_SetString(PyExc_TypeError, "bytes are needed");
        return NULL;
    }
    Py_ssize_t size = PyBytes_GET_SIZE(data);
    return size > 0 && keep((Reader *)self, PyBytes_AS_STRING(data), size) < 0 ? NULL : Py_NewRef(Py_None);
}

static PyObject *reader_readinto(PyObject *self, PyObject *target) { return read_into(self, target, false); }
static PyObject *reader_readinto1(PyObject *self, PyObject *target) { return read_into(self, target, true); }

/* -- the type ----------------------------------------------------------------------------------------------------- */

static PyObject *set_most(PyObject *reader, Py_ssize_t most) {
    if (reader != NULL)
        ((Reader *)reader)->most = most > 0 && most < SCRATCH ? most : SCRATCH;
    return reader;
}

static PyObject *reader_new(PyTypeObject *type, PyObject *args, PyObject *words) {
    PyObject *sock;
    Py_ssize_t most = -1;
    if (!PyArg_ParseTuple(args, "O!|n:Reader", Socket_Type, &sock, &most))
        return NULL;
    Reader *reader = (Reader *)attach_to(type->tp_alloc(type, 0), sock);
    if (reader != NULL)
        reader->foreign = !PyObject_TypeCheck(sock, Connection_Type);
    return set_most((PyObject *)reader, most);
}

/* Connection.open_reader(size=-1). */
PyObject *connection_open_reader(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    Py_ssize_t most;
    PyObject *reader = size_of(args, count, &most) < 0 ? NULL : Reader_Type->tp_alloc(Reader_Type, 0);
    return set_most(attach_to(reader, self), most);
}

static PyMethodDef reader_methods[] = {
    FILE_METHODS{"readable", file_yes, METH_NOARGS, "True."},
    {"writable", file_no, METH_NOARGS, "False."},
    REFUSED("write") REFUSED("writelines")
    {"flush", file_nothing, METH_NOARGS, "Nothing."},
    {"readline", FAST(reader_readline), METH_FASTCALL, "readline(size=-1): one line, or what there is of it."},
    {"readlines", FAST(reader_readlines), METH_FASTCALL, "readlines(hint=-1): lines until the end."},
    {"read", FAST(reader_read), METH_FASTCALL, "read(size=-1): so many bytes, or all until the end."},
    {"give_back", reader_give_back, METH_O, "give_back(data): put back what was read last."},
    {"add", reader_add, METH_O, "add(data): put behind what is held what somebody else received after it."},
    {"read1", FAST(reader_read1), METH_FASTCALL, "read1(size=-1): what is there, or comes first."},
    {"readinto", reader_readinto, METH_O, "readinto(buffer): fill it."},
    {"readinto1", reader_readinto1, METH_O, "readinto1(buffer): what is there, or comes first."},
    {"peek", FAST(reader_peek), METH_FASTCALL, "peek(size=0): what is there, without taking it."},
    {NULL},
};

static PyObject *reader_mode(PyObject *self, void *closure) { return PyUnicode_InternFromString("rb"); }

static PyGetSetDef reader_attributes[] = {
    {"closed", file_closed, NULL, "Whether it was closed.", NULL},
    {"mode", reader_mode, NULL, "As of any file that is open for reading bytes.", NULL},
    {NULL},
};

static Py_ssize_t reader_length(PyObject *self) { return held((Reader *)self); }

static int reader_true(PyObject *self) { return 1; } /* a reader that holds nothing is one all the same */

static PyType_Slot reader_slots[] = {
    {Py_mp_length, reader_length},
    {Py_nb_bool, reader_true},
    {Py_tp_doc, "Reader(connection, size=-1): reads it, or another socket, as a buffered file, at most `size` bytes ahead."},
    {Py_tp_new, reader_new},
    {Py_tp_iter, PyObject_SelfIter},
    {Py_tp_iternext, reader_next},
    {Py_tp_finalize, file_finalize},
    {Py_tp_dealloc, file_dealloc},
    {Py_tp_traverse, file_traverse},
    {Py_tp_clear, file_clear},
    {Py_tp_methods, reader_methods},
    {Py_tp_getset, reader_attributes},
    {Py_tp_members, file_members},
    {0, NULL},
};

static PyType_Spec reader_spec = {
    .name = "harken._hub.compiled.Reader",
    .basicsize = sizeof(Reader),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_BASETYPE, /* see harken.stamps */
    .slots = reader_slots,
};

int reader_ready(PyObject *module) {
    Reader_Type = (PyTypeObject *)PyType_FromSpec(&reader_spec);
    return add_file_type(module, "Reader", Reader_Type);
}
