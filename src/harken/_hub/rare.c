/* SPDX-License-Identifier: MIT
 *
 * What a Connection does less often: the socket module's own method is called, and called again after waiting. */
#include "hub.h"
#include <errno.h>
#include <poll.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/stat.h>

#define FIRST_PAUSE 1000000   /* nanoseconds: a Unix listener with a full backlog cannot be waited for */
#define LONGEST_PAUSE 50000000
#define FILE_PIECE 1048576 /* TURN_BYTES: what is sent of a file before the others get their turn */

static PyObject *base_method[7], *base_connect_ex, *base_shutdown, *base_fileno, *base_dup;
enum { RECVFROM, RECVFROM_INTO, RECVMSG, RECVMSG_INTO, SENDTO, SENDMSG, KINDS };
static const char *const names[KINDS] = {"recvfrom", "recvfrom_into", "recvmsg", "recvmsg_into", "sendto", "sendmsg"};

static int flags_in(PyObject *args, PyObject *words, Py_ssize_t place) {
    PyObject *flags = PyTuple_GET_SIZE(args) > place ? PyTuple_GET_ITEM(args, place) : NULL;
    if (flags == NULL && words != NULL)
        flags = PyDict_GetItemString(words, "flags"); /* borrowed */
    return flags != NULL && PyLong_Check(flags) ? (int)PyLong_AsUnsignedLongMask(flags) : 0;
}

/* -- what recv() and recv_into() do of the others: take what was received ahead (see together.c), and wait for all --- */

static bool has_come(State *state, int flags) {
    return attached(state) && state->slot->came && !(flags & (MSG_OOB | MSG_ERRQUEUE));
}

/* Whether the call is to return as much as was asked for: of a stream, and without ancillary data. */
static bool wants_all(State *state, PyObject *args, int which, int flags) {
    if (!(flags & MSG_WAITALL) || flags & (MSG_PEEK | MSG_OOB | MSG_ERRQUEUE) || !state->stream || state->nonblocking)
        return false;
    if (which != RECVMSG && which != RECVMSG_INTO)
        return true;
    PyObject *room = PyTuple_GET_SIZE(args) > 1 ? PyTuple_GET_ITEM(args, 1) : NULL;
    return room == NULL || (PyLong_CheckExact(room) && PyObject_Not(room) == 1);
}

/* One buffer's part; -1 with an exception. `*full`: another may follow. */
static Py_ssize_t scatter_into(PyObject *self, PyObject *buffer, int flags, bool *full) {
    Py_ssize_t room = -1, size = -1;
    Py_buffer view;
    if (PyObject_GetBuffer(buffer, &view, PyBUF_WRITABLE) == 0) {
        room = view.len;
        PyBuffer_Release(&view);
    }
    PyObject *got = room < 0 ? NULL : PyObject_CallMethod(self, "recv_into", "Oii", buffer, 0, flags);
    if (got != NULL)
        size = PyLong_AsSsize_t(got);
    Py_XDECREF(got);
    *full = size == room && !(flags & MSG_PEEK); /* the next would look at the same */
    return size;
}

/* Into as many of the buffers as it fills. What has come before an exception is returned, and the next call meets that;
 * but for one that is to interrupt the green thread. */
static PyObject *scatter(PyObject *self, PyObject *buffers, int flags) {
    PyObject *all = PySequence_Tuple(buffers);
    State *state = state_of(self);
    Py_ssize_t total = 0;
    bool full = true;
    for (Py_ssize_t i = 0; all != NULL && full && i < PyTuple_GET_SIZE(all); i++) {
        if (!has_come(state, flags) && !(flags & MSG_WAITALL))
            break;
        Py_ssize_t size = scatter_into(self, PyTuple_GET_ITEM(all, i), flags, &full);
        if (size >= 0)
            total += size;
        else if (total > 0 && is_outcome())
            PyErr_Clear();
        else
            Py_CLEAR(all);
    }
    Py_XDECREF(all);
    return all == NULL ? NULL : PyLong_FromSsize_t(total);
}

/* As the method, of a stream, whose calls tell no address and here no ancillary data. */
static PyObject *by_receiving(PyObject *self, PyObject *args, PyObject *words, int which, int flags) {
    PyObject *got;
    if (which == RECVMSG_INTO)
        got = PyTuple_GET_SIZE(args) > 0 ? scatter(self, PyTuple_GET_ITEM(args, 0), flags) : NULL;
    else if (which == RECVFROM_INTO) {
        PyObject *method = PyObject_GetAttrString(self, "recv_into");
        got = method == NULL ? NULL : PyObject_Call(method, args, words);
        Py_XDECREF(method);
    } else
        got = PyTuple_GET_SIZE(args) > 0 ? PyObject_CallMethod(self, "recv", "Oi", PyTuple_GET_ITEM(args, 0), flags) : NULL;
    if (got == NULL && !PyErr_Occurred())
        PyErr_Format(PyExc_TypeError, "%s() takes at least 1 argument", names[which]);
    if (got == NULL)
        return NULL;
    return which == RECVFROM || which == RECVFROM_INTO ? Py_BuildValue("(NO)", got, Py_None)
                                                       : Py_BuildValue("(N[]iO)", got, 0, Py_None);
}

static PyObject *again(PyObject *self, PyObject *args, PyObject *words, int which, Py_ssize_t flags_at) {
    State *state = state_of(self);
    int64_t deadline = 0;
    int direction = which >= SENDTO ? WRITE : READ;
    if (direction == READ)
        begin_reading(state);
    else
        begin_writing(state);
    PyObject *method = PyObject_CallMethod(base_method[which], "__get__", "O", self), *done = NULL;
    int flags = flags_in(args, words, flags_at);
    bool waits = !state->nonblocking && !(flags & MSG_DONTWAIT);
    if ((direction == WRITE || (hub_here() != NULL && hub_here()->pending_owner == self)) && flush_of(self) < 0)
        Py_CLEAR(method);
    if (hub_here() != NULL && --hub_here()->budget < 0 && give_way(hub_here()) < 0)
        Py_CLEAR(method);
    int fd;
    while (method != NULL && (fd = begin(self, state)) >= 0) {
        if (direction == READ && owes(state) && settle_to_read(self, state, waits) < 0)
            break;
        if (direction == READ && (has_come(state, flags) || wants_all(state, args, which, flags))) {
            Py_DECREF(method);
            return by_receiving(self, args, words, which, flags); /* which tells of itself, to whoever follows */
        }
        bool hushed = hush(state, fd);
        done = PyObject_Call(method, args, words);
        if (hushed)
            unhush(self);
        if (done != NULL || !PyErr_ExceptionMatches(PyExc_BlockingIOError) || state->nonblocking ||
            flags & MSG_DONTWAIT)
            break;
        PyErr_Clear();
        if (wait_ready(self, state, direction, &deadline, 0) < 0)
            break;
    }
    Py_XDECREF(method);
    if (done != NULL && state->traced)
        tell_call(self, names[which], args, done);
    return done;
}

static PyObject *rare_recvfrom(PyObject *self, PyObject *args, PyObject *words) {
    return again(self, args, words, RECVFROM, 1);
}
static PyObject *rare_recvfrom_into(PyObject *self, PyObject *args, PyObject *words) {
    return again(self, args, words, RECVFROM_INTO, 2);
}
static PyObject *rare_recvmsg(PyObject *self, PyObject *args, PyObject *words) {
    return again(self, args, words, RECVMSG, 2);
}
static PyObject *rare_recvmsg_into(PyObject *self, PyObject *args, PyObject *words) {
    return again(self, args, words, RECVMSG_INTO, 2);
}

/* Send what is left of `data` after some was sent, where a socket that blocks would; see share_of(). */
static PyObject *send_rest(PyObject *self, PyObject *data, int flags, PyObject *sent) {
    Py_ssize_t done = PyLong_AsSsize_t(sent);
    Py_DECREF(sent);
    Py_buffer whole;
    if (PyObject_GetBuffer(data, &whole, PyBUF_SIMPLE) < 0)
        return NULL;
    ssize_t more = done >= whole.len ? 0
                                     : transmit(self, state_of(self), (char *)whole.buf + done,
                                                (size_t)(whole.len - done), flags, MUCH);
    PyBuffer_Release(&whole);
    if (more < 0 && is_outcome()) {
        PyErr_Clear(); /* the next call meets it */
        more = 0;
    }
    return more < 0 ? NULL : PyLong_FromSsize_t(done + more);
}

static PyObject *rare_sendto(PyObject *self, PyObject *args, PyObject *words) {
    Py_ssize_t flags_at = PyTuple_GET_SIZE(args) > 2 ? 1 : PY_SSIZE_T_MAX;
    int flags = flags_in(args, NULL, flags_at);
    PyObject *sent = again(self, args, words, SENDTO, flags_at);
    if (sent == NULL || share_of(state_of(self), flags) == SOME)
        return sent;
    return send_rest(self, PyTuple_GET_ITEM(args, 0), flags, sent);
}

/* How long the buffers are together; -1 with an exception. */
static Py_ssize_t length_of(PyObject *parts) {
    Py_ssize_t length = 0;
    for (Py_ssize_t each = 0; each < PyTuple_GET_SIZE(parts); each++) {
        Py_buffer part;
        if (PyObject_GetBuffer(PyTuple_GET_ITEM(parts, each), &part, PyBUF_SIMPLE) < 0)
            return -1;
        length += part.len;
        PyBuffer_Release(&part);
    }
    return length;
}

static PyObject *send_rest_of(PyObject *self, PyObject *parts, int flags, PyObject *sent) {
    Py_ssize_t length = length_of(parts);
    if (length >= 0 && length == PyLong_AsSsize_t(sent))
        return sent;
    PyObject *nothing = PyBytes_FromStringAndSize(NULL, 0);
    PyObject *whole = length < 0 || nothing == NULL ? NULL : PyObject_CallMethod(nothing, "join", "(O)", parts);
    Py_XDECREF(nothing);
    if (whole == NULL)
        Py_CLEAR(sent);
    else
        sent = send_rest(self, whole, flags, sent);
    Py_XDECREF(whole);
    return sent;
}

static PyObject *rare_sendmsg(PyObject *self, PyObject *args, PyObject *words) {
    int flags = flags_in(args, words, 2);
    if (PyTuple_GET_SIZE(args) == 0 || share_of(state_of(self), flags) == SOME)
        return again(self, args, words, SENDMSG, 2);
    PyObject *parts = PySequence_Tuple(PyTuple_GET_ITEM(args, 0)); /* it may be good for one round only */
    PyObject *first = parts == NULL ? NULL : PyTuple_Pack(1, parts);
    PyObject *others = PyTuple_GetSlice(args, 1, PyTuple_GET_SIZE(args));
    PyObject *all = first == NULL || others == NULL ? NULL : PySequence_Concat(first, others);
    PyObject *sent = all == NULL ? NULL : again(self, all, words, SENDMSG, 2);
    if (sent != NULL)
        sent = send_rest_of(self, parts, flags, sent);
    Py_XDECREF(all);
    Py_XDECREF(others);
    Py_XDECREF(first);
    Py_XDECREF(parts);
    return sent;
}

static PyObject *rare_accept(PyObject *self, PyObject *none) {
    State *state = state_of(self);
    int64_t deadline = 0;
    for (;;) {
        int fd = begin(self, state), family, kind, proto;
        if (fd < 0 || socket_parts(self, &fd, &family, &kind, &proto) < 0)
            return NULL;
        bool hushed = hush(state, fd);
        PyObject *pair = accept_from(Connection_Type, fd, family, kind, proto);
        if (hushed)
            unhush(self);
        if (pair != NULL || !PyErr_ExceptionMatches(PyExc_BlockingIOError) || state->nonblocking)
            return pair;
        PyErr_Clear();
        if (wait_ready(self, state, READ, &deadline, 0) < 0)
            return NULL;
    }
}

/* -- connecting --------------------------------------------------------------------------------------------------- */

static int pause_for(int64_t ns) {
    if (hub_here() != NULL && !in_hub(hub_here()))
        return sleep_until(hub_here(), now_ns() + ns);
    Py_BEGIN_ALLOW_THREADS;
    poll(NULL, 0, (int)(ns / 1000000));
    Py_END_ALLOW_THREADS;
    return PyErr_CheckSignals();
}

/* Once the handshake has ended: its error, EINPROGRESS if it has not, -1 with an exception. */
static int handshake(PyObject *self) {
    int error = 0, fd = socket_fd(self);
    socklen_t length = sizeof error;
    struct sockaddr_storage peer;
    if (getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &length) < 0)
        return errno;
    length = sizeof peer;
    if (error == 0 && getpeername(fd, (struct sockaddr *)&peer, &length) < 0)
        return errno == ENOTCONN ? EINPROGRESS : errno;
    return error;
}

static int connecting(PyObject *self, PyObject *address) {
    State *state = state_of(self);
    int64_t deadline = 0, pause = FIRST_PAUSE;
    int error, fd = begin(self, state);
    if (fd < 0)
        return -1;
    for (;;) {
        bool hushed = hush(state, fd);
        PyObject *number = PyObject_CallFunctionObjArgs(base_connect_ex, self, address, NULL);
        if (hushed)
            unhush(self);
        error = number == NULL ? -1 : (int)PyLong_AsLong(number);
        Py_XDECREF(number);
        if (error != EAGAIN || state->nonblocking)
            break;
        if (deadline == 0 && state->timeout > 0)
            deadline = now_ns() + (int64_t)(state->timeout > 4e9 ? 4e18 : state->timeout * 1e9);
        if (deadline && now_ns() >= deadline)
            return timed_out();
        if (pause_for(pause) < 0)
            return -1;
        pause = 2 * pause < LONGEST_PAUSE ? 2 * pause : LONGEST_PAUSE;
    }
    while ((error == EINPROGRESS || error == EALREADY) && !state->nonblocking) {
        if (wait_ready(self, state, WRITE, &deadline, 0) < 0)
            return -1;
        error = handshake(self);
    }
    return error;
}

static PyObject *rare_connect(PyObject *self, PyObject *address) {
    int error = connecting(self, address);
    if (error > 0)
        fail(error);
    return error == 0 ? Py_NewRef(Py_None) : NULL;
}

static PyObject *rare_connect_ex(PyObject *self, PyObject *address) {
    if (socket_fd(self) < 0 && !PyErr_Occurred())
        return PyLong_FromLong(EBADF);
    int error = connecting(self, address);
    if (error >= 0)
        return PyLong_FromLong(error);
    if (!PyErr_ExceptionMatches(PyExc_TimeoutError) || !is_outcome())
        return NULL;
    PyErr_Clear();
    return PyLong_FromLong(EAGAIN); /* as the socket module says of a timeout here */
}

/* -- files -------------------------------------------------------------------------------------------------------- */

/* Counts the bytes in `*total`. 0: done; -1: an exception; -2: this file must be read and sent. */
static int send_pieces(PyObject *self, int file, int64_t offset, int64_t most, int64_t *total) {
    State *state = state_of(self);
    int64_t deadline = 0, sent;
    begin_writing(state);
    while ((sent = *total) < most) {
        int fd = begin(self, state), error;
        if (fd < 0)
            return -1;
        off_t at = (off_t)(offset + sent);
        ssize_t done;
        bool hushed = hush(state, fd);
        Py_BEGIN_ALLOW_THREADS; /* the file may have to be read */
        done = sendfile(fd, file, &at, (size_t)(most - sent < FILE_PIECE ? most - sent : FILE_PIECE));
        error = errno;
        Py_END_ALLOW_THREADS;
        if (hushed)
            unhush(self);
        if (done == 0)
            break;
        if (done > 0) {
            *total += done;
            deadline = 0; /* the timeout bounds each wait, as where the kernel waits */
            moved(self, state, WRITE, NULL, (size_t)done);
            if (hub_here() != NULL && (hub_here()->budget -= PIECES(done) + 1) < 0 && give_way(hub_here()) < 0)
                return -1;
        } else if (error == EAGAIN) {
            if (wait_ready(self, state, WRITE, &deadline, 0) < 0)
                return -1;
        } else if (error == EINTR) {
            if (PyErr_CheckSignals() < 0)
                return -1;
        } else if (sent == 0 && (error == EINVAL || error == ENOSYS || error == EOVERFLOW))
            return -2;
        else
            return fail(error);
    }
    return 0;
}

/* Leave the file where what was sent ends, also when an exception is under way; what has no position has none. */
static int seek_to(PyObject *file, int64_t position) {
    PyObject *type, *error, *trace;
    PyErr_Fetch(&type, &error, &trace);
    PyObject *done = PyObject_CallMethod(file, "seek", "L", (long long)position);
    int result = done == NULL && !PyErr_ExceptionMatches(PyExc_AttributeError) ? -1 : 0;
    Py_XDECREF(done);
    if (result == 0 || type != NULL)
        PyErr_Restore(type, error, trace);
    return result;
}

static PyObject *rare_sendfile(PyObject *self, PyObject *args, PyObject *words) {
    static char *keywords[] = {"file", "offset", "count", NULL};
    PyObject *file, *count = Py_None;
    long long offset = 0;
    if (!PyArg_ParseTupleAndKeywords(args, words, "O|LO:sendfile", keywords, &file, &offset, &count))
        return NULL;
    PyObject *right = PyObject_CallMethod(self, "_check_sendfile_params", "OLO", file, offset, count);
    if (right == NULL)
        return NULL;
    Py_DECREF(right);
    if (flush_of(self) < 0)
        return NULL;
    if (state_of(self)->nonblocking) {
        PyErr_SetString(PyExc_ValueError, "non-blocking sockets are not supported");
        return NULL;
    }
    struct stat about;
    int fd = PyObject_AsFileDescriptor(file);
    PyErr_Clear(); /* whatever cannot tell is read */
    int64_t sent = 0;
    int done = -2;
    if (fd >= 0 && fstat(fd, &about) == 0 && S_ISREG(about.st_mode)) {
        int64_t most = about.st_size;
        if (count != Py_None && (most = PyLong_AsLongLong(count)) == -1 && PyErr_Occurred())
            return NULL;
        done = send_pieces(self, fd, offset, most, &sent);
    }
    if (done == -2)
        return PyObject_CallMethod(self, "_sendfile_use_send", "OLO", file, offset, count);
    if (sent > 0 && seek_to(file, offset + sent) < 0)
        return NULL;
    return done < 0 ? NULL : PyLong_FromLongLong(sent);
}

/* -- before others use the descriptor, what was written goes ------------------------------------------------------ */

static PyObject *rare_shutdown(PyObject *self, PyObject *how) {
    return flush_to_leave(self) < 0 ? NULL : PyObject_CallFunctionObjArgs(base_shutdown, self, how, NULL);
}

static void expose(PyObject *self) {
    State *state = state_of(self);
    if (!state->exposed)
        show_flags(state, socket_fd(self)); /* from now on the program may have set them itself */
    state->exposed = true;
}

static PyObject *rare_fileno(PyObject *self, PyObject *none) {
    expose(self);
    return flush_to_leave(self) < 0 ? NULL : PyObject_CallOneArg(base_fileno, self);
}

/* Both have one set of flags from now on, whatever the new one's constructor has done to them. */
static PyObject *rare_dup(PyObject *self, PyObject *none) {
    PyObject *other = PyObject_CallOneArg(base_dup, self);
    if (other != NULL && PyObject_TypeCheck(other, Connection_Type)) {
        state_of(other)->exposed = true;
        show_flags(state_of(self), socket_fd(self));
    }
    return other;
}

/* -- for who looks on from outside ------------------------------------------------------------------------------- */

static PyObject *rare_waits_for(PyObject *self, PyObject *none) {
    State *state = state_of(self);
    Slot *slot = state->hub == NULL ? NULL : state->slot;
    if (slot == NULL || slot->generation != state->generation)
        Py_RETURN_NONE;
    if (slot->waiter[WRITE] != NULL || state->later || state->owed != NULL)
        return PyUnicode_FromString("writing");
    if (slot->came) /* what it waits for is here */
        Py_RETURN_NONE;
    if (slot->waiter[READ] != NULL || slot->guest != NULL)
        return PyUnicode_FromString("reading");
    Py_RETURN_NONE;
}

/* -- travel to another process ------------------------------------------------------------------------------------ */

PyObject *rebuild(PyObject *module, PyObject *args) {
    PyObject *duplicate;
    int family, kind, proto;
    if (!PyArg_ParseTuple(args, "Oiii:rebuild", &duplicate, &family, &kind, &proto))
        return NULL;
    PyObject *number = PyObject_CallMethod(duplicate, "detach", NULL);
    if (number == NULL)
        return NULL;
    return PyObject_CallFunction((PyObject *)Connection_Type, "iiiN", family, kind, proto, number);
}

static PyObject *rare_reduce(PyObject *self, PyObject *protocol) {
    int fd, family, kind, proto;
    expose(self);
    if (flush_to_leave(self) < 0)
        return NULL;
    if (socket_parts(self, &fd, &family, &kind, &proto) < 0)
        return NULL;
    PyObject *reduction = PyImport_ImportModule("multiprocessing.reduction"), *made = NULL;
    PyObject *own = PyImport_ImportModule("harken._hub.compiled");
    PyObject *function = own == NULL ? NULL : PyObject_GetAttrString(own, "rebuild");
    PyObject *duplicate = reduction == NULL ? NULL : PyObject_CallMethod(reduction, "DupFd", "i", fd);
    if (function != NULL && duplicate != NULL)
        made = Py_BuildValue("O(Oiii)", function, duplicate, family, kind, proto);
    Py_XDECREF(duplicate);
    Py_XDECREF(function);
    Py_XDECREF(own);
    Py_XDECREF(reduction);
    return made;
}

#define WORDS METH_VARARGS | METH_KEYWORDS
HIDDEN PyMethodDef rare_methods[] = {
    {"recvfrom", FAST(rare_recvfrom), WORDS, "As socket.recvfrom, waiting in the hub."},
    {"recvfrom_into", FAST(rare_recvfrom_into), WORDS, "As socket.recvfrom_into, likewise."},
    {"recvmsg", FAST(rare_recvmsg), WORDS, "As socket.recvmsg, likewise."},
    {"recvmsg_into", FAST(rare_recvmsg_into), WORDS, "As socket.recvmsg_into, likewise."},
    {"sendto", FAST(rare_sendto), WORDS, "As socket.sendto, likewise."},
    {"sendmsg", FAST(rare_sendmsg), WORDS, "As socket.sendmsg, likewise; it may send a part."},
    {"accept", rare_accept, METH_NOARGS, "As socket.accept, likewise; gives a Connection."},
    {"connect", rare_connect, METH_O, "As socket.connect, likewise."},
    {"connect_ex", rare_connect_ex, METH_O, "As socket.connect_ex, likewise."},
    {"sendfile", FAST(rare_sendfile), WORDS, "As socket.sendfile, likewise."},
    {"shutdown", rare_shutdown, METH_O, "As socket.shutdown."},
    {"fileno", rare_fileno, METH_NOARGS, "As socket.fileno."},
    {"dup", rare_dup, METH_NOARGS, "As socket.dup."},
    {"waits_for", rare_waits_for, METH_NOARGS, "Return 'reading', 'writing' or None: what its green thread waits for."},
    {"__reduce_ex__", rare_reduce, METH_O, "Travel to another process by multiprocessing."},
    {NULL},
};

int rare_ready(void) {
    for (int i = 0; i < KINDS; i++)
        if ((base_method[i] = PyObject_GetAttrString((PyObject *)Wire_Type, names[i])) == NULL)
            return -1;
    base_connect_ex = PyObject_GetAttrString((PyObject *)Wire_Type, "connect_ex");
    base_shutdown = PyObject_GetAttrString((PyObject *)Wire_Type, "shutdown");
    base_fileno = PyObject_GetAttrString((PyObject *)Wire_Type, "fileno");
    base_dup = PyObject_GetAttrString((PyObject *)Socket_Type, "dup");
    return base_connect_ex == NULL || base_shutdown == NULL || base_fileno == NULL || base_dup == NULL ? -1 : 0;
}
