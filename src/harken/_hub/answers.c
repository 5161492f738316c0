/* SPDX-License-Identifier: MIT
 *
 * Answers to datagrams.
 *
 * They join while the handler that they are of runs: sendto() on the batch's socket with the very address that the
 * handler was given costs no system call. They are sent when the batch is done, when a handler waits, and by the
 * watchdog when one computes on. Anything else that is sent goes at once, after what was joined.
 *
 * On a socket that is bound to every address they leave from the address that was asked: a client takes none from
 * another. */
#include "datagrams.h"
#include <errno.h>
#include <poll.h>

#define JOINED 1472 /* bytes: more than one Ethernet frame may be refused, which the handler has to be told */
#define WAIT_MS 1   /* between two tries to send when the kernel has no room */

HIDDEN Batch *batches;
static PyTypeObject *Answers_Type;
static PyObject *base_sendto;

/* Let a message leave from the address that it was asked at. `control` has room for CMSG_SPACE of a Way's `own`. */
static void set_own(struct msghdr *message, Way *way, char *control) {
    if (way->level == ANY)
        return;
    bool v4 = way->level == IPPROTO_IP;
    size_t size = v4 ? sizeof way->own.v4 : sizeof way->own.v6;
    message->msg_control = control;
    message->msg_controllen = CMSG_SPACE(size);
    struct cmsghdr *header = CMSG_FIRSTHDR(message);
    header->cmsg_level = way->level;
    header->cmsg_type = v4 ? IP_PKTINFO : IPV6_PKTINFO;
    header->cmsg_len = CMSG_LEN(size);
    memcpy(CMSG_DATA(header), &way->own, size);
}

static void count_answers(Batch *batch, size_t count) {
    batch->hub->answers += count - batch->answer_count;
    batch->answer_count = count;
}

void drop_answers(Batch *batch) {
    for (size_t i = 0; i < batch->answer_count; i++)
        Py_CLEAR(batch->answers[i].data);
    count_answers(batch, 0);
}

/* The answer that the kernel refused is its handler's fault, or its client's: told as if the handler had raised. */
static void tell_unsent(Batch *batch, int piece, int error) {
    PyObject *failed = batch->service.failed;
    PyObject *request = batch->pieces[piece].request, *address = batch->pieces[piece].address;
    if (failed == NULL || request == NULL)
        return;
    Py_INCREF(failed);
    fail(error);
    if (tell_failure(failed, request, address) < 0)
        PyErr_WriteUnraisable(failed);
    Py_DECREF(failed);
}

/* Send the joined answers: all of them, waiting for the kernel where it must, or (`nowait`) as many as it takes. */
size_t send_answers(Batch *batch, bool nowait) {
    struct mmsghdr messages[MOST];
    struct iovec parts[MOST];
    _Alignas(struct cmsghdr) char controls[MOST][CONTROL];
    int count = (int)batch->answer_count, sent = 0, pieces[MOST];
    if (count == 0)
        return 0;
    memset(messages, 0, sizeof messages[0] * (size_t)count);
    for (int i = 0; i < count; i++) {
        PyObject *data = batch->answers[i].data;
        Way *way = &batch->pieces[pieces[i] = batch->answers[i].piece].way;
        parts[i] = (struct iovec){PyBytes_AS_STRING(data), (size_t)PyBytes_GET_SIZE(data)};
        messages[i].msg_hdr = (struct msghdr){
            .msg_name = &way->address, .msg_namelen = way->length, .msg_iov = &parts[i], .msg_iovlen = 1};
        set_own(&messages[i].msg_hdr, way, controls[i]);
    }
    PyObject *held[MOST];
    for (int i = 0; i < count; i++)
        held[i] = batch->answers[i].data;
    count_answers(batch, 0); /* from here on they are ours: nobody sends one twice while we wait */
    int saved = errno;
    while (sent < count) {
        int done = sendmmsg(batch->fd, messages + sent, (unsigned)(count - sent), MSG_NOSIGNAL | MSG_DONTWAIT);
        if (done > 0) {
            sent += done;
        } else if (nowait && errno != EINTR) {
            break; /* also what was refused: the hub's own thread will tell */
        } else if (errno == EAGAIN) { /* the card is slower than we: as blocking sockets do, wait for it */
            struct pollfd ready = {.fd = batch->fd, .events = POLLOUT};
            Py_BEGIN_ALLOW_THREADS;
            poll(&ready, 1, WAIT_MS);
            Py_END_ALLOW_THREADS;
        } else if (errno != EINTR) {
            tell_unsent(batch, pieces[sent++], errno);
        }
    }
    errno = saved;
    for (int i = 0; i < sent; i++)
        Py_DECREF(held[i]);
    for (int i = sent; i < count; i++)
        batch->answers[i - sent] = (Answer){held[i], pieces[i]};
    if (sent < count)
        count_answers(batch, (size_t)(count - sent));
    return (size_t)sent;
}

/* For the watchdog: what handlers of this hub answered goes out although one of them computes on. */
size_t answers_nowait(Hub *hub) {
    size_t sent = 0;
    for (Batch *batch = batches; batch != NULL; batch = batch->next)
        if (batch->hub == hub)
            sent += send_answers(batch, true);
    return sent;
}

static Batch *batch_of(PyObject *sock) {
    for (Batch *batch = batches; batch != NULL; batch = batch->next)
        if (batch->sock == sock)
            return batch->hub == current_hub ? batch : NULL;
    return NULL;
}

/* What the calling green thread's handler is known by, if it has waited since its batch; borrowed, or NULL. */
static PyObject *has_waited(Batch *batch) {
    if (PyDict_GET_SIZE(batch->waiting) == 0)
        return NULL;
    PyGreenlet *me = PyGreenlet_GetCurrent();
    PyObject *known = PyDict_GetItemWithError(batch->waiting, (PyObject *)me);
    Py_DECREF(me);
    return known;
}

/* Let the answer wait for others. 1: it does; 0: it has to go at once; -1: an exception. */
static int join(Batch *batch, PyObject *data, PyObject *address) {
    if (!batch->joins || batch->current < 0 || !PyObject_CheckBuffer(data) || has_waited(batch))
        return 0;
    Piece *piece = &batch->pieces[batch->current];
    int same = address == piece->address ? 1 : PyObject_RichCompareBool(address, piece->address, Py_EQ);
    if (same <= 0)
        return same;
    PyObject *bytes = PyBytes_CheckExact(data) ? Py_NewRef(data) : PyBytes_FromObject(data);
    if (bytes == NULL || PyBytes_GET_SIZE(bytes) > JOINED) {
        Py_XDECREF(bytes);
        PyErr_Clear(); /* sendto() itself will say what is wrong with it */
        return 0;
    }
    if (batch->answer_count == MOST)
        send_answers(batch, false);
    if (batch->answer_count == 0)
        batch->oldest = coarse_ns();
    batch->answers[batch->answer_count] = (Answer){bytes, batch->current};
    count_answers(batch, batch->answer_count + 1);
    return 1;
}

/* The way of a handler that has waited in between, if `address` is its client's: true, and `*way` is filled. */
static bool old_way(Batch *batch, PyObject *address, Way *way) {
    if (!batch->wildcard)
        return false;
    PyObject *known = has_waited(batch);
    if (known != NULL && PyObject_RichCompareBool(PyTuple_GET_ITEM(known, 0), address, Py_EQ) > 0) {
        memcpy(way, PyBytes_AS_STRING(PyTuple_GET_ITEM(known, 1)), sizeof *way);
        return true;
    }
    if (known == NULL && batch->current >= 0) {
        Piece *piece = &batch->pieces[batch->current];
        if (PyObject_RichCompareBool(piece->address, address, Py_EQ) > 0) {
            *way = piece->way;
            return true;
        }
    }
    PyErr_Clear();
    return false;
}

static ssize_t send_one(Batch *batch, PyObject *data, Way *way) {
    _Alignas(struct cmsghdr) char control[CONTROL];
    Py_buffer buffer;
    if (PyObject_GetBuffer(data, &buffer, PyBUF_SIMPLE) < 0)
        return -1;
    struct iovec part = {buffer.buf, (size_t)buffer.len};
    struct msghdr message = {
        .msg_name = &way->address, .msg_namelen = way->length, .msg_iov = &part, .msg_iovlen = 1};
    set_own(&message, way, control);
    ssize_t sent = sendmsg(batch->fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
    PyBuffer_Release(&buffer);
    if (sent < 0)
        PyErr_SetFromErrno(PyExc_OSError);
    return sent;
}

/* socket.sendto with what a green thread must not do, to block, left to the caller. */
static PyObject *send_plainly(PyObject *self, PyObject *const *args, Py_ssize_t count, bool wait) {
    long flags = 0;
    if (count == 3 && (flags = PyLong_AsLong(args[1])) == -1 && PyErr_Occurred())
        return NULL;
    PyObject *number = PyLong_FromLong(wait ? flags : flags | MSG_DONTWAIT);
    if (number == NULL)
        return NULL;
    PyObject *all[] = {self, args[0], number, args[count - 1]};
    PyObject *sent = PyObject_Vectorcall(base_sendto, all, 4, NULL);
    Py_DECREF(number);
    return sent;
}

/* sendto(data[, flags], address) on the socket of a datagram server. */
static PyObject *answers_sendto(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    Batch *batch = current_hub == NULL || count < 2 || count > 3 ? NULL : batch_of(self);
    if (batch == NULL || in_hub(batch->hub)) {
        PyObject *all[4] = {self};
        if (count > 3) {
            PyErr_Format(PyExc_TypeError, "sendto() takes 2 or 3 arguments (%zd given)", count);
            return NULL;
        }
        for (Py_ssize_t i = 0; i < count; i++)
            all[i + 1] = args[i];
        return PyObject_Vectorcall(base_sendto, all, (size_t)count + 1, NULL);
    }
    if (count == 2) {
        int joined = join(batch, args[0], args[1]);
        if (joined != 0)
            return joined < 0 ? NULL : PyLong_FromSsize_t(PyBytes_GET_SIZE(
                                           batch->answers[batch->answer_count - 1].data));
    }
    send_answers(batch, false);
    Way way;
    bool known = count == 2 && old_way(batch, args[1], &way);
    for (;;) {
        ssize_t size = known ? send_one(batch, args[0], &way) : 0;
        PyObject *sent = known ? (size < 0 ? NULL : PyLong_FromSsize_t(size)) : send_plainly(self, args, count, false);
        if (sent != NULL || !PyErr_ExceptionMatches(PyExc_BlockingIOError))
            return sent;
        PyObject *kind, *value, *trace;
        PyErr_Fetch(&kind, &value, &trace);
        PyObject *limit = PyObject_CallMethod(self, "gettimeout", NULL);
        bool patient = limit == Py_None && (count == 2 || !(PyLong_AsLong(args[1]) & MSG_DONTWAIT));
        Py_XDECREF(limit);
        if (!patient) {
            PyErr_Restore(kind, value, trace);
            return NULL;
        }
        Py_XDECREF(kind);
        Py_XDECREF(value);
        Py_XDECREF(trace);
        if (sleep_until(batch->hub, now_ns() + (int64_t)WAIT_MS * 1000000) < 0)
            return NULL;
    }
}

/* -- the type ------------------------------------------------------------------------------------------------------ */

static PyMethodDef answers_methods[] = {
    {"sendto", FAST(answers_sendto), METH_FASTCALL, "As socket.sendto; answers to a datagram may go out together."},
    {NULL},
};

static PyType_Slot answers_slots[] = {
    {Py_tp_doc, "What the socket of a datagram server has besides, while a hub serves it."},
    {Py_tp_methods, answers_methods},
    {0, NULL},
};

static PyType_Spec answers_spec = {
    .name = "harken._hub.compiled.Answers",
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
    .slots = answers_slots,
};

int answers_ready(PyObject *module) {
    Answers_Type = (PyTypeObject *)PyType_FromSpec(&answers_spec);
    base_sendto = PyObject_GetAttrString((PyObject *)Wire_Type, "sendto");
    if (Answers_Type == NULL || base_sendto == NULL)
        return -1;
    return PyModule_AddObjectRef(module, "Answers", (PyObject *)Answers_Type);
}
