/* SPDX-License-Identifier: MIT
 *
 * A stream that passes through: large pieces go on together.
 *
 * A handler that copies (recv, sendall, and again) sends a piece as soon as it has one. Each send wakes a client that has
 * slept, and with large pieces that, and not the copying, is what costs most: a megabyte in pieces of 64 KiB was 0.7 of
 * the C floor one by one, and 1.1 with up to sixteen sent by one sendmsg(2). So while more lies ready to be read (a read
 * came back full), what is written after it is kept, by reference, and goes out when the next read would wait, at
 * FLOW_BYTES, and before the green thread or the connection does anything else. The peer waits for that, never that for it.
 *
 * As in together.c only a connection that has gone on like this STEADY times, and none where sendall() could tell more;
 * and an error is raised by the call that finds it, if that is one of this connection's. */
#include "hub.h"
#include <errno.h>
#include <sys/socket.h>
#include <sys/uio.h>

#define FLOW_BYTES 524288 /* half of what a turn may move */

/* Take it from the hub: whoever does sends it, or drops it. */
static Flow take(Hub *hub) {
    Flow flow = hub->flow;
    hub->flow.owner = NULL;
    hub->flow.count = hub->flow.bytes = hub->flow.from = 0;
    if (flow.owner != NULL)
        state_of(flow.owner)->flowing = false;
    return flow;
}

static void forget(Flow *flow) {
    for (size_t i = 0; i < flow->count; i++)
        Py_DECREF(flow->pieces[i]);
    Py_DECREF(flow->owner);
}

/* How much the kernel takes at once; -1: nothing, and errno says why. */
static ssize_t send_pieces(Flow *flow) {
    struct iovec parts[FLOW_PIECES];
    for (size_t i = 0; i < flow->count; i++) {
        size_t from = i == 0 ? flow->from : 0;
        parts[i] = (struct iovec){PyBytes_AS_STRING(flow->pieces[i]) + from, (size_t)PyBytes_GET_SIZE(flow->pieces[i]) - from};
    }
    struct msghdr message = {.msg_iov = parts, .msg_iovlen = flow->count};
    ssize_t sent = sendmsg(socket_fd(flow->owner), &message, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (sent > 0)
        note_moved(state_of(flow->owner), WRITE, (size_t)sent);
    return sent;
}

/* Somebody may have begun to follow the connection meanwhile. Other threads may run while he is told. */
static void tell_sent(PyObject *owner, ssize_t sent) {
    if (sent > 0 && state_of(owner)->traced)
        tell_traffic(owner, WRITE, NULL, (size_t)sent);
}

/* What the kernel did not take, as one object. */
static PyObject *rest_of(Flow *flow, size_t sent) {
    size_t skip = flow->from + sent, total = 0;
    for (size_t i = 0; i < flow->count; i++)
        total += (size_t)PyBytes_GET_SIZE(flow->pieces[i]);
    PyObject *rest = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)(total - skip));
    char *at = rest == NULL ? NULL : PyBytes_AS_STRING(rest);
    for (size_t i = 0; at != NULL && i < flow->count; i++) {
        size_t size = (size_t)PyBytes_GET_SIZE(flow->pieces[i]), gone = skip < size ? skip : size;
        memcpy(at, PyBytes_AS_STRING(flow->pieces[i]) + gone, size - gone);
        at += size - gone;
        skip -= gone;
    }
    return rest;
}

/* Send all. It may wait; what interrupts that leaves the rest to whoever uses the connection next: see `owed`. */
static int send_flow(Flow *flow) {
    State *state = state_of(flow->owner);
    ssize_t sent = send_pieces(flow);
    state->ended = false;
    if (sent < 0 && errno != EAGAIN && errno != EINTR) {
        state->broken |= errno == ECONNRESET;
        return fail(errno);
    }
    tell_sent(flow->owner, sent);
    size_t done = sent > 0 ? (size_t)sent : 0;
    if (done == flow->bytes)
        return 0;
    if (!attached(state)) /* it was closed meanwhile */
        return fail(EBADF);
    PyObject *rest = rest_of(flow, done);
    if (rest == NULL)
        return -1;
    owe(state, rest, 0);
    Py_DECREF(rest);
    return settle_answers(flow->owner, state);
}

/* Send what the running green thread has kept. It may wait. */
int flow_flush(Hub *hub) {
    if (hub->flow.owner == NULL)
        return 0;
    Flow flow = take(hub); /* others will have flows of their own while we wait */
    int result = send_flow(&flow);
    forget(&flow);
    return result;
}

static Hub *holder(PyObject *self) {
    Hub *hub = all_hubs;
    while (hub != NULL && hub->flow.owner != self)
        hub = hub->next;
    return hub;
}

/* Before something else is sent on `self`, by whatever thread. It may wait. */
int flow_flush_of(PyObject *self) {
    Hub *hub = holder(self);
    return hub != NULL ? flow_flush(hub) : 0;
}

/* Before the running green thread gives up its turn in a call of `user`'s. What becomes of the pieces is told there, if
 * that is where they go. */
int flow_settle(Hub *hub, PyObject *user) {
    bool own = hub->flow.owner == user;
    int result = flow_flush(hub);
    if (result < 0 && !own && is_outcome()) {
        PyErr_Clear(); /* whoever uses that connection next finds out */
        result = 0;
    }
    return result;
}

/* Before it waits for something that has nothing to do with the stream. */
int flow_interrupted(Hub *hub) {
    state_of(hub->flow.owner)->flow = NEVER;
    return flow_settle(hub, NULL);
}

/* Without a word, as the hub goes. */
void flow_drop(Hub *hub) {
    Flow flow = take(hub);
    if (flow.owner != NULL)
        forget(&flow);
}

/* Send what can be sent without waiting, whatever thread this is; how much that was. */
size_t flow_flush_nowait(Hub *hub) {
    Flow *flow = &hub->flow;
    ssize_t sent = flow->owner == NULL ? 0 : send_pieces(flow);
    if (sent <= 0)
        return 0;
    size_t done = flow->from + (size_t)sent, whole = 0;
    while (whole < flow->count && done >= (size_t)PyBytes_GET_SIZE(flow->pieces[whole]))
        done -= (size_t)PyBytes_GET_SIZE(flow->pieces[whole++]);
    Flow gone = *flow;
    gone.count = whole;
    flow->count -= whole;
    flow->bytes -= (size_t)sent;
    flow->from = done;
    memmove(flow->pieces, flow->pieces + whole, flow->count * sizeof *flow->pieces);
    Py_INCREF(gone.owner);
    if (flow->count == 0)
        Py_DECREF(take(hub).owner);
    tell_sent(gone.owner, sent); /* last: other threads may run meanwhile */
    forget(&gone);
    return (size_t)sent;
}

/* What is kept, as one object, and whose it is: the caller's business from now on. NULL with an exception: it is lost. */
PyObject *flow_take(Hub *hub, PyObject **owner) {
    Flow flow = take(hub);
    PyObject *rest = rest_of(&flow, 0);
    *owner = Py_NewRef(flow.owner);
    forget(&flow);
    return rest;
}

/* Before `self` is closed, or sends in another way. Only the green thread whose stream it is may be kept waiting. */
int flow_leave(PyObject *self) {
    Hub *hub = holder(self);
    if (hub != NULL && hub == hub_here() && !in_hub(hub))
        return flow_flush(hub);
    if (hub != NULL)
        flow_flush_nowait(hub);
    return 0;
}

static bool may_flow(Hub *hub, PyObject *self, State *state) {
    return state->flow == STEADY && tells_nothing(state) && state->owed == NULL && !state->later &&
           hub->pending_owner != self && hub->turning && !in_hub(hub);
}

/* Keep a piece, if it is one of a stream. 1: done; 0: the caller has to send it; -1. */
int flow_join(PyObject *self, State *state, PyObject *data) {
    Hub *hub = hub_here();
    size_t size = (size_t)PyBytes_GET_SIZE(data);
    if (hub == NULL || size < FLOW_PIECE)
        return 0;
    bool full = hub->full;
    if (full && hub->wrote == self && state->flow < STEADY)
        state->flow++;
    hub->wrote = self;
    hub->full = false;
    if (!full || size > FLOW_BYTES || !may_flow(hub, self, state)) /* so large a one would be copied, where it waits */
        return 0;
    if (!attached(state) && attach(state, hub, socket_fd(self)) < 0) { /* what it may owe is its hub's business */
        PyErr_Clear();
        return 0;
    }
    if (hub->flow.owner != self && flow_settle(hub, NULL) < 0)
        return -1;
    if (hub->flow.owner == NULL) {
        hub->flow.owner = Py_NewRef(self);
        note_debtor(hub, state->slot);
    }
    state->flowing = true;
    hub->flow.pieces[hub->flow.count++] = Py_NewRef(data);
    hub->flow.bytes += size;
    hub->budget -= PIECES(size);
    if (hub->flow.count == FLOW_PIECES || hub->flow.bytes >= FLOW_BYTES)
        return flow_flush(hub) < 0 ? -1 : 1;
    return 1;
}
