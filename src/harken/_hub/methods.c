/* SPDX-License-Identifier: MIT
 *
 * What Python sees of a hub. */
#include "hub.h"
#include <errno.h>

HIDDEN PyTypeObject *Hub_Type;

PyObject *hub_current(PyObject *module, PyObject *none) {
    Hub *hub = hub_here();
    if (hub == NULL || in_hub(hub))
        Py_RETURN_NONE;
    if (hub->occupies) { /* in a thread that others share, not every greenlet is a green thread */
        PyGreenlet *me = PyGreenlet_GetCurrent();
        int found = PySet_Contains(hub->greens, (PyObject *)me);
        Py_DECREF(me);
        if (found <= 0)
            return found < 0 ? NULL : Py_NewRef(Py_None);
    }
    return Py_NewRef(hub);
}

static PyObject *hub_fileno(PyObject *self, PyObject *none) { return PyLong_FromLong(((Hub *)self)->epoll); }

static PyObject *hub_occupy(PyObject *self, PyObject *yes) {
    int wanted = PyObject_IsTrue(yes);
    if (wanted < 0)
        return NULL;
    occupy((Hub *)self, wanted);
    Py_RETURN_NONE;
}

static PyObject *hub_wake_method(PyObject *self, PyObject *none) {
    hub_wake((Hub *)self);
    Py_RETURN_NONE;
}

static PyObject *hub_flush_pending_nowait(PyObject *self, PyObject *none) {
    Hub *hub = (Hub *)self;
    return PyLong_FromSize_t(send_later_nowait(hub) + flow_flush_nowait(hub) + flush_pending_nowait(hub) +
                             answers_nowait(hub));
}

static PyObject *hub_next_deadline(PyObject *self, PyObject *none) {
    Hub *hub = (Hub *)self;
    if (hub->count > 0)
        return PyFloat_FromDouble(0.0);
    if (hub->heap_size > 0)
        return PyFloat_FromDouble((double)hub->heap[0]->deadline / 1e9);
    Py_RETURN_NONE;
}

static PyObject *hub_spawn(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    if (count < 1 || !PyCallable_Check(args[0])) {
        PyErr_SetString(PyExc_TypeError, "spawn() takes a function and its arguments");
        return NULL;
    }
    return spawn((Hub *)self, NULL, args[0], args + 1, count - 1);
}

static PyObject *hub_spawn_into(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    if (count < 2 || !PySet_Check(args[0]) || !PyCallable_Check(args[1])) {
        PyErr_SetString(PyExc_TypeError, "spawn_into() takes a set, a function and its arguments");
        return NULL;
    }
    return spawn((Hub *)self, args[0], args[1], args + 2, count - 2);
}

static PyObject *rest(PyObject *const *args, Py_ssize_t count) {
    PyObject *tuple = PyTuple_New(count);
    for (Py_ssize_t i = 0; tuple != NULL && i < count; i++)
        PyTuple_SET_ITEM(tuple, i, Py_NewRef(args[i]));
    return tuple;
}

static PyObject *hub_call_soon(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    if (count < 1 || !PyCallable_Check(args[0])) {
        PyErr_SetString(PyExc_TypeError, "call_soon() takes a function and its arguments");
        return NULL;
    }
    PyObject *tuple = rest(args + 1, count - 1);
    int result = tuple == NULL ? -1 : enqueue((Hub *)self, CALL, args[0], tuple);
    Py_XDECREF(tuple);
    return result < 0 ? NULL : Py_NewRef(Py_None);
}

static PyObject *hub_call_at(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    int64_t deadline;
    if (count < 2 || !PyCallable_Check(args[1])) {
        PyErr_SetString(PyExc_TypeError, "call_at() takes a deadline, a function and its arguments");
        return NULL;
    }
    if (seconds_to_ns(args[0], &deadline) < 0)
        return NULL;
    PyObject *tuple = rest(args + 2, count - 2);
    PyObject *timer = tuple == NULL ? NULL : timer_new((Hub *)self, deadline, args[1], tuple);
    Py_XDECREF(tuple);
    return timer;
}

static int must_be_green(Hub *hub) {
    if (hub_here() == hub && !in_hub(hub))
        return flush_pending(hub);
    PyErr_SetString(PyExc_RuntimeError, "nothing can wait here: this is no green thread of a running hub");
    return -1;
}

static PyObject *hub_settle(PyObject *self, PyObject *none) {
    return must_be_green((Hub *)self) < 0 ? NULL : Py_NewRef(Py_None);
}

static PyObject *hub_park(PyObject *self, PyObject *none) {
    Hub *hub = (Hub *)self;
    if (must_be_green(hub) < 0)
        return NULL;
    PyObject *got = PyGreenlet_Switch(hub->greenlet, NULL, NULL);
    if (got == NULL)
        undo_due(hub);
    if (got != NULL && PyTuple_CheckExact(got) && PyTuple_GET_SIZE(got) == 0)
        Py_SETREF(got, Py_NewRef(Py_None)); /* resumed without a value */
    return got;
}

/* A green thread that has given up its turn: started, not ended, and not the one that asks. */
static int is_parked(PyGreenlet *green) {
    if (!PyGreenlet_Check(green)) {
        PyErr_Format(PyExc_TypeError, "a green thread is needed, not %.100s", Py_TYPE(green)->tp_name);
        return -1;
    }
    PyGreenlet *me = PyGreenlet_GetCurrent();
    Py_XDECREF(me);
    return PyGreenlet_ACTIVE(green) && green != me;
}

/* From the hub's own greenlet: let a parked green thread go on now, and return when it waits or ends. */
static PyObject *hub_resume(PyObject *self, PyObject *green) {
    Hub *hub = (Hub *)self;
    int parked = is_parked((PyGreenlet *)green);
    if (parked < 0)
        return NULL;
    if (hub_here() != hub || !in_hub(hub) || !parked || is_due(hub, (PyGreenlet *)green)) {
        PyErr_SetString(PyExc_RuntimeError, "only the hub itself can resume a green thread, and only a parked one");
        return NULL;
    }
    resume(hub, (PyGreenlet *)green, NULL);
    Py_RETURN_NONE;
}

static PyObject *hub_unpark(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    Hub *hub = (Hub *)self;
    if (count < 1 || count > 2) {
        PyErr_SetString(PyExc_TypeError, "unpark() takes a green thread and a value");
        return NULL;
    }
    PyGreenlet *green = (PyGreenlet *)args[0];
    int parked = is_parked(green);
    if (parked <= 0 || is_due(hub, green))
        return parked < 0 ? NULL : Py_NewRef(Py_False);
    if (make_due(hub, green, count > 1 ? args[1] : Py_None) < 0)
        return NULL;
    Py_RETURN_TRUE;
}

static PyObject *hub_throw(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    Hub *hub = (Hub *)self;
    if (count != 2 || !PyExceptionInstance_Check(args[1])) {
        PyErr_SetString(PyExc_TypeError, "throw() takes a green thread and an exception");
        return NULL;
    }
    int parked = is_parked((PyGreenlet *)args[0]);
    if (parked <= 0)
        return parked < 0 ? NULL : Py_NewRef(Py_False);
    int done = throw_into(hub, (PyGreenlet *)args[0], args[1]);
    return done < 0 ? NULL : PyBool_FromLong(done);
}

static PyObject *hub_sleep(PyObject *self, PyObject *seconds) {
    Hub *hub = (Hub *)self;
    int64_t ns;
    if (hub_here() != hub || in_hub(hub)) {
        PyObject *module = PyImport_ImportModule("time");
        PyObject *done = module == NULL ? NULL : PyObject_CallMethod(module, "sleep", "O", seconds);
        Py_XDECREF(module);
        return done;
    }
    if (seconds_to_ns(seconds, &ns) < 0)
        return NULL;
    int64_t now = now_ns();
    if ((ns == 0 ? give_way(hub) : sleep_until(hub, ns > INT64_MAX - now ? INT64_MAX : now + ns)) < 0)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *hub_wait(PyObject *self, PyObject *args, PyObject *words) {
    static char *names[] = {"fd", "write", "timeout", NULL};
    Hub *hub = (Hub *)self;
    PyObject *door, *timeout = Py_None;
    int direction = READ;
    int64_t deadline = 0;
    if (!PyArg_ParseTupleAndKeywords(args, words, "O|pO:wait", names, &door, &direction, &timeout))
        return NULL;
    int fd = PyObject_AsFileDescriptor(door);
    if (fd < 0) {
        if (PyErr_ExceptionMatches(PyExc_ValueError) && !PyLong_Check(door)) { /* a closed socket's */
            errno = EBADF;
            PyErr_SetFromErrno(PyExc_OSError);
        }
        return NULL;
    }
    if (timeout != Py_None) {
        if (seconds_to_ns(timeout, &deadline) < 0)
            return NULL;
        deadline = deadline > INT64_MAX / 2 ? 0 : deadline + now_ns();
    }
    bool plain = hub_here() != hub || in_hub(hub);
    if ((plain ? poll_wait(fd, direction, deadline) : wait_fd(hub, fd, direction, deadline)) < 0)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *hub_lodge(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    if (count != 2 || !PyObject_TypeCheck(args[0], Connection_Type) || !PyCallable_Check(args[1])) {
        PyErr_SetString(PyExc_TypeError, "lodge() takes a Connection and a function");
        return NULL;
    }
    return connection_lodge((Hub *)self, args[0], args[1]) < 0 ? NULL : Py_NewRef(Py_None);
}

static PyObject *hub_adopt(PyObject *self, PyObject *sock) { return connection_adopt(sock); }

static PyMethodDef hub_methods[] = {
    {"run", FAST(hub_run), METH_VARARGS | METH_KEYWORDS, "run(until, patience, tick): run green threads here."},
    {"step", hub_step, METH_O, "step(timeout): take one turn."},
    {"fileno", hub_fileno, METH_NOARGS, "The epoll descriptor."},
    {"next_deadline", hub_next_deadline, METH_NOARGS, "When a turn is wanted without a descriptor's being ready."},
    {"occupy", hub_occupy, METH_O, "occupy(yes): this thread is the hub's between its turns, too."},
    {"wake", hub_wake_method, METH_NOARGS, "End the sleep. Any thread."},
    {"flush_pending_nowait", hub_flush_pending_nowait, METH_NOARGS, "Send what was written and not sent. Any thread."},
    {"close", hub_close, METH_NOARGS, "End the green threads that are left, and give the descriptors back."},
    {"spawn", FAST(hub_spawn), METH_FASTCALL, "spawn(function, *args): a green thread; it starts at the next turn."},
    {"spawn_into", FAST(hub_spawn_into), METH_FASTCALL, "spawn_into(busy, function, *args): likewise; the set holds it."},
    {"call_soon", FAST(hub_call_soon), METH_FASTCALL, "call_soon(function, *args): call at the next turn."},
    {"call_soon_threadsafe", FAST(hub_call_soon), METH_FASTCALL, "The same, from any thread."},
    {"call_at", FAST(hub_call_at), METH_FASTCALL, "call_at(deadline, function, *args): call once after the deadline."},
    {"settle", hub_settle, METH_NOARGS, "settle(): send what the calling green thread has written; it may wait."},
    {"park", hub_park, METH_NOARGS, "Give up the calling green thread until unpark() or throw()."},
    {"resume", hub_resume, METH_O, "resume(green): let a parked green thread go on now. The hub's own greenlet."},
    {"unpark", FAST(hub_unpark), METH_FASTCALL, "unpark(green, value=None): let a parked green thread go on."},
    {"throw", FAST(hub_throw), METH_FASTCALL, "throw(green, error): raise an exception in a parked green thread."},
    {"sleep", hub_sleep, METH_O, "sleep(seconds): park for so long."},
    {"wait", FAST(hub_wait), METH_VARARGS | METH_KEYWORDS, "wait(fd, write=False, timeout=None): park until ready."},
    {"watch", FAST(hub_watch), METH_FASTCALL, "watch(door, on_readable, shared=False): call while the door is readable."},
    {"unwatch", hub_unwatch, METH_O, "unwatch(door): stop calling."},
    {"lodge", FAST(hub_lodge), METH_FASTCALL, "lodge(connection, starter): call starter(connection) at its first event."},
    {"adopt", hub_adopt, METH_O, "adopt(sock): take a socket over as a Connection."},
    {NULL},
};

static PyMemberDef hub_members[] = {
    {"beat", T_OBJECT_EX, offsetof(Hub, beat), READONLY, "What the loop says of itself."},
    {"asks_at_ends", T_BOOL, offsetof(Hub, asks_at_ends), 0, "Whether the end of a green thread is news."},
    {"__weaklistoffset__", T_PYSSIZET, offsetof(Hub, weak), READONLY, NULL},
    {NULL},
};

static PyType_Slot hub_slots[] = {
    {Py_tp_doc, "Runs green threads and waits for sockets on their behalf; the contract stands in harken._hub."},
    {Py_tp_new, hub_new},
    {Py_tp_dealloc, hub_dealloc},
    {Py_tp_traverse, hub_traverse},
    {Py_tp_clear, hub_clear},
    {Py_tp_methods, hub_methods},
    {Py_tp_members, hub_members},
    {0, NULL},
};

static PyType_Spec hub_spec = {
    .name = "harken._hub.compiled.Hub",
    .basicsize = sizeof(Hub),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .slots = hub_slots,
};

int hub_ready(PyObject *module) {
    Hub_Type = (PyTypeObject *)PyType_FromSpec(&hub_spec);
    return Hub_Type == NULL ? -1 : PyModule_AddObjectRef(module, "Hub", (PyObject *)Hub_Type);
}
