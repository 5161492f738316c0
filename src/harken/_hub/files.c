/* SPDX-License-Identifier: MIT
 *
 * Reader and Writer: rfile and wfile of a Connection.
 *
 * The reader holds bytes only while some are unread. The writer joins what is written while the reader still holds
 * requests: a pipelining client gets one packet for many answers. What was joined is sent before the green thread gives
 * up its turn in any way, so no answer ever waits for the peer; at most one green thread, the running one, has such
 * output, and one buffer a hub is enough. */
#include "hub.h"
#include <errno.h>
#include <sys/socket.h>

#define PENDING 65536 /* joined at the most */

typedef struct {
    PyObject_HEAD
    PyObject *weak;
    PyObject *sock;    /* a Connection; NULL once closed */
    char *data;        /* received, and unread from `at` to `end`; NULL when nothing is */
    Py_ssize_t at, end, room;
    Py_ssize_t most;   /* bytes to ask the kernel for at once */
} Reader;

typedef struct {
    PyObject_HEAD
    PyObject *weak;
    PyObject *sock; /* NULL once closed */
    Reader *reader; /* of the same connection, or NULL */
    PyObject *keeper; /* of what was offered, joined, and cannot be sent at once; NULL: none */
} Writer;

static PyTypeObject *Reader_Type, *Writer_Type;

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

/* -- pending output ----------------------------------------------------------------------------------------------- */

static int call_keeper(PyObject *keeper, PyObject *rest) {
    PyObject *type, *error, *trace;
    PyErr_Fetch(&type, &error, &trace); /* a green thread that ends may have one */
    PyObject *done = PyObject_CallOneArg(keeper, rest);
    Py_XDECREF(done);
    if (done == NULL) {
        Py_XDECREF(type);
        Py_XDECREF(error);
        Py_XDECREF(trace);
        return -1;
    }
    PyErr_Restore(type, error, trace);
    return 0;
}

/* Send what the running green thread has joined. It may wait, unless somebody keeps what the peer does not take. */
int flush_pending(Hub *hub) {
    hub->full = false;
    if (hub->loose != NULL && settle_loose(hub, true) < 0)
        return -1;
    if (hub->flow.owner != NULL && flow_interrupted(hub) < 0)
        return -1;
    hub->wrote = NULL;
    PyObject *owner = hub->pending_owner, *keeper = hub->pending_keeper;
    size_t size = hub->pending_size;
    if (owner == NULL)
        return 0;
    hub->pending_owner = hub->pending_keeper = NULL;
    hub->pending_size = 0;
    state_of(owner)->joined = false;
    int result = 0, fd = socket_fd(owner);
    ssize_t sent = send(fd, hub->pending, size, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (sent < 0 && errno != EAGAIN && errno != EINTR)
        result = fail(errno);
    if (sent > 0)
        moved(owner, state_of(owner), WRITE, hub->pending, (size_t)sent);
    if (result == 0 && sent < (ssize_t)size) { /* others will use the buffer while we wait */
        size_t done = sent > 0 ? (size_t)sent : 0;
        PyObject *rest = PyBytes_FromStringAndSize(hub->pending + done, (Py_ssize_t)(size - done));
        if (rest == NULL)
            result = -1;
        else if (keeper != NULL)
            result = call_keeper(keeper, rest);
        else
            result = transmit(owner, state_of(owner), PyBytes_AS_STRING(rest), size - done, 0, ALL) < 0 ? -1 : 0;
        Py_XDECREF(rest);
    }
    Py_XDECREF(keeper);
    Py_DECREF(owner);
    return result;
}

/* The same, where the green thread waits for nothing: it lets the others have their turn, or ends. */
int flush_turn(Hub *hub) {
    if ((hub->loose != NULL && settle_loose(hub, false) < 0) || flow_settle(hub, NULL) < 0)
        return -1;
    return flush_pending(hub);
}

/* Send what can be sent without waiting, whatever thread this is; its number of bytes. What a handler wrote before it
 * went on computing gets out so. An error is left for the green thread to meet. */
size_t flush_pending_nowait(Hub *hub) {
    int fd = hub->pending_owner == NULL ? -1 : socket_fd(hub->pending_owner);
    if (fd < 0 || hub->pending_owner == NULL) {
        PyErr_Clear();
        return 0;
    }
    ssize_t sent = send(fd, hub->pending, hub->pending_size, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (sent <= 0)
        return 0;
    PyObject *owner = Py_NewRef(hub->pending_owner);
    PyObject *told = state_of(owner)->traced ? PyBytes_FromStringAndSize(hub->pending, sent) : NULL;
    note_moved(state_of(owner), WRITE, (size_t)sent);
    hub->pending_size -= (size_t)sent;
    memmove(hub->pending, hub->pending + sent, hub->pending_size);
    if (hub->pending_size == 0) {
        state_of(owner)->joined = false;
        Py_CLEAR(hub->pending_owner);
        Py_CLEAR(hub->pending_keeper);
    }
    if (told != NULL) /* last: it may let other threads run */
        tell_traffic(owner, WRITE, PyBytes_AS_STRING(told), (size_t)sent);
    Py_XDECREF(told);
    Py_DECREF(owner);
    return (size_t)sent;
}

/* What is joined, which is the caller's business from now on; NULL with an exception: nothing was taken. */
static PyObject *take_joined(Hub *hub) {
    PyObject *rest = PyBytes_FromStringAndSize(hub->pending, (Py_ssize_t)hub->pending_size);
    if (rest != NULL) {
        hub->pending_size = 0;
        state_of(hub->pending_owner)->joined = false;
        Py_CLEAR(hub->pending_owner);
        Py_CLEAR(hub->pending_keeper);
    }
    return rest;
}

/* What a green thread has joined for `sock` goes before what this thread sends, of which that one knows. */
static int flush_for_another(PyObject *sock) {
    Hub *hub = all_hubs;
    while (hub != NULL && hub->pending_owner != sock)
        hub = hub->next;
    if (hub == NULL)
        return 0;
    PyObject *rest = take_joined(hub);
    int result = rest == NULL ? -1 : 0;
    if (result == 0 && transmit(sock, state_of(sock), PyBytes_AS_STRING(rest), (size_t)PyBytes_GET_SIZE(rest), 0, ALL) < 0)
        result = -1;
    Py_XDECREF(rest);
    return result;
}

/* Before something is sent on `sock`: what was written goes first. */
int flush_of(PyObject *sock) {
    Hub *hub = current_hub;
    State *state = state_of(sock);
    if ((state->later || state->owed != NULL) && settle_answers(sock, state) < 0)
        return -1;
    if (state->flowing && flow_flush_of(sock) < 0)
        return -1;
    if (hub != NULL && hub->pending_owner == sock)
        return flush_pending(hub);
    return state->joined ? flush_for_another(sock) : 0;
}

/* Before something changes how `sock` sends: what was put off goes as it would have then. Anybody may do that, at any
 * time: see settle_now(). */
int settle_of(PyObject *sock) {
    State *state = state_of(sock);
    if ((state->later || state->owed != NULL) && settle_now(sock, state) < 0)
        return -1;
    return state->flowing ? flow_leave(sock) : 0;
}

/* Before `sock` is closed, or used past its methods. */
int flush_to_leave(PyObject *sock) {
    Hub *hub = current_hub;
    State *state = state_of(sock);
    if (settle_of(sock) < 0)
        return -1;
    if (hub != NULL && hub->pending_owner == sock)
        return flush_pending(hub);
    for (Hub *other = state->joined ? all_hubs : NULL; other != NULL; other = other->next)
        if (other->pending_owner == sock)
            flush_pending_nowait(other);
    return 0;
}

static inline void append(Hub *hub, const char *data, size_t size) {
    memcpy(hub->pending + hub->pending_size, data, size);
    hub->pending_size += size;
}

static int join(Hub *hub, PyObject *sock, const char *data, size_t size) {
    if (hub->pending_owner != NULL && (hub->pending_owner != sock || hub->pending_size + size > PENDING) &&
        flush_pending(hub) < 0)
        return -1;
    if (hub->pending == NULL && (hub->pending = PyMem_Malloc(PENDING)) == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    if (hub->pending_owner == NULL) {
        if (flush_of(sock) < 0) /* so that nothing else is unsent where something is pending */
            return -1;
        hub->pending_owner = Py_NewRef(sock);
        state_of(sock)->joined = true;
    }
    append(hub, data, size);
    return 0;
}

/* -- reading ------------------------------------------------------------------------------------------------------ */

static PyObject *open_sock(PyObject *sock) {
    if (sock == NULL)
        PyErr_SetString(PyExc_ValueError, "I/O operation on closed file.");
    return sock;
}

static Py_ssize_t held(Reader *reader) { return reader->end - reader->at; }

static const char *start(Reader *reader) { return reader->data + reader->at; }

/* `size` of the unread bytes are read. */
static void taken(Reader *reader, Py_ssize_t size) {
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
    State *state = state_of(sock);
    begin_reading(state);
    if (state->marked != NULL && marks_of(state)->first == 0 && held(reader) > 0)
        begin_request(marks_of(state), now_ns());
    return 0;
}

/* Receive once; the target may be the scratch buffer, which is good until anybody waits again. With `whole` it is, and
 * see receive_whole(). */
static ssize_t get(Reader *reader, char *into, Py_ssize_t size, PyObject **whole) {
    PyObject *sock = open_sock(reader->sock);
    if (sock == NULL)
        return -1;
    Py_INCREF(sock); /* somebody may close us meanwhile */
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

static PyObject *reader_readinto(PyObject *self, PyObject *target) { return read_into(self, target, false); }
static PyObject *reader_readinto1(PyObject *self, PyObject *target) { return read_into(self, target, true); }

/* -- writing ------------------------------------------------------------------------------------------------------ */

/* `whole` is an object that has exactly these bytes and never others, or NULL. */
static int put(Writer *writer, const char *data, size_t size, PyObject *whole) {
    PyObject *sock = open_sock(writer->sock);
    if (sock == NULL)
        return -1;
    Hub *hub = current_hub;
    State *state = state_of(sock);
    bool more = writer->reader != NULL && held(writer->reader) > 0;
    bool mine = hub != NULL && hub->pending_owner == sock; /* what is pending is a green thread's: the running one's */
    bool joins = size <= PENDING && !state->nonblocking && (mine || (more && hub != NULL && !in_hub(hub)));
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
static ssize_t try_put(Writer *writer, const char *data, size_t size) {
    PyObject *sock = open_sock(writer->sock);
    int fd = sock == NULL ? -1 : begin(sock, state_of(sock));
    if (fd < 0)
        return -1;
    begin_writing(state_of(sock));
    if (settle_to_read(sock, state_of(sock), false) < 0)
        return -1;
    if (state_of(sock)->owed != NULL)
        return 0;
    Hub *hub = current_hub;
    bool more = writer->reader != NULL && held(writer->reader) > 0;
    bool mine = hub != NULL && hub->pending_owner == sock;
    if (mine && hub->pending_size + size > PENDING) {
        flush_pending_nowait(hub);
        if ((mine = hub->pending_owner == sock) && hub->pending_size + size > PENDING)
            return 0;
    }
    if (hub != NULL && (mine || (more && size <= PENDING && hub->pending_owner == NULL && !in_hub(hub)))) {
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
    if (PyObject_GetBuffer(data, &buffer, PyBUF_SIMPLE) < 0)
        return NULL;
    ssize_t done = try_put((Writer *)self, buffer.buf, (size_t)buffer.len);
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
    Hub *hub = current_hub;
    if (hub != NULL && hub->pending_owner == sock)
        flush_pending_nowait(hub);
    if (hub == NULL || hub->pending_owner != sock)
        return PyBytes_FromStringAndSize(NULL, 0);
    return take_joined(hub);
}

static PyObject *writer_write(PyObject *self, PyObject *data) {
    if (PyBytes_CheckExact(data))
        return put((Writer *)self, PyBytes_AS_STRING(data), (size_t)PyBytes_GET_SIZE(data), data) < 0
                   ? NULL
                   : PyLong_FromSsize_t(PyBytes_GET_SIZE(data));
    Py_buffer buffer;
    if (PyObject_GetBuffer(data, &buffer, PyBUF_SIMPLE) < 0)
        return NULL;
    Py_ssize_t size = buffer.len;
    int result = put((Writer *)self, buffer.buf, (size_t)size, NULL);
    PyBuffer_Release(&buffer);
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
    PyObject *sock = open_sock(((Writer *)self)->sock);
    return sock == NULL || flush_to_leave(sock) < 0 ? NULL : Py_NewRef(Py_None);
}

/* -- what both have ----------------------------------------------------------------------------------------------- */

#define SOCK(self) (*(PyObject **)((char *)(self) + offsetof(Reader, sock)))
_Static_assert(offsetof(Reader, sock) == offsetof(Writer, sock), "Reader and Writer begin alike");

static PyObject *file_fileno(PyObject *self, PyObject *none) {
    PyObject *sock = open_sock(SOCK(self));
    return sock == NULL ? NULL : PyObject_CallMethod(sock, "fileno", NULL);
}

static PyObject *file_no(PyObject *self, PyObject *none) {
    return open_sock(SOCK(self)) == NULL ? NULL : Py_NewRef(Py_False);
}

static PyObject *file_yes(PyObject *self, PyObject *none) {
    return open_sock(SOCK(self)) == NULL ? NULL : Py_NewRef(Py_True);
}

static PyObject *file_nothing(PyObject *self, PyObject *none) { Py_RETURN_NONE; }

static PyObject *file_enter(PyObject *self, PyObject *none) {
    return open_sock(SOCK(self)) == NULL ? NULL : Py_NewRef(self);
}

static PyObject *file_closed(PyObject *self, void *closure) { return PyBool_FromLong(SOCK(self) == NULL); }

/* As makefile()'s files do: the socket stays open until its last file is closed. */
static PyObject *file_close(PyObject *self, PyObject *none) {
    PyObject *sock = SOCK(self);
    if (sock == NULL)
        Py_RETURN_NONE;
    int flushed = Py_IS_TYPE(self, Writer_Type) ? flush_to_leave(sock) : 0;
    if (SOCK(self) != sock) /* another green thread closed it while we sent */
        return flushed < 0 ? NULL : Py_NewRef(Py_None);
    PyObject *type, *error, *trace;
    PyErr_Fetch(&type, &error, &trace);
    SOCK(self) = NULL;
    if (Py_IS_TYPE(self, Writer_Type))
        Py_CLEAR(((Writer *)self)->keeper);
    if (Py_IS_TYPE(self, Reader_Type) && held((Reader *)self) > 0)
        taken((Reader *)self, held((Reader *)self));
    PyObject *done = PyObject_CallMethod(sock, "_decref_socketios", NULL);
    Py_DECREF(sock);
    if (flushed < 0) {
        PyErr_Restore(type, error, trace);
        Py_CLEAR(done);
    }
    return done;
}

static PyObject *file_exit(PyObject *self, PyObject *args) { return file_close(self, NULL); }

static PyObject *attach_to(PyObject *file, PyObject *sock) {
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

static PyObject *set_most(PyObject *reader, Py_ssize_t most) {
    if (reader != NULL)
        ((Reader *)reader)->most = most > 0 && most < SCRATCH ? most : SCRATCH;
    return reader;
}

static PyObject *set_reader(PyObject *writer, PyObject *reader) {
    if (writer != NULL && Py_IS_TYPE(reader, Reader_Type))
        ((Writer *)writer)->reader = (Reader *)Py_NewRef(reader);
    return writer;
}

static PyObject *reader_new(PyTypeObject *type, PyObject *args, PyObject *words) {
    PyObject *sock;
    Py_ssize_t most = -1;
    if (!PyArg_ParseTuple(args, "O!|n:Reader", Connection_Type, &sock, &most))
        return NULL;
    return set_most(attach_to(type->tp_alloc(type, 0), sock), most);
}

static PyObject *writer_new(PyTypeObject *type, PyObject *args, PyObject *words) {
    PyObject *sock, *reader = Py_None;
    if (!PyArg_ParseTuple(args, "O!|O:Writer", Connection_Type, &sock, &reader))
        return NULL;
    return set_reader(attach_to(type->tp_alloc(type, 0), sock), reader);
}

/* Connection.open_reader(size=-1) and open_writer(reader=None). */
PyObject *connection_open_reader(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    Py_ssize_t most;
    PyObject *reader = size_of(args, count, &most) < 0 ? NULL : Reader_Type->tp_alloc(Reader_Type, 0);
    return set_most(attach_to(reader, self), most);
}

PyObject *connection_open_writer(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    if (count > 1) {
        PyErr_SetString(PyExc_TypeError, "open_writer() takes the reader of the connection");
        return NULL;
    }
    return set_reader(attach_to(Writer_Type->tp_alloc(Writer_Type, 0), self), count > 0 ? args[0] : Py_None);
}

static int file_traverse(PyObject *self, visitproc visit, void *arg) {
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(SOCK(self));
    if (Py_IS_TYPE(self, Writer_Type)) {
        Py_VISIT(((Writer *)self)->reader);
        Py_VISIT(((Writer *)self)->keeper);
    }
    return 0;
}

static int file_clear(PyObject *self) {
    if (Py_IS_TYPE(self, Writer_Type)) {
        Py_CLEAR(((Writer *)self)->reader);
        Py_CLEAR(((Writer *)self)->keeper);
    }
    return 0;
}

/* Dropped without close(): like SocketIO, it lets the socket go. */
static void file_finalize(PyObject *self) {
    PyObject *type, *error, *trace;
    PyErr_Fetch(&type, &error, &trace);
    PyObject *done = file_close(self, NULL);
    if (done == NULL)
        PyErr_Clear();
    Py_XDECREF(done);
    PyErr_Restore(type, error, trace);
}

static void file_dealloc(PyObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    if (PyObject_CallFinalizerFromDealloc(self) < 0)
        return;
    PyObject_GC_UnTrack(self);
    if (((Reader *)self)->weak != NULL)
        PyObject_ClearWeakRefs(self);
    file_clear(self);
    if (Py_IS_TYPE(self, Reader_Type))
        PyMem_Free(((Reader *)self)->data);
    Py_CLEAR(SOCK(self));
    type->tp_free(self);
    Py_DECREF(type);
}

#define SHARED                                                                        \
    {"fileno", file_fileno, METH_NOARGS, "The connection's descriptor."},             \
        {"isatty", file_no, METH_NOARGS, "False."},                                   \
        {"seekable", file_no, METH_NOARGS, "False."},                                 \
        {"close", file_close, METH_NOARGS, "Let the connection go."},                 \
        {"__enter__", file_enter, METH_NOARGS, NULL}, {"__exit__", file_exit, METH_VARARGS, NULL},

static PyMethodDef reader_methods[] = {
    SHARED{"readable", file_yes, METH_NOARGS, "True."},
    {"writable", file_no, METH_NOARGS, "False."},
    {"flush", file_nothing, METH_NOARGS, "Nothing."},
    {"readline", FAST(reader_readline), METH_FASTCALL, "readline(size=-1): one line, or what there is of it."},
    {"readlines", FAST(reader_readlines), METH_FASTCALL, "readlines(hint=-1): lines until the end."},
    {"read", FAST(reader_read), METH_FASTCALL, "read(size=-1): so many bytes, or all until the end."},
    {"give_back", reader_give_back, METH_O, "give_back(data): put back what was read last."},
    {"read1", FAST(reader_read1), METH_FASTCALL, "read1(size=-1): what is there, or comes first."},
    {"readinto", reader_readinto, METH_O, "readinto(buffer): fill it."},
    {"readinto1", reader_readinto1, METH_O, "readinto1(buffer): what is there, or comes first."},
    {"peek", FAST(reader_peek), METH_FASTCALL, "peek(size=0): what is there, without taking it."},
    {NULL},
};

static PyMethodDef writer_methods[] = {
    SHARED{"readable", file_no, METH_NOARGS, "False."},
    {"writable", file_yes, METH_NOARGS, "True."},
    {"offer", writer_offer, METH_O, "offer(data): as write, without waiting; how many bytes were taken, or None: all."},
    {"keep_by", writer_keep_by, METH_O, "keep_by(function): call it with what was offered, joined, and cannot be sent."},
    {"take_back", writer_take_back, METH_NOARGS, "take_back(): what was joined, and cannot be sent without waiting."},
    {"write", writer_write, METH_O, "write(data): send it, at once or before this green thread waits."},
    {"writelines", writer_writelines, METH_O, "writelines(lines): write each."},
    {"flush", writer_flush, METH_NOARGS, "Send what was written."},
    {NULL},
};

static PyObject *reader_mode(PyObject *self, void *closure) { return PyUnicode_InternFromString("rb"); }

static PyGetSetDef reader_attributes[] = {
    {"closed", file_closed, NULL, "Whether it was closed.", NULL},
    {"mode", reader_mode, NULL, "As of any file that is open for reading bytes.", NULL},
    {NULL},
};

static PyGetSetDef writer_attributes[] = {
    {"closed", file_closed, NULL, "Whether it was closed.", NULL},
    {NULL},
};

static PyMemberDef file_members[] = {
    {"__weaklistoffset__", T_PYSSIZET, offsetof(Reader, weak), READONLY, NULL},
    {NULL},
};

static Py_ssize_t reader_length(PyObject *self) { return held((Reader *)self); }

static int reader_true(PyObject *self) { return 1; } /* a reader that holds nothing is one all the same */

static PyType_Slot reader_slots[] = {
    {Py_mp_length, reader_length},
    {Py_nb_bool, reader_true},
    {Py_tp_doc, "Reader(connection, size=-1): reads it as a buffered file, at most `size` bytes ahead."},
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

static PyType_Spec reader_spec = {
    .name = "harken._hub.compiled.Reader",
    .basicsize = sizeof(Reader),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .slots = reader_slots,
};

static PyType_Spec writer_spec = {
    .name = "harken._hub.compiled.Writer",
    .basicsize = sizeof(Writer),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .slots = writer_slots,
};

/* A C type cannot derive from io.BufferedIOBase (its layout is another), but it can be registered as one. */
static int add_type(PyObject *module, const char *name, PyTypeObject *type) {
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

int files_ready(PyObject *module) {
    Reader_Type = (PyTypeObject *)PyType_FromSpec(&reader_spec);
    Writer_Type = (PyTypeObject *)PyType_FromSpec(&writer_spec);
    return add_type(module, "Reader", Reader_Type) < 0 || add_type(module, "Writer", Writer_Type) < 0 ? -1 : 0;
}
