/* SPDX-License-Identifier: MIT
 *
 * Answers to datagrams.
 *
 * They join while the handlers of a batch run: sendto() on the batch's socket with the very address that the handler was
 * given costs no system call. They are sent with the first one to the batch's last datagram, when the batch is done, when a handler waits, before the socket
 * is closed or gets another option, and by the watchdog when a handler computes on. Anything else that is sent goes at
 * once, after what was joined.
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
static PyObject *base_sendto, *no_words;

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

/* The answer that the kernel refused is its handler's fault, or its client's: told as if the handler had raised, in a
 * green thread of its own, since what is told may wait. */
static void tell_unsent(Batch *batch, int piece, int error) {
    PyObject *failed = batch->service.failed;
    PyObject *request = batch->pieces[piece].request, *address = batch->pieces[piece].address;
    if (failed == NULL || request == NULL)
        return;
    PyObject *tell = PyObject_GetAttrString((PyObject *)batch, "tell"), *number = PyLong_FromLong(error), *told = NULL;
    if (tell != NULL && number != NULL) {
        PyObject *args[] = {failed, request, address, number};
        told = spawn(batch->hub, batch->busy, tell, args, 4);
    }
    if (told == NULL)
        PyErr_WriteUnraisable(failed);
    Py_XDECREF(told);
    Py_XDECREF(number);
    Py_XDECREF(tell);
}

/* tell(failed, request, address, errno): what that green thread does. */
PyObject *batch_tell(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    if (count != 4) {
        PyErr_SetString(PyExc_TypeError, "tell() takes what is called, a request, an address and an error's number");
        return NULL;
    }
    fail((int)PyLong_AsLong(args[3]));
    return tell_failure(args[0], args[1], args[2]) < 0 ? NULL : Py_NewRef(Py_None);
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

/* The batch of a socket, for a call of a green thread; NULL: the call is the plain socket's. */
static Batch *batch_of(PyObject *sock) {
    if (hub_here() == NULL)
        return NULL;
    for (Batch *batch = batches; batch != NULL; batch = batch->next)
        if (batch->sock == sock)
            return batch->hub == hub_here() && !in_hub(batch->hub) && socket_fd(sock) == batch->fd ? batch : NULL;
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

/* Let the answer wait for others; `*size` is its own. 1: it does; 0: it has to be sent; -1: an exception.
 *
 * The first one to the last datagram of a batch has nobody to wait for. It takes the others along at once: the handler of
 * a quiet server may be about to end or to replace the process, by an order to do so that it has confirmed. */
static int join(Batch *batch, PyObject *data, PyObject *address, Py_ssize_t *size) {
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
    *size = PyBytes_GET_SIZE(bytes);
    batch->answers[batch->answer_count] = (Answer){bytes, batch->current};
    count_answers(batch, batch->answer_count + 1);
    bool first = !batch->answered;
    batch->answered = true;
    if (first && batch->at == batch->count)
        send_answers(batch, false);
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

static PyObject *send_one(Batch *batch, PyObject *data, int flags, Way *way) {
    _Alignas(struct cmsghdr) char control[CONTROL];
    Py_buffer buffer;
    if (PyObject_GetBuffer(data, &buffer, PyBUF_SIMPLE) < 0)
        return NULL;
    struct iovec part = {buffer.buf, (size_t)buffer.len};
    struct msghdr message = {
        .msg_name = &way->address, .msg_namelen = way->length, .msg_iov = &part, .msg_iovlen = 1};
    set_own(&message, way, control);
    ssize_t sent = sendmsg(batch->fd, &message, flags | MSG_NOSIGNAL | MSG_DONTWAIT);
    PyBuffer_Release(&buffer);
    return sent < 0 ? PyErr_SetFromErrno(PyExc_OSError) : PyLong_FromSsize_t(sent);
}

/* After what a green thread must not do, to block: wait a moment, if a socket would. -1: not, and that is raised. */
static int wait_for_room(PyObject *self, Batch *batch, long flags) {
    if (!PyErr_ExceptionMatches(PyExc_BlockingIOError))
        return -1;
    PyObject *kind, *value, *trace;
    PyErr_Fetch(&kind, &value, &trace);
    PyObject *limit = PyObject_CallMethod(self, "gettimeout", NULL);
    bool patient = limit == Py_None && !(flags & MSG_DONTWAIT);
    Py_XDECREF(limit);
    if (!patient) {
        PyErr_Restore(kind, value, trace);
        return -1;
    }
    Py_XDECREF(kind);
    Py_XDECREF(value);
    Py_XDECREF(trace);
    return sleep_until(batch->hub, now_ns() + (int64_t)WAIT_MS * 1000000);
}

/* sendto(data[, flags], address) on the socket of a datagram server. */
static PyObject *answers_sendto(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    if (count > 3) {
        PyErr_Format(PyExc_TypeError, "sendto() takes 2 or 3 arguments (%zd given)", count);
        return NULL;
    }
    Batch *batch = count < 2 ? NULL : batch_of(self);
    PyObject *all[4] = {self};
    for (Py_ssize_t i = 0; i < count; i++)
        all[i + 1] = args[i];
    if (batch == NULL)
        return PyObject_Vectorcall(base_sendto, all, (size_t)count + 1, NULL);
    if (count == 2) {
        Py_ssize_t size = 0;
        int joined = join(batch, args[0], args[1], &size);
        if (joined != 0)
            return joined < 0 ? NULL : PyLong_FromSsize_t(size);
    }
    send_answers(batch, false);
    long flags = count == 2 ? 0 : PyLong_AsLong(args[1]);
    if (flags == -1 && PyErr_Occurred())
        return NULL;
    Way way;
    bool known = old_way(batch, args[count - 1], &way);
    PyObject *sent, *quick = PyLong_FromLong(flags | MSG_DONTWAIT);
    if (quick == NULL)
        return NULL;
    all[2] = quick;
    all[3] = args[count - 1];
    do
        sent = known ? send_one(batch, args[0], (int)flags, &way) : PyObject_Vectorcall(base_sendto, all, 4, NULL);
    while (sent == NULL && wait_for_room(self, batch, flags) == 0);
    Py_DECREF(quick);
    return sent;
}

/* The socket's own method of that name. */
static PyObject *plainly(PyObject *self, const char *name, PyObject *args) {
    PyObject *plain = PyObject_CallFunctionObjArgs((PyObject *)&PySuper_Type, Answers_Type, self, NULL);
    PyObject *method = plain == NULL ? NULL : PyObject_GetAttrString(plain, name);
    PyObject *done = method == NULL ? NULL : PyObject_Call(method, args, NULL);
    Py_XDECREF(method);
    Py_XDECREF(plain);
    return done;
}

/* What sendmsg() is to be given besides: our address of a way. */
static PyObject *own_as_ancillary(Way *way) {
    bool v4 = way->level == IPPROTO_IP;
    return Py_BuildValue("[(iiy#)]", way->level, v4 ? IP_PKTINFO : IPV6_PKTINFO, (char *)&way->own,
                         (Py_ssize_t)(v4 ? sizeof way->own.v4 : sizeof way->own.v6));
}

/* The arguments of sendmsg() as they are passed on: it does not block, and may be called again. */
static PyObject *message_args(Batch *batch, PyObject *const *args, Py_ssize_t count, long flags) {
    PyObject *buffers = PySequence_List(args[0]), *ancillary = NULL, *all = NULL;
    Way way;
    bool none = count < 2 || (PyList_CheckExact(args[1]) && PyList_GET_SIZE(args[1]) == 0) || args[1] == no_words;
    if (buffers != NULL && none && count == 4 && old_way(batch, args[3], &way) && way.level != ANY)
        ancillary = own_as_ancillary(&way);
    else if (buffers != NULL)
        ancillary = count < 2 ? PyList_New(0) : PySequence_List(args[1]);
    if (ancillary != NULL)
        all = count == 4 ? Py_BuildValue("(OOlO)", buffers, ancillary, flags | MSG_DONTWAIT, args[3])
                         : Py_BuildValue("(OOl)", buffers, ancillary, flags | MSG_DONTWAIT);
    Py_XDECREF(buffers);
    Py_XDECREF(ancillary);
    return all;
}

/* sendmsg(buffers[, ancdata[, flags[, address]]]) likewise. */
static PyObject *answers_sendmsg(PyObject *self, PyObject *args) {
    Py_ssize_t count = PyTuple_GET_SIZE(args);
    Batch *batch = count < 1 || count > 4 ? NULL : batch_of(self);
    if (batch == NULL)
        return plainly(self, "sendmsg", args);
    send_answers(batch, false);
    long flags = count < 3 ? 0 : PyLong_AsLong(PyTuple_GET_ITEM(args, 2));
    if (flags == -1 && PyErr_Occurred())
        return NULL;
    PyObject *sent, *all = message_args(batch, &PyTuple_GET_ITEM(args, 0), count, flags);
    if (all == NULL)
        return NULL;
    do
        sent = plainly(self, "sendmsg", all);
    while (sent == NULL && wait_for_room(self, batch, flags) == 0);
    Py_DECREF(all);
    return sent;
}

static PyObject *after_answers(PyObject *self, const char *name, PyObject *args) {
    Batch *batch = batch_of(self);
    if (batch != NULL)
        send_answers(batch, false);
    return plainly(self, name, args);
}

static PyObject *answers_close(PyObject *self, PyObject *none) { return after_answers(self, "close", no_words); }

static PyObject *answers_detach(PyObject *self, PyObject *none) { return after_answers(self, "detach", no_words); }

static PyObject *answers_dup(PyObject *self, PyObject *none) { return after_answers(self, "dup", no_words); }

static PyObject *answers_setsockopt(PyObject *self, PyObject *args) { return after_answers(self, "setsockopt", args); }

/* -- the type ------------------------------------------------------------------------------------------------------ */

static PyMethodDef answers_methods[] = {
    {"sendto", FAST(answers_sendto), METH_FASTCALL, "As socket.sendto; answers to a datagram may go out together."},
    {"sendmsg", answers_sendmsg, METH_VARARGS, "As socket.sendmsg, after the answers."},
    {"close", answers_close, METH_NOARGS, "As socket.close, after the answers."},
    {"detach", answers_detach, METH_NOARGS, "As socket.detach, after the answers."},
    {"dup", answers_dup, METH_NOARGS, "As socket.dup, after the answers."},
    {"setsockopt", answers_setsockopt, METH_VARARGS, "As socket.setsockopt, for what is sent from now on."},
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
    no_words = PyTuple_New(0);
    if (Answers_Type == NULL || base_sendto == NULL || no_words == NULL)
        return -1;
    return PyModule_AddObjectRef(module, "Answers", (PyObject *)Answers_Type);
}
