/* SPDX-License-Identifier: MIT
 *
 * What a green thread has written and not sent: answers that are joined while its reader still holds requests.
 *
 * What was joined is sent before the green thread gives up its turn in any way, so no answer ever waits for the peer; at
 * most one green thread, the running one, has such output, and one buffer a hub is enough. What else may wait to be sent
 * (together.c, flow.c, owed.c) goes from here, too, wherever something is to follow it. */
#include "files.h"
#include <errno.h>
#include <sys/socket.h>

static int call_keeper(PyObject *keeper, PyObject *rest) {
    PyObject *type, *error, *trace;
    PyErr_Fetch(&type, &error, &trace); /* a green thread that ends may have one */
    PyObject *done = PyObject_CallOneArg(keeper, rest);
    Py_XDECREF(done);
    if (done == NULL) {
        Py_XDECREF(type);
        Py_XDECREF(error);
        Py_XDECREF(trace);
        return -1;
    }
    PyErr_Restore(type, error, trace);
    return 0;
}

/* What the peer does not take at once of what was joined for `owner` in `hub`. Other threads may write meanwhile: it goes
 * before that. */
static int send_owed(Hub *hub, PyObject *owner, PyObject *rest) {
    State *state = state_of(owner);
    if (!attached(state) && attach(state, hub, socket_fd(owner)) < 0)
        return -1;
    owe(state, rest, 0);
    return settle_answers(owner, state);
}

/* Send what the running green thread has joined. It may wait, unless somebody keeps what the peer does not take. */
int flush_pending(Hub *hub) {
    hub->full = false;
    if (hub->loose != NULL && settle_loose(hub, true) < 0)
        return -1;
    if (hub->flow.owner != NULL && flow_interrupted(hub) < 0)
        return -1;
    hub->wrote = NULL;
    PyObject *owner = hub->pending_owner, *keeper = hub->pending_keeper;
    size_t size = hub->pending_size;
    if (owner == NULL)
        return 0;
    hub->pending_owner = hub->pending_keeper = NULL;
    hub->pending_size = 0;
    state_of(owner)->joined = false;
    int result = 0, fd = socket_fd(owner);
    ssize_t sent = send(fd, hub->pending, size, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (sent < 0 && errno != EAGAIN && errno != EINTR)
        result = fail(errno);
    if (sent > 0)
        moved(owner, state_of(owner), WRITE, hub->pending, (size_t)sent);
    if (result == 0 && sent < (ssize_t)size) { /* others will use the buffer while we wait */
        size_t done = sent > 0 ? (size_t)sent : 0;
        PyObject *rest = PyBytes_FromStringAndSize(hub->pending + done, (Py_ssize_t)(size - done));
        if (rest == NULL)
            result = -1;
        else if (keeper != NULL)
            result = call_keeper(keeper, rest);
        else
            result = send_owed(hub, owner, rest);
        Py_XDECREF(rest);
    }
    Py_XDECREF(keeper);
    Py_DECREF(owner);
    return result;
}

/* The same, where the green thread waits for nothing: it lets the others have their turn, or ends. */
int flush_turn(Hub *hub) {
    if ((hub->loose != NULL && settle_loose(hub, false) < 0) || flow_settle(hub, NULL) < 0)
        return -1;
    return flush_pending(hub);
}

/* Send what can be sent without waiting, whatever thread this is; its number of bytes. What a handler wrote before it
 * went on computing gets out so. An error is left for the green thread to meet. */
size_t flush_pending_nowait(Hub *hub) {
    int fd = hub->pending_owner == NULL ? -1 : socket_fd(hub->pending_owner);
    if (fd < 0 || hub->pending_owner == NULL) {
        PyErr_Clear();
        return 0;
    }
    ssize_t sent = send(fd, hub->pending, hub->pending_size, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (sent <= 0)
        return 0;
    PyObject *owner = Py_NewRef(hub->pending_owner);
    PyObject *told = state_of(owner)->traced ? PyBytes_FromStringAndSize(hub->pending, sent) : NULL;
    note_moved(state_of(owner), WRITE, (size_t)sent);
    hub->pending_size -= (size_t)sent;
    memmove(hub->pending, hub->pending + sent, hub->pending_size);
    if (hub->pending_size == 0) {
        state_of(owner)->joined = false;
        Py_CLEAR(hub->pending_owner);
        Py_CLEAR(hub->pending_keeper);
    }
    if (told != NULL) /* last: it may let other threads run */
        tell_traffic(owner, WRITE, PyBytes_AS_STRING(told), (size_t)sent);
    Py_XDECREF(told);
    Py_DECREF(owner);
    return (size_t)sent;
}

/* What is joined, which is the caller's business from now on; NULL with an exception: nothing was taken. */
PyObject *take_joined(Hub *hub) {
    PyObject *rest = PyBytes_FromStringAndSize(hub->pending, (Py_ssize_t)hub->pending_size);
    if (rest != NULL) {
        hub->pending_size = 0;
        state_of(hub->pending_owner)->joined = false;
        Py_CLEAR(hub->pending_owner);
        Py_CLEAR(hub->pending_keeper);
    }
    return rest;
}

/* Owe `rest` to the peer of `owner`. Both are given away. */
static void leave_unseen(Hub *hub, PyObject *rest, PyObject *owner) {
    State *state = state_of(owner);
    if (socket_fd(owner) < 0)
        PyErr_Clear(); /* another thread has closed it */
    else if (rest == NULL || (!attached(state) && attach(state, hub, socket_fd(owner)) < 0))
        PyErr_WriteUnraisable(owner);
    else
        owe_unseen(owner, state, rest, 0);
    Py_XDECREF(rest);
    Py_DECREF(owner);
}

/* A green thread has given up its turn, and the hub knows nothing of it: in gevent's loop it waits for what is gevent's,
 * and goes on between turns. What it has written goes, and what the kernel does not take is another one's business. */
void unsent_unseen(Hub *hub) {
    PyObject *owner = NULL;
    if (hub->loose != NULL) {
        state_of(hub->loose)->rhythm = NEVER; /* the answer goes as the turn ends */
        Py_CLEAR(hub->loose);
    }
    if (hub->flow.owner != NULL) {
        state_of(hub->flow.owner)->flow = NEVER;
        flow_flush_nowait(hub);
    }
    if (hub->flow.owner != NULL) {
        PyObject *rest = flow_take(hub, &owner);
        leave_unseen(hub, rest, owner);
    }
    flush_pending_nowait(hub);
    if ((owner = Py_XNewRef(hub->pending_owner)) != NULL)
        leave_unseen(hub, take_joined(hub), owner);
}

/* What a green thread has joined for `sock` goes before what this thread sends, of which that one knows. */
static int flush_for_another(PyObject *sock) {
    Hub *hub = all_hubs;
    while (hub != NULL && hub->pending_owner != sock)
        hub = hub->next;
    if (hub == NULL)
        return 0;
    PyObject *rest = take_joined(hub);
    int result = rest == NULL ? -1 : send_owed(hub, sock, rest);
    Py_XDECREF(rest);
    return result;
}

/* Before something is sent on `sock`: what was written goes first. */
int flush_of(PyObject *sock) {
    Hub *hub = hub_here();
    State *state = state_of(sock);
    if ((state->later || state->owed != NULL) && settle_answers(sock, state) < 0)
        return -1;
    if (state->flowing && flow_flush_of(sock) < 0)
        return -1;
    if (hub != NULL && hub->pending_owner == sock)
        return flush_pending(hub);
    return state->joined ? flush_for_another(sock) : 0;
}

/* Before something changes how `sock` sends: what was put off goes as it would have then. Anybody may do that, at any
 * time: see settle_now(). */
int settle_of(PyObject *sock) {
    State *state = state_of(sock);
    if ((state->later || state->owed != NULL) && settle_now(sock, state) < 0)
        return -1;
    return state->flowing ? flow_leave(sock) : 0;
}

/* Before `sock` is closed, or used past its methods. */
int flush_to_leave(PyObject *sock) {
    Hub *hub = hub_here();
    State *state = state_of(sock);
    if (settle_of(sock) < 0)
        return -1;
    if (hub != NULL && hub->pending_owner == sock)
        return flush_pending(hub);
    for (Hub *other = state->joined ? all_hubs : NULL; other != NULL; other = other->next)
        if (other->pending_owner == sock)
            flush_pending_nowait(other);
    return 0;
}

int join(Hub *hub, PyObject *sock, const char *data, size_t size) {
    if (hub->pending_owner != NULL && (hub->pending_owner != sock || hub->pending_size + size > PENDING) &&
        flush_pending(hub) < 0)
        return -1;
    if (hub->pending == NULL && (hub->pending = PyMem_Malloc(PENDING)) == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    if (hub->pending_owner == NULL) {
        if (flush_of(sock) < 0) /* so that nothing else is unsent where something is pending */
            return -1;
        State *state = state_of(sock);
        if (hub->occupies && !attached(state) && attach(state, hub, socket_fd(sock)) < 0)
            return -1; /* it may owe, which is its hub's business */
        note_debtor(hub, state->slot);
        hub->pending_owner = Py_NewRef(sock);
        state->joined = true;
    }
    append(hub, data, size);
    return 0;
}
