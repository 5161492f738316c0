/* SPDX-License-Identifier: MIT
 *
 * Who waits for which descriptor.
 *
 * A descriptor is registered once, edge-triggered and for everything, when somebody first waits for it; it leaves the
 * set before it is closed. Events carry the descriptor and the generation of its slot: those of a registration that is
 * over are recognised, also when a forked child keeps the old file alive. */
#include "hub.h"
#include <errno.h>
#include <poll.h>

#define ALL (EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLPRI | EPOLLET)

Slot *slot_of(Hub *hub, int fd) {
    if (fd < 0) {
        fail(EBADF);
        return NULL;
    }
    int page = fd / SLOTS_A_PAGE;
    if (page >= hub->page_count) {
        int count = page + 1 > 2 * hub->page_count ? page + 1 : 2 * hub->page_count;
        Slot **pages = PyMem_Realloc(hub->pages, (size_t)count * sizeof *pages);
        if (pages == NULL) {
            PyErr_NoMemory();
            return NULL;
        }
        for (int i = hub->page_count; i < count; i++)
            pages[i] = NULL;
        hub->pages = pages;
        hub->page_count = count;
    }
    if (hub->pages[page] == NULL && (hub->pages[page] = PyMem_Calloc(SLOTS_A_PAGE, sizeof(Slot))) == NULL) {
        PyErr_NoMemory();
        return NULL;
    }
    return &hub->pages[page][fd % SLOTS_A_PAGE];
}

static void drop_timer(Hub *hub, Slot *slot, int direction) {
    SlotTimer *timer = slot->timer[direction];
    if (timer != NULL) {
        heap_remove(hub, &timer->node);
        PyMem_Free(timer);
        slot->timer[direction] = NULL;
    }
}

static void each_slot(Hub *hub, void (*function)(Hub *, Slot *)) {
    for (int page = 0; page < hub->page_count; page++)
        for (int i = 0; hub->pages[page] != NULL && i < SLOTS_A_PAGE; i++)
            function(hub, &hub->pages[page][i]);
}

static void forget_waiters(Hub *hub, Slot *slot) {
    Py_CLEAR(slot->waiter[READ]);
    Py_CLEAR(slot->waiter[WRITE]);
    Py_CLEAR(slot->starter);
    Py_CLEAR(slot->guest);
}

void slots_forget_waiters(Hub *hub) { each_slot(hub, forget_waiters); }

static void abandon(Hub *hub, Slot *slot) {
    slot->waiter[READ] = slot->waiter[WRITE] = NULL;
    slot->guest = slot->starter = slot->ahead = NULL;
    slot->registered = slot->dry = slot->came = false;
    slot->want = 0;
    slot->generation++;
}

/* In a forked child: nothing is registered, nobody waits; see hubs_after_fork. */
void slots_abandon(Hub *hub) { each_slot(hub, abandon); }

static void drop(Hub *hub, Slot *slot) {
    drop_timer(hub, slot, READ);
    drop_timer(hub, slot, WRITE);
    Py_CLEAR(slot->ahead);
}

void slots_free(Hub *hub) {
    each_slot(hub, drop);
    for (int page = 0; page < hub->page_count; page++)
        PyMem_Free(hub->pages[page]);
    PyMem_Free(hub->pages);
    hub->pages = NULL;
    hub->page_count = 0;
}

static int register_slot(Hub *hub, Slot *slot, int fd) {
    struct epoll_event event = {.events = ALL, .data.u64 = (uint64_t)slot->generation << 32 | (uint32_t)fd};
    if (epoll_ctl(hub->epoll, EPOLL_CTL_ADD, fd, &event) < 0 &&
        (errno != EEXIST || epoll_ctl(hub->epoll, EPOLL_CTL_MOD, fd, &event) < 0)) {
        PyErr_SetFromErrno(PyExc_OSError);
        return -1;
    }
    slot->registered = true;
    return 0;
}

/* The guest's time has come: its green thread is started, by the loop. */
static int call_guest(Hub *hub, Slot *slot) {
    PyObject *guest = slot->guest, *starter = slot->starter;
    slot->guest = slot->starter = NULL;
    PyObject *args = PyTuple_Pack(1, guest);
    int result = args == NULL ? -1 : enqueue(hub, CALL, starter, args);
    Py_XDECREF(args);
    Py_DECREF(guest);
    Py_DECREF(starter);
    return result;
}

/* Let a connection wait for its first bytes without a green thread. */
int slot_lodge(Hub *hub, Slot *slot, int fd, PyObject *guest, PyObject *starter) {
    if (slot->waiter[READ] != NULL || slot->guest != NULL) {
        PyErr_SetString(PyExc_RuntimeError, BUSY);
        return -1;
    }
    slot->guest = Py_NewRef(guest);
    slot->starter = Py_NewRef(starter);
    /* Registered anew, the kernel tells of what is there already. */
    if (register_slot(hub, slot, fd) == 0)
        return 0;
    Py_CLEAR(slot->guest);
    Py_CLEAR(slot->starter);
    return -1;
}

/* Whoever waits there gets EBADF: its descriptor goes. A guest will find that out by itself. */
static void evict(Hub *hub, Slot *slot) {
    if (slot->guest != NULL && call_guest(hub, slot) < 0)
        PyErr_WriteUnraisable(NULL);
    for (int direction = READ; direction <= WRITE; direction++) {
        PyGreenlet *green = slot->waiter[direction];
        if (green == NULL)
            continue;
        slot->waiter[direction] = NULL;
        PyObject *error = PyObject_CallFunction(PyExc_OSError, "is", EBADF, "Bad file descriptor");
        if (error == NULL || throw_into(hub, green, error) < 0) {
            PyErr_Clear(); /* no memory: it finds out by itself */
            if (make_due(hub, green, NULL) < 0)
                PyErr_WriteUnraisable((PyObject *)green);
        }
        Py_XDECREF(error);
        Py_DECREF(green);
    }
}

/* The descriptor begins a new life. */
void slot_renew(Hub *hub, Slot *slot) {
    evict(hub, slot);
    slot->generation++;
    slot->registered = slot->owned = slot->dry = slot->sticky = slot->came = false;
    slot->want = 0;
    Py_CLEAR(slot->ahead);
}

/* The descriptor is about to be closed or given away. */
void slot_leave(Hub *hub, Slot *slot, int fd) {
    if (slot->registered && hub->epoll >= 0)
        epoll_ctl(hub->epoll, EPOLL_CTL_DEL, fd, NULL);
    slot_renew(hub, slot);
}

int timed_out(void) {
    PyErr_SetString(PyExc_TimeoutError, "timed out");
    return -1;
}

static void wake_waiter(Hub *hub, Slot *slot, int direction) {
    PyGreenlet *green = slot->waiter[direction];
    if (green == NULL || is_due(hub, green)) /* it will go on anyway, and ask the descriptor itself */
        return;
    slot->waiter[direction] = NULL;
    resume(hub, green, NULL);
    Py_DECREF(green);
}

static int fire_timeout(Hub *hub, Node *node) {
    SlotTimer *timer = (SlotTimer *)node;
    Slot *slot = timer->slot;
    if (timer->wanted == 0 || slot->waiter[timer->direction] == NULL)
        return 0;
    if (timer->wanted > node->deadline) { /* a later wait has moved it */
        node->deadline = timer->wanted;
        return heap_insert(hub, node);
    }
    slot->timed_out |= 1u << timer->direction;
    wake_waiter(hub, slot, timer->direction);
    return 0;
}

static int set_timeout(Hub *hub, Slot *slot, int direction, int64_t deadline) {
    SlotTimer *timer = slot->timer[direction];
    if (timer == NULL) {
        if (deadline == 0)
            return 0;
        if ((timer = slot->timer[direction] = PyMem_Calloc(1, sizeof *timer)) == NULL) {
            PyErr_NoMemory();
            return -1;
        }
        *timer = (SlotTimer){.node = {.index = -1, .fire = fire_timeout}, .slot = slot, .direction = direction};
    }
    timer->wanted = deadline;
    if (deadline == 0 || (timer->node.index >= 0 && timer->node.deadline <= deadline))
        return 0;
    heap_remove(hub, &timer->node);
    timer->node.deadline = deadline;
    return heap_insert(hub, &timer->node);
}

Slot *event_slot(Hub *hub, struct epoll_event *event) {
    uint32_t fd = (uint32_t)event->data.u64;
    int page = (int)(fd / SLOTS_A_PAGE);
    if (page >= hub->page_count || hub->pages[page] == NULL)
        return NULL;
    Slot *slot = &hub->pages[page][fd % SLOTS_A_PAGE];
    return slot->generation == (uint32_t)(event->data.u64 >> 32) ? slot : NULL;
}

static void note(Slot *slot, uint32_t events) {
    if (events & NOTED)
        return;
    if (events & ENDS)
        slot->sticky = true;
    if (events & (EPOLLIN | ENDS))
        slot->dry = false;
}

void slot_event(Hub *hub, struct epoll_event *event) {
    uint32_t events = event->events;
    uint64_t tag = event->data.u64; /* the green threads may end the turn that the event is of */
    Slot *slot = event_slot(hub, event);
    if (slot == NULL)
        return;
    note(slot, events);
    if (slot->guest != NULL) {
        if (events & (EPOLLIN | ENDS) && call_guest(hub, slot) < 0)
            PyErr_WriteUnraisable(NULL);
        return;
    }
    if (events & (EPOLLIN | ENDS))
        wake_waiter(hub, slot, READ);
    /* Whoever was just resumed may have closed the descriptor. */
    if (events & (EPOLLOUT | EPOLLHUP | EPOLLERR) && slot->generation == (uint32_t)(tag >> 32))
        wake_waiter(hub, slot, WRITE);
}

/* Give up the running green thread: to the one that the next event is for, which saves a switch to the hub and one
 * from it, or to the hub. NULL: an exception. */
PyObject *pass_on(Hub *hub, PyGreenlet *me) {
    while (hub->next_event < hub->event_count || fetch_in_its_place(hub)) {
        if (hub->event_count <= 0)
            break;
        struct epoll_event *event = &hub->events[hub->next_event];
        if ((uint32_t)event->data.u64 & DOOR_BIT)
            break;
        Slot *slot = event_slot(hub, event);
        PyGreenlet *next = slot == NULL ? NULL : slot->waiter[READ];
        if (slot != NULL && (slot->waiter[WRITE] != NULL || slot->guest != NULL))
            break; /* two may have to be woken, or a guest: the hub's work */
        hub->next_event++;
        if (slot == NULL)
            continue;
        note(slot, event->events);
        if (!(event->events & (EPOLLIN | ENDS)) || next == NULL || is_due(hub, next))
            continue;
        slot->waiter[READ] = NULL;
        hub->budget = TURN_BUDGET;
        beat_piece(hub->beat);
        Py_XSETREF(hub->passed, next); /* `me` may rest for long, and would hold it */
        return next == me ? Py_NewRef(Py_None) : PyGreenlet_Switch(next, NULL, NULL);
    }
    return PyGreenlet_Switch(hub->greenlet, NULL, NULL);
}

/* Park the running green thread until the descriptor may be ready. `deadline` 0 is never. The caller holds the hub. */
int slot_wait(Hub *hub, PyGreenlet *me, Slot *slot, int fd, int direction, int64_t deadline) {
    if (slot->waiter[direction] != NULL || (direction == READ && slot->guest != NULL)) {
        PyErr_SetString(PyExc_RuntimeError, BUSY);
        return -1;
    }
    if ((!slot->registered && register_slot(hub, slot, fd) < 0) || set_timeout(hub, slot, direction, deadline) < 0)
        return -1;
    slot->waiter[direction] = (PyGreenlet *)Py_NewRef(me);
    slot->timed_out &= (uint8_t)~(1u << direction);
    PyObject *back = pass_on(hub, me);
    bool late = slot->timed_out & 1u << direction;
    if (slot->waiter[direction] == me) { /* neither an event nor the timeout: park()'s ways, or an exception */
        slot->waiter[direction] = NULL;
        late = false;
        Py_DECREF(me);
    }
    if (back == NULL) {
        undo_due(hub);
        return -1;
    }
    Py_DECREF(back);
    return late ? timed_out() : 0;
}

/* Wait as a plain thread does. */
int poll_wait(int fd, int direction, int64_t deadline) {
    struct pollfd ready = {.fd = fd, .events = direction == WRITE ? POLLOUT : POLLIN | POLLPRI};
    for (;;) {
        int patience = -1;
        if (deadline) {
            int64_t left = (deadline - now_ns() + 999999) / 1000000;
            patience = left < 0 ? 0 : left > 1000000000 ? 1000000000 : (int)left;
        }
        int count, error;
        Py_BEGIN_ALLOW_THREADS;
        count = poll(&ready, 1, patience);
        error = errno;
        Py_END_ALLOW_THREADS;
        if (count < 0 && error == EINTR) {
            if (PyErr_CheckSignals() < 0)
                return -1;
            continue;
        }
        if (count < 0 || ready.revents & POLLNVAL) {
            errno = count < 0 ? error : EBADF;
            PyErr_SetFromErrno(PyExc_OSError);
            return -1;
        }
        if (count > 0)
            return 0;
        if (now_ns() >= deadline)
            return timed_out();
    }
}

/* Wait for a descriptor that need not be a Connection's. */
int wait_fd(Hub *hub, int fd, int direction, int64_t deadline) {
    struct pollfd ready = {.fd = fd, .events = direction == WRITE ? POLLOUT : POLLIN | POLLPRI};
    if (flush_pending(hub) < 0)
        return -1;
    int count = poll(&ready, 1, 0);
    if (count > 0 && ready.revents & POLLNVAL) {
        errno = EBADF;
        PyErr_SetFromErrno(PyExc_OSError);
        return -1;
    }
    Slot *slot = slot_of(hub, fd);
    if (slot == NULL)
        return -1;
    if (slot->waiter[direction] != NULL) {
        PyErr_SetString(PyExc_RuntimeError, BUSY);
        return -1;
    }
    if (count > 0 || (direction == READ && slot->owned && slot->came))
        return 0;
    /* Registered anew: somebody may have closed and opened the number. That also tells its state of now. */
    if (register_slot(hub, slot, fd) < 0) {
        if (!PyErr_ExceptionMatches(PyExc_PermissionError))
            return -1;
        PyErr_Clear(); /* epoll takes no regular files, which are always ready */
        return 0;
    }
    uint32_t generation = slot->generation;
    PyGreenlet *me = PyGreenlet_GetCurrent();
    int result = slot_wait(hub, me, slot, fd, direction, deadline);
    Py_DECREF(me);
    if (!slot->owned && slot->generation == generation && !slot->waiter[READ] && !slot->waiter[WRITE]) {
        if (hub->epoll >= 0)
            epoll_ctl(hub->epoll, EPOLL_CTL_DEL, fd, NULL);
        slot->registered = false;
    }
    return result;
}
