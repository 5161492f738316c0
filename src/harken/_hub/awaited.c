/* SPDX-License-Identifier: MIT
 *
 * What a coroutine awaits of its own connection, without a future and without a coroutine of its own.
 *
 * Driver: the part of a task (see task.py) that runs in its green thread and is quick. Wait: an awaitable for a function
 * that waits as green threads do. Awaited in the task's own green thread it calls the function inside `send()`, where
 * that thread then waits in the hub; awaited in any other task it leaves the work to what its owner says. */
#include "hub.h"

typedef struct {
    PyObject_HEAD
    PyGreenlet *green;
    PyObject *loop, *task;
    PyObject *before_wait; /* called before the green thread next waits; NULL: nothing */
    char in_call;          /* in a function that waits: to be cancelled by an exception there */
    char must_cancel;      /* cancelled before it waited */
} Driver;

typedef struct {
    PyObject_HEAD
    Driver *driver;
    PyObject *owner;    /* whose elsewhere(function, *args) is a coroutine for other tasks */
    PyObject *function; /* NULL: called already */
    PyObject *arg;      /* NULL: none. Of a Wait without owner: what it returns */
    PyObject *inner;    /* that coroutine */
    bool iterates;      /* nothing read is the end of an iteration */
} Wait;

static PyTypeObject *Driver_Type, *Wait_Type;
static PyObject *enter_task, *leave_task, *sweep, *elsewhere_name;

/* -- asyncio ------------------------------------------------------------------------------------------------------ */

static PyObject *from(const char *module, const char *name) {
    PyObject *found = PyImport_ImportModule(module), *value = NULL;
    if (found != NULL)
        value = PyObject_GetAttrString(found, name);
    Py_XDECREF(found);
    return value;
}

/* When a driver is made first: asyncio is not loaded for those who do without. */
static int know_asyncio(void) {
    if (sweep != NULL)
        return 0;
    Py_XSETREF(enter_task, from("asyncio", "_enter_task"));
    Py_XSETREF(leave_task, from("asyncio", "_leave_task"));
    if (enter_task == NULL || leave_task == NULL)
        return -1;
    sweep = from("harken._hub.task", "sweep");
    return sweep == NULL ? -1 : 0;
}

static int tell(Driver *driver, PyObject *function) {
    PyObject *args[] = {driver->loop, driver->task};
    PyObject *done = PyObject_Vectorcall(function, args, 2, NULL);
    Py_XDECREF(done);
    return done == NULL ? -1 : 0;
}

/* Be the current task. Whatever is current has waited by a call that it did not await: it is no more. */
static int enter(Driver *driver) {
    if (tell(driver, enter_task) == 0)
        return 0;
    if (!PyErr_ExceptionMatches(PyExc_RuntimeError))
        return -1;
    PyErr_Clear();
    PyObject *done = PyObject_CallOneArg(sweep, driver->loop);
    Py_XDECREF(done);
    return done == NULL ? -1 : tell(driver, enter_task);
}

static int leave(Driver *driver) {
    if (tell(driver, leave_task) == 0)
        return 0;
    if (!PyErr_ExceptionMatches(PyExc_RuntimeError))
        return -1;
    PyErr_Clear(); /* it was swept away while it waited */
    return 0;
}

/* -- Driver ------------------------------------------------------------------------------------------------------- */

static int flush(Driver *driver) {
    PyObject *before = driver->before_wait;
    if (before == NULL)
        return 0;
    driver->before_wait = NULL;
    PyObject *done = PyObject_CallNoArgs(before);
    Py_DECREF(before);
    Py_XDECREF(done);
    return done == NULL ? -1 : 0;
}

/* function(*args), which waits, as the green thread and not as the task. */
static PyObject *call(Driver *driver, PyObject *function, PyObject *const *args, size_t count) {
    if (driver->must_cancel) {
        driver->must_cancel = 0;
        PyObject *error = PyObject_CallMethod(driver->task, "cancelled_error", NULL);
        if (error != NULL)
            PyErr_SetObject((PyObject *)Py_TYPE(error), error);
        Py_XDECREF(error);
        return NULL;
    }
    if (flush(driver) < 0 || leave(driver) < 0)
        return NULL;
    driver->in_call = 1;
    PyObject *result = PyObject_Vectorcall(function, args, count, NULL);
    driver->in_call = 0;
    PyObject *type, *error, *trace;
    PyErr_Fetch(&type, &error, &trace);
    if (driver->task == NULL || enter(driver) == 0) {
        PyErr_Restore(type, error, trace);
        return result;
    }
    Py_XDECREF(type);
    Py_XDECREF(error);
    Py_XDECREF(trace);
    Py_XDECREF(result);
    return NULL;
}

static PyObject *driver_call(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    if (count < 1) {
        PyErr_SetString(PyExc_TypeError, "call() takes a function and its arguments");
        return NULL;
    }
    return call((Driver *)self, args[0], args + 1, (size_t)count - 1);
}

static PyObject *driver_enter(PyObject *self, PyObject *none) {
    return enter((Driver *)self) < 0 ? NULL : Py_NewRef(Py_None);
}

static PyObject *driver_leave(PyObject *self, PyObject *none) {
    return leave((Driver *)self) < 0 ? NULL : Py_NewRef(Py_None);
}

static PyObject *driver_flush(PyObject *self, PyObject *none) {
    return flush((Driver *)self) < 0 ? NULL : Py_NewRef(Py_None);
}

static PyObject *driver_release(PyObject *self, PyObject *none) {
    Driver *driver = (Driver *)self;
    Py_CLEAR(driver->task);
    Py_CLEAR(driver->before_wait);
    Py_CLEAR(driver->green);
    Py_RETURN_NONE;
}

static Wait *new_wait(PyObject *driver, PyObject *owner, PyObject *function, PyObject *arg, bool iterates) {
    Wait *wait = PyObject_GC_New(Wait, Wait_Type);
    if (wait == NULL)
        return NULL;
    wait->driver = (Driver *)Py_NewRef(driver);
    wait->owner = Py_XNewRef(owner);
    wait->function = Py_XNewRef(function);
    wait->arg = Py_XNewRef(arg);
    wait->inner = NULL;
    wait->iterates = iterates;
    PyObject_GC_Track(wait);
    return wait;
}

static PyObject *driver_wait(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    if (count < 2 || count > 3) {
        PyErr_SetString(PyExc_TypeError, "wait() takes an owner, a function and at most one argument");
        return NULL;
    }
    return (PyObject *)new_wait(self, args[0], args[1], count > 2 ? args[2] : NULL, false);
}

static PyObject *driver_next(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    if (count != 2) {
        PyErr_SetString(PyExc_TypeError, "next() takes an owner and a function");
        return NULL;
    }
    return (PyObject *)new_wait(self, args[0], args[1], NULL, true);
}

static PyObject *driver_done(PyObject *self, PyObject *value) {
    return (PyObject *)new_wait(self, NULL, NULL, value, false);
}

static PyObject *driver_new(PyTypeObject *type, PyObject *args, PyObject *words) {
    PyObject *loop, *task;
    if (!PyArg_ParseTuple(args, "OO:Driver", &loop, &task) || know_asyncio() < 0)
        return NULL;
    Driver *driver = (Driver *)type->tp_alloc(type, 0);
    if (driver == NULL)
        return NULL;
    driver->loop = Py_NewRef(loop);
    driver->task = Py_NewRef(task);
    driver->green = PyGreenlet_GetCurrent();
    return (PyObject *)driver;
}

static int driver_traverse(PyObject *self, visitproc visit, void *arg) {
    Driver *driver = (Driver *)self;
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(driver->green);
    Py_VISIT(driver->loop);
    Py_VISIT(driver->task);
    Py_VISIT(driver->before_wait);
    return 0;
}

static int driver_clear(PyObject *self) {
    Driver *driver = (Driver *)self;
    Py_CLEAR(driver->green);
    Py_CLEAR(driver->loop);
    Py_CLEAR(driver->task);
    Py_CLEAR(driver->before_wait);
    return 0;
}

static void driver_dealloc(PyObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    driver_clear(self);
    type->tp_free(self);
    Py_DECREF(type);
}

/* -- Wait --------------------------------------------------------------------------------------------------------- */

static bool is_mine(Driver *driver) {
    PyGreenlet *me = PyGreenlet_GetCurrent();
    Py_XDECREF(me); /* the running greenlet lives */
    return me == driver->green;
}

static PySendResult hand_over(Wait *wait, PyObject *value, PyObject **result) {
    if (!wait->iterates || !PyBytes_Check(value) || PyBytes_GET_SIZE(value) > 0) {
        *result = value;
        return PYGEN_RETURN;
    }
    Py_DECREF(value);
    PyErr_SetNone(PyExc_StopAsyncIteration);
    return PYGEN_ERROR;
}

/* Leave the work to the owner's coroutine. */
static int go_elsewhere(Wait *wait) {
    PyObject *args[] = {wait->owner, wait->function, wait->arg};
    wait->inner = PyObject_VectorcallMethod(elsewhere_name, args, wait->arg == NULL ? 2 : 3, NULL);
    Py_CLEAR(wait->function);
    return wait->inner == NULL ? -1 : 0;
}

static PySendResult wait_send(PyObject *self, PyObject *sent, PyObject **result) {
    Wait *wait = (Wait *)self;
    if (wait->inner == NULL) {
        PyObject *function = wait->function;
        if (wait->owner == NULL)
            return hand_over(wait, Py_NewRef(wait->arg), result);
        if (function == NULL) {
            PyErr_SetString(PyExc_RuntimeError, "cannot reuse what was awaited already");
            return PYGEN_ERROR;
        }
        if (is_mine(wait->driver)) {
            wait->function = NULL;
            PyObject *value = call(wait->driver, function, &wait->arg, wait->arg != NULL);
            Py_DECREF(function);
            return value == NULL ? PYGEN_ERROR : hand_over(wait, value, result);
        }
        if (go_elsewhere(wait) < 0)
            return PYGEN_ERROR;
    }
    PySendResult how = PyIter_Send(wait->inner, sent, result);
    return how == PYGEN_RETURN ? hand_over(wait, *result, result) : how;
}

static PyObject *as_iteration(PySendResult how, PyObject *value) {
    if (how == PYGEN_NEXT)
        return value;
    if (how == PYGEN_RETURN) {
        PyObject *stop = PyObject_CallOneArg(PyExc_StopIteration, value); /* also when the value is a tuple */
        if (stop != NULL)
            PyErr_SetObject(PyExc_StopIteration, stop);
        Py_XDECREF(stop);
        Py_DECREF(value);
    }
    return NULL;
}

static PyObject *wait_next(PyObject *self) {
    PyObject *value = NULL;
    PySendResult how = wait_send(self, Py_None, &value);
    return as_iteration(how, value);
}

static PyObject *wait_send_method(PyObject *self, PyObject *sent) {
    PyObject *value = NULL;
    PySendResult how = wait_send(self, sent, &value);
    return as_iteration(how, value);
}

static PyObject *wait_throw(PyObject *self, PyObject *args) {
    Wait *wait = (Wait *)self;
    if (wait->inner != NULL) {
        PyObject *method = PyObject_GetAttrString(wait->inner, "throw");
        PyObject *result = method == NULL ? NULL : PyObject_Call(method, args, NULL);
        Py_XDECREF(method);
        return result;
    }
    PyObject *type, *value = NULL, *trace = NULL;
    if (!PyArg_UnpackTuple(args, "throw", 1, 3, &type, &value, &trace))
        return NULL;
    Py_CLEAR(wait->function);
    if (PyExceptionInstance_Check(type))
        PyErr_SetObject((PyObject *)Py_TYPE(type), type);
    else
        PyErr_SetObject(type, value == Py_None ? NULL : value);
    return NULL;
}

static PyObject *wait_close(PyObject *self, PyObject *none) {
    Wait *wait = (Wait *)self;
    Py_CLEAR(wait->function);
    return wait->inner == NULL ? Py_NewRef(Py_None) : PyObject_CallMethod(wait->inner, "close", NULL);
}

static int wait_traverse(PyObject *self, visitproc visit, void *arg) {
    Wait *wait = (Wait *)self;
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(wait->driver);
    Py_VISIT(wait->owner);
    Py_VISIT(wait->function);
    Py_VISIT(wait->arg);
    Py_VISIT(wait->inner);
    return 0;
}

static int wait_clear(PyObject *self) {
    Wait *wait = (Wait *)self;
    Py_CLEAR(wait->driver);
    Py_CLEAR(wait->owner);
    Py_CLEAR(wait->function);
    Py_CLEAR(wait->arg);
    Py_CLEAR(wait->inner);
    return 0;
}

/* A read that nobody awaited has not been done: a mistake that is easily made, and told as for a coroutine. */
static void wait_finalize(PyObject *self) {
    Wait *wait = (Wait *)self;
    if (wait->function == NULL)
        return;
    PyObject *type, *error, *trace;
    PyErr_Fetch(&type, &error, &trace);
    if (PyErr_WarnFormat(PyExc_RuntimeWarning, 1, "%R was never awaited", wait->function) < 0)
        PyErr_WriteUnraisable(wait->function);
    PyErr_Restore(type, error, trace);
}

static void wait_dealloc(PyObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    if (((Wait *)self)->function != NULL && PyObject_CallFinalizerFromDealloc(self) < 0)
        return;
    PyObject_GC_UnTrack(self);
    wait_clear(self);
    PyObject_GC_Del(self);
    Py_DECREF(type);
}

/* -- the types ---------------------------------------------------------------------------------------------------- */

static PyMethodDef driver_methods[] = {
    {"call", FAST(driver_call), METH_FASTCALL, "call(function, *args): in the task's own coroutine, wait by it."},
    {"enter", driver_enter, METH_NOARGS, "Be the current task."},
    {"leave", driver_leave, METH_NOARGS, "Be the current task no more."},
    {"flush", driver_flush, METH_NOARGS, "Call `before_wait`, once."},
    {"release", driver_release, METH_NOARGS, "The task is over."},
    {"wait", FAST(driver_wait), METH_FASTCALL, "wait(owner, function, arg): an awaitable for function(arg)."},
    {"next", FAST(driver_next), METH_FASTCALL, "next(owner, function): likewise; nothing read ends an iteration."},
    {"done", driver_done, METH_O, "done(value): an awaitable that gives value at once."},
    {NULL},
};

static PyMemberDef driver_members[] = {
    {"green", T_OBJECT, offsetof(Driver, green), READONLY, "The green thread."},
    {"in_call", T_BOOL, offsetof(Driver, in_call), READONLY, "Whether it waits in a call."},
    {"must_cancel", T_BOOL, offsetof(Driver, must_cancel), 0, "Whether to raise CancelledError at the next wait."},
    {"before_wait", T_OBJECT, offsetof(Driver, before_wait), 0, "What to call before the next wait, once."},
    {NULL},
};

static PyType_Slot driver_slots[] = {
    {Py_tp_doc, "Driver(loop, task): runs a task in the calling green thread."},
    {Py_tp_new, driver_new},
    {Py_tp_dealloc, driver_dealloc},
    {Py_tp_traverse, driver_traverse},
    {Py_tp_clear, driver_clear},
    {Py_tp_methods, driver_methods},
    {Py_tp_members, driver_members},
    {0, NULL},
};

static PyMethodDef wait_methods[] = {
    {"send", wait_send_method, METH_O, "As of a coroutine."},
    {"throw", wait_throw, METH_VARARGS, "As of a coroutine."},
    {"close", wait_close, METH_NOARGS, "As of a coroutine."},
    {NULL},
};

static PyType_Slot wait_slots[] = {
    {Py_tp_doc, "What a function returns that waits as green threads do, to be awaited."},
    {Py_tp_dealloc, wait_dealloc},
    {Py_tp_finalize, wait_finalize},
    {Py_tp_traverse, wait_traverse},
    {Py_tp_clear, wait_clear},
    {Py_tp_iter, PyObject_SelfIter},
    {Py_tp_iternext, wait_next},
    {Py_am_await, PyObject_SelfIter},
    {Py_am_send, wait_send},
    {Py_tp_methods, wait_methods},
    {0, NULL},
};

static PyType_Spec driver_spec = {
    .name = "harken._hub.compiled.Driver",
    .basicsize = sizeof(Driver),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .slots = driver_slots,
};

static PyType_Spec wait_spec = {
    .name = "harken._hub.compiled.Wait",
    .basicsize = sizeof(Wait),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = wait_slots,
};

int awaited_ready(PyObject *module) {
    elsewhere_name = PyUnicode_InternFromString("elsewhere");
    Driver_Type = (PyTypeObject *)PyType_FromSpec(&driver_spec);
    Wait_Type = (PyTypeObject *)PyType_FromSpec(&wait_spec);
    if (elsewhere_name == NULL || Driver_Type == NULL || Wait_Type == NULL)
        return -1;
    return PyModule_AddObjectRef(module, "Driver", (PyObject *)Driver_Type);
}
