/* SPDX-License-Identifier: MIT
 *
 * recv(), sendall() and the handshake of a connection under TLS, for harken.preambles._hubbed: between the wire and
 * OpenSSL's memory there is one call. What is not of every day (no Connection below, sockets that do not wait, flags,
 * something that stands before the next write, large pieces) is left to the methods that these replace. */
#include "hub.h"
#include <sys/socket.h>

#define PIECE 16384                /* as in _hubbed.py: plain text in a record, at the most */
#define SLICE (PIECE + 2048 + 5)   /* and one on the wire */

/* Slots of the class. The first are what calls use while others may close the connection. */
enum { INNER, SSLOBJ, INCOMING, OUTGOING, GUARD, HELD, AHEAD = HELD, REST, BROKEN, TRACED, ENDED, RECORD, SLOTS };
static const char *slot_names[SLOTS] = {"_inner", "_sslobj", "_incoming", "_outgoing", "_guard", "_ahead",
                                        "_rest",  "_broken", "_traced",   "_ended",    "record"};
static Py_ssize_t offsets[SLOTS];
static PyObject *slow_recv, *slow_sendall, *slow_shake, *slow_end, *slow_stand_for; /* what was replaced */
static PyObject *want_read;                                                         /* ssl.SSLWantReadError */
static PyObject *word_break_off, *word_fail, *word_judge, *word_record, *word_recv, *word_sendall, *word_tell;

/* What is called on OpenSSL's objects for every message, looked up once: of `type`, which programs cannot change. */
typedef struct {
    const char *module, *kind, *text;
    PyObject *name;
    PyTypeObject *type;
    PyObject *found; /* its method, or property */
} Member;

enum {
    ACQUIRE, RELEASE,                                      /* the guard */
    SHAKE, PLAIN, PLAIN_READ, PLAIN_WRITE, BYE, VERSION,   /* OpenSSL */
    READ_OUT, WRITE_IN, WRITE_EOF, HELD_BACK, EOF_SEEN,    /* its memory */
    MEMBERS
};
static Member members[MEMBERS] = {
    [ACQUIRE] = {"_thread", "LockType", "acquire"},
    [RELEASE] = {"_thread", "LockType", "release"},
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

/* The guard, which stands for OpenSSL's state: a lock of Python's, waited for without the GIL. */
static inline int lock(PyObject *guard) { return call_off(guard, ACQUIRE, NULL); }

static int unlock(PyObject *guard) {
    PyObject *kind, *error, *trace;
    PyErr_Fetch(&kind, &error, &trace);
    int result = call_off(guard, RELEASE, NULL);
    if (kind != NULL)
        PyErr_Restore(kind, error, trace);
    return result;
}

/* Whether the quick way can be taken: all is there, the hub waits, and nobody has read ahead. */
static bool is_plain_case(PyObject *self) {
    for (int which = 0; which < SLOTS; which++)
        if (*slot(self, which) == NULL)
            return false;
    PyObject *inner = *slot(self, INNER);
    return *slot(self, SSLOBJ) != Py_None && PyObject_TypeCheck(inner, Connection_Type) &&
           !state_of(inner)->nonblocking;
}

/* -- receiving ----------------------------------------------------------------------------------------------------- */

/* How much OpenSSL could give at the most without more from the wire: 0 nothing, -1 with an exception. */
static Py_ssize_t at_hand(PyObject *sslobj, PyObject *incoming) {
    Py_ssize_t held = size_in(ask_for(incoming, HELD_BACK));
    if (held != 0 || (held = size_in(call(sslobj, PLAIN, NULL))) != 0)
        return held;
    PyObject *eof = ask_for(incoming, EOF_SEEN);
    Py_XDECREF(eof);
    return eof == NULL ? -1 : eof == Py_True;
}

static int say(PyObject *self, PyObject *const held[]);

/* Wait for more from the peer; what OpenSSL has to say to it goes first. Returns how much is held then. */
static Py_ssize_t feed(PyObject *self, PyObject *const held[]) {
    PyObject *inner = held[INNER], *incoming = held[INCOMING];
    if (say(self, held) < 0)
        return -1;
    ssize_t got = receive(inner, state_of(inner), scratch, SLICE, 0);
    if (got < 0)
        return -1;
    if (got == 0)
        return call_off(incoming, WRITE_EOF, NULL) < 0 ? -1 : 1;
    PyObject *data = PyBytes_FromStringAndSize(scratch, got);
    int done = data == NULL ? -1 : call_off(incoming, WRITE_IN, data);
    Py_XDECREF(data);
    return done < 0 ? -1 : got;
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

/* None: more is needed from the wire. */
static PyObject *read_plain(PyObject *self, PyObject *inner, PyObject *sslobj, PyObject *guard, Py_ssize_t size) {
    PyObject *number = PyLong_FromSsize_t(size);
    if (number == NULL || lock(guard) < 0) {
        Py_XDECREF(number);
        return NULL;
    }
    PyObject *data = call(sslobj, PLAIN_READ, number);
    Py_DECREF(number);
    if (unlock(guard) < 0)
        Py_CLEAR(data);
    if (data == NULL)
        data = ask(self, word_judge);
    if (data != NULL && PyBytes_Check(data) && PyBytes_GET_SIZE(data) == 0)
        state_of(inner)->ended = true; /* by close_notify: it says nothing more, as if it had closed its side */
    return data;
}

static PyObject *pump(PyObject *self, PyObject *const held[], Py_ssize_t size) {
    PyObject *inner = held[INNER], *sslobj = held[SSLOBJ], *guard = held[GUARD];
    Py_ssize_t most = at_hand(sslobj, held[INCOMING]), more;
    if (most == 0)
        most = feed(self, held);
    while (most >= 0) {
        /* No larger buffer than needed. */
        PyObject *data = read_plain(self, inner, sslobj, guard, most < size ? most : size);
        if (data != Py_None)
            return data;
        Py_DECREF(data);
        more = feed(self, held);
        most = more < 0 ? -1 : most + more; /* OpenSSL keeps the pieces of a record */
    }
    return NULL;
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
    Py_ssize_t size = count == 1 && names == NULL && PyLong_CheckExact(args[0]) ? PyLong_AsSsize_t(args[0]) : 0;
    if (size == -1)
        PyErr_Clear(); /* whatever it is, the other one tells */
    if (size <= 0 || !is_plain_case(self) || PyBytes_GET_SIZE(*slot(self, AHEAD)) > 0)
        return leave_to(slow_recv, self, args, count, names);
    PyObject *held[HELD];
    hold(self, held);
    PyObject *data = pump(self, held, size);
    drop(held);
    if (data != NULL && tell(self, word_recv, args[0], data) < 0)
        Py_CLEAR(data);
    return data;
}

/* -- sending ------------------------------------------------------------------------------------------------------- */

static PyObject *encrypt(PyObject *self, PyObject *const held[], PyObject *plain) {
    if (lock(held[GUARD]) < 0)
        return NULL;
    PyObject *data = NULL;
    if (call_off(held[SSLOBJ], PLAIN_WRITE, plain) == 0)
        data = call(held[OUTGOING], READ_OUT, NULL);
    if (unlock(held[GUARD]) < 0)
        Py_CLEAR(data);
    return data != NULL ? data : ask(self, word_fail);
}

static int send_all(PyObject *self, PyObject *const held[], PyObject *data) {
    PyObject *inner = held[INNER];
    begin_writing(state_of(inner));
    Py_SETREF(*slot(self, REST), PyBytes_FromStringAndSize(NULL, 0)); /* the empty one: it is there always */
    ssize_t sent = flush_of(inner) < 0 ? -1
                                       : transmit(inner, state_of(inner), PyBytes_AS_STRING(data),
                                                  (size_t)PyBytes_GET_SIZE(data), 0, true);
    if (sent < 0)
        Py_XSETREF(*slot(self, BROKEN), Py_NewRef(Py_True));
    else
        Py_XSETREF(*slot(self, REST), Py_NewRef(Py_None));
    return sent < 0 ? -1 : 0;
}

/* Send what OpenSSL has to say of its own accord, unless a write is under way. */
static int say(PyObject *self, PyObject *const held[]) {
    Py_ssize_t unsaid = size_in(ask_for(held[OUTGOING], HELD_BACK));
    if (unsaid <= 0 || *slot(self, REST) != Py_None)
        return unsaid < 0 ? -1 : 0;
    PyObject *data = call(held[OUTGOING], READ_OUT, NULL);
    int result = data == NULL ? -1 : send_all(self, held, data);
    Py_XDECREF(data);
    return result;
}

static PyObject *secured_sendall(PyObject *self, PyObject *const *args, Py_ssize_t count, PyObject *names) {
    Py_ssize_t size = count == 1 && names == NULL && PyBytes_CheckExact(args[0]) ? PyBytes_GET_SIZE(args[0]) : 0;
    if (size == 0 || size > PIECE || !is_plain_case(self) || *slot(self, REST) != Py_None)
        return leave_to(slow_sendall, self, args, count, names);
    PyObject *held[HELD];
    hold(self, held);
    PyObject *data = encrypt(self, held, args[0]);
    int result = data == NULL ? -1 : send_all(self, held, data);
    Py_XDECREF(data);
    drop(held);
    if (result < 0 || tell(self, word_sendall, args[0], Py_None) < 0)
        return NULL;
    Py_RETURN_NONE;
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

/* 1: it is done; 0: OpenSSL wants to read; -1. */
static int shake_on(PyObject *self, PyObject *const held[]) {
    if (lock(held[GUARD]) < 0)
        return -1;
    int done = call_off(held[SSLOBJ], SHAKE, NULL);
    if (unlock(held[GUARD]) < 0)
        return -1;
    if (done == 0)
        return settle(self, held) < 0 ? -1 : 1;
    if (PyErr_ExceptionMatches(want_read)) {
        PyErr_Clear();
        return 0;
    }
    Py_XDECREF(ask(self, word_break_off));
    return -1;
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
        if (feed(self, held) < 0)
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

/* Send close_notify, if that can be done at once; whatever comes of it. -1: something else was raised meanwhile. */
static int say_goodbye(PyObject *const held[]) {
    if (lock(held[GUARD]) < 0)
        return -1;
    int done = call_off(held[SSLOBJ], BYE, NULL);
    if (unlock(held[GUARD]) < 0)
        return -1;
    if (done < 0) { /* the usual: the peer's close_notify has not come */
        if (!PyErr_ExceptionMatches(PyExc_OSError))
            return -1;
        PyErr_Clear();
    }
    PyObject *data = call(held[OUTGOING], READ_OUT, NULL);
    if (data == NULL)
        return -1;
    int fd = socket_fd(held[INNER]); /* the peer may not read, or have gone */
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
    {{"sendall", FAST(secured_sendall), METH_FASTCALL | METH_KEYWORDS,
      "Send all of the bytes, waiting in the hub for room; the timeout bounds each part of 64 KiB."},
     &slow_sendall},
    {{"shake", secured_shake, METH_O, "Do the TLS handshake, waiting in the hub until a deadline."}, &slow_shake},
    {{"end", secured_end, METH_NOARGS, "Say goodbye and close, when nothing will be read on."}, &slow_end},
    {{"_stand_for", secured_stand_for, METH_O, "Become a socket of the same descriptor."}, &slow_stand_for},
};

static int replace(PyTypeObject *type, PyMethodDef *method, PyObject **slow) {
    PyObject *replaced = PyObject_GetAttrString((PyObject *)type, method->ml_name);
    PyObject *descriptor = replaced == NULL ? NULL : PyDescr_NewMethod(type, method);
    int result = descriptor == NULL ? -1 : PyObject_SetAttrString((PyObject *)type, method->ml_name, descriptor);
    Py_XDECREF(descriptor);
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
        {&word_sendall, "sendall"},
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
    Py_RETURN_NONE;
}
