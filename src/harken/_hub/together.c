/* SPDX-License-Identifier: MIT
 *
 * What a turn does for many at once: it receives first, and sends last.
 *
 * An event says that a client has sent something to a green thread that waits in recv(). Served one by one, each takes
 * the processor through the kernel's way of receiving, a handler, and the kernel's way of sending, and each of the three
 * drives the others' code out of its nearest caches: of an echo on 100 connections that is seven hundredths of the
 * server's time (0.86 of the C floor one by one, 0.92 together; either half alone gains a third of that). So where a turn
 * brings more than one event, what was sent is received for all who wait for it, then the handlers run, each until it
 * waits again, and then their answers go out, before the loop asks for more. The peer waits for that, never that for it.
 *
 * Receiving ahead changes nothing for a handler: it has asked for those bytes, and for no more of them. What interrupts
 * its wait meanwhile leaves them to the next call that reads (`came`).
 *
 * An answer that is put off is for its handler as if the peer were a little slower to take it, or a little quicker to
 * reset the connection, which a sendall() that has succeeded says nothing of in any case. To keep it so:
 *
 * - Only where others wait for their turn, on a connection that has answered and then waited for the next request
 *   STEADY times. If its green thread then does anything else than that, the answer goes first, and the connection's
 *   answers are never put off again: what follows an answer must not overtake it.
 * - Nowhere where sendall() could tell its caller more: not with a timeout, not without blocking, not after an end or a
 *   reset of the peer's, not where others have asked for the descriptor, not where what moves is traced.
 * - What the kernel does not take at once, or refuses, is the green thread's business again (`owed`): it is woken, and
 *   sends the rest or raises before it reads on, as it would have in sendall(). So does whoever uses the connection next.
 * - A handler that goes on computing is told from one that waits by the watchdog, which sends what lies here. */
#include "hub.h"
#include <errno.h>
#include <sys/socket.h>

#define MOST_AHEAD 262144 /* bytes received ahead, or a last piece more: a quarter of what one green thread's turn may move */
#define SMALL 4096        /* bytes of an answer that may be put off: larger ones gained nothing */

/* -- receiving first ---------------------------------------------------------------------------------------------- */

/* Receive what the green thread in this slot has asked for; how much that was. */
static size_t receive_one(Slot *slot, int fd) {
    ssize_t got = recv(fd, scratch, slot->want, MSG_DONTWAIT);
    if (got == 0 || (got < 0 && (errno == EAGAIN || errno == EINTR)))
        return 0; /* it will find that out by itself */
    if (got < 0)
        slot->fault = errno; /* told once, by the kernel as by us */
    else if ((slot->ahead = PyBytes_FromStringAndSize(scratch, got)) == NULL) {
        PyErr_Clear();
        slot->fault = ENOMEM;
    }
    slot->dry = got > 0 && (uint32_t)got < slot->want && !slot->sticky;
    slot->came = true;
    slot->want = 0;
    return got > 0 ? (size_t)got : 0;
}

/* Receive for all to whom these events bring bytes and nothing else. What they say is noted with that: see note(). */
void receive_ahead(Hub *hub) {
    size_t total = 0;
    for (int i = 0; i < hub->event_count && total < MOST_AHEAD; i++) {
        struct epoll_event *event = &hub->events[i];
        Slot *slot = (uint32_t)event->data.u64 & DOOR_BIT ? NULL : event_slot(hub, event);
        if (slot == NULL || slot->want == 0 || slot->came || (event->events & (EPOLLIN | ENDS)) != EPOLLIN)
            continue;
        if (slot->waiter[READ] == NULL || is_due(hub, slot->waiter[READ]))
            continue; /* something else will resume it, which may be an exception */
        total += receive_one(slot, (int)(uint32_t)event->data.u64);
        if (slot->came)
            event->events |= NOTED;
    }
}

/* As recv(2), of what was received ahead. It goes into `*whole` instead, if that is not NULL and takes it all. */
ssize_t take_ahead(Slot *slot, char *into, size_t size, int flags, PyObject **whole) {
    if (slot->ahead == NULL) {
        errno = slot->fault;
        slot->came = false;
        return -1;
    }
    const char *data = PyBytes_AS_STRING(slot->ahead);
    size_t there = (size_t)PyBytes_GET_SIZE(slot->ahead), take = there < size ? there : size;
    PyObject *rest = NULL;
    if (whole != NULL && take == there && !(flags & MSG_PEEK)) {
        *whole = slot->ahead;
        slot->ahead = NULL;
        slot->came = false;
        return (ssize_t)take;
    }
    memcpy(into, data, take);
    if (flags & MSG_PEEK)
        return (ssize_t)take;
    if (take < there && (rest = PyBytes_FromStringAndSize(data + take, (Py_ssize_t)(there - take))) == NULL) {
        PyErr_Clear();
        errno = ENOMEM;
        return -1;
    }
    Py_SETREF(slot->ahead, rest);
    slot->came = rest != NULL;
    return (ssize_t)take;
}

/* -- sending last ------------------------------------------------------------------------------------------------- */

/* The green thread that waits for the next request has to send the rest first. */
static void wake_debtor(State *state) {
    Hub *hub = (Hub *)state->hub;
    PyGreenlet *green = attached(state) ? state->slot->waiter[READ] : NULL;
    if (green != NULL && !is_due(hub, green) && make_due(hub, green, NULL) < 0)
        PyErr_WriteUnraisable((PyObject *)green);
}

static void send_one(Later *later) {
    State *state = state_of(later->owner);
    const char *data = PyBytes_AS_STRING(later->data);
    size_t size = (size_t)PyBytes_GET_SIZE(later->data);
    state->later = state->ended = false;
    ssize_t sent = send(socket_fd(later->owner), data, size, MSG_NOSIGNAL | MSG_DONTWAIT);
    later->sent = sent > 0 ? (size_t)sent : 0;
    note_moved(state, WRITE, later->sent);
    if (later->sent == size)
        return;
    state->broken |= sent < 0 && errno == ECONNRESET;
    if (!attached(state))
        return; /* it was closed meanwhile */
    state->slot->owed_from = (uint32_t)later->sent;
    Py_XSETREF(state->owed, Py_NewRef(later->data));
    wake_debtor(state);
}

/* Somebody may have begun to follow the connection meanwhile. */
static void tell_sent(Later *later) {
    if (later->sent > 0 && state_of(later->owner)->traced)
        tell_traffic(later->owner, WRITE, PyBytes_AS_STRING(later->data), later->sent);
}

/* Send what was put off, as far as that does not wait; how much that was. Any thread; an exception that is under way
 * stays. */
size_t send_all_later(Hub *hub) {
    Later now[MOST_PUT_OFF];
    size_t count = hub->later_count, total = 0;
    PyObject *type, *error, *trace;
    PyErr_Fetch(&type, &error, &trace);
    memcpy(now, hub->later, count * sizeof *now);
    hub->later_count = 0;
    for (size_t i = 0; i < count; i++)
        send_one(&now[i]);
    for (size_t i = 0; i < count; i++) { /* last: other threads may run meanwhile, and put off more */
        total += now[i].sent;
        tell_sent(&now[i]);
        Py_DECREF(now[i].owner);
        Py_DECREF(now[i].data);
    }
    PyErr_Restore(type, error, trace);
    return total;
}

/* A handler goes on computing after its answer. */
size_t send_later_nowait(Hub *hub) {
    if (hub->loose != NULL)
        state_of(hub->loose)->rhythm = NEVER;
    return hub->later_count > 0 ? send_all_later(hub) : 0;
}

/* The child has no part in what was put off here, and may be the next to write to these connections. */
void hubs_before_fork(void) {
    for (Hub *hub = all_hubs; hub != NULL; hub = hub->next)
        send_later(hub);
    if (current_hub != NULL) {
        flow_flush_nowait(current_hub);
        flush_pending_nowait(current_hub);
    }
}

/* Send what is left of an answer that was put off, as far as that does not wait. 1: all of it; 0: not yet; -1. */
static int pay_some(PyObject *self, State *state) {
    if (!attached(state)) /* it is the parent's, of a process that has forked */
        Py_CLEAR(state->owed);
    while (state->owed != NULL) {
        PyObject *data = Py_NewRef(state->owed); /* who is told of it may use the connection */
        const char *rest = PyBytes_AS_STRING(data) + state->slot->owed_from;
        size_t size = (size_t)PyBytes_GET_SIZE(data) - state->slot->owed_from;
        ssize_t sent = send(socket_fd(self), rest, size, MSG_NOSIGNAL | MSG_DONTWAIT);
        int error = sent < 0 ? errno : 0;
        if (error == 0 || (error != EAGAIN && error != EINTR)) {
            state->ended = false;
            state->slot->owed_from += sent > 0 ? (uint32_t)sent : 0;
            if (sent < 0 || (size_t)sent == size)
                Py_CLEAR(state->owed);
        }
        if (sent > 0)
            moved(self, state, WRITE, rest, (size_t)sent);
        Py_DECREF(data);
        if (error == EAGAIN)
            return 0;
        if (error == EINTR && PyErr_CheckSignals() < 0)
            return -1;
        if (error != 0 && error != EINTR) {
            state->broken |= error == ECONNRESET;
            return fail(error);
        }
    }
    return 1;
}

/* Whether another green thread of this hub waits to send the rest. One that writes on takes that over from the one that
 * reads, which goes on: it has nothing to do there but that. */
static bool others_pay(State *state, bool reads) {
    Hub *hub = current_hub;
    PyGreenlet *green = hub != NULL && attached(state) && state->hub == (PyObject *)hub ? state->slot->waiter[WRITE] : NULL;
    if (green == NULL || reads || !state->reader_pays)
        return green != NULL && reads;
    state->slot->waiter[WRITE] = NULL;
    if (!is_due(hub, green) && make_due(hub, green, NULL) < 0)
        PyErr_WriteUnraisable((PyObject *)green);
    Py_DECREF(green);
    return false;
}

/* Send what is left, which may wait, as sendall() does. What interrupts that leaves it to whoever uses the connection
 * next, or waits there. */
static int pay(PyObject *self, State *state, bool reads) {
    int64_t deadline = 0;
    int done;
    while ((done = pay_some(self, state)) == 0 && !others_pay(state, reads)) {
        state->reader_pays = reads;
        if (wait_ready(self, state, WRITE, &deadline, 0) < 0) {
            if (state->owed != NULL)
                wake_debtor(state);
            return -1;
        }
    }
    return done < 0 ? -1 : 0;
}

static void send_put_off(State *state) {
    if (state->later && attached(state))
        send_later((Hub *)state->hub);
    state->later = false;
}

/* Before something else is sent on `self`. It may wait. */
int settle_answers(PyObject *self, State *state) {
    send_put_off(state);
    return state->owed != NULL ? pay(self, state, false) : 0;
}

/* Before `self` is read. It may wait, unless the call that reads may not. */
int settle_to_read(PyObject *self, State *state, bool waits) {
    send_put_off(state);
    if (state->owed == NULL)
        return 0;
    if (waits)
        return pay(self, state, true);
    if (pay_some(self, state) < 0)
        PyErr_Clear();
    return 0;
}

/* Before `self` is closed, or used past its methods. Only the green thread whose answer it is may be kept waiting, as it
 * would have been in sendall(); anybody else finds what there is during a sendall(). -1: an exception that is no outcome
 * of the sending. */
int settle_now(PyObject *self, State *state) {
    bool own = current_hub != NULL && current_hub->loose == self && !in_hub(current_hub);
    send_put_off(state);
    if (state->owed == NULL || (own ? pay(self, state, false) : pay_some(self, state)) >= 0)
        return 0;
    if (!is_outcome())
        return -1;
    PyErr_Clear();
    return 0;
}

/* Before the running green thread gives up its turn, by waiting for something else than the next request if it is
 * `interrupted`. What becomes of the answer is for whoever uses the connection next to find out. */
int settle_loose(Hub *hub, bool interrupted) {
    PyObject *self = hub->loose;
    State *state = state_of(self);
    hub->loose = NULL;
    if (interrupted)
        state->rhythm = NEVER;
    int result = settle_answers(self, state);
    if (result < 0 && is_outcome()) {
        PyErr_Clear();
        result = 0;
    }
    Py_DECREF(self);
    return result;
}

/* The running green thread waits for the next request. */
void note_rhythm(Hub *hub, PyObject *self, State *state) {
    if (hub->loose == self)
        Py_CLEAR(hub->loose);
    else if (state->answers && state->rhythm < STEADY)
        state->rhythm++;
    state->answers = false;
}

/* Whether a sendall() that is to succeed has nothing to tell its caller. */
bool tells_nothing(State *state) {
    return !state->nonblocking && state->timeout == 0 && !state->traced && !state->exposed && !state->broken;
}

static bool may_wait(Hub *hub, State *state) {
    return state->rhythm == STEADY && hub->next_event < hub->event_count && hub->turning && attached(state) &&
           state->hub == (PyObject *)hub && tells_nothing(state) && !state->ended;
}

/* Put an answer off, if it may be: `whole`, or a copy of `data`. 1: done; 0: the caller has to send it; -1. */
static int try_later(PyObject *self, State *state, PyObject *whole, const char *data, size_t size) {
    Hub *hub = current_hub;
    state->answers = true;
    if (hub == NULL || !may_wait(hub, state) || size == 0 || size > SMALL)
        return 0;
    if (hub->loose != NULL)
        return settle_loose(hub, true) < 0 ? -1 : 0;
    PyObject *kept = whole != NULL ? Py_NewRef(whole) : PyBytes_FromStringAndSize(data, (Py_ssize_t)size);
    if (kept == NULL)
        return -1;
    if (hub->later_count == MOST_PUT_OFF)
        send_all_later(hub);
    hub->later[hub->later_count++] = (Later){Py_NewRef(self), kept, 0};
    hub->loose = Py_NewRef(self);
    state->later = true;
    return 1;
}

int put_off(PyObject *self, State *state, PyObject *data) {
    return try_later(self, state, data, NULL, (size_t)PyBytes_GET_SIZE(data));
}

int put_off_copy(PyObject *self, State *state, const char *data, size_t size) {
    return try_later(self, state, NULL, data, size);
}
