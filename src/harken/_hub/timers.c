/* SPDX-License-Identifier: MIT
 *
 * Deadlines: a binary heap of nodes that know their place, so that removing one is O(log n) too. */
#include "hub.h"
#include <time.h>

typedef struct {
    PyObject_HEAD
    Node node;
    Hub *hub;           /* owned while the node is in the heap */
    PyObject *function; /* NULL: a sleep, and `args` is the sleeping greenlet */
    PyObject *args;
} Timer;

HIDDEN PyTypeObject *Timer_Type;

int64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

/* Seconds as Python gives them. What is too far away for 64 bits is as good as never. */
int seconds_to_ns(PyObject *seconds, int64_t *ns) {
    double value = PyFloat_AsDouble(seconds);
    if (value == -1.0 && PyErr_Occurred())
        return -1;
    if (value != value) {
        PyErr_SetString(PyExc_ValueError, "seconds must be a number, not nan");
        return -1;
    }
    *ns = value > 9e9 ? (int64_t)9e18 : value < 0 ? 0 : (int64_t)(value * 1e9);
    return 0;
}

static void place(Hub *hub, Py_ssize_t index, Node *node) {
    hub->heap[index] = node;
    node->index = index;
}

static void sift_up(Hub *hub, Py_ssize_t index, Node *node) {
    while (index > 0) {
        Node *parent = hub->heap[(index - 1) / 2];
        if (parent->deadline <= node->deadline)
            break;
        place(hub, index, parent);
        index = (index - 1) / 2;
    }
    place(hub, index, node);
}

static void sift_down(Hub *hub, Py_ssize_t index, Node *node) {
    for (;;) {
        Py_ssize_t child = 2 * index + 1;
        if (child >= hub->heap_size)
            break;
        if (child + 1 < hub->heap_size && hub->heap[child + 1]->deadline < hub->heap[child]->deadline)
            child++;
        if (hub->heap[child]->deadline >= node->deadline)
            break;
        place(hub, index, hub->heap[child]);
        index = child;
    }
    place(hub, index, node);
}

int heap_insert(Hub *hub, Node *node) {
    if (hub->heap_size == hub->heap_capacity) {
        Py_ssize_t capacity = hub->heap_capacity ? 2 * hub->heap_capacity : 64;
        Node **heap = PyMem_Realloc(hub->heap, (size_t)capacity * sizeof *heap);
        if (heap == NULL) {
            PyErr_NoMemory();
            return -1;
        }
        hub->heap = heap;
        hub->heap_capacity = capacity;
    }
    sift_up(hub, hub->heap_size++, node);
    return in_turn(hub) ? 0 : hub_wake(hub); /* whoever hosts the loop asks for the next deadline then */
}

void heap_remove(Hub *hub, Node *node) {
    Py_ssize_t index = node->index;
    if (index < 0)
        return;
    node->index = -1;
    Node *last = hub->heap[--hub->heap_size];
    if (last == node)
        return;
    if (index > 0 && last->deadline < hub->heap[(index - 1) / 2]->deadline)
        sift_up(hub, index, last);
    else
        sift_down(hub, index, last);
}

/* Fire what is due. What the fired ones add waits for the next turn, or a timer at "now" would keep us here. */
int heap_run(Hub *hub) {
    if (hub->heap_size == 0)
        return 0;
    int64_t now = now_ns();
    Py_ssize_t most = hub->heap_size;
    while (most-- > 0 && hub->heap_size > 0 && hub->heap[0]->deadline <= now) {
        Node *node = hub->heap[0];
        heap_remove(hub, node);
        beat_piece(hub->beat);
        if (node->fire(hub, node) < 0)
            return -1;
    }
    return 0;
}

/* -- Timer: what call_at() returns -------------------------------------------------------------------------------- */

#define TIMER_OF(pointer) ((Timer *)((char *)(pointer) - offsetof(Timer, node)))

static int timer_fire(Hub *hub, Node *node) {
    Timer *timer = TIMER_OF(node); /* the heap's reference is ours now */
    int result = 0;
    if (timer->function == NULL) {
        if (timer->args != NULL && !is_due(hub, (PyGreenlet *)timer->args))
            resume(hub, (PyGreenlet *)timer->args, NULL);
    } else {
        PyObject *done = PyObject_Call(timer->function, timer->args, NULL);
        result = done == NULL ? report(timer->function) : 0;
        Py_XDECREF(done);
    }
    Py_DECREF(timer);
    return result;
}

/* For the garbage collector: the object whose reference the heap holds, if it is one. */
PyObject *node_owner(Node *node) { return node->fire == timer_fire ? (PyObject *)TIMER_OF(node) : NULL; }

/* Empty the heap. In a forked child (`abandon`) nothing is given back: see hubs_after_fork. */
void heap_clear(Hub *hub, bool abandon) {
    while (hub->heap_size > 0) {
        Node *node = hub->heap[--hub->heap_size];
        PyObject *owner = node_owner(node);
        node->index = -1;
        if (!abandon)
            Py_XDECREF(owner);
    }
}

PyObject *timer_new(Hub *hub, int64_t deadline, PyObject *function, PyObject *args) {
    Timer *timer = (Timer *)Timer_Type->tp_alloc(Timer_Type, 0);
    if (timer == NULL)
        return NULL;
    timer->node = (Node){.deadline = deadline, .index = -1, .fire = timer_fire};
    timer->function = Py_XNewRef(function);
    timer->args = Py_NewRef(args);
    timer->hub = (Hub *)Py_NewRef(hub);
    if (heap_insert(hub, &timer->node) < 0) {
        Py_DECREF(timer);
        return NULL;
    }
    return Py_NewRef(timer); /* one reference for the heap, one for the caller */
}

static int timer_clear(PyObject *self) {
    Timer *timer = (Timer *)self;
    Py_CLEAR(timer->function);
    Py_CLEAR(timer->args);
    return 0; /* the hub stays: the node may be in its heap */
}

static PyObject *timer_cancel(PyObject *self, PyObject *none) {
    Timer *timer = (Timer *)self;
    if (timer->node.index >= 0) {
        heap_remove(timer->hub, &timer->node);
        timer_clear(self);
        Py_DECREF(timer); /* the heap's; the caller holds another */
    }
    Py_RETURN_NONE;
}

/* Park the running green thread until `deadline`. */
int sleep_until(Hub *hub, int64_t deadline) {
    if (flush_pending(hub) < 0)
        return -1;
    PyGreenlet *me = PyGreenlet_GetCurrent();
    if (me == NULL)
        return -1;
    PyObject *timer = timer_new(hub, deadline, NULL, (PyObject *)me);
    Py_DECREF(me);
    if (timer == NULL)
        return -1;
    PyObject *woken = PyGreenlet_Switch(hub->greenlet, NULL, NULL);
    if (woken == NULL)
        undo_due(hub);
    timer_cancel(timer, NULL);
    Py_DECREF(timer);
    Py_XDECREF(woken);
    return woken == NULL ? -1 : 0;
}

static int timer_traverse(PyObject *self, visitproc visit, void *arg) {
    Timer *timer = (Timer *)self;
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(timer->hub);
    Py_VISIT(timer->function);
    Py_VISIT(timer->args);
    return 0;
}

static void timer_dealloc(PyObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    timer_clear(self);
    Py_CLEAR(((Timer *)self)->hub);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyMethodDef timer_methods[] = {
    {"cancel", timer_cancel, METH_NOARGS, "Do not call the function after all; harmless when it has been called."},
    {NULL},
};

static PyType_Slot timer_slots[] = {
    {Py_tp_doc, "A call at a deadline, as Hub.call_at returns it."},
    {Py_tp_dealloc, timer_dealloc},
    {Py_tp_traverse, timer_traverse},
    {Py_tp_clear, timer_clear},
    {Py_tp_methods, timer_methods},
    {0, NULL},
};

static PyType_Spec timer_spec = {
    .name = "harken._hub.compiled.Timer",
    .basicsize = sizeof(Timer),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = timer_slots,
};

int timers_ready(PyObject *module) {
    Timer_Type = (PyTypeObject *)PyType_FromSpec(&timer_spec);
    return Timer_Type == NULL ? -1 : PyModule_AddObjectRef(module, "Timer", (PyObject *)Timer_Type);
}
