/* SPDX-License-Identifier: MIT
 *
 * Workers: the green threads of a lane, which serve one connection after the other, each from its handler to its end;
 * and what is known of a connection that has no record. */
#include "lane.h"
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>

static PyTypeObject *Worker_Type;
static PyObject *word_closed, *word_give_back, *word_key;

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
bool lane_unheard(Lane *lane, PyObject *event) {
    PyObject *callbacks = PyDict_GetItemWithError(lane->subscribers, event); /* borrowed */
    return callbacks != NULL && PyTuple_CheckExact(callbacks) && PyTuple_GET_SIZE(callbacks) == 0;
}

/* Whether nobody has to be told of an end, nor does anything come before it. */
static bool ends_unnoticed(Lane *lane) {
    PyObject *waiting = *(PyObject **)((char *)lane->registry + waiting_at);
    return is(lane, careful_at, Py_False) && is(lane, counts_bytes_at, Py_False) && waiting != NULL &&
           PyLong_CheckExact(waiting) && PyLong_AsLong(waiting) == 0 && lane_unheard(lane, word_closed);
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
    if (flush_to_leave(request) < 0) /* others may run meanwhile */
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
void lane_end(Lane *lane, PyObject *request) {
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
    lane_end(lane, worker->request);
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

void lane_drop_resting(Lane *lane, int place) {
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
                lane_drop_resting(worker->lane, i);
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
        if (has_unsent(hub) && hub_here() == hub && flush_turn(hub) < 0)
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
int lane_start(Lane *lane, PyObject *request, PyObject *address, PyObject *ticket, bool now) {
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
    if (result < 0) {
        unmake(lane->hub, lane->busy, green);
        return -1;
    }
    if (now)
        resume(lane->hub, green, NULL);
    Py_DECREF(green);
    return 0;
}

/* -- the type ----------------------------------------------------------------------------------------------------- */

int lane_know_registry(PyTypeObject *type) {
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

/* Its green thread was never started, since the hub was closed: a record is made as long as this can be referred to. */
static void worker_finalize(PyObject *self) { drop_request((Worker *)self); }

static void worker_dealloc(PyObject *self) {
    Worker *worker = (Worker *)self;
    PyTypeObject *type = Py_TYPE(self);
    if (PyObject_CallFinalizerFromDealloc(self) < 0)
        return;
    PyObject_GC_UnTrack(self);
    worker_clear(self);
    Py_CLEAR(worker->lane);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyType_Slot worker_slots[] = {
    {Py_tp_doc, "What a green thread of a lane runs."},
    {Py_tp_call, worker_call},
    {Py_tp_finalize, worker_finalize},
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

int workers_ready(void) {
    const struct {
        PyObject **word;
        const char *text;
    } words[] = {{&word_closed, "closed"}, {&word_give_back, "give_back"}, {&word_key, "key"}};
    for (size_t i = 0; i < sizeof words / sizeof *words; i++)
        if ((*words[i].word = PyUnicode_InternFromString(words[i].text)) == NULL)
            return -1;
    Worker_Type = (PyTypeObject *)PyType_FromSpec(&worker_spec);
    return Worker_Type == NULL ? -1 : 0;
}
