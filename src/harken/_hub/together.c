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
 * - What the kernel does not take at once, or refuses, is the green thread's business again (owed.c): it is woken, and
 *   sends the rest or raises before it reads on, as it would have in sendall(). So does whoever uses the connection next.
 * - In gevent's loop a green thread may also wait unseen. Its answer goes with the others', and none of that connection's
 *   is put off again: see unsent_unseen().
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
    if (attached(state)) /* or it was closed meanwhile */
        owe_unseen(later->owner, state, later->data, later->sent);
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
    if (hub_here() != NULL) {
        flow_flush_nowait(hub_here());
        flush_pending_nowait(hub_here());
    }
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
    Hub *hub = hub_here();
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
    note_debtor(hub, state->slot);
    state->later = true;
    return 1;
}

int put_off(PyObject *self, State *state, PyObject *data) {
    return try_later(self, state, data, NULL, (size_t)PyBytes_GET_SIZE(data));
}

int put_off_copy(PyObject *self, State *state, const char *data, size_t size) {
    return try_later(self, state, NULL, data, size);
}
