/* SPDX-License-Identifier: MIT
 *
 * A hub is made, closed, forked, and given back. */
#include "hub.h"
#include <sys/eventfd.h>
#include <unistd.h>

HIDDEN Hub *all_hubs;
HIDDEN bool forked;

int watch_fd(Hub *hub, int fd, uint64_t tag) {
    struct epoll_event event = {.events = EPOLLIN, .data.u64 = tag};
    return epoll_ctl(hub->epoll, EPOLL_CTL_ADD, fd, &event);
}

void close_fd(int *fd) {
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
}

static int open_fds(Hub *hub) {
    hub->woken = false;
    hub->epoll = epoll_create1(EPOLL_CLOEXEC);
    hub->wakeup = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (hub->epoll >= 0 && hub->wakeup >= 0 && watch_fd(hub, hub->wakeup, WAKEUP_TAG) == 0)
        return 0;
    PyErr_SetFromErrno(PyExc_OSError);
    close_fd(&hub->epoll);
    close_fd(&hub->wakeup);
    return -1;
}

static void unlink_hub(Hub *hub) {
    if (hub->previous != NULL)
        hub->previous->next = hub->next;
    else if (all_hubs == hub)
        all_hubs = hub->next;
    if (hub->next != NULL)
        hub->next->previous = hub->previous;
    hub->next = hub->previous = NULL;
}

PyObject *hub_new(PyTypeObject *type, PyObject *args, PyObject *words) {
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
    hub->lost.index = -1;
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

PyObject *hub_close(PyObject *self, PyObject *none) {
    Hub *hub = (Hub *)self;
    if (hub->closed)
        Py_RETURN_NONE;
    if (hub_may_run(hub) < 0)
        return NULL;
    PyObject *left = PySequence_List(hub->greens);
    if (left == NULL)
        return NULL;
    Hub *before = hub_enter(hub);
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
    hub_leave(hub, before);
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
    Hub *running = running_hub;
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
        hub->batch = NULL;
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
        running_hub = NULL;
    }
}

int hub_traverse(PyObject *self, visitproc visit, void *arg) {
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

int hub_clear(PyObject *self) {
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

void hub_dealloc(PyObject *self) {
    Hub *hub = (Hub *)self;
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    if (hub->weak != NULL)
        PyObject_ClearWeakRefs(self);
    occupants -= hub->occupies;
    if (running_hub == hub) /* nobody has said that the thread is its own no more: a forked child, say */
        running_hub = NULL;
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
