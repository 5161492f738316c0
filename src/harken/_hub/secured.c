/* SPDX-License-Identifier: MIT
 *
 * Reading, writing and the handshake of a connection under TLS, for harken.preambles._hubbed: OpenSSL is called where
 * openssl.c finds it, and between it and the wire there is one call. What is not of every day (no Connection below,
 * sockets that do not wait, flags, something that stands before the next write) is left to the methods that these
 * replace. */
#include "files.h"
#include "openssl.h"
#include <sys/socket.h>

#define SLICE (PIECE + 2048 + 5) /* as in _hubbed.py: a record on the wire, at the most */
#define BATCH (4 * PIECE)        /* and what is sent at once */
#define MOST_IN_VAIN (8 * PIECE) /* as in _hubbed.py: received without data in it */
#define VAIN_A_TURN 4096         /* and what of it before others have their turn */

/* Slots of the class. The first are what calls use while others may close the connection. */
enum { INNER, SSLOBJ, INCOMING, OUTGOING, GUARD, HELD, AHEAD = HELD, REST, BROKEN, TRACED, ENDED, RECORD, SLOTS };
static const char *slot_names[SLOTS] = {"_inner", "_sslobj", "_incoming", "_outgoing", "_guard", "_ahead",
                                        "_rest",  "_broken", "_traced",   "_ended",    "record"};
static Py_ssize_t offsets[SLOTS];
static PyTypeObject *secured_type; /* the class that was quickened */
static PyObject *slow_recv, *slow_recv_into, *slow_sendall, *slow_encrypt, *slow_shake, *slow_end, *slow_stand_for;
static PyObject *want_read;                                                         /* ssl.SSLWantReadError */
static PyObject *word_break_off, *word_fail, *word_judge, *word_record, *word_recv, *word_refuse,
    *word_sendall, *word_take, *word_tell;

/* What is called on OpenSSL's objects for every message, looked up once: of `type`, which programs cannot change. */
typedef struct {
    const char *module, *kind, *text;
    PyObject *name;
    PyTypeObject *type;
    PyObject *found; /* its method, or property */
} Member;

enum {
    SHAKE, PLAIN, PLAIN_READ, PLAIN_WRITE, BYE, VERSION,   /* OpenSSL */
    READ_OUT, WRITE_IN, WRITE_EOF, HELD_BACK, EOF_SEEN,    /* its memory */
    MEMBERS
};
static Member members[MEMBERS] = {
    [SHAKE] = {"_ssl", "_SSLSocket", "do_handshake"},
    [PLAIN] = {"_ssl", "_SSLSocket", "pending"},
    [PLAIN_READ] = {"_ssl", "_SSLSocket", "read"},
    [PLAIN_WRITE] = {"_ssl", "_SSLSocket", "write"},
    [BYE] = {"_ssl", "_SSLSocket", "shutdown"},
    [VERSION] = {"_ssl", "_SSLSocket", "version"},
    [READ_OUT] = {"_ssl", "MemoryBIO", "read"},
    [WRITE_IN] = {"_ssl", "MemoryBIO", "write"},
    [WRITE_EOF] = {"_ssl", "MemoryBIO", "write_eof"},
    [HELD_BACK] = {"_ssl", "MemoryBIO", "pending"},
    [EOF_SEEN] = {"_ssl", "MemoryBIO", "eof"},
};

static inline PyObject **slot(PyObject *self, int which) { return (PyObject **)((char *)self + offsets[which]); }

static inline PyObject *call(PyObject *object, int which, PyObject *argument) {
    Member *member = &members[which];
    PyObject *args[] = {object, argument};
    size_t count = argument == NULL ? 1 : 2;
    return Py_IS_TYPE(object, member->type) ? PyObject_Vectorcall(member->found, args, count, NULL)
                                            : PyObject_VectorcallMethod(member->name, args, count, NULL);
}

static inline int call_off(PyObject *object, int which, PyObject *argument) {
    PyObject *result = call(object, which, argument);
    Py_XDECREF(result);
    return result == NULL ? -1 : 0;
}

static inline PyObject *ask_for(PyObject *object, int which) {
    Member *member = &members[which];
    if (!Py_IS_TYPE(object, member->type))
        return PyObject_GetAttr(object, member->name);
    PyGetSetDef *property = ((PyGetSetDescrObject *)member->found)->d_getset;
    return property->get(object, property->closure);
}

static inline Py_ssize_t size_in(PyObject *number) {
    Py_ssize_t size = number == NULL ? -1 : PyLong_AsSsize_t(number);
    Py_XDECREF(number);
    return size;
}

/* Whether the quick way can be taken: all is there, the hub waits, and nobody has read ahead. */
static bool is_plain_case(PyObject *self) {
    for (int which = 0; which < SLOTS; which++)
        if (*slot(self, which) == NULL)
            return false;
    PyObject *inner = *slot(self, INNER);
    return *slot(self, SSLOBJ) != Py_None && PyObject_TypeCheck(inner, Connection_Type) &&
           Py_IS_TYPE(*slot(self, GUARD), Guard_Type) && !state_of(inner)->nonblocking;
}

/* -- receiving ----------------------------------------------------------------------------------------------------- */

/* Where plain text goes: a buffer that is there, or bytes that are made no larger than needed. */
typedef struct {
    char *buffer; /* or NULL */
    PyObject *bytes;
    Py_ssize_t size; /* at the most */
} Target;

enum { FAILED = -1, MORE = -2 }; /* beside sizes: an exception; more is needed from the wire */

/* Room for `*size` bytes, or fewer: no more than was asked for, and than a read ever gives, which is one record's. */
static char *room_in(Target *target, Py_ssize_t *size) {
    if (*size > PIECE)
        *size = PIECE;
    if (*size > target->size)
        *size = target->size;
    if (target->buffer != NULL)
        return target->buffer;
    Py_XSETREF(target->bytes, PyBytes_FromStringAndSize(NULL, *size));
    return target->bytes == NULL ? NULL : PyBytes_AS_STRING(target->bytes);
}

/* How much OpenSSL could give at the most without more from the wire: 0 nothing, -1 with an exception. */
static Py_ssize_t at_hand(PyObject *sslobj, PyObject *incoming) {
    SSL *ssl = ssl_of(sslobj);
    Py_ssize_t held = ssl != NULL ? (Py_ssize_t)ssl_at_hand(ssl) : size_in(ask_for(incoming, HELD_BACK));
    if (held != 0 || (ssl == NULL && (held = size_in(call(sslobj, PLAIN, NULL))) != 0))
        return held;
    PyObject *eof = ask_for(incoming, EOF_SEEN);
    Py_XDECREF(eof);
    return eof == NULL ? -1 : eof == Py_True;
}

/* Whether more requests may lie in OpenSSL's memory: a peer may send each in a record of its own. */
bool secured_holds(PyObject *self) {
    if (secured_type == NULL || !PyObject_TypeCheck(self, secured_type) || *slot(self, SSLOBJ) == Py_None)
        return false;
    Py_ssize_t held = at_hand(*slot(self, SSLOBJ), *slot(self, INCOMING));
    if (held < 0)
        PyErr_Clear();
    return held > 0;
}

static int say(PyObject *self, PyObject *const held[]);

/* The peer has gone, as an exception says: what it had sent can still be read, whatever was to be said to it. */
static ssize_t left_behind(PyObject *inner) {
    PyObject *kind, *error, *trace;
    if (!PyErr_ExceptionMatches(PyExc_ConnectionError))
        return -1;
    PyErr_Fetch(&kind, &error, &trace);
    ssize_t got = receive(inner, state_of(inner), scratch, SLICE, MSG_DONTWAIT);
    if (got > 0) {
        Py_XDECREF(kind);
        Py_XDECREF(error);
        Py_XDECREF(trace);
        return got;
    }
    PyErr_Restore(kind, error, trace);
    return -1;
}

/* Wait for more from the peer, into `scratch`; what OpenSSL has to say to it goes first. */
static ssize_t receive_more(PyObject *self, PyObject *const held[]) {
    PyObject *inner = held[INNER], *whole = NULL;
    if (say(self, held) < 0)
        return left_behind(inner);
    ssize_t got = receive_whole(inner, state_of(inner), SLICE, 0, &whole);
    if (whole != NULL)
        memcpy(scratch, PyBytes_AS_STRING(whole), (size_t)got);
    Py_XDECREF(whole);
    return got;
}

/* Keep what was received in OpenSSL's memory. */
static int keep(PyObject *incoming, ssize_t got) {
    PyObject *data = PyBytes_FromStringAndSize(scratch, got);
    int done = data == NULL ? -1 : call_off(incoming, WRITE_IN, data);
    Py_XDECREF(data);
    return done;
}

/* Let the class look at an error of OpenSSL's: `_judge` for what it means to a read, `_fail` to raise it again, from
 * a frame that tells whose it is. */
static PyObject *ask(PyObject *self, PyObject *word) {
    PyObject *kind, *error, *trace;
    PyErr_Fetch(&kind, &error, &trace);
    PyErr_NormalizeException(&kind, &error, &trace);
    if (trace != NULL)
        PyException_SetTraceback(error, trace);
    PyObject *result = PyObject_CallMethodOneArg(self, word, error);
    Py_XDECREF(kind);
    Py_XDECREF(error);
    Py_XDECREF(trace);
    return result;
}

/* The peer has said close_notify: nothing comes from it any more, as if it had closed its side. It may wait for ours
 * with its side open, so that no read may wait again. */
static int see_end(PyObject *const held[]) {
    state_of(held[INNER])->ended = true;
    return call_off(held[INCOMING], WRITE_EOF, NULL);
}

static bool has_read_ahead(PyObject *self) { return PyBytes_GET_SIZE(*slot(self, AHEAD)) > 0; }

/* Read by Python's call, after `more`, if that is not NULL, was kept in OpenSSL's memory. Another thread may have had
 * the guard, to end the connection: what it has read ahead then is first. */
static Py_ssize_t read_asking(PyObject *self, PyObject *const held[], char *room, Py_ssize_t size, PyObject *more) {
    PyObject *number = PyLong_FromSsize_t(size), *data = NULL;
    if (number == NULL) {
        Py_XDECREF(more);
        return FAILED;
    }
    guard_take(held[GUARD]);
    int kept = more == NULL ? 0 : call_off(held[INCOMING], WRITE_IN, more);
    if (kept == 0)
        data = has_read_ahead(self) ? PyObject_CallMethodOneArg(self, word_take, number)
                                    : call(held[SSLOBJ], PLAIN_READ, number);
    guard_give_back(held[GUARD]);
    Py_XDECREF(more);
    Py_DECREF(number);
    if (data == NULL)
        data = ask(self, word_judge);
    Py_ssize_t read = data == NULL ? FAILED : data == Py_None ? MORE : PyBytes_GET_SIZE(data);
    if (read > 0)
        memcpy(room, PyBytes_AS_STRING(data), (size_t)read);
    Py_XDECREF(data);
    return read == 0 && see_end(held) < 0 ? FAILED : read;
}

/* Read out of what is at hand, or of the `got` bytes in `scratch`. */
static Py_ssize_t read_once(PyObject *self, PyObject *const held[], ssize_t got, Py_ssize_t most, Target *target) {
    SSL *ssl = ssl_of(held[SSLOBJ]);
    PyObject *more = NULL;
    char *room = room_in(target, &most);
    if (room == NULL)
        return FAILED;
    if (ssl != NULL && guard_try(held[GUARD])) { /* to wait for it would be to lose what is in `scratch` */
        ssize_t read = ssl_decrypt(ssl, scratch, (size_t)got, room, (size_t)most);
        guard_give_back(held[GUARD]);
        if (read != ASK_SSL)
            return read == FEED_SSL ? MORE : read;
    } else if (got > 0 && (more = PyBytes_FromStringAndSize(scratch, got)) == NULL) {
        return FAILED;
    }
    return read_asking(self, held, room, most, more);
}

/* A peer may send records without data (TLS 1.3's updates of its key) as fast as they are read: some hundred in what is
 * received at once, each as dear as data of a kilobyte. Whoever reads them gives way after that. */
static void give_way_next(void) {
    Hub *hub = hub_here();
    if (hub != NULL)
        hub->budget = 0;
}

/* Wait for more, and read out of it. */
static Py_ssize_t feed(PyObject *self, PyObject *const held[], Py_ssize_t *most, Target *target) {
    ssize_t got = receive_more(self, held);
    if (got < 0)
        return FAILED;
    if (got > 0) {
        Py_ssize_t read = read_once(self, held, got, *most += got, target); /* OpenSSL keeps the pieces of a record */
        if (got >= VAIN_A_TURN && read < got / 8)
            give_way_next();
        return read;
    }
    guard_take(held[GUARD]);
    int ended = call_off(held[INCOMING], WRITE_EOF, NULL);
    guard_give_back(held[GUARD]);
    if (ended < 0)
        return FAILED;
    *most += 1;
    char *room = room_in(target, most);
    return room == NULL ? FAILED : read_asking(self, held, room, *most, NULL);
}

/* Read at least one byte; 0: the end. */
static Py_ssize_t pump(PyObject *self, PyObject *const held[], Target *target) {
    Py_ssize_t most = at_hand(held[SSLOBJ], held[INCOMING]);
    Py_ssize_t read = most > 0 ? read_once(self, held, 0, most, target) : most < 0 ? FAILED : MORE;
    if (read == MORE && most >= VAIN_A_TURN)
        give_way_next();
    while (read == MORE) {
        if (most > MOST_IN_VAIN) {
            Py_XDECREF(PyObject_CallMethodNoArgs(self, word_refuse));
            return FAILED;
        }
        read = feed(self, held, &most, target);
    }
    return read;
}

/* Held: somebody else may close the connection while this call waits. */
static void hold(PyObject *self, PyObject *held[]) {
    for (int which = 0; which < HELD; which++)
        held[which] = Py_NewRef(*slot(self, which));
}

static void drop(PyObject *held[]) {
    for (int which = 0; which < HELD; which++)
        Py_DECREF(held[which]);
}

static PyObject *leave_to(PyObject *function, PyObject *self, PyObject *const *args, Py_ssize_t count, PyObject *names) {
    PyObject *method = PyMethod_New(function, self);
    PyObject *result = method == NULL ? NULL : PyObject_Vectorcall(method, args, (size_t)count, names);
    Py_XDECREF(method);
    return result;
}

/* Tell whoever traces this connection; see harken.tracing. */
static int tell(PyObject *self, PyObject *method, PyObject *argument, PyObject *result) {
    if (*slot(self, TRACED) != Py_True)
        return 0;
    PyObject *args[] = {self, method, argument, result};
    PyObject *told = PyObject_VectorcallMethod(word_tell, args, 4, NULL);
    Py_XDECREF(told);
    return told == NULL ? -1 : 0;
}

static PyObject *secured_recv(PyObject *self, PyObject *const *args, Py_ssize_t count, PyObject *names) {
    Target target = {.size = count == 1 && names == NULL && PyLong_CheckExact(args[0]) ? PyLong_AsSsize_t(args[0]) : 0};
    if (target.size == -1)
        PyErr_Clear(); /* whatever it is, the other one tells */
    if (target.size <= 0 || !is_plain_case(self) || has_read_ahead(self))
        return leave_to(slow_recv, self, args, count, names);
    PyObject *held[HELD];
    hold(self, held);
    Py_ssize_t read = pump(self, held, &target);
    drop(held);
    if (read < 0)
        Py_CLEAR(target.bytes);
    else if (read < PyBytes_GET_SIZE(target.bytes))
        _PyBytes_Resize(&target.bytes, read);
    if (target.bytes != NULL && tell(self, word_recv, args[0], target.bytes) < 0)
        Py_CLEAR(target.bytes);
    return target.bytes;
}

static PyObject *secured_recv_into(PyObject *self, PyObject *const *args, Py_ssize_t count, PyObject *names) {
    if (count != 1 || names != NULL || !is_plain_case(self) || has_read_ahead(self) || *slot(self, TRACED) == Py_True)
        return leave_to(slow_recv_into, self, args, count, names);
    Py_buffer buffer;
    if (PyObject_GetBuffer(args[0], &buffer, PyBUF_WRITABLE) < 0) {
        PyErr_Clear(); /* whatever it is, the other one tells */
        return leave_to(slow_recv_into, self, args, count, names);
    }
    if (buffer.len == 0) {
        PyBuffer_Release(&buffer);
        return leave_to(slow_recv_into, self, args, count, names);
    }
    Target target = {.buffer = buffer.buf, .size = buffer.len};
    PyObject *held[HELD];
    hold(self, held);
    Py_ssize_t read = pump(self, held, &target);
    drop(held);
    PyBuffer_Release(&buffer);
    return read < 0 ? NULL : PyLong_FromSsize_t(read);
}

/* -- sending ------------------------------------------------------------------------------------------------------- */

/* Write by Python's calls what OpenSSL's functions have not taken. */
static int write_asking(PyObject *const held[], const char *plain, Py_ssize_t size) {
    for (Py_ssize_t piece; size > 0; plain += piece, size -= piece) {
        piece = size < PIECE ? size : PIECE;
        PyObject *data = PyBytes_FromStringAndSize(plain, piece);
        int done = data == NULL ? -1 : call_off(held[SSLOBJ], PLAIN_WRITE, data);
        Py_XDECREF(data);
        if (done < 0)
            return -1;
    }
    return 0;
}

/* The records of at most BATCH bytes, behind what OpenSSL has to say of its own accord: so many bytes of the object as
 * `*made` becomes. With the guard. */
static PyObject *records_of(PyObject *const held[], const char *plain, Py_ssize_t size, size_t *made) {
    SSL *ssl = ssl_of(held[SSLOBJ]);
    size_t taken = 0;
    if (ssl != NULL) {
        size_t room = ssl_room(ssl, (size_t)size);
        PyObject *wire = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)room);
        if (wire == NULL)
            return NULL;
        *made = ssl_encrypt(ssl, plain, (size_t)size, &taken, PyBytes_AS_STRING(wire), room);
        if (*made > 0)
            return wire;
        Py_DECREF(wire);
    }
    if (write_asking(held, plain + taken, size - (Py_ssize_t)taken) < 0)
        return NULL;
    PyObject *wire = call(held[OUTGOING], READ_OUT, NULL);
    *made = wire == NULL ? 0 : (size_t)PyBytes_GET_SIZE(wire);
    return wire;
}

/* Whether an answer is to be joined with others, as pending.c does. A record must not be cut: only where the kernel's
 * want of room is all that can come between, so that the rest is owed. */
static bool joins(PyObject *self, PyObject *inner, size_t size) {
    Hub *hub = hub_here();
    return hub != NULL && (hub->batch == self || hub->pending_owner == inner) && size <= PENDING &&
           tells_nothing(state_of(inner)) && hub->turning && !in_hub(hub);
}

/* `answer`: not what OpenSSL has to say of its own accord. */
static int send_all(PyObject *self, PyObject *const held[], const char *data, size_t size, bool answer) {
    PyObject *inner = held[INNER];
    State *state = state_of(inner);
    Hub *joining = answer && joins(self, inner, size) ? hub_here() : NULL;
    bool more = joining != NULL && joining->batch == self;
    begin_writing(state);
    Py_SETREF(*slot(self, REST), PyBytes_FromStringAndSize(NULL, 0)); /* the empty one: it is there always */
    ssize_t sent = joining != NULL ? join(joining, inner, data, size) : flush_of(inner);
    if (sent == 0 && joining == NULL) {
        int gone = answer ? put_off_copy(inner, state, data, size) : 0;
        sent = gone != 0 ? gone : transmit(inner, state, data, size, 0, ALL);
    }
    if (sent < 0) {
        Py_XSETREF(*slot(self, BROKEN), Py_NewRef(Py_True));
        return -1;
    }
    Py_XSETREF(*slot(self, REST), Py_NewRef(Py_None));
    if (joining == NULL)
        return 0;
    return more ? 0 : flush_pending(joining);
}

/* Send what OpenSSL has to say of its own accord, unless a write is under way. */
static int say(PyObject *self, PyObject *const held[]) {
    SSL *ssl = ssl_of(held[SSLOBJ]);
    Py_ssize_t unsaid = ssl != NULL ? (Py_ssize_t)ssl_unsaid(ssl) : size_in(ask_for(held[OUTGOING], HELD_BACK));
    if (unsaid <= 0 || *slot(self, REST) != Py_None)
        return unsaid < 0 ? -1 : 0;
    PyObject *data = call(held[OUTGOING], READ_OUT, NULL);
    int result = data == NULL ? -1 : send_all(self, held, PyBytes_AS_STRING(data), (size_t)PyBytes_GET_SIZE(data), false);
    Py_XDECREF(data);
    return result;
}

/* Encrypt and send at most BATCH bytes. */
static int encrypt(PyObject *self, PyObject *const held[], const char *plain, Py_ssize_t size) {
    size_t made;
    guard_take(held[GUARD]);
    PyObject *wire = records_of(held, plain, size, &made);
    guard_give_back(held[GUARD]);
    if (wire == NULL) {
        Py_XDECREF(ask(self, word_fail));
        return -1;
    }
    int result = send_all(self, held, PyBytes_AS_STRING(wire), made, true);
    Py_DECREF(wire);
    return result;
}

/* How much is encrypted at once. By Python's calls no more than a record: its memory never shrinks. */
static Py_ssize_t most_at_once(PyObject *self) {
    PyObject *sslobj = *slot(self, SSLOBJ);
    return sslobj != NULL && ssl_of(sslobj) != NULL ? BATCH : PIECE;
}

static PyObject *secured_sendall(PyObject *self, PyObject *const *args, Py_ssize_t count, PyObject *names) {
    Py_ssize_t size = count == 1 && names == NULL && PyBytes_CheckExact(args[0]) ? PyBytes_GET_SIZE(args[0]) : 0;
    if (size == 0 || size > most_at_once(self) || !is_plain_case(self) || *slot(self, REST) != Py_None)
        return leave_to(slow_sendall, self, args, count, names);
    PyObject *held[HELD];
    hold(self, held);
    int result = encrypt(self, held, PyBytes_AS_STRING(args[0]), size);
    drop(held);
    if (result < 0 || tell(self, word_sendall, args[0], Py_None) < 0)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *secured_encrypt(PyObject *self, PyObject *plain) {
    if (!is_plain_case(self) || *slot(self, REST) != Py_None || *slot(self, TRACED) == Py_True)
        return PyObject_CallFunctionObjArgs(slow_encrypt, self, plain, NULL);
    Py_buffer data;
    if (PyObject_GetBuffer(plain, &data, PyBUF_SIMPLE) < 0)
        return NULL;
    if (data.len == 0 || data.len > most_at_once(self)) {
        PyBuffer_Release(&data);
        return PyObject_CallFunctionObjArgs(slow_encrypt, self, plain, NULL);
    }
    PyObject *held[HELD];
    hold(self, held);
    int result = encrypt(self, held, data.buf, data.len);
    drop(held);
    PyBuffer_Release(&data);
    return result < 0 ? NULL : Py_NewRef(Py_None);
}

/* wfile: of the compiled hub alone, which joins. */
static PyObject *secured_open_writer(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    return PyObject_CallFunctionObjArgs((PyObject *)Writer_Type, self, count > 0 ? args[0] : Py_None, NULL);
}

/* -- the handshake ------------------------------------------------------------------------------------------------- */

/* It is done; see _settle(). */
static int settle(PyObject *self, PyObject *const held[]) {
    PyObject *version = call(held[SSLOBJ], VERSION, NULL);
    if (version == NULL)
        return -1;
    bool has_tickets = PyUnicode_Check(version) && PyUnicode_CompareWithASCIIString(version, "TLSv1.3") == 0;
    Py_DECREF(version);
    return has_tickets ? 0 : say(self, held);
}

/* Go on by Python's call. 1: it is done; 0: OpenSSL wants to read; -1. */
static int shake_asking(PyObject *self, PyObject *const held[]) {
    guard_take(held[GUARD]);
    int done = call_off(held[SSLOBJ], SHAKE, NULL);
    guard_give_back(held[GUARD]);
    if (done == 0)
        return 1;
    if (PyErr_ExceptionMatches(want_read)) {
        PyErr_Clear();
        return 0;
    }
    Py_XDECREF(ask(self, word_break_off));
    return -1;
}

static int shake_on(PyObject *self, PyObject *const held[]) {
    SSL *ssl = ssl_of(held[SSLOBJ]);
    int done = ASK_SSL;
    if (ssl != NULL && guard_try(held[GUARD])) {
        done = ssl_shake(ssl);
        guard_give_back(held[GUARD]);
    }
    if (done == ASK_SSL)
        done = shake_asking(self, held);
    return done == 1 && settle(self, held) < 0 ? -1 : done;
}

/* Wait for more of the handshake from the peer. */
static int await_answer(PyObject *self, PyObject *const held[]) {
    ssize_t got = receive_more(self, held);
    if (got == 0)
        return call_off(held[INCOMING], WRITE_EOF, NULL);
    if (got >= VAIN_A_TURN) /* of pieces of a byte each, perhaps, in a record of their own */
        give_way_next();
    return got < 0 ? -1 : keep(held[INCOMING], got);
}

/* The timeout of the next wait. Not 0, which would be none. */
static double left(double deadline) {
    double seconds = deadline - (double)now_ns() / 1e9;
    return seconds > 0.001 ? seconds : 0.001;
}

static PyObject *secured_shake(PyObject *self, PyObject *deadline) {
    double until = PyFloat_CheckExact(deadline) ? PyFloat_AS_DOUBLE(deadline) : 0;
    if (until <= 0 || !is_plain_case(self))
        return PyObject_CallFunctionObjArgs(slow_shake, self, deadline, NULL);
    PyObject *held[HELD];
    hold(self, held);
    State *state = state_of(held[INNER]);
    double timeout = state->timeout;
    int done;
    while ((done = shake_on(self, held)) == 0) {
        state->timeout = left(until);
        if (await_answer(self, held) < 0)
            done = -1;
        state->timeout = timeout;
        if (done < 0)
            break;
    }
    drop(held);
    return done < 0 ? NULL : Py_NewRef(Py_None);
}

/* -- beginning and end --------------------------------------------------------------------------------------------- */

static PyObject *secured_stand_for(PyObject *self, PyObject *inner) {
    if (PyObject_TypeCheck(inner, Connection_Type) && stand_for(self, inner))
        Py_RETURN_NONE;
    return PyObject_CallFunctionObjArgs(slow_stand_for, self, inner, NULL);
}

/* Let OpenSSL say close_notify. -1: something else was raised meanwhile. */
static int bye(PyObject *const held[]) {
    SSL *ssl = ssl_of(held[SSLOBJ]);
    int done = 0;
    guard_take(held[GUARD]);
    if (ssl != NULL)
        ssl_bye(ssl);
    else
        done = call_off(held[SSLOBJ], BYE, NULL);
    guard_give_back(held[GUARD]);
    if (done < 0 && PyErr_ExceptionMatches(PyExc_OSError)) { /* the usual: the peer's close_notify has not come */
        PyErr_Clear();
        done = 0;
    }
    return done;
}

/* Send close_notify, if that can be done at once; whatever comes of it. -1: something else was raised meanwhile. */
static int say_goodbye(PyObject *const held[]) {
    PyObject *inner = held[INNER];
    if (flush_to_leave(inner) < 0 || bye(held) < 0)
        return -1;
    if (state_of(inner)->owed != NULL) /* half a record was sent */
        return 0;
    PyObject *data = call(held[OUTGOING], READ_OUT, NULL);
    if (data == NULL)
        return -1;
    int fd = socket_fd(inner); /* the peer may not read, or have gone */
    (void)!send(fd, PyBytes_AS_STRING(data), (size_t)PyBytes_GET_SIZE(data), MSG_DONTWAIT | MSG_NOSIGNAL);
    Py_DECREF(data);
    return 0;
}

static PyObject *secured_end(PyObject *self, PyObject *none) {
    if (!is_plain_case(self) || *slot(self, REST) != Py_None || *slot(self, ENDED) != Py_False || !closes_at_once(self))
        return PyObject_CallOneArg(slow_end, self);
    PyObject *held[HELD], *closed = NULL;
    hold(self, held);
    Py_XSETREF(*slot(self, RECORD), Py_NewRef(Py_None));
    Py_XSETREF(*slot(self, ENDED), Py_NewRef(Py_True));
    if (say_goodbye(held) == 0 && closes_at_once(self)) {
        stand_down(self);
        Py_XSETREF(*slot(self, SSLOBJ), Py_NewRef(Py_None));
        if (PyObject_SetAttr(held[INNER], word_record, Py_None) == 0) /* after start_tls() it leads here */
            closed = connection_end(held[INNER], NULL);
    } else if (!PyErr_Occurred()) {
        closed = Py_NewRef(Py_True); /* another thread was quicker */
    }
    drop(held);
    return closed;
}

/* -- the class ----------------------------------------------------------------------------------------------------- */

static struct {
    PyMethodDef method;
    PyObject **slow;
} quick[] = {
    {{"recv", FAST(secured_recv), METH_FASTCALL | METH_KEYWORDS,
      "Read at most that many bytes, waiting in the hub for the first."},
     &slow_recv},
    {{"recv_into", FAST(secured_recv_into), METH_FASTCALL | METH_KEYWORDS,
      "Read into a buffer, waiting in the hub for the first byte."},
     &slow_recv_into},
    {{"_encrypt", secured_encrypt, METH_O, "Send at most BATCH bytes."}, &slow_encrypt},
    {{"sendall", FAST(secured_sendall), METH_FASTCALL | METH_KEYWORDS,
      "Send all of the bytes, waiting in the hub for room; the timeout bounds each part of 64 KiB."},
     &slow_sendall},
    {{"shake", secured_shake, METH_O, "Do the TLS handshake, waiting in the hub until a deadline."}, &slow_shake},
    {{"end", secured_end, METH_NOARGS, "Say goodbye and close, when nothing will be read on."}, &slow_end},
    {{"_stand_for", secured_stand_for, METH_O, "Become a socket of the same descriptor."}, &slow_stand_for},
};

static PyMethodDef open_writer = {"open_writer", FAST(secured_open_writer), METH_FASTCALL,
                                  "open_writer(reader=None): a file to write, which joins answers."};

static int add(PyTypeObject *type, PyMethodDef *method) {
    PyObject *descriptor = PyDescr_NewMethod(type, method);
    int result = descriptor == NULL ? -1 : PyObject_SetAttrString((PyObject *)type, method->ml_name, descriptor);
    Py_XDECREF(descriptor);
    return result;
}

static int replace(PyTypeObject *type, PyMethodDef *method, PyObject **slow) {
    PyObject *replaced = PyObject_GetAttrString((PyObject *)type, method->ml_name);
    int result = replaced == NULL ? -1 : add(type, method);
    if (result < 0)
        Py_XDECREF(replaced);
    else
        *slow = replaced;
    return result;
}

static int look_up(Member *member) {
    PyObject *module = PyImport_ImportModule(member->module);
    PyObject *type = module == NULL ? NULL : PyObject_GetAttrString(module, member->kind);
    Py_XDECREF(module);
    member->name = type == NULL ? NULL : PyUnicode_InternFromString(member->text);
    member->found = member->name == NULL ? NULL : PyObject_GetAttr(type, member->name);
    bool property = member == &members[HELD_BACK] || member == &members[EOF_SEEN];
    if (member->found != NULL && !Py_IS_TYPE(member->found, property ? &PyGetSetDescr_Type : &PyMethodDescr_Type))
        Py_CLEAR(type); /* whatever it is, it is asked by name */
    member->type = (PyTypeObject *)type;
    return member->found == NULL ? -1 : 0;
}

PyObject *quicken(PyObject *module, PyObject *type) {
    const struct {
        PyObject **word;
        const char *text;
    } words[] = {
        {&word_break_off, "_break_off"},
        {&word_fail, "_fail"},
        {&word_judge, "_judge"},
        {&word_record, "record"},
        {&word_recv, "recv"},
        {&word_refuse, "_refuse_more"},
        {&word_sendall, "sendall"},
        {&word_take, "_take"},
        {&word_tell, "_tell"},
    };
    if (!PyType_Check(type) || slow_recv != NULL) {
        PyErr_SetString(PyExc_TypeError, "quicken() takes one class, once");
        return NULL;
    }
    for (int which = 0; which < SLOTS; which++)
        if ((offsets[which] = slot_offset((PyTypeObject *)type, slot_names[which])) <= 0)
            return PyErr_Format(PyExc_TypeError, "%R has no slot %s", type, slot_names[which]);
    for (size_t each = 0; each < sizeof words / sizeof *words; each++)
        if ((*words[each].word = PyUnicode_InternFromString(words[each].text)) == NULL)
            return NULL;
    openssl_find();
    for (int which = 0; which < MEMBERS; which++)
        if (look_up(&members[which]) < 0)
            return NULL;
    PyObject *ssl = PyImport_ImportModule("ssl");
    want_read = ssl == NULL ? NULL : PyObject_GetAttrString(ssl, "SSLWantReadError");
    Py_XDECREF(ssl);
    if (want_read == NULL)
        return NULL;
    for (size_t each = 0; each < sizeof quick / sizeof *quick; each++)
        if (replace((PyTypeObject *)type, &quick[each].method, quick[each].slow) < 0)
            return NULL;
    if (add((PyTypeObject *)type, &open_writer) < 0)
        return NULL;
    secured_type = (PyTypeObject *)Py_NewRef(type);
    Py_RETURN_NONE;
}
