/* SPDX-License-Identifier: MIT
 *
 * Doors: listening sockets and the like, whose function is called while they can be read. A Batch or a Lane may see to
 * one without Python. */
#include "hub.h"
#include <errno.h>

#define LOST_NS 100000000 /* 100 ms: how long a door stays lost at least; as an acceptor's first pause */

static int add_door(Hub *hub, int place) {
    Door *door = &hub->doors[place];
    struct epoll_event event = {
        .events = EPOLLIN | (door->shared ? EPOLLEXCLUSIVE : 0),
        .data.u64 = (uint64_t)door->generation << 32 | DOOR_BIT | (uint32_t)place,
    };
    return epoll_ctl(hub->epoll, EPOLL_CTL_ADD, door->fd, &event);
}

static int find_lost(Hub *hub, Node *node);

static int find_later(Hub *hub) {
    hub->lost = (Node){.deadline = now_ns() + LOST_NS, .index = -1, .fire = find_lost};
    return heap_insert(hub, &hub->lost);
}

/* Watch again what the kernel had no room for (ENOSPC: max_user_watches; ENOMEM): nobody would come in for ever. */
static int find_lost(Hub *hub, Node *node) {
    bool lost = false;
    for (int place = 0; place < hub->door_count; place++) {
        Door *door = &hub->doors[place];
        if (door->door != NULL && door->lost)
            lost |= door->lost = add_door(hub, place) < 0 && (errno == ENOMEM || errno == ENOSPC);
    }
    return lost ? find_later(hub) : 0;
}

/* EPOLLEXCLUSIVE wakes one process, and always the same one while that can keep up: the first in the queue of the
 * door's waiters. Added anew we stand at its end. (epoll_ctl(2): an exclusive entry cannot be modified.) */
static int go_to_the_end(Hub *hub, int place) {
    if (epoll_ctl(hub->epoll, EPOLL_CTL_DEL, hub->doors[place].fd, NULL) < 0 || add_door(hub, place) == 0)
        return 0;
    hub->doors[place].lost = true;
    return hub->lost.index < 0 ? find_later(hub) : 0;
}

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

int open_door(Hub *hub, uint32_t place, uint32_t generation) {
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
    if (door != NULL && door->door != NULL && door->generation == generation && door->shared &&
        go_to_the_end(hub, (int)place) < 0)
        result = -1;
    return result;
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

PyObject *hub_watch(PyObject *self, PyObject *const *args, Py_ssize_t count) {
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
    if (fd < 0)
        return NULL;
    if (hub->closed) {
        PyErr_SetString(PyExc_RuntimeError, "this hub is closed: it watches nothing any more");
        return NULL;
    }
    if ((place = find_door(hub, NULL)) < 0) {
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
    door->lost = false;
    if (add_door(hub, place) < 0)
        return PyErr_SetFromErrno(PyExc_OSError);
    door->door = Py_NewRef(args[0]);
    door->on_readable = Py_NewRef(args[1]);
    if (!in_turn(hub))
        hub_wake(hub);
    Py_RETURN_NONE;
}

PyObject *hub_unwatch(PyObject *self, PyObject *door) {
    int place = find_door((Hub *)self, door);
    if (place >= 0)
        remove_door((Hub *)self, place);
    Py_RETURN_NONE;
}

void drop_doors(Hub *hub) {
    while (hub->door_count > 0) {
        Door door = hub->doors[--hub->door_count];
        Py_XDECREF(door.door);
        Py_XDECREF(door.on_readable);
        Py_XDECREF(door.shortcut);
    }
}
