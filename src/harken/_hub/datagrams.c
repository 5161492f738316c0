/* SPDX-License-Identifier: MIT
 *
 * Batch: datagrams of one socket, taken from the kernel together, served one by one, and answered together.
 *
 * Answers join while the handler that they are of runs: sendto() on the batch's socket with the very address that the
 * handler was given costs no system call. They are sent when the batch is done, when a handler waits, and by the
 * watchdog when one computes on. Anything else that is sent goes at once, after what was joined.
 *
 * On a socket that is bound to every address the kernel is asked to which one a datagram came, and told to answer from
 * there: a client takes no answer from another. */
#include "hub.h"
#include <errno.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>

#define MOST 32       /* in a batch: of some 7 us each, so the first answer waits a quarter of a millisecond */
#define JOINED 1472   /* bytes: more than one Ethernet frame may be refused, which the handler has to be told */
#define ROOM 65536    /* for one datagram; max_packet_size is at most that */
#define OLDEST 1000000 /* ns that an answer waits for others, by the coarse clock: one tick of it */
#define WAIT_MS 1     /* between two tries to send when the kernel has no room */

typedef union {
    struct sockaddr any;
    struct sockaddr_storage room;
} Address;

#define ANY (-1)

/* The way back: where a datagram came from, and to which of our addresses. */
typedef struct {
    Address address;
    socklen_t length;
    int level; /* IPPROTO_IP, which is 0, or IPPROTO_IPV6; ANY: the kernel chooses our address */
    union {
        struct in_pktinfo v4;
        struct in6_pktinfo v6;
    } own;
} Way;

typedef struct {
    PyObject *request, *address; /* owned */
    Way way;
} Piece;

typedef struct {
    PyObject *data; /* owned */
    int piece;
} Answer;

#define KNOWN_BITS 6

/* A client that was here. */
typedef struct {
    in_addr_t host;
    in_port_t port;
    PyObject *address; /* owned, or NULL */
} Known;

typedef struct Batch {
    PyObject_HEAD
    struct Batch *next; /* of all batches */
    Hub *hub;
    PyObject *sock;
    int fd, family;
    bool wildcard, joins, lean;
    Piece pieces[MOST];
    int count, at; /* pieces that are there, and the first that is not served */
    int current;   /* the one whose handler runs; -1: none, or it waits */
    long turn;     /* counts who serves; see batch_serve */
    Answer answers[MOST];
    volatile size_t answer_count;
    int64_t oldest;
    PyObject *waiting; /* dict: green threads whose handler waits, to (address, Way as bytes) */
    Known known[1 << KNOWN_BITS];
    PyObject *failed;  /* told of what could not be sent, while a batch is served */
} Batch;

static PyTypeObject *Batch_Type, *Answers_Type;
static Batch *batches;
static PyObject *base_sendto, *no_args, *words[4]; /* of a handler: request, client_address, server, handle */
static char *space; /* for MOST datagrams of ROOM bytes; the kernel touches what it fills */

/* -- sending ------------------------------------------------------------------------------------------------------ */

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

#define CONTROL CMSG_SPACE(sizeof(struct in6_pktinfo))

static void count_answers(Batch *batch, size_t count) {
    batch->hub->answers += count - batch->answer_count;
    batch->answer_count = count;
}

static void drop_answers(Batch *batch) {
    for (size_t i = 0; i < batch->answer_count; i++)
        Py_CLEAR(batch->answers[i].data);
    count_answers(batch, 0);
}

/* The answer that the kernel refused is its handler's fault, or its client's: told as if the handler had raised. */
static void tell_unsent(Batch *batch, int piece, int error) {
    PyObject *failed = batch->failed, *request = batch->pieces[piece].request, *address = batch->pieces[piece].address;
    if (failed == NULL || request == NULL)
        return;
    errno = error;
    PyErr_SetFromErrno(PyExc_OSError);
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    PyErr_NormalizeException(&type, &value, &trace);
    PyObject *done = PyObject_CallFunctionObjArgs(failed, request, address, value, NULL);
    if (done == NULL)
        PyErr_WriteUnraisable(failed);
    Py_XDECREF(done);
    Py_XDECREF(type);
    Py_XDECREF(value);
    Py_XDECREF(trace);
}

/* Send the joined answers: all of them, waiting for the kernel where it must, or (`nowait`) as many as it takes. */
static size_t send_answers(Batch *batch, bool nowait) {
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

/* -- receiving ---------------------------------------------------------------------------------------------------- */

static void note_own(Piece *piece, struct msghdr *message) {
    piece->way.level = ANY;
    for (struct cmsghdr *header = CMSG_FIRSTHDR(message); header != NULL; header = CMSG_NXTHDR(message, header)) {
        if (header->cmsg_level == IPPROTO_IP && header->cmsg_type == IP_PKTINFO) {
            piece->way.level = IPPROTO_IP;
            memcpy(&piece->way.own.v4, CMSG_DATA(header), sizeof piece->way.own.v4);
            struct in_pktinfo *own = &piece->way.own.v4;
            own->ipi_ifindex = 0; /* the routes say by which card an answer leaves */
            if (own->ipi_spec_dst.s_addr == 0) { /* it came before we asked, and might be a broadcast */
                uint32_t asked = ntohl(own->ipi_addr.s_addr);
                if (!IN_MULTICAST(asked) && asked != INADDR_BROADCAST)
                    own->ipi_spec_dst = own->ipi_addr;
            }
        } else if (header->cmsg_level == IPPROTO_IPV6 && header->cmsg_type == IPV6_PKTINFO) {
            struct in6_pktinfo *own = &piece->way.own.v6;
            memcpy(own, CMSG_DATA(header), sizeof *own);
            if (IN6_IS_ADDR_MULTICAST(&own->ipi6_addr))
                continue;
            piece->way.level = IPPROTO_IPV6;
            if (!IN6_IS_ADDR_LINKLOCAL(&own->ipi6_addr))
                own->ipi6_ifindex = 0;
        }
    }
}

static void drop_piece(Piece *piece) {
    Py_CLEAR(piece->request);
    Py_CLEAR(piece->address);
}

/* The sender's address. Clients come back: the same object, until another one takes its place here. */
static PyObject *sender(Batch *batch, Way *way) {
    struct sockaddr_in *v4 = (struct sockaddr_in *)&way->address;
    if (batch->family != AF_INET || way->length != sizeof *v4)
        return address_of(&way->address, way->length);
    uint32_t mixed = (ntohl(v4->sin_addr.s_addr) ^ (uint32_t)v4->sin_port << 16) * 2654435761u;
    Known *known = &batch->known[mixed >> (32 - KNOWN_BITS)];
    if (known->address == NULL || known->host != v4->sin_addr.s_addr || known->port != v4->sin_port) {
        PyObject *made = address_of(v4, way->length);
        if (made == NULL)
            return NULL;
        known->host = v4->sin_addr.s_addr;
        known->port = v4->sin_port;
        Py_XSETREF(known->address, made);
    }
    return Py_NewRef(known->address);
}

static int make_piece(Batch *batch, int i, struct mmsghdr *message, const char *data) {
    Piece *piece = &batch->pieces[i];
    PyObject *bytes = PyBytes_FromStringAndSize(data, message->msg_len);
    piece->way.length = message->msg_hdr.msg_namelen;
    piece->address = sender(batch, &piece->way);
    piece->request = bytes == NULL ? NULL : PyTuple_Pack(2, bytes, batch->sock);
    Py_XDECREF(bytes);
    if (batch->wildcard)
        note_own(piece, &message->msg_hdr);
    else
        piece->way.level = ANY;
    return piece->request == NULL || piece->address == NULL ? -1 : 0;
}

/* receive(size, cut): take what is there, without waiting; the number of datagrams. `cut(address)` is told of each that
 * was longer than `size`. Not while some of the last are left. */
static PyObject *batch_receive(PyObject *self, PyObject *args) {
    Batch *batch = (Batch *)self;
    Py_ssize_t size;
    PyObject *cut;
    if (!PyArg_ParseTuple(args, "nO:receive", &size, &cut))
        return NULL;
    if (batch->at < batch->count) {
        PyErr_SetString(PyExc_RuntimeError, "the last batch is not served");
        return NULL;
    }
    if (space == NULL && (space = PyMem_RawMalloc((size_t)MOST * ROOM)) == NULL)
        return PyErr_NoMemory();
    for (int i = 0; i < batch->count; i++)
        drop_piece(&batch->pieces[i]);
    batch->count = batch->at = 0;
    struct mmsghdr messages[MOST];
    struct iovec parts[MOST];
    _Alignas(struct cmsghdr) char controls[MOST][CONTROL + CMSG_SPACE(sizeof(struct in_pktinfo))];
    size_t room = size < 0 ? 0 : size < ROOM ? (size_t)size : ROOM;
    for (int i = 0; i < MOST; i++) {
        parts[i] = (struct iovec){space + (size_t)i * ROOM, room};
        messages[i].msg_hdr = (struct msghdr){.msg_name = &batch->pieces[i].way.address,
                                              .msg_namelen = sizeof(Address),
                                              .msg_iov = &parts[i],
                                              .msg_iovlen = 1,
                                              .msg_control = batch->wildcard ? controls[i] : NULL,
                                              .msg_controllen = batch->wildcard ? sizeof controls[i] : 0};
    }
    batch->fd = socket_fd(batch->sock);
    if (batch->fd < 0) {
        if (!PyErr_Occurred())
            fail(EBADF);
        return NULL;
    }
    int count;
    while ((count = recvmmsg(batch->fd, messages, MOST, MSG_DONTWAIT, NULL)) < 0) {
        if (errno == EAGAIN)
            return PyLong_FromLong(0);
        if (errno != EINTR)
            return PyErr_SetFromErrno(PyExc_OSError);
        if (PyErr_CheckSignals() < 0)
            return NULL;
    }
    for (int i = 0; i < count; i++) {
        batch->count = i + 1;
        if (make_piece(batch, i, &messages[i], parts[i].iov_base) < 0) {
            batch->at = batch->count;
            return NULL;
        }
    }
    for (int i = 0; i < count; i++)
        if (messages[i].msg_hdr.msg_flags & MSG_TRUNC) {
            PyObject *done = PyObject_CallOneArg(cut, batch->pieces[i].address);
            if (done == NULL)
                return NULL;
            Py_DECREF(done);
        }
    return PyLong_FromLong(count);
}

/* -- serving ------------------------------------------------------------------------------------------------------ */

/* A handler raised. What is no Exception ends it without a word to handle_error(), as in a thread; GreenletExit goes
 * on: the hub is being closed. */
static int tell_failure(PyObject *failed, PyObject *request, PyObject *address) {
    if (PyErr_ExceptionMatches(PyExc_GreenletExit))
        return -1;
    if (!PyErr_ExceptionMatches(PyExc_Exception)) {
        show_exception(failed);
        return 0;
    }
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    PyErr_NormalizeException(&type, &value, &trace);
    if (trace != NULL)
        PyException_SetTraceback(value, trace);
    PyObject *before = PyErr_GetHandledException();
    PyErr_SetHandledException(value); /* handle_error() asks sys.exc_info() */
    PyObject *done = PyObject_CallFunctionObjArgs(failed, request, address, value, NULL);
    int result = 0;
    if (done == NULL && (result = PyErr_ExceptionMatches(PyExc_GreenletExit) ? -1 : 0) == 0)
        show_exception(failed);
    Py_XDECREF(done);
    PyErr_SetHandledException(before);
    Py_XDECREF(before);
    Py_XDECREF(type);
    Py_XDECREF(value);
    Py_XDECREF(trace);
    return result;
}

/* What BaseRequestHandler's constructor does when its setup() and finish() are its own, which do nothing. */
static PyObject *handle_plainly(PyTypeObject *type, PyObject *const *args) {
    PyObject *handler = type->tp_new(type, no_args, NULL), *done = NULL;
    if (handler != NULL && PyObject_SetAttr(handler, words[0], args[0]) == 0 &&
        PyObject_SetAttr(handler, words[1], args[1]) == 0 && PyObject_SetAttr(handler, words[2], args[2]) == 0) {
        PyObject *self[] = {handler};
        done = PyObject_VectorcallMethod(words[3], self, 1, NULL);
    }
    Py_XDECREF(handler);
    return done;
}

/* Call serve(request, address[, server]) in a context of its own. */
static int serve_piece(Batch *batch, PyObject *serve, PyObject *server, PyObject *failed, int place) {
    Piece *piece = &batch->pieces[place];
    PyObject *request = Py_NewRef(piece->request), *address = Py_NewRef(piece->address);
    PyObject *args[] = {request, address, server};
    PyObject *context = PyContext_CopyCurrent(), *done = NULL;
    int result = -1;
    if (context != NULL && PyContext_Enter(context) == 0) {
        if (batch->lean)
            done = handle_plainly((PyTypeObject *)serve, args);
        else
            done = PyObject_Vectorcall(serve, args, server == Py_None ? 2 : 3, NULL);
        result = done != NULL ? 0 : tell_failure(failed, request, address);
        PyObject *type, *value, *trace;
        PyErr_Fetch(&type, &value, &trace);
        PyContext_Exit(context);
        PyErr_Restore(type, value, trace);
    }
    Py_XDECREF(done);
    Py_XDECREF(context);
    Py_DECREF(address);
    Py_DECREF(request);
    return result;
}

/* serve(serve, server, failed, lean=False): serve what is left, in the calling green thread. When a handler waits, and somebody has
 * said so by waits(), others go on with the batch; this call then returns as soon as that handler has ended. False: this is
 * a forked child, in which nothing more is served. */
static PyObject *batch_serve(PyObject *self, PyObject *args) {
    Batch *batch = (Batch *)self;
    PyObject *serve, *server, *failed;
    int lean = 0;
    if (!PyArg_ParseTuple(args, "OOO|p:serve", &serve, &server, &failed, &lean))
        return NULL;
    batch->lean = lean && PyType_Check(serve);
    Hub *hub = batch->hub;
    long turn = ++batch->turn;
    int result = 0;
    Py_XSETREF(batch->failed, Py_NewRef(failed));
    while (result == 0 && batch->at < batch->count && batch->turn == turn) {
        int place = batch->current = batch->at++;
        beat_piece(hub->beat);
        result = serve_piece(batch, serve, server, failed, place);
        if (batch->turn != turn || hub->lent)
            break;
        batch->current = -1;
        if (batch->answer_count > 0 && coarse_ns() - batch->oldest >= OLDEST)
            send_answers(batch, false);
    }
    if (hub->lent) { /* a handler forked: what was joined is the parent's to send */
        drop_answers(batch);
        batch->at = batch->count;
    }
    if (PyDict_GET_SIZE(batch->waiting) > 0) {
        PyObject *type, *value, *trace;
        PyErr_Fetch(&type, &value, &trace);
        PyGreenlet *me = PyGreenlet_GetCurrent();
        if (PyDict_DelItem(batch->waiting, (PyObject *)me) < 0)
            PyErr_Clear(); /* it never waited */
        Py_DECREF(me);
        PyErr_Restore(type, value, trace);
    }
    return result < 0 ? NULL : PyBool_FromLong(!hub->lent);
}

/* waits(green): the handler that was being served waits in that green thread; send what it has answered. */
static PyObject *batch_waits(PyObject *self, PyObject *green) {
    Batch *batch = (Batch *)self;
    int current = batch->current;
    batch->turn++;
    batch->current = -1;
    send_answers(batch, false);
    if (current < 0)
        Py_RETURN_NONE;
    Piece *piece = &batch->pieces[current];
    PyObject *way = PyBytes_FromStringAndSize((char *)&piece->way, sizeof piece->way);
    PyObject *known = way == NULL ? NULL : PyTuple_Pack(2, piece->address, way);
    int result = known == NULL ? -1 : PyDict_SetItem(batch->waiting, green, known);
    Py_XDECREF(known);
    Py_XDECREF(way);
    return result < 0 ? NULL : Py_NewRef(Py_None);
}

static PyObject *batch_flush(PyObject *self, PyObject *none) {
    return PyLong_FromSize_t(send_answers((Batch *)self, false));
}

static PyObject *get_left(PyObject *self, void *closure) {
    return PyLong_FromLong(((Batch *)self)->count - ((Batch *)self)->at);
}

/* -- the types ---------------------------------------------------------------------------------------------------- */

/* Whether the socket answers for every address of the machine; then ask for the one that each datagram came to. */
static bool ask_for_own(int fd, int family) {
    struct sockaddr_storage bound;
    socklen_t length = sizeof bound;
    int yes = 1;
    if (getsockname(fd, (struct sockaddr *)&bound, &length) < 0)
        return false;
    if (family == AF_INET)
        return ((struct sockaddr_in *)&bound)->sin_addr.s_addr == htonl(INADDR_ANY) &&
               setsockopt(fd, IPPROTO_IP, IP_PKTINFO, &yes, sizeof yes) == 0;
    if (family == AF_INET6)
        return IN6_IS_ADDR_UNSPECIFIED(&((struct sockaddr_in6 *)&bound)->sin6_addr) &&
               setsockopt(fd, IPPROTO_IPV6, IPV6_RECVPKTINFO, &yes, sizeof yes) == 0;
    return false;
}

static PyObject *batch_new(PyTypeObject *type, PyObject *args, PyObject *words) {
    PyObject *hub, *sock;
    int fd, family, kind, proto;
    if (!PyArg_ParseTuple(args, "O!O!:Batch", Hub_Type, &hub, Wire_Type, &sock) ||
        socket_parts(sock, &fd, &family, &kind, &proto) < 0)
        return NULL;
    Batch *batch = (Batch *)type->tp_alloc(type, 0);
    if (batch == NULL)
        return NULL;
    batch->hub = (Hub *)Py_NewRef(hub);
    batch->sock = Py_NewRef(sock);
    batch->fd = fd;
    batch->family = family;
    batch->current = -1;
    batch->wildcard = fd >= 0 && ask_for_own(fd, family);
    batch->joins = family == AF_INET || family == AF_INET6; /* a Unix client that has gone is told of at once */
    batch->next = batches;
    batches = batch;
    if ((batch->waiting = PyDict_New()) == NULL)
        Py_CLEAR(batch);
    return (PyObject *)batch;
}

static int batch_clear(PyObject *self) {
    Batch *batch = (Batch *)self;
    drop_answers(batch);
    for (int i = 0; i < batch->count; i++)
        drop_piece(&batch->pieces[i]);
    batch->count = batch->at = 0;
    for (int i = 0; i < 1 << KNOWN_BITS; i++)
        Py_CLEAR(batch->known[i].address);
    Py_CLEAR(batch->failed);
    Py_CLEAR(batch->sock);
    if (batch->waiting != NULL)
        PyDict_Clear(batch->waiting);
    return 0;
}

static PyObject *batch_close(PyObject *self, PyObject *none) {
    send_answers((Batch *)self, true);
    batch_clear(self);
    Py_RETURN_NONE;
}

static int batch_traverse(PyObject *self, visitproc visit, void *arg) {
    Batch *batch = (Batch *)self;
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(batch->hub);
    Py_VISIT(batch->sock);
    Py_VISIT(batch->waiting);
    Py_VISIT(batch->failed);
    for (int i = 0; i < batch->count; i++) {
        Py_VISIT(batch->pieces[i].request);
        Py_VISIT(batch->pieces[i].address);
    }
    return 0;
}

static void batch_dealloc(PyObject *self) {
    Batch *batch = (Batch *)self;
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    for (Batch **link = &batches; *link != NULL; link = &(*link)->next)
        if (*link == batch) {
            *link = batch->next;
            break;
        }
    batch_clear(self);
    Py_CLEAR(batch->waiting);
    Py_CLEAR(batch->hub);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyMethodDef batch_methods[] = {
    {"receive", batch_receive, METH_VARARGS, "receive(size, cut): take what is there; how many."},
    {"serve", batch_serve, METH_VARARGS, "serve(serve, server, failed): serve what is left."},
    {"waits", batch_waits, METH_O, "waits(green): the handler that was being served waits in that green thread."},
    {"flush", batch_flush, METH_NOARGS, "Send the answers that were joined."},
    {"close", batch_close, METH_NOARGS, "Let the socket go."},
    {NULL},
};

static PyGetSetDef batch_attributes[] = {
    {"left", get_left, NULL, "Datagrams that were taken and not served yet.", NULL},
    {NULL},
};

static PyType_Slot batch_slots[] = {
    {Py_tp_doc, "Batch(hub, sock): datagrams of one socket; the contract stands in harken._hub."},
    {Py_tp_new, batch_new},
    {Py_tp_dealloc, batch_dealloc},
    {Py_tp_traverse, batch_traverse},
    {Py_tp_clear, batch_clear},
    {Py_tp_methods, batch_methods},
    {Py_tp_getset, batch_attributes},
    {0, NULL},
};

static PyType_Spec batch_spec = {
    .name = "harken._hub.compiled.Batch",
    .basicsize = sizeof(Batch),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .slots = batch_slots,
};

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

int datagrams_ready(PyObject *module) {
    Batch_Type = (PyTypeObject *)PyType_FromSpec(&batch_spec);
    Answers_Type = (PyTypeObject *)PyType_FromSpec(&answers_spec);
    static const char *names[] = {"request", "client_address", "server", "handle"};
    for (int i = 0; i < 4; i++)
        if ((words[i] = PyUnicode_InternFromString(names[i])) == NULL)
            return -1;
    no_args = PyTuple_New(0);
    base_sendto = PyObject_GetAttrString((PyObject *)Wire_Type, "sendto");
    if (Batch_Type == NULL || Answers_Type == NULL || base_sendto == NULL ||
        PyModule_AddObjectRef(module, "Batch", (PyObject *)Batch_Type) < 0)
        return -1;
    return PyModule_AddObjectRef(module, "Answers", (PyObject *)Answers_Type);
}
