/* SPDX-License-Identifier: MIT
 *
 * Hub: the loop, and what Python sees of it. */
#include "hub.h"
#include <errno.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

HIDDEN __thread Hub *current_hub;
HIDDEN Hub *all_hubs;
HIDDEN bool forked;
HIDDEN PyTypeObject *Hub_Type;

/* Whether what is added now is seen without waking anybody: the turn under way looks again before it sleeps. */
bool in_turn(Hub *hub) { return current_hub == hub && hub->turning; }

bool in_hub(Hub *hub) {
    PyGreenlet *me = PyGreenlet_GetCurrent();
    Py_XDECREF(me); /* the running greenlet lives */
    return me == hub->greenlet;
}

/* Switch to a green thread; returns when it waits or ends. */
void resume(Hub *hub, PyGreenlet *green, PyObject *value) {
    PyObject *args = NULL;
    if (value != NULL && (args = PyTuple_Pack(1, value)) == NULL) {
        PyErr_WriteUnraisable((PyObject *)green);
        return;
    }
    hub->budget = TURN_BUDGET;
    beat_piece(hub->beat);
    PyObject *back = PyGreenlet_Switch(green, args, NULL);
    if (back == NULL)
        PyErr_WriteUnraisable((PyObject *)green); /* from a greenlet that harken did not make */
    Py_XDECREF(back);
    Py_XDECREF(args);
}

/* -- descriptors -------------------------------------------------------------------------------------------------- */

static int add(Hub *hub, int fd, uint64_t tag) {
    struct epoll_event event = {.events = EPOLLIN, .data.u64 = tag};
    return epoll_ctl(hub->epoll, EPOLL_CTL_ADD, fd, &event);
}

static int add_door(Hub *hub, int place) {
    Door *door = &hub->doors[place];
    struct epoll_event event = {
        .events = EPOLLIN | (door->shared ? EPOLLEXCLUSIVE : 0),
        .data.u64 = (uint64_t)door->generation << 32 | DOOR_BIT | (uint32_t)place,
    };
    return epoll_ctl(hub->epoll, EPOLL_CTL_ADD, door->fd, &event);
}

/* EPOLLEXCLUSIVE wakes one process, and always the same one while that can keep up: the first in the queue of the
 * door's waiters. Added anew we stand at its end. (epoll_ctl(2): an exclusive entry cannot be modified.) */
static void go_to_the_end(Hub *hub, int place) {
    if (epoll_ctl(hub->epoll, EPOLL_CTL_DEL, hub->doors[place].fd, NULL) == 0)
        add_door(hub, place);
}

static void close_fd(int *fd) {
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
}

static int open_fds(Hub *hub) {
    hub->woken = false;
    hub->epoll = epoll_create1(EPOLL_CLOEXEC);
    hub->wakeup = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (hub->epoll >= 0 && hub->wakeup >= 0 && add(hub, hub->wakeup, WAKEUP_TAG) == 0)
        return 0;
    PyErr_SetFromErrno(PyExc_OSError);
    close_fd(&hub->epoll);
    close_fd(&hub->wakeup);
    return -1;
}

int hub_wake(Hub *hub) {
    uint64_t one = 1;
    if (!hub->woken && hub->wakeup >= 0) {
        hub->woken = true;
        if (write(hub->wakeup, &one, sizeof one) < 0)
            hub->woken = false; /* cannot be: its count is far from full */
    }
    return 0;
}

/* -- signals ------------------------------------------------------------------------------------------------------ */

static PyObject *wakeup_fd(int fd) {
    PyObject *module = PyImport_ImportModule("signal"), *before = NULL;
    PyObject *function = module == NULL ? NULL : PyObject_GetAttrString(module, "set_wakeup_fd");
    PyObject *args = function == NULL ? NULL : Py_BuildValue("(i)", fd);
    PyObject *words = args == NULL ? NULL : Py_BuildValue("{s:O}", "warn_on_full_buffer", Py_False);
    if (words != NULL)
        before = PyObject_Call(function, args, words);
    Py_XDECREF(words);
    Py_XDECREF(args);
    Py_XDECREF(function);
    Py_XDECREF(module);
    return before;
}

/* Between the last look for signals and epoll_wait there is a gap; a byte on a socket closes it. (An eventfd takes no
 * single byte.) Only the main thread may ask for that, and only one can have it: a host that does keeps it. */
static int watch_signals(Hub *hub) {
    if (hub->signals[0] >= 0 ||
        socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, hub->signals) < 0)
        return 0; /* without them signals are seen at the next wake-up */
    PyObject *before = wakeup_fd(hub->signals[1]);
    if (before == NULL && !PyErr_ExceptionMatches(PyExc_ValueError))
        return -1;
    long others = before == NULL ? 0 : PyLong_AsLong(before);
    Py_XDECREF(before);
    PyErr_Clear();
    if (others == -1 && add(hub, hub->signals[0], SIGNAL_TAG) == 0)
        return 0;
    if (others > 0)
        Py_XDECREF(wakeup_fd((int)others));
    close_fd(&hub->signals[0]);
    close_fd(&hub->signals[1]);
    PyErr_Clear();
    return 0;
}

static void unwatch_signals(Hub *hub) {
    if (hub->signals[0] < 0)
        return;
    PyObject *type, *error, *trace;
    PyErr_Fetch(&type, &error, &trace);
    PyObject *now = wakeup_fd(-1);
    long fd = now == NULL ? -1 : PyLong_AsLong(now);
    Py_XDECREF(now);
    if (fd >= 0 && fd != hub->signals[1]) /* somebody took it over meanwhile */
        Py_XDECREF(wakeup_fd((int)fd));
    PyErr_Restore(type, error, trace);
    close_fd(&hub->signals[0]);
    close_fd(&hub->signals[1]);
}

static void drain_signals(Hub *hub) {
    char numbers[256];
    while (read(hub->signals[0], numbers, sizeof numbers) > 0)
        ;
}

/* -- the loop ----------------------------------------------------------------------------------------------------- */

static int take_from_door(Hub *hub, uint32_t place, uint32_t generation) {
    for (int i = 0; i < DOOR_BURST; i++) {
        Door *door = (int)place < hub->door_count ? &hub->doors[place] : NULL;
        if (door == NULL || door->door == NULL || door->generation != generation)
            return 0;
        PyObject *on_readable = Py_NewRef(door->on_readable);
        beat_piece(hub->beat);
        PyObject *more = PyObject_CallNoArgs(on_readable);
        Py_DECREF(on_readable);
        hub->news |= more != Py_None;
        int again = more == NULL ? -1 : PyObject_IsTrue(more);
        Py_XDECREF(more);
        if (again <= 0)
            return again;
    }
    return 0;
}

/* Let whom Python trusts see to a door. 1: done; 0: Python has to be asked; -1. */
static int take_shortcut(PyObject *shortcut) {
    Py_INCREF(shortcut);
    int seen = Py_IS_TYPE(shortcut, Lane_Type) ? lane_shortcut(shortcut) : batch_shortcut(shortcut);
    Py_DECREF(shortcut);
    return seen;
}

static int open_door(Hub *hub, uint32_t place, uint32_t generation) {
    int seen = 0, result = 0;
    send_later(hub); /* what a door calls may take long */
    hub->at_door = true;
    if ((int)place < hub->door_count && hub->doors[place].shortcut != NULL &&
        hub->doors[place].generation == generation)
        seen = take_shortcut(hub->doors[place].shortcut);
    if (seen == 0)
        result = take_from_door(hub, place, generation);
    else if (seen < 0)
        result = -1;
    hub->at_door = false;
    Door *door = (int)place < hub->door_count ? &hub->doors[place] : NULL;
    if (door != NULL && door->door != NULL && door->generation == generation && door->shared)
        go_to_the_end(hub, (int)place);
    return result;
}

static int dispatch(Hub *hub, struct epoll_event *event) {
    uint32_t low = (uint32_t)event->data.u64;
    uint64_t count;
    if (!(low & DOOR_BIT))
        slot_event(hub, event);
    else if (low == SIGNAL_TAG) {
        drain_signals(hub);
        hub->news = true; /* what its handler has done may be what the caller waits for */
    } else if (low != WAKEUP_TAG)
        return open_door(hub, low & ~DOOR_BIT, (uint32_t)(event->data.u64 >> 32));
    else {
        hub->woken = false;
        hub->news = true;
        if (read(hub->wakeup, &count, sizeof count) < 0)
            return 0; /* read already, by a turn that was interrupted */
    }
    return 0;
}

/* Hand the events out. Green threads that wait again take the next ones themselves: see pass_on. */
static int dispatch_all(Hub *hub) {
    while (hub->next_event < hub->event_count)
        if (dispatch(hub, &hub->events[hub->next_event++]) < 0)
            return -1;
    return 0;
}

/* The loop ends by an exception. Edges come once: hand them out all the same, or a later run would wait in vain.
 * Doors and wake-ups are told of again. */
static int dispatch_edges(Hub *hub) {
    PyObject *type, *error, *trace;
    PyErr_Fetch(&type, &error, &trace);
    while (hub->next_event < hub->event_count) {
        struct epoll_event *event = &hub->events[hub->next_event++];
        if (!((uint32_t)event->data.u64 & DOOR_BIT))
            slot_event(hub, event);
    }
    PyErr_Restore(type, error, trace);
    return -1;
}

/* How long epoll_wait may sleep, in whole milliseconds rounded up: a deadline is never early. */
static int sleep_time(Hub *hub, int64_t latest) {
    if (hub->count > 0 || latest == 0)
        return 0;
    if (hub->heap_size > 0 && hub->heap[0]->deadline < latest)
        latest = hub->heap[0]->deadline;
    if (latest == INT64_MAX)
        return -1;
    int64_t left = latest - now_ns();
    if (left <= 0)
        return 0;
    return left > (int64_t)86400 * 1000000000 ? 86400 * 1000 : (int)((left + 999999) / 1000000);
}

/* Ask the epoll set what is ready, sleeping at most so many milliseconds. */
static void fetch(Hub *hub, int timeout) {
    int count, fd = hub->epoll;
    if (timeout == 0)
        count = epoll_wait(fd, hub->events, MAX_EVENTS, 0);
    else {
        beat_sleeps(hub->beat);
        Py_BEGIN_ALLOW_THREADS;
        count = epoll_wait(fd, hub->events, MAX_EVENTS, timeout);
        Py_END_ALLOW_THREADS;
        beat_wakes(hub->beat);
    }
    hub->next_event = 0;
    hub->event_count = count;
    if (count > 1)
        receive_ahead(hub);
}

/* A green thread has nothing to hand its turn to. If the loop had nothing else to do either but to sleep until there is
 * an event, let the green thread do that: one connection that talks alone costs no switch at all. Not while the loop takes
 * connections: that would bring it the door again, at which nobody is any more. And not where a signal handler may
 * raise, which is to end the loop and not a handler. */
bool fetch_in_its_place(Hub *hub) {
    if (!hub->rounds || hub->at_door || hub->news || hub->event_count <= 0 || hub->signals[0] >= 0 || hub->closed)
        return false;
    send_later(hub);
    int timeout = sleep_time(hub, hub->latest);
    if (timeout == 0)
        return false;
    fetch(hub, timeout);
    return true;
}

/* One turn, which sleeps until `latest` at most: 0 not at all, INT64_MAX without end. */
static int turn(Hub *hub, int64_t latest) {
    if (hub->next_event >= hub->event_count) { /* or a green thread has fetched some, and found the loop's among them */
        send_later(hub);
        fetch(hub, sleep_time(hub, latest));
    }
    if (PyErr_CheckSignals() < 0 || dispatch_all(hub) < 0)
        return dispatch_edges(hub);
    send_later(hub);
    return heap_run(hub) < 0 ? -1 : run_queue(hub);
}

static Hub *enter(Hub *hub) {
    Hub *before = current_hub;
    Py_XSETREF(hub->greenlet, PyGreenlet_GetCurrent());
    current_hub = hub;
    hub->turning = true;
    beat_wakes(hub->beat);
    return before;
}

static void leave(Hub *hub, Hub *before) {
    send_later(hub);
    beat_sleeps(hub->beat);
    hub->turning = false;
    if (hub->occupies)
        return;
    Py_CLEAR(hub->greenlet);
    current_hub = before;
}

static int may_run(Hub *hub) {
    if (hub->closed)
        PyErr_SetString(PyExc_RuntimeError, "this hub is closed");
    else if (hub->turning)
        PyErr_SetString(PyExc_RuntimeError, "this hub is running already");
    else
        return 0;
    return -1;
}

/* The moment at which so many seconds will have passed. */
static int ask_moment(PyObject *seconds, int64_t *moment) {
    int64_t ns;
    *moment = INT64_MAX;
    if (seconds == Py_None)
        return 0;
    if (seconds_to_ns(seconds, &ns) < 0)
        return -1;
    int64_t now = now_ns();
    *moment = ns == 0 ? 0 : ns < INT64_MAX - now ? now + ns : INT64_MAX;
    return 0;
}

static int ask_until(PyObject *until) {
    PyObject *answer = PyObject_CallNoArgs(until);
    int done = answer == NULL ? -1 : PyObject_IsTrue(answer);
    Py_XDECREF(answer);
    return done;
}

static int call_tick(PyObject *tick) {
    PyObject *answer = PyObject_CallNoArgs(tick);
    Py_XDECREF(answer);
    return answer == NULL ? -1 : 0;
}

/* Turns until there is news for the caller's functions, or they want to be called. Green threads that go on from one
 * message to the next are none: a busy connection costs no call of Python's. */
static int one_round(Hub *hub, PyObject *until, PyObject *patience, PyObject *tick) {
    int64_t latest;
    int done = ask_until(until);
    if (done != 0)
        return done;
    PyObject *seconds = PyObject_CallNoArgs(patience);
    int wrong = seconds == NULL ? -1 : ask_moment(seconds, &latest);
    Py_XDECREF(seconds);
    if (wrong < 0)
        return -1;
    hub->news = false;
    hub->latest = latest;
    do {
        if (turn(hub, latest) < 0)
            return -1;
    } while (!hub->news && hub->event_count > 0 && (latest == INT64_MAX || now_ns() < latest));
    return call_tick(tick);
}

static PyObject *hub_run(PyObject *self, PyObject *args, PyObject *words) {
    static char *names[] = {"until", "patience", "tick", NULL};
    Hub *hub = (Hub *)self;
    PyObject *until, *patience, *tick;
    if (!PyArg_ParseTupleAndKeywords(args, words, "OOO:run", names, &until, &patience, &tick) || may_run(hub) < 0 ||
        watch_signals(hub) < 0)
        return NULL;
    Hub *before = enter(hub);
    int result;
    hub->rounds = true;
    while ((result = one_round(hub, until, patience, tick)) == 0)
        ;
    hub->rounds = false;
    leave(hub, before);
    unwatch_signals(hub);
    return result < 0 ? NULL : Py_NewRef(Py_None);
}

/* Turns that step() may take beyond the first while there is work: below a millisecond for others in the host's loop. */
#define MORE_TURNS 7

static PyObject *hub_step(PyObject *self, PyObject *timeout) {
    Hub *hub = (Hub *)self;
    int64_t latest;
    if (ask_moment(timeout, &latest) < 0 || may_run(hub) < 0)
        return NULL;
    Hub *before = enter(hub);
    hub->news = false;
    int result = turn(hub, latest);
    for (int left = MORE_TURNS; left > 0 && result == 0 && hub->event_count > 0 && !hub->news; left--)
        result = turn(hub, 0); /* whoever hosts the loop would come back at once, for more than a turn costs */
    leave(hub, before);
    return result < 0 ? NULL : PyBool_FromLong(hub->news);
}

/* -- what Python sees --------------------------------------------------------------------------------------------- */

PyObject *hub_current(PyObject *module, PyObject *none) {
    if (current_hub == NULL || in_hub(current_hub))
        Py_RETURN_NONE;
    if (current_hub->occupies) { /* in a thread that others share, not every greenlet is a green thread */
        PyGreenlet *me = PyGreenlet_GetCurrent();
        int found = PySet_Contains(current_hub->greens, (PyObject *)me);
        Py_DECREF(me);
        if (found <= 0)
            return found < 0 ? NULL : Py_NewRef(Py_None);
    }
    return Py_NewRef(current_hub);
}

static PyObject *hub_fileno(PyObject *self, PyObject *none) { return PyLong_FromLong(((Hub *)self)->epoll); }

static PyObject *hub_occupy(PyObject *self, PyObject *yes) {
    Hub *hub = (Hub *)self;
    int wanted = PyObject_IsTrue(yes);
    if (wanted < 0)
        return NULL;
    if (wanted && !hub->turning) {
        Py_XSETREF(hub->greenlet, PyGreenlet_GetCurrent());
        current_hub = hub;
    } else if (!wanted && !hub->turning && hub->occupies) {
        Py_CLEAR(hub->greenlet);
        if (current_hub == hub)
            current_hub = NULL;
    }
    hub->occupies = wanted;
    Py_RETURN_NONE;
}

static PyObject *hub_wake_method(PyObject *self, PyObject *none) {
    hub_wake((Hub *)self);
    Py_RETURN_NONE;
}

static PyObject *hub_flush_pending_nowait(PyObject *self, PyObject *none) {
    Hub *hub = (Hub *)self;
    return PyLong_FromSize_t(send_later_nowait(hub) + flow_flush_nowait(hub) + flush_pending_nowait(hub) +
                             answers_nowait(hub));
}

static PyObject *hub_next_deadline(PyObject *self, PyObject *none) {
    Hub *hub = (Hub *)self;
    if (hub->count > 0)
        return PyFloat_FromDouble(0.0);
    if (hub->heap_size > 0)
        return PyFloat_FromDouble((double)hub->heap[0]->deadline / 1e9);
    Py_RETURN_NONE;
}

static PyObject *hub_spawn(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    if (count < 1 || !PyCallable_Check(args[0])) {
        PyErr_SetString(PyExc_TypeError, "spawn() takes a function and its arguments");
        return NULL;
    }
    return spawn((Hub *)self, NULL, args[0], args + 1, count - 1);
}

static PyObject *hub_spawn_into(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    if (count < 2 || !PySet_Check(args[0]) || !PyCallable_Check(args[1])) {
        PyErr_SetString(PyExc_TypeError, "spawn_into() takes a set, a function and its arguments");
        return NULL;
    }
    return spawn((Hub *)self, args[0], args[1], args + 2, count - 2);
}

static PyObject *rest(PyObject *const *args, Py_ssize_t count) {
    PyObject *tuple = PyTuple_New(count);
    for (Py_ssize_t i = 0; tuple != NULL && i < count; i++)
        PyTuple_SET_ITEM(tuple, i, Py_NewRef(args[i]));
    return tuple;
}

static PyObject *hub_call_soon(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    if (count < 1 || !PyCallable_Check(args[0])) {
        PyErr_SetString(PyExc_TypeError, "call_soon() takes a function and its arguments");
        return NULL;
    }
    PyObject *tuple = rest(args + 1, count - 1);
    int result = tuple == NULL ? -1 : enqueue((Hub *)self, CALL, args[0], tuple);
    Py_XDECREF(tuple);
    return result < 0 ? NULL : Py_NewRef(Py_None);
}

static PyObject *hub_call_at(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    int64_t deadline;
    if (count < 2 || !PyCallable_Check(args[1])) {
        PyErr_SetString(PyExc_TypeError, "call_at() takes a deadline, a function and its arguments");
        return NULL;
    }
    if (seconds_to_ns(args[0], &deadline) < 0)
        return NULL;
    PyObject *tuple = rest(args + 2, count - 2);
    PyObject *timer = tuple == NULL ? NULL : timer_new((Hub *)self, deadline, args[1], tuple);
    Py_XDECREF(tuple);
    if (timer != NULL && !in_turn((Hub *)self))
        hub_wake((Hub *)self); /* whoever hosts the loop asks for the next deadline then */
    return timer;
}

static int must_be_green(Hub *hub) {
    if (current_hub == hub && !in_hub(hub))
        return flush_pending(hub);
    PyErr_SetString(PyExc_RuntimeError, "nothing can wait here: this is no green thread of a running hub");
    return -1;
}

static PyObject *hub_settle(PyObject *self, PyObject *none) {
    return must_be_green((Hub *)self) < 0 ? NULL : Py_NewRef(Py_None);
}

static PyObject *hub_park(PyObject *self, PyObject *none) {
    Hub *hub = (Hub *)self;
    if (must_be_green(hub) < 0)
        return NULL;
    PyObject *got = PyGreenlet_Switch(hub->greenlet, NULL, NULL);
    if (got != NULL && PyTuple_CheckExact(got) && PyTuple_GET_SIZE(got) == 0)
        Py_SETREF(got, Py_NewRef(Py_None)); /* resumed without a value */
    return got;
}

/* A green thread that has given up its turn: started, not ended, and not the one that asks. */
static int is_parked(PyGreenlet *green) {
    if (!PyGreenlet_Check(green)) {
        PyErr_Format(PyExc_TypeError, "a green thread is needed, not %.100s", Py_TYPE(green)->tp_name);
        return -1;
    }
    PyGreenlet *me = PyGreenlet_GetCurrent();
    Py_XDECREF(me);
    return PyGreenlet_ACTIVE(green) && green != me;
}

/* From the hub's own greenlet: let a parked green thread go on now, and return when it waits or ends. */
static PyObject *hub_resume(PyObject *self, PyObject *green) {
    Hub *hub = (Hub *)self;
    int parked = is_parked((PyGreenlet *)green);
    if (parked < 0)
        return NULL;
    if (current_hub != hub || !in_hub(hub) || !parked || is_due(hub, (PyGreenlet *)green)) {
        PyErr_SetString(PyExc_RuntimeError, "only the hub itself can resume a green thread, and only a parked one");
        return NULL;
    }
    resume(hub, (PyGreenlet *)green, NULL);
    Py_RETURN_NONE;
}

static PyObject *hub_unpark(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    Hub *hub = (Hub *)self;
    if (count < 1 || count > 2) {
        PyErr_SetString(PyExc_TypeError, "unpark() takes a green thread and a value");
        return NULL;
    }
    PyGreenlet *green = (PyGreenlet *)args[0];
    int parked = is_parked(green);
    if (parked <= 0 || is_due(hub, green))
        return parked < 0 ? NULL : Py_NewRef(Py_False);
    if (make_due(hub, green, count > 1 ? args[1] : Py_None) < 0)
        return NULL;
    Py_RETURN_TRUE;
}

static PyObject *hub_throw(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    Hub *hub = (Hub *)self;
    if (count != 2 || !PyExceptionInstance_Check(args[1])) {
        PyErr_SetString(PyExc_TypeError, "throw() takes a green thread and an exception");
        return NULL;
    }
    int parked = is_parked((PyGreenlet *)args[0]);
    if (parked <= 0)
        return parked < 0 ? NULL : Py_NewRef(Py_False);
    int done = throw_into(hub, (PyGreenlet *)args[0], args[1]);
    return done < 0 ? NULL : PyBool_FromLong(done);
}

static PyObject *hub_sleep(PyObject *self, PyObject *seconds) {
    Hub *hub = (Hub *)self;
    int64_t ns;
    if (current_hub != hub || in_hub(hub)) {
        PyObject *module = PyImport_ImportModule("time");
        PyObject *done = module == NULL ? NULL : PyObject_CallMethod(module, "sleep", "O", seconds);
        Py_XDECREF(module);
        return done;
    }
    if (seconds_to_ns(seconds, &ns) < 0)
        return NULL;
    int64_t now = now_ns();
    if ((ns == 0 ? give_way(hub) : sleep_until(hub, ns > INT64_MAX - now ? INT64_MAX : now + ns)) < 0)
        return NULL;
    Py_RETURN_NONE;
}

static int find_door(Hub *hub, PyObject *door) {
    for (int i = 0; i < hub->door_count; i++)
        if (hub->doors[i].door == door)
            return i;
    return -1;
}

static void remove_door(Hub *hub, int place) {
    Door *door = &hub->doors[place];
    PyObject *object = door->door, *function = door->on_readable;
    PyObject *shortcut = door->shortcut;
    door->door = door->on_readable = door->shortcut = NULL;
    door->generation++;
    /* Its number may be another's by now: then the kernel has dropped the door with its file. */
    PyObject *type, *error, *trace;
    PyErr_Fetch(&type, &error, &trace);
    if (hub->epoll >= 0 && PyObject_AsFileDescriptor(object) == door->fd)
        epoll_ctl(hub->epoll, EPOLL_CTL_DEL, door->fd, NULL);
    PyErr_Restore(type, error, trace);
    Py_XDECREF(shortcut);
    Py_DECREF(object);
    Py_DECREF(function);
}

/* Let a Batch or a Lane see to a door that is watched. */
void hub_set_shortcut(Hub *hub, PyObject *door, PyObject *shortcut) {
    int place = find_door(hub, door);
    if (place >= 0 && hub->doors[place].shortcut != shortcut)
        Py_XSETREF(hub->doors[place].shortcut, Py_NewRef(shortcut));
}

static PyObject *hub_watch(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    Hub *hub = (Hub *)self;
    if (count < 2 || count > 3 || !PyCallable_Check(args[1])) {
        PyErr_SetString(PyExc_TypeError, "watch() takes a door, a function and whether the door is shared");
        return NULL;
    }
    int shared = count == 3 ? PyObject_IsTrue(args[2]) : 0;
    if (shared < 0)
        return NULL;
    int place = find_door(hub, args[0]);
    if (place >= 0)
        remove_door(hub, place);
    int fd = PyObject_AsFileDescriptor(args[0]);
    if (fd < 0 || ((place = find_door(hub, NULL)) < 0 && hub->closed))
        return NULL;
    if (place < 0) {
        Door *doors = PyMem_Realloc(hub->doors, (size_t)(hub->door_count + 1) * sizeof *doors);
        if (doors == NULL)
            return PyErr_NoMemory();
        hub->doors = doors;
        place = hub->door_count++;
        doors[place] = (Door){.fd = -1};
    }
    Door *door = &hub->doors[place];
    door->fd = fd;
    door->shared = shared;
    if (add_door(hub, place) < 0)
        return PyErr_SetFromErrno(PyExc_OSError);
    door->door = Py_NewRef(args[0]);
    door->on_readable = Py_NewRef(args[1]);
    if (!in_turn(hub))
        hub_wake(hub);
    Py_RETURN_NONE;
}

static PyObject *hub_unwatch(PyObject *self, PyObject *door) {
    int place = find_door((Hub *)self, door);
    if (place >= 0)
        remove_door((Hub *)self, place);
    Py_RETURN_NONE;
}

static PyObject *hub_wait(PyObject *self, PyObject *args, PyObject *words) {
    static char *names[] = {"fd", "write", "timeout", NULL};
    Hub *hub = (Hub *)self;
    PyObject *door, *timeout = Py_None;
    int direction = READ;
    int64_t deadline = 0;
    if (!PyArg_ParseTupleAndKeywords(args, words, "O|pO:wait", names, &door, &direction, &timeout))
        return NULL;
    int fd = PyObject_AsFileDescriptor(door);
    if (fd < 0) {
        if (PyErr_ExceptionMatches(PyExc_ValueError) && !PyLong_Check(door)) { /* a closed socket's */
            errno = EBADF;
            PyErr_SetFromErrno(PyExc_OSError);
        }
        return NULL;
    }
    if (timeout != Py_None) {
        if (seconds_to_ns(timeout, &deadline) < 0)
            return NULL;
        deadline = deadline > INT64_MAX / 2 ? 0 : deadline + now_ns();
    }
    bool plain = current_hub != hub || in_hub(hub);
    if ((plain ? poll_wait(fd, direction, deadline) : wait_fd(hub, fd, direction, deadline)) < 0)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *hub_lodge(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    if (count != 2 || !PyObject_TypeCheck(args[0], Connection_Type) || !PyCallable_Check(args[1])) {
        PyErr_SetString(PyExc_TypeError, "lodge() takes a Connection and a function");
        return NULL;
    }
    return connection_lodge((Hub *)self, args[0], args[1]) < 0 ? NULL : Py_NewRef(Py_None);
}

static PyObject *hub_adopt(PyObject *self, PyObject *sock) { return connection_adopt(sock); }

/* -- life --------------------------------------------------------------------------------------------------------- */

static void unlink_hub(Hub *hub) {
    if (hub->previous != NULL)
        hub->previous->next = hub->next;
    else if (all_hubs == hub)
        all_hubs = hub->next;
    if (hub->next != NULL)
        hub->next->previous = hub->previous;
    hub->next = hub->previous = NULL;
}

static PyObject *hub_new(PyTypeObject *type, PyObject *args, PyObject *words) {
    Hub *hub = (Hub *)type->tp_alloc(type, 0);
    if (hub == NULL)
        return NULL;
    hub->epoll = hub->wakeup = hub->signals[0] = hub->signals[1] = -1;
    hub->due = PyDict_New();
    hub->greens = PySet_New(NULL);
    hub->events = PyMem_New(struct epoll_event, MAX_EVENTS);
    hub->beat = (Beat *)PyObject_CallNoArgs((PyObject *)Beat_Type);
    if (hub->events == NULL)
        PyErr_NoMemory();
    if (hub->events == NULL || hub->beat == NULL || hub->due == NULL || hub->greens == NULL || open_fds(hub) < 0) {
        Py_DECREF(hub);
        return NULL;
    }
    hub->asks_at_ends = true;
    size_t *owed[] = {&hub->pending_size, &hub->answers, &hub->later_count, &hub->flow.count};
    for (int i = 0; i < 4; i++)
        hub->beat->owed[i] = owed[i];
    if ((hub->next = all_hubs) != NULL)
        all_hubs->previous = hub;
    all_hubs = hub;
    return (PyObject *)hub;
}

static void close_fds(Hub *hub) {
    close_fd(&hub->epoll);
    close_fd(&hub->wakeup);
    close_fd(&hub->signals[0]);
    close_fd(&hub->signals[1]);
}

static void drop_doors(Hub *hub) {
    while (hub->door_count > 0) {
        Door door = hub->doors[--hub->door_count];
        Py_XDECREF(door.door);
        Py_XDECREF(door.on_readable);
        Py_XDECREF(door.shortcut);
    }
}

static PyObject *hub_close(PyObject *self, PyObject *none) {
    Hub *hub = (Hub *)self;
    if (hub->closed)
        Py_RETURN_NONE;
    if (may_run(hub) < 0)
        return NULL;
    PyObject *left = PySequence_List(hub->greens);
    if (left == NULL)
        return NULL;
    Hub *before = enter(hub);
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(left); i++) {
        PyGreenlet *green = (PyGreenlet *)PyList_GET_ITEM(left, i);
        if (!PyGreenlet_STARTED(green) && PyObject_SetAttrString((PyObject *)green, "run", NULL) < 0)
            PyErr_Clear(); /* what it would have run goes now, whoever holds the greenlet */
        if (!PyGreenlet_ACTIVE(green))
            continue;
        PyObject *done = PyGreenlet_Throw(green, PyExc_GreenletExit, NULL, NULL);
        if (done == NULL)
            PyErr_WriteUnraisable((PyObject *)green);
        Py_XDECREF(done);
    }
    leave(hub, before);
    Py_DECREF(left);
    hub->closed = true;
    queue_clear(hub, false);
    heap_clear(hub, false);
    drop_doors(hub);
    slots_forget_waiters(hub);
    PySet_Clear(hub->greens);
    Py_CLEAR(hub->passed);
    close_fds(hub);
    Py_RETURN_NONE;
}

/* In a child: nothing of the parent's is watched or runs here. The parent's green threads are not given back but
 * forgotten: to drop a suspended greenlet is to run its `finally` blocks, which are the parent's business. */
void hubs_after_fork(void) {
    Hub *running = current_hub;
    forked = true;
    for (Hub *hub = all_hubs; hub != NULL; hub = hub->next) {
        if (hub->closed)
            continue;
        queue_clear(hub, true);
        heap_clear(hub, true);
        slots_abandon(hub);
        hub->event_count = 0;
        hub->at_door = false;
        hub->pending_owner = hub->pending_keeper = NULL; /* the parent sends it */
        hub->passed = NULL;
        hub->pending_size = 0;
        hub->later_count = 0;
        hub->loose = NULL;
        hub->flow = (Flow){0};
        beat_forget(hub->beat);
        hub->greens = PySet_New(NULL);
        drop_doors(hub);
        bool mine = hub->signals[0] >= 0 && hub == running;
        close_fds(hub);
        if (mine)
            Py_XDECREF(wakeup_fd(-1));
        if (open_fds(hub) < 0 || hub->due == NULL || hub->greens == NULL)
            Py_FatalError("harken's hub got no descriptors in a forked child");
    }
    PyErr_Clear();
    if (running != NULL && !in_hub(running)) {
        running->lent = true;
        current_hub = NULL;
    }
}

static int hub_traverse(PyObject *self, visitproc visit, void *arg) {
    Hub *hub = (Hub *)self;
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(hub->greenlet);
    Py_VISIT(hub->passed);
    Py_VISIT(hub->due);
    Py_VISIT(hub->greens);
    Py_VISIT(hub->pending_owner);
    Py_VISIT(hub->pending_keeper);
    Py_VISIT(hub->loose);
    Py_VISIT(hub->flow.owner);
    for (size_t i = 0; i < hub->later_count; i++)
        Py_VISIT(hub->later[i].owner);
    for (size_t i = 0; i < hub->count; i++) {
        Entry *entry = &hub->queue[(hub->head + i) & (hub->capacity - 1)];
        Py_VISIT(entry->target);
        Py_VISIT(entry->value);
    }
    for (Py_ssize_t i = 0; i < hub->heap_size; i++)
        Py_VISIT(node_owner(hub->heap[i]));
    for (int i = 0; i < hub->door_count; i++) {
        Py_VISIT(hub->doors[i].door);
        Py_VISIT(hub->doors[i].on_readable);
        Py_VISIT(hub->doors[i].shortcut);
    }
    for (int page = 0; page < hub->page_count; page++)
        for (int i = 0; hub->pages[page] != NULL && i < SLOTS_A_PAGE; i++) {
            Py_VISIT(hub->pages[page][i].waiter[READ]);
            Py_VISIT(hub->pages[page][i].waiter[WRITE]);
            Py_VISIT(hub->pages[page][i].guest);
            Py_VISIT(hub->pages[page][i].starter);
        }
    return 0;
}

static int hub_clear(PyObject *self) {
    Hub *hub = (Hub *)self;
    hub->closed = true; /* nobody can reach it, but what its green threads do at their end might */
    queue_clear(hub, false);
    heap_clear(hub, false);
    drop_doors(hub);
    slots_forget_waiters(hub);
    Py_CLEAR(hub->pending_owner);
    Py_CLEAR(hub->pending_keeper);
    send_later(hub);
    flow_drop(hub);
    Py_CLEAR(hub->loose);
    Py_CLEAR(hub->passed);
    if (hub->greens != NULL)
        PySet_Clear(hub->greens);
    return 0;
}

static void hub_dealloc(PyObject *self) {
    Hub *hub = (Hub *)self;
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    if (hub->weak != NULL)
        PyObject_ClearWeakRefs(self);
    unlink_hub(hub);
    hub_clear(self);
    close_fds(hub);
    slots_free(hub);
    PyMem_Free(hub->queue);
    PyMem_Free(hub->heap);
    PyMem_Free(hub->doors);
    PyMem_Free(hub->events);
    PyMem_Free(hub->pending);
    for (int i = 0; hub->beat != NULL && i < 4; i++)
        hub->beat->owed[i] = NULL;
    Py_CLEAR(hub->beat);
    Py_CLEAR(hub->due);
    Py_CLEAR(hub->greens);
    Py_CLEAR(hub->greenlet);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyMethodDef hub_methods[] = {
    {"run", FAST(hub_run), METH_VARARGS | METH_KEYWORDS, "run(until, patience, tick): run green threads here."},
    {"step", hub_step, METH_O, "step(timeout): take one turn."},
    {"fileno", hub_fileno, METH_NOARGS, "The epoll descriptor."},
    {"next_deadline", hub_next_deadline, METH_NOARGS, "When a turn is wanted without a descriptor's being ready."},
    {"occupy", hub_occupy, METH_O, "occupy(yes): this thread is the hub's between its turns, too."},
    {"wake", hub_wake_method, METH_NOARGS, "End the sleep. Any thread."},
    {"flush_pending_nowait", hub_flush_pending_nowait, METH_NOARGS, "Send what was written and not sent. Any thread."},
    {"close", hub_close, METH_NOARGS, "End the green threads that are left, and give the descriptors back."},
    {"spawn", FAST(hub_spawn), METH_FASTCALL, "spawn(function, *args): a green thread; it starts at the next turn."},
    {"spawn_into", FAST(hub_spawn_into), METH_FASTCALL, "spawn_into(busy, function, *args): likewise; the set holds it."},
    {"call_soon", FAST(hub_call_soon), METH_FASTCALL, "call_soon(function, *args): call at the next turn."},
    {"call_soon_threadsafe", FAST(hub_call_soon), METH_FASTCALL, "The same, from any thread."},
    {"call_at", FAST(hub_call_at), METH_FASTCALL, "call_at(deadline, function, *args): call once after the deadline."},
    {"settle", hub_settle, METH_NOARGS, "settle(): send what the calling green thread has written; it may wait."},
    {"park", hub_park, METH_NOARGS, "Give up the calling green thread until unpark() or throw()."},
    {"resume", hub_resume, METH_O, "resume(green): let a parked green thread go on now. The hub's own greenlet."},
    {"unpark", FAST(hub_unpark), METH_FASTCALL, "unpark(green, value=None): let a parked green thread go on."},
    {"throw", FAST(hub_throw), METH_FASTCALL, "throw(green, error): raise an exception in a parked green thread."},
    {"sleep", hub_sleep, METH_O, "sleep(seconds): park for so long."},
    {"wait", FAST(hub_wait), METH_VARARGS | METH_KEYWORDS, "wait(fd, write=False, timeout=None): park until ready."},
    {"watch", FAST(hub_watch), METH_FASTCALL, "watch(door, on_readable, shared=False): call while the door is readable."},
    {"unwatch", hub_unwatch, METH_O, "unwatch(door): stop calling."},
    {"lodge", FAST(hub_lodge), METH_FASTCALL, "lodge(connection, starter): call starter(connection) at its first event."},
    {"adopt", hub_adopt, METH_O, "adopt(sock): take a socket over as a Connection."},
    {NULL},
};

static PyMemberDef hub_members[] = {
    {"beat", T_OBJECT_EX, offsetof(Hub, beat), READONLY, "What the loop says of itself."},
    {"asks_at_ends", T_BOOL, offsetof(Hub, asks_at_ends), 0, "Whether the end of a green thread is news."},
    {"__weaklistoffset__", T_PYSSIZET, offsetof(Hub, weak), READONLY, NULL},
    {NULL},
};

static PyType_Slot hub_slots[] = {
    {Py_tp_doc, "Runs green threads and waits for sockets on their behalf; the contract stands in harken._hub."},
    {Py_tp_new, hub_new},
    {Py_tp_dealloc, hub_dealloc},
    {Py_tp_traverse, hub_traverse},
    {Py_tp_clear, hub_clear},
    {Py_tp_methods, hub_methods},
    {Py_tp_members, hub_members},
    {0, NULL},
};

static PyType_Spec hub_spec = {
    .name = "harken._hub.compiled.Hub",
    .basicsize = sizeof(Hub),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .slots = hub_slots,
};

int hub_ready(PyObject *module) {
    Hub_Type = (PyTypeObject *)PyType_FromSpec(&hub_spec);
    return Hub_Type == NULL ? -1 : PyModule_AddObjectRef(module, "Hub", (PyObject *)Hub_Type);
}
