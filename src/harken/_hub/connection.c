/* SPDX-License-Identifier: MIT
 *
 * Connection: a socket.socket whose calls wait in the hub. Here are its type and what every request uses; rare.c has
 * the rest.
 *
 * It is a heap type with its state behind the base's, and without traverse, clear and dealloc of its own: the base's
 * are written for subclasses made by `class`, and visit and clear what is declared as a member. (A type with its own
 * would recurse for ever in the first collection.) */
#include "hub.h"
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <sys/socket.h>

HIDDEN PyTypeObject *Connection_Type;
static PyTypeObject *Base_Type; /* harken.connection.Connection */
HIDDEN Py_ssize_t state_offset;
static Py_ssize_t record_offset; /* of harken.connection.Connection's slot */
static PyObject *far_ends[2];
static PyObject *deadline_exceeded; /* what green.timeout() raises: an OSError, too */
static PyObject *base_init, *base_real_close, *base_detach, *base_setblocking;
HIDDEN char scratch[SCRATCH];

PyObject **record_slot(PyObject *self) { return (PyObject **)((char *)self + record_offset); }

int fail(int error) {
    errno = error;
    PyErr_SetFromErrno(PyExc_OSError);
    return -1;
}

/* Whether the exception is what became of the operation, not what interrupted the green thread in it. */
bool is_outcome(void) { return PyErr_ExceptionMatches(PyExc_OSError) && !PyErr_ExceptionMatches(deadline_exceeded); }

static int as_int(PyObject *number) {
    long value = PyLong_AsLong(number);
    if (value != (int)value) {
        PyErr_SetString(PyExc_OverflowError, "flags do not fit in an int");
        return -1;
    }
    return (int)value;
}

/* Only TCP: Unix sockets stop a read between writers and at passed descriptors, other protocols at messages. */
void make_stream_known(State *state, int family, int kind, int proto) {
    state->stream = (family == AF_INET || family == AF_INET6) && kind == SOCK_STREAM &&
                    (proto == 0 || proto == IPPROTO_TCP);
    state->prepared = true;
}

static int prepare(PyObject *self, State *state) {
    int fd, family, kind, proto;
    PyObject *done = PyObject_CallFunctionObjArgs(base_setblocking, self, Py_False, NULL);
    if (done == NULL)
        return -1;
    Py_DECREF(done);
    if (socket_parts(self, &fd, &family, &kind, &proto) < 0)
        return -1;
    make_stream_known(state, family, kind, proto);
    return 0;
}

/* Whoever asks for the descriptor finds it as the standard library's sockets leave theirs: it blocks where there is no
 * timeout. Programs read(2) it, make another of it, or start a child on it. Here all goes by MSG_DONTWAIT. */
void show_flags(State *state, int fd) {
    int flags = fd < 0 ? -1 : fcntl(fd, F_GETFL);
    int wanted = state->nonblocking || state->timeout > 0 ? flags | O_NONBLOCK : flags & ~O_NONBLOCK;
    if (flags >= 0 && flags != wanted)
        fcntl(fd, F_SETFL, wanted);
}

/* For a call that has no MSG_DONTWAIT. Tells whether unhush() is due after it. */
bool hush(State *state, int fd) {
    int flags = state->exposed ? fcntl(fd, F_GETFL) : -1;
    return flags >= 0 && !(flags & O_NONBLOCK) && fcntl(fd, F_SETFL, flags | O_NONBLOCK) == 0;
}

void unhush(PyObject *self) {
    int fd = socket_fd(self); /* it may be closed by now */
    if (fd >= 0)
        fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) & ~O_NONBLOCK);
}

/* The descriptor, ready for use; -1 with an exception. */
int begin(PyObject *self, State *state) {
    int fd = socket_fd(self);
    if (fd < 0)
        return PyErr_Occurred() ? -1 : fail(EBADF);
    if (!state->prepared && prepare(self, state) < 0)
        return -1;
    return fd;
}

bool attached(State *state) {
    return state->slot != NULL && state->hub != NULL && state->slot->generation == state->generation;
}

/* Find the connection's slot in the hub of this thread. */
int attach(State *state, Hub *hub, int fd) {
    Slot before = {0};
    if (!attached(state))
        Py_CLEAR(state->owed); /* the parent's, of a process that has forked */
    else {
        if (state->hub == (PyObject *)hub)
            return 0;
        if (state->slot->waiter[READ] != NULL || state->slot->waiter[WRITE] != NULL) {
            PyErr_SetString(PyExc_RuntimeError, BUSY); /* in another hub */
            return -1;
        }
        before = *state->slot; /* what came for a reader that was interrupted goes with it, as what is owed */
        state->slot->ahead = NULL;
        slot_leave((Hub *)state->hub, state->slot, fd);
    }
    Slot *slot = slot_of(hub, fd);
    if (slot == NULL) {
        Py_XDECREF(before.ahead);
        return -1;
    }
    if (slot->owned || (slot->waiter[READ] == NULL && slot->waiter[WRITE] == NULL))
        slot_renew(hub, slot);
    slot->owned = true;
    slot->registered = slot->dry = false;
    slot->owed_from = before.owed_from;
    slot->ahead = before.ahead;
    slot->fault = before.fault;
    slot->came = before.came;
    Py_XSETREF(state->hub, Py_NewRef(hub));
    state->slot = slot;
    state->generation = slot->generation;
    return 0;
}

/* Its descriptor is about to be closed for good: it need not be taken out of the epoll set. */
void leave_unasked(State *state) {
    if (attached(state))
        state->slot->registered = false;
}

/* The connection leaves the hub, before its descriptor is closed or given away. */
void let_go(PyObject *self, State *state) {
    if (flush_to_leave(self) < 0)
        PyErr_Clear(); /* the peer has gone: nobody is left to be told */
    if (attached(state))
        slot_leave((Hub *)state->hub, state->slot, socket_fd(self));
    state->slot = NULL;
}

static int wait_somewhere(PyObject *self, State *state, int direction, int64_t *deadline, size_t want);

/* Wait until the connection may be ready. `deadline` is 0 at first, and kept over the waits of one operation. Up to
 * `want` bytes may be received meanwhile, for the caller to take_ahead(). */
int wait_ready(PyObject *self, State *state, int direction, int64_t *deadline, size_t want) {
    if (state->nonblocking)
        return fail(EAGAIN);
    Marks *marks = marks_of(state);
    if (marks == NULL)
        return wait_somewhere(self, state, direction, deadline, want);
    if (marks->since[direction] == 0)
        marks->since[direction] = now_ns();
    marks->waits[direction] = true;
    int result = wait_somewhere(self, state, direction, deadline, want);
    if ((marks = marks_of(state)) != NULL)
        marks->waits[direction] = false;
    return result;
}

/* Before the running green thread waits for more to read: what it has written goes, but what may go with others'. */
static int send_before_reading(Hub *hub, PyObject *self) {
    if (hub->flow.owner != NULL && flow_settle(hub, self) < 0)
        return -1;
    return hub->pending_owner != NULL || (hub->loose != NULL && hub->loose != self) ? flush_pending(hub) : 0;
}

static int wait_somewhere(PyObject *self, State *state, int direction, int64_t *deadline, size_t want) {
    if (*deadline == 0 && state->timeout > 0)
        *deadline = now_ns() + (state->timeout > 4e9 ? (int64_t)4e18 : (int64_t)(state->timeout * 1e9));
    int fd = socket_fd(self);
    if (fd < 0)
        return fail(EBADF);
    Hub *hub = hub_here();
    PyGreenlet *me = hub == NULL ? NULL : PyGreenlet_GetCurrent();
    if (hub == NULL || me == hub->greenlet) {
        Py_XDECREF(me);
        int result = poll_wait(fd, direction, *deadline);
        if (attached(state))
            state->slot->dry = false;
        return result;
    }
    if (direction == READ && hub->pending_owner == NULL && hub->flow.owner == NULL &&
        (hub->loose == NULL || hub->loose == self))
        note_rhythm(hub, self, state);
    else if (has_unsent(hub)) { /* which may wait, and so miss our event: ask the descriptor once more */
        Py_DECREF(me);
        return direction == READ ? send_before_reading(hub, self) : flush_pending(hub);
    }
    int result = attach(state, hub, fd);
    if (result == 0) {
        Slot *slot = state->slot; /* the connection may have left it when we come back */
        if (want > 0)
            slot->want = (uint32_t)want;
        result = slot_wait(hub, me, slot, fd, direction, *deadline);
        if (want > 0)
            slot->want = 0;
    }
    Py_DECREF(me);
    return result;
}

/* Take `amount` from the running green thread's turn; give way when it is over. Before an operation, since whoever
 * waits may be thrown at. */
static inline int spend(int amount) {
    Hub *hub = hub_here();
    return hub != NULL && (hub->budget -= amount) < 0 ? give_way(hub) : 0;
}

/* -- receiving ---------------------------------------------------------------------------------------------------- */

static void mark_dry(State *state, int fd) {
    Hub *hub = hub_here();
    if (hub == NULL || !state->stream)
        return;
    if (!attached(state) || state->hub != (PyObject *)hub) {
        if (attached(state) || attach(state, hub, fd) < 0) {
            PyErr_Clear();
            return;
        }
    }
    state->slot->dry = !state->slot->sticky;
}

static ssize_t received(PyObject *self, State *state, const char *data, size_t size, int flags) {
    if (hub_here() != NULL)
        hub_here()->budget -= PIECES(size);
    if (size > 0 && !(flags & MSG_PEEK))
        moved(self, state, READ, data, size);
    return (ssize_t)size;
}

/* The error of a call that has bytes to return is the next one's. */
static void keep_fault(Slot *slot, int error) {
    slot->fault = (int16_t)error;
    slot->came = true;
}

/* What MSG_WAITALL has gathered before an error. */
static ssize_t gathered(PyObject *self, State *state, int fd, const char *data, size_t size, int flags) {
    int error = errno;
    Hub *hub = hub_here();
    if (attached(state) || (hub != NULL && attach(state, hub, fd) == 0))
        keep_fault(state->slot, error);
    PyErr_Clear();
    return received(self, state, data, size, flags);
}

/* A result that was used before is full, and the handler asked for more: receive that behind it, into one that has room
 * for all. Whether nothing is left in the kernel; an error is left to the next call. */
static bool receive_rest(Slot *slot, int fd, Result *result, size_t *have, size_t size) {
    Result full = *result;
    if (!result_make(result, size, false)) {
        PyErr_Clear();
        *result = full;
        return false;
    }
    char *into = PyBytes_AS_STRING(result->bytes);
    memcpy(into, PyBytes_AS_STRING(full.bytes), *have);
    Py_DECREF(full.bytes);
    ssize_t more = recv(fd, into + *have, size - *have, MSG_DONTWAIT);
    if (more > 0)
        *have += (size_t)more;
    else if (more < 0 && errno != EAGAIN && errno != EINTR)
        keep_fault(slot, errno);
    return more > 0 || (more < 0 && errno != EINTR);
}

/* recv(2) that waits. A connection that was read empty is not asked again before an event says that there is more. With
 * `fresh` the bytes go into an object that is made for them: never while this waits, so that what others have just given
 * back, and the processor's cache still has, is used first. With `whole` they may have come in an object of their own,
 * received ahead, and then are not in `into`, which is the scratch buffer. */
static ssize_t receive_to(PyObject *self, State *state, char *into, Result *fresh, PyObject **whole, size_t size,
                          int flags) {
    int64_t deadline = 0;
    size_t have = 0, room = size, want = whole != NULL && flags == 0 && state->stream ? size : 0;
    if (state->marked != NULL && !marks_of(state)->whole)
        begin_reading(state);
    if (spend(1) < 0)
        return -1;
    for (;;) {
        if (owes(state)) {
            if (settle_to_read(self, state, !state->nonblocking && !(flags & MSG_DONTWAIT)) < 0)
                return -1;
            deadline = 0; /* the peer was not waited for to speak */
            if (state->marked != NULL)
                marks_of(state)->since[READ] = 0;
        }
        int fd = begin(self, state);
        if (fd < 0)
            return -1;
        Slot *slot = attached(state) ? state->slot : NULL;
        bool came = slot != NULL && slot->came && !(flags & (MSG_OOB | MSG_ERRQUEUE));
        if (flags != 0 || state->nonblocking || slot == NULL || !slot->dry || came) {
            if (fresh != NULL && fresh->bytes == NULL) {
                if (!result_make(fresh, size, flags == 0 && slot != NULL && !came && state->again))
                    return -1;
                into = PyBytes_AS_STRING(fresh->bytes);
                room = fresh->room < size ? fresh->room : size;
            }
            ssize_t got = came ? take_ahead(slot, into + have, room - have, flags, whole)
                               : recv(fd, into + have, room - have, flags | MSG_DONTWAIT);
            if (got >= 0) {
                state->ended = got == 0;
                have += (size_t)got;
                bool rest = have == room && room < size &&
                            (came || slot == NULL || !receive_rest(slot, fd, fresh, &have, size));
                if (flags & MSG_WAITALL && !(flags & MSG_PEEK) && got > 0 && have < size)
                    continue;
                if (flags == 0 && got > 0 && have < size && !came && !rest)
                    mark_dry(state, fd);
                if (hub_here() != NULL)
                    hub_here()->full = have == size && flags == 0;
                if (fresh != NULL)
                    into = PyBytes_AS_STRING(fresh->bytes);
                return received(self, state, whole != NULL && *whole != NULL ? PyBytes_AS_STRING(*whole) : into, have,
                                flags);
            }
            if (errno == EINTR) {
                if (PyErr_CheckSignals() < 0)
                    return -1;
                continue;
            }
            if (errno != EAGAIN && errno != EWOULDBLOCK) {
                state->broken |= errno == ECONNRESET;
                return have > 0 ? gathered(self, state, fd, into, have, flags) : fail(errno);
            }
            if (flags & MSG_DONTWAIT)
                return have > 0 ? received(self, state, into, have, flags) : fail(EAGAIN);
        }
        if (fresh != NULL && have == 0)
            Py_CLEAR(fresh->bytes);
        if (wait_ready(self, state, READ, &deadline, want) < 0) {
            if (have == 0 || !is_outcome())
                return -1;
            PyErr_Clear();
            return received(self, state, into, have, flags); /* or it would be lost */
        }
    }
}

ssize_t receive(PyObject *self, State *state, char *into, size_t size, int flags) {
    return receive_to(self, state, into, NULL, NULL, size, flags);
}

/* Receive into the scratch buffer, or into an object of its own, if it has come so: `*whole`, NULL before. */
ssize_t receive_whole(PyObject *self, State *state, size_t size, int flags, PyObject **whole) {
    return receive_to(self, state, scratch, NULL, whole, size, flags);
}

static PyObject *connection_recv(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    if (count < 1 || count > 2) {
        PyErr_SetString(PyExc_TypeError, "recv() takes the most bytes to receive, and flags");
        return NULL;
    }
    Py_ssize_t size = PyNumber_AsSsize_t(args[0], PyExc_OverflowError);
    if (size == -1 && PyErr_Occurred())
        return NULL;
    int flags = count > 1 ? as_int(args[1]) : 0;
    if (flags == -1 && PyErr_Occurred())
        return NULL;
    if (size < 0) {
        PyErr_SetString(PyExc_ValueError, "negative buffersize in recv");
        return NULL;
    }
    if (size == 0)
        return PyBytes_FromStringAndSize(NULL, 0);
    State *state = state_of(self);
    if (size <= SCRATCH && !state->large && !(flags & MSG_WAITALL)) {
        PyObject *whole = NULL;
        ssize_t got = receive_whole(self, state, (size_t)size, flags, &whole);
        state->large = got > LARGE;
        return got < 0 || whole != NULL ? whole : PyBytes_FromStringAndSize(scratch, got);
    }
    Result result = {NULL, 0};
    ssize_t got = receive_to(self, state, NULL, &result, NULL, (size_t)size, flags);
    state->large = got > LARGE;
    if (got < 0) {
        Py_XDECREF(result.bytes);
        return NULL;
    }
    state->again = flags == 0 && state->stream && result_fits((size_t)got);
    return result_finish(&result, (size_t)got, (size_t)size, state->again);
}

static PyObject *connection_recv_into(PyObject *self, PyObject *args, PyObject *words) {
    static char *names[] = {"buffer", "nbytes", "flags", NULL};
    Py_buffer buffer;
    Py_ssize_t size = 0;
    int flags = 0;
    if (!PyArg_ParseTupleAndKeywords(args, words, "w*|ni:recv_into", names, &buffer, &size, &flags))
        return NULL;
    ssize_t got = -1;
    if (size < 0)
        PyErr_SetString(PyExc_ValueError, "negative buffersize in recv_into");
    else if (size > buffer.len)
        PyErr_SetString(PyExc_ValueError, "buffer too small for requested bytes");
    else if ((size = size ? size : buffer.len) == 0)
        got = 0;
    else
        got = receive(self, state_of(self), buffer.buf, (size_t)size, flags);
    PyBuffer_Release(&buffer);
    return got < 0 ? NULL : PyLong_FromSsize_t(got);
}

/* -- sending ------------------------------------------------------------------------------------------------------ */

/* What send() is to send. On a socket that blocks send(2) returns once all was taken, or with what was taken before an
 * error, which the next call meets. Programs have relied on it for as long as there are sockets, and do not look at the
 * number. With a timeout Python's sockets do not block, and send some. */
Share share_of(State *state, int flags) {
    return state->nonblocking || state->timeout > 0 || flags & MSG_DONTWAIT ? SOME : MUCH;
}

/* send(2) that waits, for as much as is asked. */
ssize_t transmit(PyObject *self, State *state, const char *data, size_t size, int flags, Share share) {
    int64_t deadline = 0;
    size_t done = 0;
    if (spend(1) < 0)
        return -1;
    for (;;) {
        int fd = begin(self, state);
        if (fd < 0)
            return -1;
        state->ended = false;
        ssize_t sent = send(fd, data + done, size - done, flags | MSG_NOSIGNAL | MSG_DONTWAIT);
        if (sent >= 0) {
            done += (size_t)sent;
            moved(self, state, WRITE, data + done - sent, (size_t)sent);
            if (share == SOME || done == size) {
                if (hub_here() != NULL)
                    hub_here()->budget -= PIECES(done);
                return (ssize_t)done;
            }
            continue;
        }
        if (errno == EINTR) {
            if (PyErr_CheckSignals() < 0)
                return -1;
            continue;
        }
        if (errno != EAGAIN && errno != EWOULDBLOCK) {
            state->broken |= errno == ECONNRESET;
            return share == MUCH && done > 0 ? (ssize_t)done : fail(errno);
        }
        if (flags & MSG_DONTWAIT)
            return fail(EAGAIN);
        if (wait_ready(self, state, WRITE, &deadline, 0) < 0) {
            if (share != MUCH || done == 0 || !is_outcome())
                return -1;
            PyErr_Clear();
            return (ssize_t)done;
        }
    }
}

static ssize_t give(PyObject *self, PyObject *const *args, Py_ssize_t count, bool all) {
    State *state = state_of(self);
    begin_writing(state);
    bool plain = all && count == 1 && PyBytes_CheckExact(args[0]);
    int gone = plain ? flow_join(self, state, args[0]) : 0;
    if (gone != 0)
        return gone;
    if (flush_of(self) < 0)
        return -1;
    if (count < 1 || count > 2) {
        PyErr_SetString(PyExc_TypeError, "bytes to send are needed, and flags");
        return -1;
    }
    int flags = count > 1 ? as_int(args[1]) : 0;
    if (flags == -1 && PyErr_Occurred())
        return -1;
    Share share = all ? ALL : share_of(state, flags);
    if (plain && (gone = put_off(self, state, args[0])) != 0)
        return gone;
    if (PyBytes_CheckExact(args[0]))
        return transmit(self, state, PyBytes_AS_STRING(args[0]), (size_t)PyBytes_GET_SIZE(args[0]), flags, share);
    Py_buffer data;
    if (PyObject_GetBuffer(args[0], &data, PyBUF_SIMPLE) < 0)
        return -1;
    ssize_t sent = transmit(self, state, data.buf, (size_t)data.len, flags, share);
    PyBuffer_Release(&data);
    return sent;
}

static PyObject *connection_send(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    ssize_t sent = give(self, args, count, false);
    return sent < 0 ? NULL : PyLong_FromSsize_t(sent);
}

static PyObject *connection_sendall(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    if (give(self, args, count, true) < 0)
        return NULL;
    Py_RETURN_NONE;
}

/* -- answers that were put off; see together.c --------------------------------------------------------------------- */

static PyObject *connection_settle(PyObject *self, PyObject *none) {
    if (flush_to_leave(self) < 0) {
        if (!is_outcome())
            return NULL;
        PyErr_Clear(); /* whoever uses the connection next meets it */
    }
    return PyBool_FromLong(state_of(self)->owed == NULL);
}

/* In a green thread of its own. */
static PyObject *connection_pay(PyObject *self, PyObject *none) {
    if (settle_to_read(self, state_of(self), true) < 0) {
        if (!is_outcome())
            return NULL;
        PyErr_Clear(); /* likewise */
    }
    Py_RETURN_NONE;
}

/* -- timeouts, kept beside the descriptor ------------------------------------------------------------------------- */

static PyObject *connection_settimeout(PyObject *self, PyObject *seconds) {
    State *state = state_of(self);
    double value = seconds == Py_None ? 0 : PyFloat_AsDouble(seconds);
    if (value == -1.0 && PyErr_Occurred())
        return NULL;
    if (!(value >= 0)) {
        PyErr_SetString(PyExc_ValueError, "Timeout value out of range");
        return NULL;
    }
    if (value > 0x1p63 / 1e9) { /* as in the standard library, which counts nanoseconds */
        PyErr_SetString(PyExc_OverflowError, "timeout is too large");
        return NULL;
    }
    if (settle_of(self) < 0) /* what was said before has no such timeout */
        return NULL;
    state->timeout = value;
    state->nonblocking = seconds != Py_None && value == 0;
    if (state->exposed)
        show_flags(state, socket_fd(self));
    Py_RETURN_NONE;
}

static PyObject *connection_gettimeout(PyObject *self, PyObject *none) {
    State *state = state_of(self);
    return state->nonblocking || state->timeout > 0 ? PyFloat_FromDouble(state->timeout) : Py_NewRef(Py_None);
}

/* What is known of the peer without asking the kernel; None is nothing. */
static PyObject *get_far_end(PyObject *self, void *closure) {
    State *state = state_of(self);
    if (!state->broken && !state->ended)
        Py_RETURN_NONE;
    return Py_NewRef(far_ends[state->broken]);
}

static PyObject *get_timeout(PyObject *self, void *closure) { return connection_gettimeout(self, NULL); }

static PyObject *connection_setblocking(PyObject *self, PyObject *flag) {
    State *state = state_of(self);
    int blocking = PyObject_IsTrue(flag);
    if (blocking < 0 || settle_of(self) < 0)
        return NULL;
    state->timeout = 0;
    state->nonblocking = !blocking;
    if (state->exposed)
        show_flags(state, socket_fd(self));
    Py_RETURN_NONE;
}

static PyObject *connection_getblocking(PyObject *self, PyObject *none) {
    return PyBool_FromLong(!state_of(self)->nonblocking);
}

/* -- life --------------------------------------------------------------------------------------------------------- */

/* socket.socket.__init__, and then never blocking. */
static int connection_init(PyObject *self, PyObject *args, PyObject *words) {
    int done_quickly = quick_init(self, args, words);
    if (done_quickly < 0 || default_timeout(state_of(self)) < 0)
        return -1;
    if (done_quickly > 0)
        return 0;
    PyObject *bound = PyObject_CallMethod(base_init, "__get__", "OO", self, Py_TYPE(self));
    PyObject *done = bound == NULL ? NULL : PyObject_Call(bound, args, words);
    Py_XDECREF(bound);
    if (done == NULL)
        return -1;
    Py_DECREF(done);
    return prepare(self, state_of(self));
}

static PyObject *connection_real_close(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    State *state = state_of(self);
    let_go(self, state);
    return PyObject_CallOneArg(base_real_close, self);
}

static PyObject *connection_detach(PyObject *self, PyObject *none) {
    State *state = state_of(self);
    let_go(self, state);
    PyObject *number = PyObject_CallOneArg(base_detach, self);
    if (number != NULL)
        show_flags(state, (int)PyLong_AsLong(number));
    return number;
}

PyObject *connection_adopt(PyObject *sock) {
    if (PyObject_TypeCheck(sock, Connection_Type))
        return Py_NewRef(sock);
    int fd, family, kind, proto;
    if (!PyObject_TypeCheck(sock, Socket_Type)) {
        PyErr_Format(PyExc_TypeError, "a socket.socket is needed, not %.100s", Py_TYPE(sock)->tp_name);
        return NULL;
    }
    if (socket_parts(sock, &fd, &family, &kind, &proto) < 0)
        return NULL;
    PyObject *record = PyObject_GetAttrString(sock, "record"), *adopted = NULL, *done = NULL;
    PyErr_Clear(); /* not every socket has one */
    PyObject *timeout = PyObject_CallMethod(sock, "gettimeout", NULL);
    PyObject *number = timeout == NULL ? NULL : PyObject_CallMethod(sock, "detach", NULL);
    if (number != NULL)
        adopted = PyObject_CallFunction((PyObject *)Connection_Type, "iiiO", family, kind, proto, number);
    if (adopted != NULL)
        done = connection_settimeout(adopted, timeout);
    if (done != NULL && record != NULL && record != Py_None)
        Py_SETREF(done, PyObject_CallMethod(record, "move", "O", adopted));
    if (done == NULL)
        Py_CLEAR(adopted);
    Py_XDECREF(done);
    Py_XDECREF(number);
    Py_XDECREF(timeout);
    Py_XDECREF(record);
    return adopted;
}

int connection_lodge(Hub *hub, PyObject *self, PyObject *starter) {
    State *state = state_of(self);
    int fd = begin(self, state);
    if (fd < 0 || attach(state, hub, fd) < 0)
        return -1;
    return slot_lodge(hub, state->slot, fd, self, starter);
}

/* Its end is told to its record, which it may not have yet. */
void make_record(PyObject *self) {
    PyObject *type, *error, *trace;
    if (state_of(self)->worker == NULL || *record_slot(self) != NULL)
        return;
    PyErr_Fetch(&type, &error, &trace);
    PyObject *record = lane_record(self);
    if (record == NULL && PyErr_Occurred())
        PyErr_WriteUnraisable(self);
    Py_XDECREF(record);
    lane_forget(self); /* if there was no memory for one */
    PyErr_Restore(type, error, trace);
}

/* The connection goes: as a socket does, with a warning if nobody closed it; and its record is told. */
static void connection_finalize(PyObject *self) {
    make_record(self); /* as long as it can still be referred to */
    handle_lose(state_of(self));
    PyObject *type, *error, *trace, *record = *record_slot(self);
    if (record != NULL && record != Py_None) {
        PyErr_Fetch(&type, &error, &trace);
        PyObject *told = PyObject_CallMethod(record, "ended", NULL);
        if (told == NULL)
            PyErr_WriteUnraisable(record);
        Py_XDECREF(told);
        PyErr_Restore(type, error, trace);
    }
    if (Base_Type->tp_finalize != NULL)
        Base_Type->tp_finalize(self);
}

static PyMethodDef connection_methods[] = {
    {"recv", FAST(connection_recv), METH_FASTCALL, "As socket.recv, waiting in the hub."},
    {"recv_into", FAST(connection_recv_into), METH_VARARGS | METH_KEYWORDS, "As socket.recv_into, likewise."},
    {"send", FAST(connection_send), METH_FASTCALL, "As socket.send, likewise."},
    {"sendall", FAST(connection_sendall), METH_FASTCALL, "As socket.sendall, likewise."},
    {"take", FAST(connection_take), METH_FASTCALL | METH_CLASS, "take(listener, most): accept what is there."},
    {"end", connection_end, METH_NOARGS, "Tell the peer that nothing more comes, and close; return whether it is closed."},
    {"handle", connection_handle, METH_NOARGS, "Return a callable that returns this connection as long as it is there."},
    {"open_reader", FAST(connection_open_reader), METH_FASTCALL, "open_reader(size=-1): a buffered file to read."},
    {"open_writer", FAST(connection_open_writer), METH_FASTCALL, "open_writer(reader=None): a file to write."},
    {"trace", connection_trace, METH_O, "trace(yes): tell harken.tracing what moves, or no more."},
    {"keep_stamps", connection_keep_stamps, METH_NOARGS, "Stamp from now on when calls begin, requests, and what moves."},
    {"stamps", connection_stamps, METH_NOARGS, "(reading, writing, first, moved, received, sent, requests); see harken.stamps."},
    {"pay", connection_pay, METH_NOARGS, "Send what was written and put off, waiting for the peer to take it."},
    {"settle", connection_settle, METH_NOARGS, "Send what was written and put off; return whether nothing is left."},
    {"settimeout", connection_settimeout, METH_O, "Set the seconds that one operation may take."},
    {"gettimeout", connection_gettimeout, METH_NOARGS, "Return what settimeout() was given."},
    {"setblocking", connection_setblocking, METH_O, "As settimeout(None) or settimeout(0)."},
    {"getblocking", connection_getblocking, METH_NOARGS, "Tell whether operations wait."},
    {"detach", connection_detach, METH_NOARGS, "Give the descriptor away, blocking if this socket did."},
    {"_real_close", FAST(connection_real_close), METH_FASTCALL, "Close the descriptor."},
};

/* The record, which is made when it is first asked for. */
static PyObject *get_record(PyObject *self, void *closure) {
    PyObject *record = Py_XNewRef(*record_slot(self));
    if (record == NULL && state_of(self)->worker != NULL)
        record = lane_record(self);
    if (record == NULL && !PyErr_Occurred())
        PyErr_SetString(PyExc_AttributeError, "record");
    return record;
}

static int set_record(PyObject *self, PyObject *record, void *closure) {
    Py_XSETREF(*record_slot(self), Py_XNewRef(record));
    lane_forget(self);
    return 0;
}

static PyGetSetDef connection_attributes[] = {
    {"timeout", get_timeout, NULL, "The timeout in seconds.", NULL},
    {"record", get_record, set_record, "What harken remembers of it.", NULL},
    {"far_end", get_far_end, NULL, "What reads and writes have told of the peer: `peer_closed`, `peer_reset`, None.", NULL},
    {NULL},
};

/* Not READONLY, or subtype_dealloc would not clear it; no name that a program could write by accident. */
static PyMemberDef connection_members[] = {
    {"<hub>", T_OBJECT_EX, 0, 0, NULL},
    {"<marks>", T_OBJECT_EX, 0, 0, NULL},
    {"<owed>", T_OBJECT_EX, 0, 0, NULL},
    {NULL},
};

static PyType_Slot connection_slots[] = {
    {Py_tp_doc, "A socket.socket that waits in the hub where a blocking one would block its thread."},
    {Py_tp_init, connection_init},
    {Py_tp_methods, NULL},
    {Py_tp_getset, connection_attributes},
    {Py_tp_members, connection_members},
    {Py_tp_finalize, connection_finalize},
    {0, NULL},
};

static PyType_Spec connection_spec = {
    .name = "harken._hub.compiled.Connection",
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
    .slots = connection_slots,
};

/* One table of both files' methods. It lives as long as the type: for ever. */
static PyMethodDef *all_methods(void) {
    size_t own = sizeof connection_methods / sizeof *connection_methods, rare = 0;
    while (rare_methods[rare].ml_name != NULL)
        rare++;
    PyMethodDef *methods = PyMem_Calloc(own + rare + 1, sizeof *methods);
    if (methods != NULL) {
        memcpy(methods, connection_methods, sizeof connection_methods);
        memcpy(methods + own, rare_methods, rare * sizeof *methods);
    }
    return methods;
}

int connection_ready(PyObject *module) {
    PyObject *parent = PyImport_ImportModule("harken.connection");
    Base_Type = parent == NULL ? NULL : (PyTypeObject *)PyObject_GetAttrString(parent, "Connection");
    Py_XDECREF(parent);
    PyObject *errors = PyImport_ImportModule("harken.errors");
    deadline_exceeded = errors == NULL ? NULL : PyObject_GetAttrString(errors, "DeadlineExceeded");
    Py_XDECREF(errors);
    far_ends[0] = PyUnicode_InternFromString("peer_closed");
    far_ends[1] = PyUnicode_InternFromString("peer_reset");
    if (Base_Type == NULL || deadline_exceeded == NULL || accept_ready() < 0 || rare_ready() < 0 || far_ends[0] == NULL || far_ends[1] == NULL)
        return -1;
    base_init = PyObject_GetAttrString((PyObject *)Base_Type, "__init__");
    base_real_close = PyObject_GetAttrString((PyObject *)Base_Type, "_real_close");
    base_detach = PyObject_GetAttrString((PyObject *)Base_Type, "detach");
    base_setblocking = PyObject_GetAttrString((PyObject *)Wire_Type, "setblocking");
    if (base_init == NULL || base_real_close == NULL || base_detach == NULL || base_setblocking == NULL)
        return -1;
    if ((record_offset = slot_offset(Base_Type, "record")) <= 0) {
        PyErr_SetString(PyExc_ImportError, "harken.connection.Connection has no slot `record`");
        return -1;
    }
    state_offset = (Base_Type->tp_basicsize + 15) & ~(Py_ssize_t)15;
    connection_members[0].offset = state_offset + (Py_ssize_t)offsetof(State, hub);
    connection_members[1].offset = state_offset + (Py_ssize_t)offsetof(State, marked);
    connection_members[2].offset = state_offset + (Py_ssize_t)offsetof(State, owed);
    connection_spec.basicsize = (int)(state_offset + (Py_ssize_t)sizeof(State));
    if ((connection_slots[2].pfunc = all_methods()) == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    PyObject *bases = PyTuple_Pack(1, Base_Type);
    Connection_Type = bases == NULL ? NULL : (PyTypeObject *)PyType_FromSpecWithBases(&connection_spec, bases);
    Py_XDECREF(bases);
    if (Connection_Type == NULL || handle_ready() < 0)
        return -1;
    return PyModule_AddObjectRef(module, "Connection", (PyObject *)Connection_Type);
}
