/* SPDX-License-Identifier: MIT
 *
 * recv() and sendall() of a connection under TLS, for harken.preambles._hubbed: between the wire and OpenSSL's memory
 * there is one call. What is not of every day (no Connection below, sockets that do not wait, flags, something that
 * stands before the next write, large pieces) is left to the methods that these two replace. */
#include "hub.h"

#define PIECE 16384                /* as in _hubbed.py: plain text in a record, at the most */
#define SLICE (PIECE + 2048 + 5)   /* and one on the wire */

/* Slots of the class. */
enum { INNER, SSLOBJ, INCOMING, OUTGOING, GUARD, AHEAD, REST, BROKEN, TRACED, SLOTS };
static const char *slot_names[SLOTS] = {"_inner", "_sslobj", "_incoming", "_outgoing", "_guard",
                                        "_ahead", "_rest",   "_broken",   "_traced"};
static Py_ssize_t offsets[SLOTS];
static PyObject *slow_recv, *slow_sendall; /* what was replaced */
static PyObject *word_acquire, *word_eof, *word_fail, *word_judge, *word_pending, *word_read, *word_recv, *word_release,
    *word_sendall, *word_tell, *word_write, *word_write_eof, *word_flush;

static inline PyObject **slot(PyObject *self, int which) { return (PyObject **)((char *)self + offsets[which]); }

static inline PyObject *call(PyObject *object, PyObject *name, PyObject *argument) {
    PyObject *args[] = {object, argument};
    return PyObject_VectorcallMethod(name, args, argument == NULL ? 1 : 2, NULL);
}

static inline int call_off(PyObject *object, PyObject *name, PyObject *argument) {
    PyObject *result = call(object, name, argument);
    Py_XDECREF(result);
    return result == NULL ? -1 : 0;
}

static inline Py_ssize_t size_in(PyObject *number) {
    Py_ssize_t size = number == NULL ? -1 : PyLong_AsSsize_t(number);
    Py_XDECREF(number);
    return size;
}

/* The guard, which stands for OpenSSL's state: a lock of Python's, waited for without the GIL. */
static inline int lock(PyObject *guard) { return call_off(guard, word_acquire, NULL); }

static int unlock(PyObject *guard) {
    PyObject *kind, *error, *trace;
    PyErr_Fetch(&kind, &error, &trace);
    int result = call_off(guard, word_release, NULL);
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
    Py_ssize_t held = size_in(PyObject_GetAttr(incoming, word_pending));
    if (held != 0 || (held = size_in(call(sslobj, word_pending, NULL))) != 0)
        return held;
    PyObject *eof = PyObject_GetAttr(incoming, word_eof);
    Py_XDECREF(eof);
    return eof == NULL ? -1 : eof == Py_True;
}

/* Wait for more from the peer; what OpenSSL has to say to it goes first. Returns how much is held then. */
static Py_ssize_t feed(PyObject *self, PyObject *inner, PyObject *incoming) {
    Py_ssize_t unsaid = size_in(PyObject_GetAttr(*slot(self, OUTGOING), word_pending));
    if (unsaid < 0 || (unsaid > 0 && call_off(self, word_flush, NULL) < 0))
        return -1;
    ssize_t got = receive(inner, state_of(inner), scratch, SLICE, 0);
    if (got < 0)
        return -1;
    if (got == 0)
        return call_off(incoming, word_write_eof, NULL) < 0 ? -1 : 1;
    PyObject *data = PyBytes_FromStringAndSize(scratch, got);
    int done = data == NULL ? -1 : call_off(incoming, word_write, data);
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
    PyObject *result = call(self, word, error);
    Py_XDECREF(kind);
    Py_XDECREF(error);
    Py_XDECREF(trace);
    return result;
}

static PyObject *read_plain(PyObject *self, PyObject *sslobj, PyObject *guard, Py_ssize_t size) {
    PyObject *number = PyLong_FromSsize_t(size);
    if (number == NULL || lock(guard) < 0) {
        Py_XDECREF(number);
        return NULL;
    }
    PyObject *data = call(sslobj, word_read, number);
    Py_DECREF(number);
    if (unlock(guard) < 0)
        Py_CLEAR(data);
    return data != NULL ? data : ask(self, word_judge);
}

static PyObject *pump(PyObject *self, PyObject *const held[], Py_ssize_t size) {
    PyObject *inner = held[INNER], *sslobj = held[SSLOBJ], *incoming = held[INCOMING], *guard = held[GUARD];
    for (;;) {
        Py_ssize_t most = at_hand(sslobj, incoming);
        if (most == 0)
            most = feed(self, inner, incoming);
        if (most < 0)
            return NULL;
        PyObject *data = read_plain(self, sslobj, guard, most < size ? most : size); /* no larger buffer than needed */
        if (data != Py_None)
            return data;
        Py_DECREF(data);
        if ((most = feed(self, inner, incoming)) < 0)
            return NULL;
    }
}

/* Held: somebody else may close the connection while this call waits. */
static void hold(PyObject *self, PyObject *held[]) {
    for (int which = 0; which < SLOTS; which++)
        held[which] = Py_NewRef(*slot(self, which));
}

static void drop(PyObject *held[]) {
    for (int which = 0; which < SLOTS; which++)
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
    PyObject *held[SLOTS];
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
    if (call_off(held[SSLOBJ], word_write, plain) == 0)
        data = call(held[OUTGOING], word_read, NULL);
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

static PyObject *secured_sendall(PyObject *self, PyObject *const *args, Py_ssize_t count, PyObject *names) {
    Py_ssize_t size = count == 1 && names == NULL && PyBytes_CheckExact(args[0]) ? PyBytes_GET_SIZE(args[0]) : 0;
    if (size == 0 || size > PIECE || !is_plain_case(self) || *slot(self, REST) != Py_None)
        return leave_to(slow_sendall, self, args, count, names);
    PyObject *held[SLOTS];
    hold(self, held);
    PyObject *data = encrypt(self, held, args[0]);
    int result = data == NULL ? -1 : send_all(self, held, data);
    Py_XDECREF(data);
    drop(held);
    if (result < 0 || tell(self, word_sendall, args[0], Py_None) < 0)
        return NULL;
    Py_RETURN_NONE;
}

/* -- the class ----------------------------------------------------------------------------------------------------- */

static PyMethodDef quick[] = {
    {"recv", FAST(secured_recv), METH_FASTCALL | METH_KEYWORDS,
     "Read at most that many bytes, waiting in the hub for the first."},
    {"sendall", FAST(secured_sendall), METH_FASTCALL | METH_KEYWORDS,
     "Send all of the bytes, waiting in the hub for room; the timeout bounds each part of 64 KiB."},
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

PyObject *quicken(PyObject *module, PyObject *type) {
    const struct {
        PyObject **word;
        const char *text;
    } words[] = {
        {&word_acquire, "acquire"}, {&word_eof, "eof"},   {&word_fail, "_fail"},       {&word_flush, "_flush"},
        {&word_judge, "_judge"},    {&word_read, "read"}, {&word_pending, "pending"},  {&word_release, "release"},
        {&word_recv, "recv"}, {&word_sendall, "sendall"}, {&word_tell, "_tell"},
        {&word_write, "write"},     {&word_write_eof, "write_eof"},
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
    if (replace((PyTypeObject *)type, &quick[0], &slow_recv) < 0 ||
        replace((PyTypeObject *)type, &quick[1], &slow_sendall) < 0)
        return NULL;
    Py_RETURN_NONE;
}
