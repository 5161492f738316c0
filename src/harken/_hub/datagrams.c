/* SPDX-License-Identifier: MIT
 *
 * Batch: datagrams of one socket, taken from the kernel together, served one by one, and answered together (answers.c).
 *
 * Handlers run in green threads that are used again: one that does not wait costs none of its own, and while one waits
 * another goes on with the batch. On a socket that is bound to every address the kernel is asked to which one a datagram
 * came. */
#include "datagrams.h"
#include <errno.h>

#define ROOM 65536          /* for one datagram; max_packet_size is at most that */
#define OLDEST 1000000      /* ns that an answer waits for others, by the coarse clock: one tick of it */
#define MOST_IDLE 16        /* green threads that are kept for the next batch */
#define ENOUGH 4            /* a batch after which it is worth asking at once whether more has come */
#define TRUSTED_NS 10000000 /* a hook that is overridden while datagrams come is seen so late at most */

static PyTypeObject *Batch_Type;
static PyObject *no_args;
static char *space; /* for MOST datagrams of ROOM bytes; the kernel touches what it fills */

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

/* What recvmmsg(2) is given, and has overwritten. */
static void prepare(Batch *batch, int i) {
    batch->parts[i] = (struct iovec){space + (size_t)i * ROOM, batch->room};
    batch->messages[i].msg_hdr = (struct msghdr){.msg_name = &batch->pieces[i].way.address,
                                                 .msg_namelen = sizeof(Address),
                                                 .msg_iov = &batch->parts[i],
                                                 .msg_iovlen = 1,
                                                 .msg_control = batch->wildcard ? batch->controls[i] : NULL,
                                                 .msg_controllen = batch->wildcard ? sizeof batch->controls[i] : 0};
}

/* Tell of each that was longer than there was room. */
static int tell_cut(Batch *batch) {
    for (int i = 0; i < batch->count; i++)
        if (batch->messages[i].msg_hdr.msg_flags & MSG_TRUNC) {
            PyObject *done = PyObject_CallOneArg(batch->service.cut, batch->pieces[i].address);
            if (done == NULL)
                return -1;
            Py_DECREF(done);
        }
    return 0;
}

static int count_taken(Batch *batch) {
    PyObject *number = PyLong_FromLong(batch->count);
    PyObject *done = number == NULL ? NULL : PyObject_CallOneArg(batch->service.taken, number);
    Py_XDECREF(number);
    Py_XDECREF(done);
    return done == NULL || tell_cut(batch) < 0 ? -1 : batch->count;
}

/* Take what is there, without waiting; how many. Not while some of the last are left. */
static int receive_batch(Batch *batch) {
    if (batch->at < batch->count || batch->sock == NULL)
        return 0;
    if (space == NULL && (space = PyMem_RawMalloc((size_t)MOST * ROOM)) == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    for (int i = 0; i < batch->count; i++)
        drop_piece(&batch->pieces[i]);
    batch->count = batch->at = 0;
    size_t room = batch->service.size < 0 ? 0 : batch->service.size < ROOM ? (size_t)batch->service.size : ROOM;
    if (room != batch->room)
        batch->used = MOST;
    batch->room = room;
    for (int i = 0; i < batch->used; i++)
        prepare(batch, i);
    batch->used = 0;
    if ((batch->fd = socket_fd(batch->sock)) < 0)
        return PyErr_Occurred() ? -1 : fail(EBADF);
    int count;
    while ((count = recvmmsg(batch->fd, batch->messages, MOST, MSG_DONTWAIT, NULL)) < 0) {
        if (errno == EAGAIN)
            return 0;
        if (errno != EINTR)
            return fail(errno);
        if (PyErr_CheckSignals() < 0)
            return -1;
    }
    batch->used = count;
    for (int i = 0; i < count; i++) {
        batch->count = i + 1;
        if (make_piece(batch, i, &batch->messages[i], batch->parts[i].iov_base) < 0) {
            batch->at = batch->count;
            return -1;
        }
    }
    return count_taken(batch);
}

/* -- serving ------------------------------------------------------------------------------------------------------ */

/* Call the service's function in a context of its own. */
static int serve_piece(Batch *batch, int place) {
    Piece *piece = &batch->pieces[place];
    PyObject *serve = Py_NewRef(batch->service.serve), *server = Py_NewRef(batch->service.server);
    PyObject *failed = Py_NewRef(batch->service.failed);
    PyObject *request = Py_NewRef(piece->request), *address = Py_NewRef(piece->address);
    PyObject *args[] = {request, address, server};
    PyObject *context = PyContext_CopyCurrent(), *done = NULL;
    int result = -1;
    if (context != NULL && PyContext_Enter(context) == 0) {
        if (batch->service.lean)
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
    Py_DECREF(failed);
    Py_DECREF(server);
    Py_DECREF(serve);
    return result;
}

/* Serve what is left, in the calling green thread. When a handler waits, others go on with the batch, which is seen by
 * another turn: then this one is done when its handler is. 1: it has waited. */
static int serve_left(Batch *batch) {
    Hub *hub = batch->hub;
    long turn = ++batch->turn;
    while (batch->at < batch->count) {
        int place = batch->current = batch->at++;
        batch->answered = false;
        beat_piece(hub->beat);
        int result = serve_piece(batch, place);
        if (hub->lent) { /* a handler forked, this is the child: what was joined is the parent's to send */
            drop_answers(batch);
            batch->at = batch->count;
            return result;
        }
        if (batch->turn != turn)
            return result < 0 ? -1 : 1;
        batch->current = -1;
        if (result < 0)
            return -1;
        if (batch->answer_count > 0 && coarse_ns() - batch->oldest >= OLDEST)
            send_answers(batch, false);
    }
    return 0;
}

static int call_crowded(Batch *batch, long change) {
    PyObject *done = PyObject_CallFunction(batch->crowded, "l", change);
    Py_XDECREF(done);
    return done == NULL ? -1 : 0;
}

/* The handler that was being served waits, in that green thread; send what it has answered. */
static int note_wait(Batch *batch, PyGreenlet *runner) {
    int current = batch->current;
    batch->turn++;
    batch->current = -1;
    batch->active = NULL;
    send_answers(batch, false);
    Piece *piece = &batch->pieces[current];
    PyObject *way = PyBytes_FromStringAndSize((char *)&piece->way, sizeof piece->way);
    PyObject *known = way == NULL ? NULL : PyTuple_Pack(2, piece->address, way);
    int result = known == NULL ? -1 : PyDict_SetItem(batch->waiting, (PyObject *)runner, known);
    Py_XDECREF(known);
    Py_XDECREF(way);
    if (result == 0 && PyDict_GET_SIZE(batch->waiting) == batch->most_waiting) {
        batch->trusted = 0;
        result = call_crowded(batch, 1);
    }
    return result;
}

static void forget_wait(Batch *batch, PyGreenlet *runner) {
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    bool full = PyDict_GET_SIZE(batch->waiting) == batch->most_waiting, closed = batch->sock == NULL; /* all is forgotten */
    if (!closed && (PyDict_DelItem(batch->waiting, (PyObject *)runner) < 0 || (full && call_crowded(batch, -1) < 0)))
        PyErr_WriteUnraisable((PyObject *)batch);
    batch->hub->news = true;
    PyErr_Restore(type, value, trace);
}

/* Whether the batch has resumed it. If not, somebody else who knows the green thread has: it is not idle any more. */
static bool is_called(Batch *batch, PyGreenlet *me) {
    if (batch->active == me)
        return true;
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    for (Py_ssize_t i = PyList_GET_SIZE(batch->idle) - 1; i >= 0; i--)
        if (PyList_GET_ITEM(batch->idle, i) == (PyObject *)me && PyList_SetSlice(batch->idle, i, i + 1, NULL) < 0)
            PyErr_Clear();
    PyErr_Restore(type, value, trace);
    return false;
}

/* One rest of a runner, and one batch. 0: go on; 1: end; -1: an exception. */
static int one_batch(Batch *batch, PyGreenlet *me) {
    Hub *hub = batch->hub;
    if (PyList_GET_SIZE(batch->idle) >= MOST_IDLE)
        return 1;
    if (flush_pending(hub) < 0)
        PyErr_Clear(); /* of a connection that a handler left: it does not learn that its peer has gone */
    if (PyList_Append(batch->idle, (PyObject *)me) < 0 || PySet_Discard(batch->busy, (PyObject *)me) < 0)
        return -1;
    PyObject *back = PyGreenlet_Switch(hub->greenlet, NULL, NULL);
    bool called = is_called(batch, me);
    if (back == NULL)
        return -1;
    Py_DECREF(back);
    if (!called)
        return 0;
    int result = serve_left(batch);
    if (hub->lent)
        return result < 0 ? -1 : 1;
    if (batch->active == me)
        batch->active = NULL;
    else
        forget_wait(batch, me);
    return result < 0 ? -1 : 0;
}

/* The life of a green thread that serves datagrams: idle until it is resumed, once for each batch. */
static PyObject *batch_work(PyObject *self, PyObject *none) {
    Batch *batch = (Batch *)self;
    PyGreenlet *me = PyGreenlet_GetCurrent();
    int result;
    while ((result = one_batch(batch, me)) == 0)
        ;
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    if (PySet_Discard(batch->busy, (PyObject *)me) < 0)
        PyErr_Clear();
    PyErr_Restore(type, value, trace);
    Py_DECREF(me);
    return result < 0 ? NULL : Py_NewRef(Py_None);
}

/* Call the batch's method of that name at the next turn, in a green thread of its own or in the hub's. */
static int later(Batch *batch, const char *name, bool green) {
    PyObject *method = PyObject_GetAttrString((PyObject *)batch, name), *made = NULL;
    int result = -1;
    if (method != NULL && green) {
        made = spawn(batch->hub, NULL, method, NULL, 0);
        result = made == NULL ? -1 : PySet_Add(batch->busy, made); /* or the hub might end before it has started */
    } else if (method != NULL)
        result = enqueue(batch->hub, CALL, method, no_args);
    Py_XDECREF(made);
    Py_XDECREF(method);
    return result;
}

static PyGreenlet *an_idle_one(Batch *batch) {
    Py_ssize_t last = PyList_GET_SIZE(batch->idle) - 1;
    PyObject *green = Py_NewRef(PyList_GET_ITEM(batch->idle, last));
    if (PyList_SetSlice(batch->idle, last, last + 1, NULL) < 0 || PySet_Add(batch->busy, green) < 0)
        Py_CLEAR(green);
    return (PyGreenlet *)green;
}

static bool is_trusted(Batch *batch) { return batch->trusted != 0 && coarse_ns() < batch->trusted; }

/* A batch was served, and not just a few: more may have come meanwhile. */
static int ask_for_more(Batch *batch) {
    send_answers(batch, false);
    if (is_trusted(batch)) {
        if (receive_batch(batch) < 0) {
            PyErr_Clear(); /* the next turn will see */
            batch->trusted = 0;
        }
        return 0;
    }
    PyObject *again = PyObject_GetAttrString((PyObject *)batch, "again");
    PyObject *done = again == NULL ? NULL : PyObject_CallOneArg(batch->more, again);
    Py_XDECREF(again);
    Py_XDECREF(done);
    return done == NULL ? -1 : 0;
}

/* Serve what was taken, and what has come meanwhile. In the hub's own greenlet: a runner comes back when it is done, or
 * when its handler waits. */
static int run_batch(Batch *batch) {
    int served = 0;
    while (batch->at < batch->count) {
        int left = batch->count - batch->at;
        if (PyList_GET_SIZE(batch->idle) == 0)
            return later(batch, "work", true) < 0 || later(batch, "run", false) < 0 ? -1 : 0;
        PyGreenlet *runner = batch->active = an_idle_one(batch);
        if (runner == NULL)
            return -1;
        served += left;
        resume(batch->hub, runner, NULL);
        bool waits = batch->active == runner;
        int result = waits ? note_wait(batch, runner) : 0;
        Py_DECREF(runner);
        if (result == 0 && !waits && left >= ENOUGH && served < DOOR_BURST)
            result = ask_for_more(batch);
        if (result < 0)
            return -1;
    }
    send_answers(batch, false);
    return 0;
}

static PyObject *batch_run(PyObject *self, PyObject *none) {
    ((Batch *)self)->hub->news = true;
    return run_batch((Batch *)self) < 0 ? NULL : Py_NewRef(Py_None);
}

/* Its door is readable. 1: that is seen to, as the last time; 0: it has to be asked what is wanted; -1. */
int batch_shortcut(PyObject *self) {
    Batch *batch = (Batch *)self;
    if (!is_trusted(batch) || batch->at < batch->count || PyList_GET_SIZE(batch->idle) == 0)
        return 0;
    if (receive_batch(batch) < 0) {
        PyErr_Clear(); /* it will be met again */
        batch->trusted = 0;
        return 0;
    }
    Py_INCREF(self);
    int result = run_batch(batch) < 0 ? -1 : 1;
    Py_DECREF(self);
    return result;
}

/* -- what Python sees --------------------------------------------------------------------------------------------- */

static void drop_service(Service *service) {
    Py_CLEAR(service->object);
    Py_CLEAR(service->cut);
    Py_CLEAR(service->taken);
    Py_CLEAR(service->serve);
    Py_CLEAR(service->server);
    Py_CLEAR(service->failed);
}

static int read_service(Batch *batch, PyObject *object) {
    if (batch->service.object == object)
        return 0;
    Service made = {.object = Py_NewRef(object)};
    PyObject *size = PyObject_GetAttrString(object, "size"), *lean = PyObject_GetAttrString(object, "lean");
    made.cut = PyObject_GetAttrString(object, "cut");
    made.taken = PyObject_GetAttrString(object, "taken");
    made.serve = PyObject_GetAttrString(object, "serve");
    made.server = PyObject_GetAttrString(object, "server");
    made.failed = PyObject_GetAttrString(object, "failed");
    made.size = size == NULL ? -1 : PyLong_AsSsize_t(size);
    made.lean = lean != NULL && made.serve != NULL && PyType_Check(made.serve) ? PyObject_IsTrue(lean) : 0;
    Py_XDECREF(size);
    Py_XDECREF(lean);
    if (PyErr_Occurred()) {
        drop_service(&made);
        return -1;
    }
    Service before = batch->service;
    batch->service = made;
    drop_service(&before);
    return 0;
}

static PyObject *batch_take(PyObject *self, PyObject *service) {
    Batch *batch = (Batch *)self;
    if (batch->at < batch->count) /* a green thread that serves them is about to start */
        Py_RETURN_NONE;
    int taken = read_service(batch, service) < 0 ? -1 : receive_batch(batch);
    if (taken < 0 || (taken > 0 && later(batch, "run", false) < 0))
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *batch_again(PyObject *self, PyObject *none) {
    return receive_batch((Batch *)self) < 0 ? NULL : Py_NewRef(Py_None);
}

static PyObject *batch_trust(PyObject *self, PyObject *door) {
    Batch *batch = (Batch *)self;
    hub_set_shortcut(batch->hub, door, self);
    batch->trusted = coarse_ns() + TRUSTED_NS;
    Py_RETURN_NONE;
}

static PyObject *batch_distrust(PyObject *self, PyObject *none) {
    ((Batch *)self)->trusted = 0;
    Py_RETURN_NONE;
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
    PyObject *hub, *sock, *busy, *crowded, *more;
    Py_ssize_t most;
    int fd, family, kind, proto;
    if (!PyArg_ParseTuple(args, "O!O!O!OOn:Batch", Hub_Type, &hub, Wire_Type, &sock, &PySet_Type, &busy, &crowded, &more,
                          &most) ||
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
    batch->used = MOST;
    batch->wildcard = fd >= 0 && ask_for_own(fd, family);
    batch->joins = family == AF_INET || family == AF_INET6; /* a Unix client that has gone is told of at once */
    batch->next = batches;
    batches = batch;
    batch->busy = Py_NewRef(busy);
    batch->crowded = Py_NewRef(crowded);
    batch->more = Py_NewRef(more);
    batch->most_waiting = most;
    batch->waiting = PyDict_New();
    batch->idle = PyList_New(0);
    if (batch->waiting == NULL || batch->idle == NULL)
        Py_CLEAR(batch);
    return (PyObject *)batch;
}

static int batch_clear(PyObject *self) {
    Batch *batch = (Batch *)self;
    drop_answers(batch);
    batch->trusted = 0;
    for (int i = 0; i < batch->count; i++)
        drop_piece(&batch->pieces[i]);
    batch->count = batch->at = 0;
    for (int i = 0; i < 1 << KNOWN_BITS; i++)
        Py_CLEAR(batch->known[i].address);
    drop_service(&batch->service);
    Py_CLEAR(batch->sock);
    Py_CLEAR(batch->crowded);
    Py_CLEAR(batch->more);
    if (batch->waiting != NULL)
        PyDict_Clear(batch->waiting);
    if (batch->idle != NULL)
        PyList_SetSlice(batch->idle, 0, PyList_GET_SIZE(batch->idle), NULL);
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
    Py_VISIT(batch->service.object);
    Py_VISIT(batch->service.cut);
    Py_VISIT(batch->service.taken);
    Py_VISIT(batch->service.serve);
    Py_VISIT(batch->service.server);
    Py_VISIT(batch->service.failed);
    Py_VISIT(batch->idle);
    Py_VISIT(batch->busy);
    Py_VISIT(batch->crowded);
    Py_VISIT(batch->more);
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
    Py_CLEAR(batch->idle);
    Py_CLEAR(batch->busy);
    Py_CLEAR(batch->hub);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyMethodDef batch_methods[] = {
    {"take", batch_take, METH_O, "take(service): take what is there, to be served this turn."},
    {"again", batch_again, METH_NOARGS, "again(): take more, for the same service."},
    {"run", batch_run, METH_NOARGS, "run(): serve what was taken."},
    {"tell", FAST(batch_tell), METH_FASTCALL, "tell(failed, request, address, errno): an answer was not sent."},
    {"work", batch_work, METH_NOARGS, "work(): what the green threads run that serve."},
    {"trust", batch_trust, METH_O, "trust(door): what is there may be taken without asking, for a moment."},
    {"distrust", batch_distrust, METH_NOARGS, "distrust(): no more. Any thread."},
    {"close", batch_close, METH_NOARGS, "Let the socket go."},
    {NULL},
};

static PyType_Slot batch_slots[] = {
    {Py_tp_doc, "Batch(hub, sock): datagrams of one socket; the contract stands in harken._hub."},
    {Py_tp_new, batch_new},
    {Py_tp_dealloc, batch_dealloc},
    {Py_tp_traverse, batch_traverse},
    {Py_tp_clear, batch_clear},
    {Py_tp_methods, batch_methods},
    {0, NULL},
};

static PyType_Spec batch_spec = {
    .name = "harken._hub.compiled.Batch",
    .basicsize = sizeof(Batch),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .slots = batch_slots,
};

int datagrams_ready(PyObject *module) {
    no_args = PyTuple_New(0);
    Batch_Type = (PyTypeObject *)PyType_FromSpec(&batch_spec);
    if (no_args == NULL || Batch_Type == NULL || PyModule_AddObjectRef(module, "Batch", (PyObject *)Batch_Type) < 0)
        return -1;
    return answers_ready(module);
}
