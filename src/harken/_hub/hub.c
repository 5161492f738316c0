/* SPDX-License-Identifier: MIT
 *
 * The loop of a Hub. */
#include "hub.h"
#include <unistd.h>

HIDDEN __thread Hub *running_hub;

/* Whether what is added now is seen without waking anybody: the turn under way looks again before it sleeps. */
bool in_turn(Hub *hub) { return running_hub == hub && hub->turning; }

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
    take_back(hub);
    Py_XDECREF(back);
    Py_XDECREF(args);
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

Hub *hub_enter(Hub *hub) {
    Hub *before = running_hub;
    Py_XSETREF(hub->greenlet, PyGreenlet_GetCurrent());
    running_hub = hub;
    hub->turning = true;
    beat_wakes(hub->beat);
    return before;
}

void hub_leave(Hub *hub, Hub *before) {
    send_later(hub);
    beat_sleeps(hub->beat);
    hub->turning = false;
    if (hub->occupies)
        return;
    Py_CLEAR(hub->greenlet);
    running_hub = before;
}

/* -- a thread that is the hub's between turns, too ---------------------------------------------------------------- */

HIDDEN int occupants;

/* Another hub that keeps the thread that `hub` keeps: whose green thread `green` is, or any for NULL. */
static Hub *neighbour(Hub *hub, PyGreenlet *green) {
    for (Hub *other = all_hubs; other != NULL; other = other->next)
        if (other != hub && other->occupies && other->greenlet == hub->greenlet &&
            (green == NULL || PySet_Contains(other->greens, (PyObject *)green) > 0))
            return other;
    return NULL;
}

/* A host may resume a green thread of one hub while another's turn was the last in this thread. */
Hub *hub_among_several(void) {
    Hub *hub = running_hub;
    if (!hub->occupies || in_hub(hub))
        return hub;
    PyGreenlet *me = PyGreenlet_GetCurrent();
    Hub *other = PySet_Contains(hub->greens, (PyObject *)me) == 0 ? neighbour(hub, me) : NULL;
    Py_DECREF(me);
    return other == NULL ? hub : (running_hub = other);
}

void occupy(Hub *hub, bool yes) {
    if (yes && !hub->turning) {
        Py_XSETREF(hub->greenlet, PyGreenlet_GetCurrent());
        running_hub = hub;
    } else if (!yes && !hub->turning && hub->occupies) {
        if (running_hub == hub)
            running_hub = neighbour(hub, NULL);
        Py_CLEAR(hub->greenlet);
    }
    occupants += yes - hub->occupies;
    hub->occupies = yes;
}

/* -- run and step -------------------------------------------------------------------------------------------------- */

int hub_may_run(Hub *hub) {
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

PyObject *hub_run(PyObject *self, PyObject *args, PyObject *words) {
    static char *names[] = {"until", "patience", "tick", NULL};
    Hub *hub = (Hub *)self;
    PyObject *until, *patience, *tick;
    if (!PyArg_ParseTupleAndKeywords(args, words, "OOO:run", names, &until, &patience, &tick) || hub_may_run(hub) < 0 ||
        watch_signals(hub) < 0)
        return NULL;
    Hub *before = hub_enter(hub);
    int result;
    hub->rounds = true;
    while ((result = one_round(hub, until, patience, tick)) == 0)
        ;
    hub->rounds = false;
    hub_leave(hub, before);
    unwatch_signals(hub);
    return result < 0 ? NULL : Py_NewRef(Py_None);
}

/* Turns that step() may take beyond the first while there is work: below a millisecond for others in the host's loop. */
#define MORE_TURNS 7

PyObject *hub_step(PyObject *self, PyObject *timeout) {
    Hub *hub = (Hub *)self;
    int64_t latest;
    if (ask_moment(timeout, &latest) < 0 || hub_may_run(hub) < 0)
        return NULL;
    Hub *before = hub_enter(hub);
    hub->news = false;
    int result = turn(hub, latest);
    for (int left = MORE_TURNS; left > 0 && result == 0 && hub->event_count > 0 && !hub->news; left--)
        result = turn(hub, 0); /* whoever hosts the loop would come back at once, for more than a turn costs */
    hub_leave(hub, before);
    return result < 0 ? NULL : PyBool_FromLong(hub->news);
}
