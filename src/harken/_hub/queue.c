/* SPDX-License-Identifier: MIT
 *
 * What is due at the next turn, and the life of a green thread. */
#include "hub.h"
#include <unistd.h>

/* -- the ring ----------------------------------------------------------------------------------------------------- */

static Entry *entry_at(Hub *hub, size_t index) { return &hub->queue[(hub->head + index) & (hub->capacity - 1)]; }

static int grow(Hub *hub) {
    size_t capacity = hub->capacity ? 2 * hub->capacity : 64;
    Entry *queue = PyMem_New(Entry, capacity);
    if (queue == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    for (size_t i = 0; i < hub->count; i++)
        queue[i] = *entry_at(hub, i);
    PyMem_Free(hub->queue);
    hub->queue = queue;
    hub->capacity = capacity;
    hub->head = 0;
    return 0;
}

/* Takes references of its own. Wakes the loop if it is not this thread that runs it. */
int enqueue(Hub *hub, int kind, PyObject *target, PyObject *value) {
    if (hub->closed)
        return 0; /* nobody is there to do it, nor to be told */
    if (hub->count == hub->capacity && grow(hub) < 0)
        return -1;
    *entry_at(hub, hub->count++) = (Entry){kind, Py_NewRef(target), Py_XNewRef(value)};
    return in_turn(hub) ? 0 : hub_wake(hub);
}

/* Forget what is due. In a forked child (`abandon`) nothing is given back: see hubs_after_fork. */
void queue_clear(Hub *hub, bool abandon) {
    if (abandon) {
        hub->count = 0;
        hub->due = PyDict_New();
        return;
    }
    while (hub->count > 0) {
        Entry entry = *entry_at(hub, 0);
        hub->head = (hub->head + 1) & (hub->capacity - 1);
        hub->count--;
        Py_DECREF(entry.target);
        Py_XDECREF(entry.value);
    }
    if (hub->due != NULL)
        PyDict_Clear(hub->due);
}

static int call(Entry *entry) {
    PyObject *done = PyObject_Call(entry->target, entry->value, NULL);
    if (done == NULL)
        return report(entry->target);
    Py_DECREF(done);
    return 0;
}

static int run_entry(Hub *hub, Entry *entry) {
    if (entry->kind == NOTHING)
        return 0;
    if (entry->kind != SWITCH)
        beat_piece(hub->beat);
    if (entry->kind == CALL)
        return call(entry);
    if (PyDict_GET_SIZE(hub->due) > 0 && PyDict_DelItem(hub->due, entry->target) < 0)
        PyErr_Clear(); /* a green thread that only starts */
    if (entry->kind == SWITCH) {
        resume(hub, (PyGreenlet *)entry->target, entry->value);
        return 0;
    }
    hub->budget = TURN_BUDGET;
    PyObject *done =
        PyGreenlet_Throw((PyGreenlet *)entry->target, (PyObject *)Py_TYPE(entry->value), entry->value, NULL);
    if (done == NULL)
        PyErr_WriteUnraisable(entry->target); /* from a greenlet that harken did not make */
    take_back(hub);
    Py_XDECREF(done);
    return 0;
}

/* Do what is due; what that adds waits for the next turn, so that the epoll set is asked in between. */
int run_queue(Hub *hub) {
    for (size_t most = hub->count; most > 0 && hub->count > 0; most--) {
        Entry entry = *entry_at(hub, 0);
        hub->head = (hub->head + 1) & (hub->capacity - 1);
        hub->count--;
        int result = run_entry(hub, &entry);
        Py_DECREF(entry.target);
        Py_XDECREF(entry.value);
        if (result < 0)
            return -1;
    }
    return 0;
}

/* -- parked green threads ----------------------------------------------------------------------------------------- */

int is_due(Hub *hub, PyGreenlet *green) {
    if (PyDict_GET_SIZE(hub->due) == 0)
        return 0;
    int found = PyDict_Contains(hub->due, (PyObject *)green);
    if (found < 0)
        PyErr_Clear();
    return found > 0;
}

static int add_due(Hub *hub, int kind, PyGreenlet *green, PyObject *value) {
    if (PyDict_SetItem(hub->due, (PyObject *)green, Py_None) < 0)
        return -1;
    if (enqueue(hub, kind, (PyObject *)green, value) == 0)
        return 0;
    PyObject *type, *error, *trace;
    PyErr_Fetch(&type, &error, &trace);
    if (PyDict_DelItem(hub->due, (PyObject *)green) < 0)
        PyErr_Clear();
    PyErr_Restore(type, error, trace);
    return -1;
}

int make_due(Hub *hub, PyGreenlet *green, PyObject *value) { return add_due(hub, SWITCH, green, value); }

/* Raise `error` in a parked green thread at the next turn, in place of what it would have been resumed with. 1: it will
 * be; 0: another one is under way, which stays; -1. */
int throw_into(Hub *hub, PyGreenlet *green, PyObject *error) {
    if (!is_due(hub, green))
        return add_due(hub, THROW, green, error) < 0 ? -1 : 1;
    for (size_t i = 0; i < hub->count; i++) {
        Entry *entry = entry_at(hub, i);
        if (entry->target != (PyObject *)green || entry->kind == CALL)
            continue;
        if (entry->kind == THROW)
            return 0;
        PyObject *before = entry->value;
        entry->kind = THROW;
        entry->value = Py_NewRef(error);
        Py_XDECREF(before);
        break;
    }
    return 1;
}

/* The running green thread was interrupted in its wait. By gevent, perhaps, which knows nothing of what was due to it: it
 * would be resumed in its next wait, whatever that is for. What was to be raised in it still is. */
void undo_due(Hub *hub) {
    PyGreenlet *me = PyGreenlet_GetCurrent();
    PyObject *type, *error, *trace;
    PyErr_Fetch(&type, &error, &trace);
    for (size_t i = is_due(hub, me) ? 0 : hub->count; i < hub->count; i++) {
        Entry *entry = entry_at(hub, i);
        if (entry->target != (PyObject *)me || entry->kind != SWITCH)
            continue;
        entry->kind = NOTHING;
        if (PyDict_DelItem(hub->due, (PyObject *)me) < 0)
            PyErr_Clear();
        break;
    }
    PyErr_Restore(type, error, trace);
    Py_DECREF(me);
}

/* Let the others have their turn, if a green thread is running here. */
int give_way(Hub *hub) {
    hub->budget = TURN_BUDGET;
    if (in_hub(hub))
        return 0;
    if (flush_turn(hub) < 0)
        return -1;
    PyGreenlet *me = PyGreenlet_GetCurrent();
    int result = make_due(hub, me, NULL);
    Py_DECREF(me);
    if (result < 0)
        return -1;
    PyObject *back = PyGreenlet_Switch(hub->greenlet, NULL, NULL);
    if (back == NULL)
        undo_due(hub);
    Py_XDECREF(back);
    return back == NULL ? -1 : 0;
}

/* -- Task: the callable that a green thread's greenlet runs ------------------------------------------------------- */

typedef struct {
    PyObject_HEAD
    Hub *hub;
    PyObject *function, *args;
    PyObject *busy; /* a set that holds the greenlet until its end, or NULL */
} Task;

HIDDEN PyTypeObject *Task_Type;

/* Show the exception as a thread's is shown. What is no Exception leaves the loop instead, when a callback raised it. */
void show_exception(PyObject *function) {
    PyObject *type, *error, *trace, *threading = NULL, *thread = NULL, *args = NULL, *shown = NULL;
    PyErr_Fetch(&type, &error, &trace);
    PyErr_NormalizeException(&type, &error, &trace);
    if (trace != NULL)
        PyException_SetTraceback(error, trace);
    if ((threading = PyImport_ImportModule("threading")) != NULL &&
        (thread = PyObject_CallMethod(threading, "current_thread", NULL)) != NULL &&
        (args = PyObject_CallMethod(threading, "ExceptHookArgs", "((OOOO))", type, error, trace ? trace : Py_None,
                                    thread)) != NULL)
        shown = PyObject_CallMethod(threading, "excepthook", "(O)", args);
    if (shown == NULL)
        PyErr_WriteUnraisable(function);
    Py_XDECREF(shown);
    Py_XDECREF(args);
    Py_XDECREF(thread);
    Py_XDECREF(threading);
    Py_XDECREF(type);
    Py_XDECREF(error);
    Py_XDECREF(trace);
}

int report(PyObject *function) {
    if (!PyErr_ExceptionMatches(PyExc_Exception))
        return -1;
    show_exception(function);
    return 0;
}

/* A green thread that forked has ended in the child: the loop below it is the parent's. */
void end_process(void) {
    PyObject *type, *error, *trace;
    PyErr_Fetch(&type, &error, &trace);
    for (int i = 0; i < 2; i++) {
        PyObject *stream = PySys_GetObject(i ? "stderr" : "stdout"); /* borrowed */
        PyObject *done = stream == NULL ? NULL : PyObject_CallMethod(stream, "flush", NULL);
        Py_XDECREF(done);
        PyErr_Clear();
    }
    _exit(0);
}

/* The calling green thread ends. It goes to whoever runs the loop now, which need not be who ran it when it started. */
void leave_hub(Hub *hub, PyGreenlet *me) {
    if (PySet_Discard(hub->greens, (PyObject *)me) < 0)
        PyErr_Clear();
    if (hub->greenlet == NULL)
        return;
    PyGreenlet *parent = PyGreenlet_GET_PARENT(me);
    if (parent != hub->greenlet && PyGreenlet_SetParent(me, hub->greenlet) < 0)
        PyErr_Clear();
    Py_XDECREF(parent);
}

static PyObject *task_call(PyObject *self, PyObject *none, PyObject *keywords) {
    Task *task = (Task *)self;
    Hub *hub = task->hub;
    void *stack = stack_begin();
    PyObject *done = PyObject_Call(task->function, task->args, NULL);
    if (done == NULL) {
        if (PyErr_ExceptionMatches(PyExc_GreenletExit))
            PyErr_Clear();
        else
            show_exception(task->function);
    }
    Py_XDECREF(done);
    if (has_unsent(hub) && hub_here() == hub && flush_turn(hub) < 0)
        PyErr_Clear(); /* a handler that did not close its file does not learn that the peer has gone */
    hub->news |= hub->asks_at_ends;
    Py_CLEAR(task->function); /* whatever the handler held goes now, not when somebody drops the greenlet */
    Py_CLEAR(task->args);
    if (hub->lent)
        end_process();
    PyGreenlet *me = PyGreenlet_GetCurrent();
    if (task->busy != NULL && PySet_Discard(task->busy, (PyObject *)me) < 0)
        PyErr_Clear();
    leave_hub(hub, me);
    Py_DECREF(me);
    stack_end(stack);
    Py_RETURN_NONE;
}

/* A new greenlet starts with no context at all; the caller's is copied unless it is empty. */
static int give_context(PyGreenlet *green) {
#if PY_VERSION_HEX < 0x030E0000
    if (PyThreadState_Get()->context == NULL)
        return 0;
#endif
    PyObject *context = PyContext_CopyCurrent();
    if (context == NULL)
        return -1;
    int result = PyObject_SetAttrString((PyObject *)green, "gr_context", context);
    Py_DECREF(context);
    return result;
}

/* It will not start. The exception that says why stays. */
void unmake(Hub *hub, PyObject *busy, PyGreenlet *green) {
    PyObject *type, *error, *trace;
    PyErr_Fetch(&type, &error, &trace);
    if (PySet_Discard(hub->greens, (PyObject *)green) < 0 || (busy != NULL && PySet_Discard(busy, (PyObject *)green) < 0))
        PyErr_Clear();
    Py_DECREF(green);
    PyErr_Restore(type, error, trace);
}

PyObject *spawn(Hub *hub, PyObject *busy, PyObject *function, PyObject *const *args, Py_ssize_t count) {
    if (hub->closed) {
        PyErr_SetString(PyExc_RuntimeError, "this hub is closed: nothing runs there any more");
        return NULL;
    }
    Task *task = (Task *)Task_Type->tp_alloc(Task_Type, 0);
    if (task == NULL)
        return NULL;
    task->hub = (Hub *)Py_NewRef(hub);
    task->function = Py_NewRef(function);
    task->busy = Py_XNewRef(busy);
    task->args = PyTuple_New(count);
    for (Py_ssize_t i = 0; task->args != NULL && i < count; i++)
        PyTuple_SET_ITEM(task->args, i, Py_NewRef(args[i]));
    PyGreenlet *green = task->args == NULL ? NULL : PyGreenlet_New((PyObject *)task, hub->greenlet);
    Py_DECREF(task);
    if (green == NULL)
        return NULL;
    if (give_context(green) < 0 || PySet_Add(hub->greens, (PyObject *)green) < 0 ||
        (busy != NULL && PySet_Add(busy, (PyObject *)green) < 0) || enqueue(hub, SWITCH, (PyObject *)green, NULL) < 0) {
        unmake(hub, busy, green);
        return NULL;
    }
    return (PyObject *)green;
}

static int task_traverse(PyObject *self, visitproc visit, void *arg) {
    Task *task = (Task *)self;
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(task->hub);
    Py_VISIT(task->function);
    Py_VISIT(task->args);
    Py_VISIT(task->busy);
    return 0;
}

static int task_clear(PyObject *self) {
    Task *task = (Task *)self;
    Py_CLEAR(task->function);
    Py_CLEAR(task->args);
    Py_CLEAR(task->busy);
    return 0;
}

static void task_dealloc(PyObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    task_clear(self);
    Py_CLEAR(((Task *)self)->hub);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyType_Slot task_slots[] = {
    {Py_tp_doc, "What a green thread runs."},
    {Py_tp_call, task_call},
    {Py_tp_dealloc, task_dealloc},
    {Py_tp_traverse, task_traverse},
    {Py_tp_clear, task_clear},
    {0, NULL},
};

static PyType_Spec task_spec = {
    .name = "harken._hub.compiled.Task",
    .basicsize = sizeof(Task),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = task_slots,
};

int queue_ready(PyObject *module) {
    Task_Type = (PyTypeObject *)PyType_FromSpec(&task_spec);
    return Task_Type == NULL ? -1 : 0;
}
