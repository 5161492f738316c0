/* SPDX-License-Identifier: MIT
 *
 * What is owed: the rest of an answer that was put off (together.c), or of a stream (flow.c), which the kernel did not
 * take at once. It is sent before anything else is, and before its green thread reads on, by whoever comes first. */
#include "hub.h"
#include <errno.h>
#include <sys/socket.h>

/* The green thread that waits for the next request has to send the rest first. */
static void wake_debtor(State *state) {
    Hub *hub = (Hub *)state->hub;
    PyGreenlet *green = attached(state) ? state->slot->waiter[READ] : NULL;
    if (green != NULL && !is_due(hub, green) && make_due(hub, green, NULL) < 0)
        PyErr_WriteUnraisable((PyObject *)green);
}

/* Of `data` only `sent` bytes are gone. */
void owe(State *state, PyObject *data, size_t sent) {
    state->slot->owed_from = (uint32_t)sent;
    Py_XSETREF(state->owed, Py_NewRef(data));
    wake_debtor(state);
}

/* What the running green thread has written there is kept. Elsewhere than in gevent's loop `loose` tells whose it is. */
void note_debtor(Hub *hub, Slot *slot) {
    if (!hub->occupies)
        return;
    PyGreenlet *me = PyGreenlet_GetCurrent();
    slot->debtor = me;
    Py_XDECREF(me); /* the running greenlet lives */
}

/* Let another green thread send the rest, where the one whose answer it is may wait unseen, in gevent, and nobody wakes
 * it. */
static void send_by_another(PyObject *self, State *state) {
    Hub *hub = (Hub *)state->hub;
    if (!hub->occupies || hub->closed || state->slot->waiter[READ] != NULL || state->slot->waiter[WRITE] != NULL)
        return;
    PyObject *pay = PyObject_GetAttrString(self, "pay");
    PyObject *green = pay == NULL ? NULL : spawn(hub, NULL, pay, NULL, 0);
    if (green == NULL)
        PyErr_WriteUnraisable(self);
    Py_XDECREF(pay);
    Py_XDECREF(green);
}

void owe_unseen(PyObject *self, State *state, PyObject *data, size_t sent) {
    owe(state, data, sent);
    send_by_another(self, state);
}

/* What waited to send the rest was interrupted: the exception stays. */
static void leave_owed(PyObject *self, State *state) {
    if (state->owed == NULL || !attached(state))
        return;
    PyObject *type, *error, *trace;
    PyErr_Fetch(&type, &error, &trace);
    wake_debtor(state);
    if (!state->nonblocking)
        send_by_another(self, state);
    PyErr_Restore(type, error, trace);
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
        if (state->owed != NULL && !attached(state)) { /* whoever was told of it, or of a signal, has closed it */
            Py_CLEAR(state->owed);
            return fail(EBADF);
        }
    }
    return 1;
}

/* Whether another green thread of this hub waits to send the rest. One that writes on takes that over from the one that
 * reads, which goes on: it has nothing to do there but that. */
static bool others_pay(State *state, bool reads) {
    Hub *hub = hub_here();
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
            leave_owed(self, state);
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

/* Whether the running green thread is the one whose answer is owed. In gevent's loop that may have waited unseen. */
static bool is_own(PyObject *self, State *state) {
    Hub *hub = hub_here();
    if (hub == NULL || in_hub(hub))
        return false;
    PyGreenlet *me = PyGreenlet_GetCurrent();
    Py_XDECREF(me);
    return hub->loose == self || (hub->occupies && attached(state) && state->slot->debtor == me);
}

/* Before `self` is closed, or used past its methods. Only the green thread whose answer it is may be kept waiting, as it
 * would have been in sendall(); anybody else finds what there is during a sendall(). -1: an exception that is no outcome
 * of the sending. */
int settle_now(PyObject *self, State *state) {
    bool own = is_own(self, state);
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
