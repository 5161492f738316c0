/* SPDX-License-Identifier: MIT
 *
 * Lane: the way of connections whose server overrides no hook, from its door to their end. What harken.straight does
 * in Python, for a server of whose connections nobody has to be told. Preambles are Python's affair, and what comes
 * after them; so are limits, which are asked at the door and told of the end.
 *
 * Of a short connection the kernel has five sixths; what is left to us is some fifteen microseconds, and a call of
 * Python's is one or two tenths of one. So what nobody asks for is not made: a connection has no Record until somebody
 * reads its `record`, and its green thread is one that has served others before it. */
#include "hub.h"
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>

#define MOST_IDLE 64            /* green threads that rest, of some 2 KiB: as many as one burst starts */
#define TRUSTED_NS 10000000     /* 10 ms: how long what Python said of its door holds; as of datagrams */

typedef struct Lane Lane;

/* What a green thread of a lane runs. */
typedef struct Worker {
    PyObject_HEAD
    struct Worker *next, *previous; /* of those whose connections are open and have no record */
    int64_t started;                /* when the connection was accepted, in nanoseconds of CLOCK_MONOTONIC */
    Lane *lane;
    PyGreenlet *green; /* borrowed: it holds this */
    PyObject *request, *address, *kind; /* of the connection that it serves; NULL: it rests */
    PyObject *ticket;                   /* what that was let in by, until its record has it; or NULL */
    PyObject *context;                  /* to serve it in; NULL: there is none */
    bool lean, leaves;
} Worker;

typedef struct {
    PyGreenlet *green;
    Worker *worker;
} Resting; /* both owned */

/* What Python's books will be told, when somebody reads them. */
typedef struct {
    long long taken, opened, ended[3]; /* by what `reasons` says */
} Tallies;

struct Lane {
    PyObject_HEAD
    Hub *hub;
    PyObject *busy; /* a set that holds the green threads that serve */
    /* A Way of harken.engines, read out. */
    PyObject *server, *registry, *filed, *counts, *reasons, *subscribers, *remember, *close, *failed, *shown, *enter;
    PyObject *sock, *kind, *gate; /* the listening socket, the handler class, and who is asked, at the last take() */
    bool lean, stamps, closed;
    int64_t trusted; /* until when the door need not be looked at by Python; 0: now */
    long places;     /* and how many may come in until then */
    /* What Python has looked at: the server's attributes, and the versions of the two classes. */
    PyObject *names;
    Py_ssize_t name_count;
    unsigned int versions[2];
    Worker *first; /* of those whose connections are open and have no record */
    Py_ssize_t open;
    Tallies tallies; /* since collect() */
    Resting idle[MOST_IDLE];
    int idle_count;
};

HIDDEN PyTypeObject *Lane_Type;
static PyTypeObject *Worker_Type;
enum { RETURNED, CLOSED, RESET, UNKNOWN };
static PyObject *word_accepted, *word_opened, *word_class, *word_closed, *word_give_back, *word_key, *word_socket,
    *reasons[3];

/* Where a Registry of harken.records has what it says about ends. */
static Py_ssize_t careful_at, counts_bytes_at, waiting_at;

/* -- what is known of a connection -------------------------------------------------------------------------------- */

/* Nobody will ask for its record any more, or it has one. */
void lane_forget(PyObject *request) {
    State *state = state_of(request);
    Worker *worker = state->worker;
    if (worker == NULL)
        return;
    if (worker->next != NULL)
        worker->next->previous = worker->previous;
    if (worker->previous != NULL)
        worker->previous->next = worker->next;
    else
        worker->lane->first = worker->next;
    worker->lane->open--;
    worker->next = worker->previous = NULL;
    state->worker = NULL;
}

/* Begin to know a connection by whom serves it, who keeps it. */
static void note(Worker *worker) {
    Lane *lane = worker->lane;
    worker->started = now_ns();
    state_of(worker->request)->worker = worker;
    if ((worker->next = lane->first) != NULL)
        worker->next->previous = worker;
    lane->first = worker;
    lane->open++;
}

/* Put a record in the place of what was known. Another thread may have done that meanwhile, or the connection may have
 * ended: then what was made is nobody's. */
static int file(Worker *worker, PyObject *request, PyObject *record) {
    PyObject *number = PyObject_GetAttr(record, word_key);
    int result = number == NULL ? -1 : 0;
    if (result == 0 && state_of(request)->worker == worker && *record_slot(request) == NULL &&
        (result = PyDict_SetItem(worker->lane->filed, number, record)) == 0) {
        *record_slot(request) = Py_NewRef(record);
        Py_CLEAR(worker->ticket);
        lane_forget(request);
    }
    Py_XDECREF(number);
    return result;
}

/* The record of a connection that has none, now that somebody asks for it. NULL without an exception: it has ended. */
PyObject *lane_record(PyObject *request) {
    Worker *worker = (Worker *)Py_NewRef(state_of(request)->worker);
    PyObject *started = PyFloat_FromDouble((double)worker->started / 1e9), *result = NULL;
    PyObject *ticket = worker->ticket == NULL ? Py_None : worker->ticket;
    PyObject *made = started == NULL ? NULL
                                     : PyObject_CallFunctionObjArgs(worker->lane->remember, request, worker->address,
                                                                    started, ticket, NULL);
    if (made != NULL && file(worker, request, made) == 0)
        result = Py_XNewRef(*record_slot(request));
    Py_XDECREF(made);
    Py_XDECREF(started);
    Py_DECREF(worker);
    return result;
}

/* Tell the limits that a connection has ended which is on no record. An exception that is under way stays. */
static void give_back(Lane *lane, PyObject *ticket) {
    if (ticket == NULL)
        return;
    PyObject *type, *error, *trace;
    PyErr_Fetch(&type, &error, &trace);
    PyObject *done = PyObject_CallMethodNoArgs(ticket, word_give_back);
    if (done == NULL)
        show_exception(lane->gate);
    Py_XDECREF(done);
    Py_DECREF(ticket);
    PyErr_Restore(type, error, trace);
}

static PyObject *take_ticket(Worker *worker) {
    PyObject *ticket = worker->ticket;
    worker->ticket = NULL;
    return ticket;
}

/* The green thread is done with its connection. One that is open still, since its end failed or nobody served it, gets
 * a record, which is told when it goes. */
static void drop_request(Worker *worker) {
    if (worker->request != NULL)
        make_record(worker->request);
    give_back(worker->lane, take_ticket(worker));
    Py_CLEAR(worker->request);
    Py_CLEAR(worker->address);
    Py_CLEAR(worker->kind);
}

/* -- the end ------------------------------------------------------------------------------------------------------ */

static bool is(Lane *lane, Py_ssize_t offset, PyObject *value) {
    return *(PyObject **)((char *)lane->registry + offset) == value;
}

/* Whether nobody subscribes to an event. */
static bool unheard(Lane *lane, PyObject *event) {
    PyObject *callbacks = PyDict_GetItemWithError(lane->subscribers, event); /* borrowed */
    return callbacks != NULL && PyTuple_CheckExact(callbacks) && PyTuple_GET_SIZE(callbacks) == 0;
}

/* Whether nobody has to be told of an end, nor does anything come before it. */
static bool ends_unnoticed(Lane *lane) {
    PyObject *waiting = *(PyObject **)((char *)lane->registry + waiting_at);
    return is(lane, careful_at, Py_False) && is(lane, counts_bytes_at, Py_False) && waiting != NULL &&
           PyLong_CheckExact(waiting) && PyLong_AsLong(waiting) == 0 && unheard(lane, word_closed);
}

/* Why it ends, by what reads have told, or by the kernel; as peer_fault() of harken.connection. */
static int reason_of(State *state, int fd) {
    if (state->broken)
        return RESET;
    if (state->ended)
        return CLOSED;
    uint8_t now = 0; /* tcpi_state, the first of struct tcp_info */
    socklen_t length = sizeof now;
    if (!state->stream || getsockopt(fd, IPPROTO_TCP, TCP_INFO, &now, &length) < 0)
        return UNKNOWN;
    if (now == TCP_CLOSE)
        return RESET;
    return now == TCP_CLOSE_WAIT || now == TCP_LAST_ACK ? CLOSED : RETURNED;
}

/* Close it here, if it is a plain case: nobody has asked for its record, nobody has to be told. 1: done; 0: it is not
 * closed; -1: closed, and an exception. */
static int end_unnoticed(Lane *lane, PyObject *request) {
    State *state = state_of(request);
    if (flush_of(request) < 0) /* others may run meanwhile */
        PyErr_Clear();         /* the peer has gone: nobody is left to be told */
    if (state->worker == NULL || *record_slot(request) != NULL || !closes_at_once(request) ||
        !ends_unnoticed(lane))
        return 0;
    int reason = reason_of(state, socket_fd(request));
    if (reason == UNKNOWN)
        return 0;
    PyObject *ticket = take_ticket(state->worker);
    PyObject *closed = connection_end(request, NULL);
    lane->tallies.ended[reason]++;
    lane_forget(request);
    give_back(lane, ticket);
    Py_XDECREF(closed);
    return closed == NULL ? -1 : 1;
}

/* The handler is done, or was not even started: close its connection. An exception that is under way stays. */
static void end(Lane *lane, PyObject *request) {
    PyObject *type, *error, *trace;
    PyErr_Fetch(&type, &error, &trace);
    int done = end_unnoticed(lane, request);
    if (done == 0) {
        PyObject *closed = PyObject_CallOneArg(lane->close, request);
        done = closed == NULL ? -1 : 1;
        Py_XDECREF(closed);
    }
    if (done < 0)
        show_exception(lane->close);
    PyErr_Restore(type, error, trace);
}

/* -- the handler -------------------------------------------------------------------------------------------------- */

/* A new green thread could be given its context by who starts it; one without frames of Python's, as those that rest,
 * could not: greenlet takes it for one that runs. */
static int enter_context(Worker *worker) { return worker->context == NULL ? 0 : PyContext_Enter(worker->context); }

static void leave_context(Worker *worker) {
    if (worker->context == NULL)
        return;
    PyObject *type, *error, *trace;
    PyErr_Fetch(&type, &error, &trace);
    if (PyContext_Exit(worker->context) < 0)
        PyErr_Clear(); /* the handler has entered another for good: this green thread is nobody else's */
    Py_CLEAR(worker->context);
    PyErr_Restore(type, error, trace);
}

/* Something comes before the handler, and so before the end: Python sees to both. -1: GreenletExit. */
static int enter(Worker *worker) {
    PyObject *args[] = {worker->request, worker->address};
    PyObject *done = PyObject_Vectorcall(worker->lane->enter, args, 2, NULL);
    Py_XDECREF(done);
    if (done != NULL)
        return 0;
    if (PyErr_ExceptionMatches(PyExc_GreenletExit))
        return -1;
    show_exception(worker->lane->enter);
    return 0;
}

/* -1: GreenletExit. */
static int handle(Worker *worker) {
    Lane *lane = worker->lane;
    PyObject *args[] = {worker->request, worker->address, lane->server};
    PyObject *done = worker->lean ? handle_plainly((PyTypeObject *)worker->kind, args) : handle_fully(worker->kind, args);
    int result = done != NULL ? 0 : tell_failure(lane->failed, worker->request, worker->address);
    Py_XDECREF(done);
    end(lane, worker->request);
    return result;
}

/* -1: GreenletExit. */
static int serve(Worker *worker) {
    if (enter_context(worker) < 0)
        PyErr_Clear();
    int result = worker->lane->enter != Py_None ? enter(worker) : handle(worker);
    leave_context(worker);
    return result;
}

/* -- green threads that are used again ---------------------------------------------------------------------------- */

/* What a connection's green thread has in its context is no other's. */
static bool has_context(void) {
#if PY_VERSION_HEX < 0x030E0000
    return PyThreadState_Get()->context != NULL;
#else
    return true;
#endif
}

static bool rests(Worker *worker) {
    Lane *lane = worker->lane;
    if (lane->closed || worker->leaves || lane->hub->closed || lane->idle_count == MOST_IDLE || has_context())
        return false;
    lane->idle[lane->idle_count++] = (Resting){(PyGreenlet *)Py_NewRef(worker->green), (Worker *)Py_NewRef(worker)};
    return true;
}

static void drop_resting(Lane *lane, int place) {
    Resting gone = lane->idle[place];
    lane->idle[place] = lane->idle[--lane->idle_count];
    Py_DECREF(gone.worker);
    Py_DECREF(gone.green);
}

/* Rest until there is another connection. False: this is the end. */
static bool go_on(Worker *worker) {
    if (!rests(worker))
        return false;
    PyObject *back = pass_on(worker->lane->hub, worker->green);
    if (back == NULL) { /* the hub is closed */
        for (int i = 0; i < worker->lane->idle_count; i++)
            if (worker->lane->idle[i].worker == worker)
                drop_resting(worker->lane, i);
        return false;
    }
    Py_DECREF(back);
    return worker->request != NULL;
}

static PyObject *worker_call(PyObject *self, PyObject *none, PyObject *words) {
    Worker *worker = (Worker *)self;
    Lane *lane = worker->lane;
    Hub *hub = lane->hub;
    void *stack = stack_begin();
    PyGreenlet *me = worker->green;
    do {
        int result = serve(worker);
        if (hub->pending_owner != NULL && current_hub == hub && flush_pending(hub) < 0)
            PyErr_Clear(); /* of a connection that a handler left: it does not learn that its peer has gone */
        hub->news |= hub->asks_at_ends;
        drop_request(worker);
        if (hub->lent)
            end_process();
        worker->leaves |= result < 0;
        if (PySet_Discard(lane->busy, (PyObject *)me) < 0)
            PyErr_Clear();
    } while (go_on(worker));
    PyErr_Clear(); /* GreenletExit: nobody is told of that */
    leave_hub(hub, me);
    stack_end(stack);
    Py_RETURN_NONE;
}

/* One that nobody else holds, who could throw something into it, or a new one. */
static Worker *find_worker(Lane *lane, PyGreenlet **green) {
    Py_CLEAR(lane->hub->passed);
    while (lane->idle_count > 0) {
        Resting *last = &lane->idle[lane->idle_count - 1];
        Worker *worker = last->worker;
        *green = last->green;
        PyObject *kept = last->green->dict; /* what somebody has set as its attributes */
        bool alone = Py_REFCNT(last->green) == 2 && last->green->weakreflist == NULL &&
                     (kept == NULL || PyDict_GET_SIZE(kept) == 0);
        lane->idle_count--; /* its references are the caller's now */
        if (alone)
            return worker;
        int done = enqueue(lane->hub, SWITCH, (PyObject *)*green, NULL); /* without a connection: it ends */
        Py_DECREF(worker);
        Py_DECREF(*green);
        if (done < 0)
            return NULL;
    }
    Worker *worker = (Worker *)Worker_Type->tp_alloc(Worker_Type, 0);
    if (worker == NULL)
        return NULL;
    worker->lane = (Lane *)Py_NewRef(lane);
    *green = worker->green = PyGreenlet_New((PyObject *)worker, lane->hub->greenlet);
    if (*green == NULL || PySet_Add(lane->hub->greens, (PyObject *)*green) < 0) {
        Py_CLEAR(*green);
        Py_CLEAR(worker);
    }
    return worker;
}

/* Let a green thread serve a connection: now, while all that is known of it is at hand, or at the next turn. */
static int start(Lane *lane, PyObject *request, PyObject *address, PyObject *ticket, bool now) {
    PyGreenlet *green;
    PyObject *context = has_context() ? PyContext_CopyCurrent() : NULL;
    bool prepared = (context != NULL || !PyErr_Occurred()) && (!lane->stamps || marks_made(state_of(request)) != NULL);
    Worker *worker = prepared ? find_worker(lane, &green) : NULL;
    if (worker == NULL) {
        Py_XDECREF(context);
        give_back(lane, Py_XNewRef(ticket));
        return -1;
    }
    worker->request = Py_NewRef(request);
    worker->ticket = Py_XNewRef(ticket);
    worker->address = Py_NewRef(address);
    worker->kind = Py_NewRef(lane->kind);
    worker->lean = lane->lean;
    worker->context = context;
    note(worker);
    int result = PySet_Add(lane->busy, (PyObject *)green) < 0 ||
                         (!now && enqueue(lane->hub, SWITCH, (PyObject *)green, NULL) < 0)
                     ? -1
                     : 0;
    Py_DECREF(worker);
    if (result == 0 && now)
        resume(lane->hub, green, NULL);
    Py_DECREF(green);
    return result;
}

/* -- the door ----------------------------------------------------------------------------------------------------- */

/* Ask whether it may come in. 0: it was refused, and seen to; -1: an exception. */
static int admit(Lane *lane, PyObject *request, PyObject *address, PyObject **ticket) {
    *ticket = NULL;
    if (lane->gate == Py_None)
        return 1;
    PyObject *args[] = {request, address};
    PyObject *gate = Py_NewRef(lane->gate);
    *ticket = PyObject_Vectorcall(gate, args, 2, NULL);
    Py_DECREF(gate);
    if (*ticket == NULL)
        return -1;
    if (*ticket != Py_None)
        return 1;
    Py_CLEAR(*ticket);
    return 0;
}

static int let_in_as(Lane *lane, PyObject *request, PyObject *address, bool now) {
    PyObject *ticket;
    int admitted = admit(lane, request, address, &ticket);
    if (admitted > 0) {
        lane->tallies.opened++;
        admitted = start(lane, request, address, ticket, now);
    }
    Py_XDECREF(ticket);
    return admitted;
}

/* Let a connection that was accepted in. What goes wrong with it is its own affair. */
static void let_in(Lane *lane, PyObject *request, PyObject *address, bool now) {
    PyObject *told = PyTuple_CheckExact(address) && PyTuple_GET_SIZE(address) > 2
                         ? PyObject_CallFunctionObjArgs(lane->shown, lane->sock, address, NULL)
                         : Py_NewRef(address);
    lane->tallies.taken++;
    if (told == NULL || let_in_as(lane, request, told, now) < 0) {
        if (tell_failure(lane->failed, request, told == NULL ? Py_None : told) < 0)
            PyErr_Clear();
        end(lane, request);
    }
    Py_XDECREF(told);
}

/* Take what is at the door, at most so many, without waiting. -1: nobody could be taken, for that reason. */
static int take(Lane *lane, int most, bool now) {
    Listening listening;
    if (listening_begin(&listening, lane->sock) < 0)
        return -1;
    int taken = 0;
    while (taken < most) {
        PyObject *request, *address;
        int found = listening_accept(&listening, Connection_Type, &request, &address);
        if (found <= 0) {
            if (found < 0 && (taken == 0 || !PyErr_ExceptionMatches(PyExc_OSError)))
                return -1;
            PyErr_Clear(); /* it will be met again */
            break;
        }
        taken++;
        let_in(lane, request, address, now);
        Py_DECREF(request);
        Py_DECREF(address);
        if (now && (lane->trusted == 0 || now_ns() >= lane->trusted))
            break; /* a handler that was served has changed something, or took long */
    }
    return taken;
}

static PyObject *lane_take(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    Lane *lane = (Lane *)self;
    PyObject *kind, *lean, *stamps, *gate;
    int most = count == 3 ? (int)PyNumber_AsSsize_t(args[1], PyExc_OverflowError) : -1;
    if (count != 3 || !PyObject_TypeCheck(args[0], Wire_Type) || most < 0 || !PyTuple_Check(args[2])) {
        PyErr_SetString(PyExc_TypeError, "take() takes a listening socket, a number and Terms");
        return NULL;
    }
    if (!PyArg_ParseTuple(args[2], "OO!O!O:Terms", &kind, &PyBool_Type, &lean, &PyBool_Type, &stamps, &gate))
        return NULL;
    Py_XSETREF(lane->sock, Py_NewRef(args[0]));
    Py_XSETREF(lane->kind, Py_NewRef(kind));
    Py_XSETREF(lane->gate, Py_NewRef(gate));
    lane->lean = lean == Py_True;
    lane->stamps = stamps == Py_True;
    int taken = take(lane, most, false); /* Python is at the door: handlers would keep it there */
    return taken < 0 ? NULL : PyLong_FromLong(taken);
}

/* Programs patch hooks while they serve. A class that was changed, or one above it, has another version (0: none yet);
 * and a hook of the server itself is one attribute more. */
static unsigned int version_of(PyObject *type) { return PyType_Check(type) ? ((PyTypeObject *)type)->tp_version_tag : 0; }

static bool is_as_it_was(Lane *lane) {
    return lane->names != NULL && PyDict_GET_SIZE(lane->names) == lane->name_count &&
           PyDict_GetItemWithError(lane->names, word_socket) == lane->sock &&
           PyDict_GetItemWithError(lane->names, word_class) == lane->kind && lane->versions[0] != 0 &&
           lane->versions[1] != 0 && version_of((PyObject *)Py_TYPE(lane->server)) == lane->versions[0] &&
           version_of(lane->kind) == lane->versions[1] && unheard(lane, word_accepted) && unheard(lane, word_opened);
}

/* Its door is readable. 1: that is seen to, as the last time; 0: Python has to be asked what is wanted; -1. */
int lane_shortcut(PyObject *self) {
    Lane *lane = (Lane *)self;
    if (lane->trusted == 0 || now_ns() >= lane->trusted || !is_as_it_was(lane))
        return 0;
    beat_piece(lane->hub->beat);
    int taken = take(lane, lane->places < DOOR_BURST ? (int)lane->places : DOOR_BURST, true);
    if (taken > 0 && (lane->places -= taken) > 0)
        return 1;
    lane->trusted = 0;
    if (taken < 0 && !PyErr_ExceptionMatches(PyExc_Exception))
        return -1;
    PyErr_Clear(); /* Python's turn meets it again */
    return 0;
}

static PyObject *lane_trust(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    Lane *lane = (Lane *)self;
    long places = count == 2 ? PyLong_AsLong(args[1]) : -1;
    if (places < 0) {
        if (!PyErr_Occurred())
            PyErr_SetString(PyExc_TypeError, "trust() takes a door and a number");
        return NULL;
    }
    Py_XSETREF(lane->names, PyObject_GenericGetDict(lane->server, NULL));
    if (lane->names == NULL)
        return NULL;
    lane->name_count = PyDict_GET_SIZE(lane->names);
    lane->versions[0] = version_of((PyObject *)Py_TYPE(lane->server));
    lane->versions[1] = version_of(lane->kind);
    hub_set_shortcut(lane->hub, args[0], self);
    lane->places = places;
    lane->trusted = places > 0 ? now_ns() + TRUSTED_NS : 0;
    Py_RETURN_NONE;
}

static PyObject *lane_distrust(PyObject *self, PyObject *none) {
    ((Lane *)self)->trusted = 0;
    Py_RETURN_NONE;
}

/* Those that rest have nothing to wait for any more; those that serve end by themselves. */
static PyObject *lane_close(PyObject *self, PyObject *none) {
    Lane *lane = (Lane *)self;
    lane->closed = true;
    lane->trusted = 0;
    while (lane->idle_count > 0) {
        Resting gone = lane->idle[--lane->idle_count];
        if (enqueue(lane->hub, SWITCH, (PyObject *)gone.green, NULL) < 0)
            PyErr_Clear();
        Py_DECREF(gone.worker);
        Py_DECREF(gone.green);
    }
    Py_RETURN_NONE;
}

/* -- the books ---------------------------------------------------------------------------------------------------- */

static int add(PyObject *counts, PyObject *name, long long more) {
    PyObject *before = more == 0 ? NULL : PyDict_GetItemWithError(counts, name); /* borrowed */
    if (more == 0 || (before == NULL && PyErr_Occurred()))
        return more == 0 ? 0 : -1;
    PyObject *now = PyLong_FromLongLong((before == NULL ? 0 : PyLong_AsLongLong(before)) + more);
    int result = now == NULL || PyErr_Occurred() ? -1 : PyDict_SetItem(counts, name, now);
    Py_XDECREF(now);
    return result;
}

static PyObject *lane_collect(PyObject *self, PyObject *none) {
    Lane *lane = (Lane *)self;
    Tallies tallies = lane->tallies;
    lane->tallies = (Tallies){0};
    if (add(lane->counts, word_accepted, tallies.taken) < 0 || add(lane->counts, word_opened, tallies.opened) < 0)
        return NULL;
    for (int i = 0; i < UNKNOWN; i++)
        if (add(lane->reasons, reasons[i], tallies.ended[i]) < 0)
            return NULL;
    Py_RETURN_NONE;
}

static PyObject *lane_connections(PyObject *self, PyObject *none) {
    PyObject *found = PyList_New(0);
    for (Worker *each = ((Lane *)self)->first; found != NULL && each != NULL; each = each->next)
        if (PyList_Append(found, each->request) < 0)
            Py_CLEAR(found);
    return found;
}

static Py_ssize_t lane_length(PyObject *self) { return ((Lane *)self)->open; }

/* -- the types ---------------------------------------------------------------------------------------------------- */

static int know_registry(PyTypeObject *type) {
    const struct {
        const char *name;
        Py_ssize_t *at;
    } slots[] = {{"careful", &careful_at},
                 {"counts_bytes", &counts_bytes_at},
                 {"waiting", &waiting_at}};
    for (int i = 0; i < 3; i++)
        if ((*slots[i].at = slot_offset(type, slots[i].name)) <= 0) {
            PyErr_Format(PyExc_TypeError, "%R has no slot %s", type, slots[i].name);
            return -1;
        }
    return 0;
}

static PyObject *lane_new(PyTypeObject *type, PyObject *args, PyObject *words) {
    PyObject *hub, *busy, *way;
    if (!PyArg_ParseTuple(args, "O!O!O!:Lane", Hub_Type, &hub, &PySet_Type, &busy, &PyTuple_Type, &way))
        return NULL;
    Lane *lane = (Lane *)type->tp_alloc(type, 0);
    if (lane == NULL)
        return NULL;
    if (!PyArg_ParseTuple(way, "OOO!O!O!O!OOOOO", &lane->server, &lane->registry, &PyDict_Type, &lane->filed,
                          &PyDict_Type, &lane->counts, &PyDict_Type, &lane->reasons, &PyDict_Type,
                          &lane->subscribers, &lane->remember, &lane->close, &lane->failed, &lane->shown, &lane->enter)) {
        lane->server = NULL; /* nothing is owned yet */
        memset(&lane->server, 0, offsetof(Lane, sock) - offsetof(Lane, server));
        Py_DECREF(lane);
        return NULL;
    }
    for (PyObject **each = &lane->server; each <= &lane->enter; each++)
        Py_INCREF(*each);
    lane->hub = (Hub *)Py_NewRef(hub);
    lane->busy = Py_NewRef(busy);
    if (know_registry(Py_TYPE(lane->registry)) < 0)
        Py_CLEAR(lane);
    return (PyObject *)lane;
}

static int lane_traverse(PyObject *self, visitproc visit, void *arg) {
    Lane *lane = (Lane *)self;
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(lane->hub);
    Py_VISIT(lane->busy);
    Py_VISIT(lane->names);
    for (PyObject **each = &lane->server; each <= &lane->gate; each++)
        Py_VISIT(*each);
    for (int i = 0; i < lane->idle_count; i++) {
        Py_VISIT(lane->idle[i].green);
        Py_VISIT(lane->idle[i].worker);
    }
    return 0;
}

static int lane_clear(PyObject *self) {
    Lane *lane = (Lane *)self;
    lane->closed = true;
    lane->trusted = 0;
    Py_CLEAR(lane->names);
    while (lane->idle_count > 0)
        drop_resting(lane, lane->idle_count - 1);
    for (PyObject **each = &lane->server; each <= &lane->gate; each++)
        Py_CLEAR(*each);
    return 0;
}

static void lane_dealloc(PyObject *self) {
    Lane *lane = (Lane *)self;
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    lane_clear(self);
    Py_CLEAR(lane->busy);
    Py_CLEAR(lane->hub);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyMethodDef lane_methods[] = {
    {"take", FAST(lane_take), METH_FASTCALL, "take(listener, most, terms): let in what is there; how many."},
    {"trust", FAST(lane_trust), METH_FASTCALL, "trust(door, places): so many may be let in without asking, for a moment."},
    {"distrust", lane_distrust, METH_NOARGS, "distrust(): no more. Any thread."},
    {"collect", lane_collect, METH_NOARGS, "collect(): tell the books what was counted since. Any thread."},
    {"connections", lane_connections, METH_NOARGS, "connections(): the open ones that have no record. Any thread."},
    {"close", lane_close, METH_NOARGS, "Keep no green thread for connections to come. Any thread."},
    {NULL},
};

static PyMemberDef lane_members[] = {
    {"closed", T_BOOL, offsetof(Lane, closed), READONLY, "Whether no connection will come any more."},
    {NULL},
};

static PyType_Slot lane_slots[] = {
    {Py_tp_doc, "Lane(hub, busy, way): connections from door to end; the contract stands in harken._hub."},
    {Py_tp_new, lane_new},
    {Py_tp_dealloc, lane_dealloc},
    {Py_tp_traverse, lane_traverse},
    {Py_tp_clear, lane_clear},
    {Py_tp_methods, lane_methods},
    {Py_tp_members, lane_members},
    {Py_sq_length, lane_length},
    {0, NULL},
};

static PyType_Spec lane_spec = {
    .name = "harken._hub.compiled.Lane",
    .basicsize = sizeof(Lane),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .slots = lane_slots,
};

static int worker_traverse(PyObject *self, visitproc visit, void *arg) {
    Worker *worker = (Worker *)self;
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(worker->lane);
    Py_VISIT(worker->request);
    Py_VISIT(worker->address);
    Py_VISIT(worker->kind);
    Py_VISIT(worker->ticket);
    Py_VISIT(worker->context);
    return 0;
}

static int worker_clear(PyObject *self) {
    Worker *worker = (Worker *)self;
    drop_request(worker);
    Py_CLEAR(worker->context);
    return 0;
}

static void worker_dealloc(PyObject *self) {
    Worker *worker = (Worker *)self;
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    worker_clear(self);
    Py_CLEAR(worker->lane);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyType_Slot worker_slots[] = {
    {Py_tp_doc, "What a green thread of a lane runs."},
    {Py_tp_call, worker_call},
    {Py_tp_dealloc, worker_dealloc},
    {Py_tp_traverse, worker_traverse},
    {Py_tp_clear, worker_clear},
    {0, NULL},
};

static PyType_Spec worker_spec = {
    .name = "harken._hub.compiled.Worker",
    .basicsize = sizeof(Worker),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = worker_slots,
};

int lane_ready(PyObject *module) {
    const struct {
        PyObject **word;
        const char *text;
    } words[] = {{&word_accepted, "accepted"},
                 {&word_opened, "opened"},
                 {&word_closed, "closed"},
                 {&word_class, "RequestHandlerClass"},
                 {&word_give_back, "give_back"},
                 {&word_key, "key"},
                 {&word_socket, "socket"},
                 {&reasons[RETURNED], "handler_returned"},
                 {&reasons[CLOSED], "peer_closed"},
                 {&reasons[RESET], "peer_reset"}};
    for (size_t i = 0; i < sizeof words / sizeof *words; i++)
        if ((*words[i].word = PyUnicode_InternFromString(words[i].text)) == NULL)
            return -1;
    Lane_Type = (PyTypeObject *)PyType_FromSpec(&lane_spec);
    Worker_Type = (PyTypeObject *)PyType_FromSpec(&worker_spec);
    if (Lane_Type == NULL || Worker_Type == NULL)
        return -1;
    return PyModule_AddObjectRef(module, "Lane", (PyObject *)Lane_Type);
}
