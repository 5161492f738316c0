/* SPDX-License-Identifier: MIT
 *
 * Lane: the door of connections that workers.c serves, and the books that they are entered in; see lane.h. */
#include "lane.h"

#define TRUSTED_NS 10000000 /* 10 ms: how long what Python said of its door holds; as of datagrams */

HIDDEN PyTypeObject *Lane_Type;
static PyObject *word_accepted, *word_opened, *word_class, *word_socket, *reasons[3];

/* -- the door ----------------------------------------------------------------------------------------------------- */

/* Ask whether it may come in. 0: it was refused, and seen to; -1: an exception. */
static int admit(Lane *lane, PyObject *request, PyObject *address, PyObject **ticket) {
    *ticket = NULL;
    if (lane->gate == Py_None)
        return 1;
    PyObject *args[] = {request, address};
    PyObject *gate = Py_NewRef(lane->gate);
    *ticket = PyObject_Vectorcall(gate, args, 2, NULL);
    Py_DECREF(gate);
    if (*ticket == NULL)
        return -1;
    if (*ticket != Py_None)
        return 1;
    Py_CLEAR(*ticket);
    return 0;
}

static int let_in_as(Lane *lane, PyObject *request, PyObject *address, bool now) {
    PyObject *ticket;
    int admitted = admit(lane, request, address, &ticket);
    if (admitted > 0) {
        lane->tallies.opened++;
        admitted = lane_start(lane, request, address, ticket, now);
    }
    Py_XDECREF(ticket);
    return admitted;
}

/* Let a connection that was accepted in. What goes wrong with it is its own affair. */
static void let_in(Lane *lane, PyObject *request, PyObject *address, bool now) {
    PyObject *told = PyTuple_CheckExact(address) && PyTuple_GET_SIZE(address) > 2
                         ? PyObject_CallFunctionObjArgs(lane->shown, lane->sock, address, NULL)
                         : Py_NewRef(address);
    lane->tallies.taken++;
    if (told == NULL || let_in_as(lane, request, told, now) < 0) {
        if (tell_failure(lane->failed, request, told == NULL ? Py_None : told) < 0)
            PyErr_Clear();
        lane_end(lane, request);
    }
    Py_XDECREF(told);
}

/* Take what is at the door, at most so many, without waiting. -1: nobody could be taken, for that reason. */
static int take(Lane *lane, int most, bool now) {
    Listening listening;
    if (listening_begin(&listening, lane->sock) < 0)
        return -1;
    int taken = 0;
    while (taken < most) {
        PyObject *request, *address;
        int found = listening_accept(&listening, Connection_Type, &request, &address);
        if (found <= 0) {
            if (found < 0 && (taken == 0 || !PyErr_ExceptionMatches(PyExc_OSError)))
                return -1;
            PyErr_Clear(); /* it will be met again */
            break;
        }
        taken++;
        let_in(lane, request, address, now);
        Py_DECREF(request);
        Py_DECREF(address);
        if (now && (lane->trusted == 0 || now_ns() >= lane->trusted))
            break; /* a handler that was served has changed something, or took long */
    }
    return taken;
}

static PyObject *lane_take(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    Lane *lane = (Lane *)self;
    PyObject *kind, *lean, *stamps, *gate;
    int most = count == 3 ? (int)PyNumber_AsSsize_t(args[1], PyExc_OverflowError) : -1;
    if (count != 3 || !PyObject_TypeCheck(args[0], Wire_Type) || most < 0 || !PyTuple_Check(args[2])) {
        PyErr_SetString(PyExc_TypeError, "take() takes a listening socket, a number and Terms");
        return NULL;
    }
    if (!PyArg_ParseTuple(args[2], "OO!O!O:Terms", &kind, &PyBool_Type, &lean, &PyBool_Type, &stamps, &gate))
        return NULL;
    Py_XSETREF(lane->sock, Py_NewRef(args[0]));
    Py_XSETREF(lane->kind, Py_NewRef(kind));
    Py_XSETREF(lane->gate, Py_NewRef(gate));
    lane->lean = lean == Py_True;
    lane->stamps = stamps == Py_True;
    int taken = take(lane, most, false); /* Python is at the door: handlers would keep it there */
    return taken < 0 ? NULL : PyLong_FromLong(taken);
}

/* Programs patch hooks while they serve. A class that was changed, or one above it, has another version (0: none yet);
 * and a hook of the server itself is one attribute more. */
static unsigned int version_of(PyObject *type) { return PyType_Check(type) ? ((PyTypeObject *)type)->tp_version_tag : 0; }

static bool is_as_it_was(Lane *lane) {
    return lane->names != NULL && PyDict_GET_SIZE(lane->names) == lane->name_count &&
           PyDict_GetItemWithError(lane->names, word_socket) == lane->sock &&
           PyDict_GetItemWithError(lane->names, word_class) == lane->kind && lane->versions[0] != 0 &&
           lane->versions[1] != 0 && version_of((PyObject *)Py_TYPE(lane->server)) == lane->versions[0] &&
           version_of(lane->kind) == lane->versions[1] && lane_unheard(lane, word_accepted) &&
           lane_unheard(lane, word_opened);
}

/* Its door is readable. 1: that is seen to, as the last time; 0: Python has to be asked what is wanted; -1. */
int lane_shortcut(PyObject *self) {
    Lane *lane = (Lane *)self;
    if (lane->trusted == 0 || now_ns() >= lane->trusted || !is_as_it_was(lane))
        return 0;
    beat_piece(lane->hub->beat);
    int taken = take(lane, lane->places < DOOR_BURST ? (int)lane->places : DOOR_BURST, true);
    if (taken > 0 && (lane->places -= taken) > 0)
        return 1;
    lane->trusted = 0;
    if (taken < 0 && !PyErr_ExceptionMatches(PyExc_Exception))
        return -1;
    PyErr_Clear(); /* Python's turn meets it again */
    return 0;
}

static PyObject *lane_trust(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    Lane *lane = (Lane *)self;
    long places = count == 2 ? PyLong_AsLong(args[1]) : -1;
    if (places < 0) {
        if (!PyErr_Occurred())
            PyErr_SetString(PyExc_TypeError, "trust() takes a door and a number");
        return NULL;
    }
    Py_XSETREF(lane->names, PyObject_GenericGetDict(lane->server, NULL));
    if (lane->names == NULL)
        return NULL;
    lane->name_count = PyDict_GET_SIZE(lane->names);
    lane->versions[0] = version_of((PyObject *)Py_TYPE(lane->server));
    lane->versions[1] = version_of(lane->kind);
    hub_set_shortcut(lane->hub, args[0], self);
    lane->places = places;
    lane->trusted = places > 0 ? now_ns() + TRUSTED_NS : 0;
    Py_RETURN_NONE;
}

static PyObject *lane_distrust(PyObject *self, PyObject *none) {
    ((Lane *)self)->trusted = 0;
    Py_RETURN_NONE;
}

/* Those that rest have nothing to wait for any more; those that serve end by themselves. */
static PyObject *lane_close(PyObject *self, PyObject *none) {
    Lane *lane = (Lane *)self;
    lane->closed = true;
    lane->trusted = 0;
    while (lane->idle_count > 0) {
        Resting gone = lane->idle[--lane->idle_count];
        if (enqueue(lane->hub, SWITCH, (PyObject *)gone.green, NULL) < 0)
            PyErr_Clear();
        Py_DECREF(gone.worker);
        Py_DECREF(gone.green);
    }
    Py_RETURN_NONE;
}

/* -- the books ---------------------------------------------------------------------------------------------------- */

static int add(PyObject *counts, PyObject *name, long long more) {
    PyObject *before = more == 0 ? NULL : PyDict_GetItemWithError(counts, name); /* borrowed */
    if (more == 0 || (before == NULL && PyErr_Occurred()))
        return more == 0 ? 0 : -1;
    PyObject *now = PyLong_FromLongLong((before == NULL ? 0 : PyLong_AsLongLong(before)) + more);
    int result = now == NULL || PyErr_Occurred() ? -1 : PyDict_SetItem(counts, name, now);
    Py_XDECREF(now);
    return result;
}

static PyObject *lane_collect(PyObject *self, PyObject *none) {
    Lane *lane = (Lane *)self;
    Tallies tallies = lane->tallies;
    lane->tallies = (Tallies){0};
    if (add(lane->counts, word_accepted, tallies.taken) < 0 || add(lane->counts, word_opened, tallies.opened) < 0)
        return NULL;
    for (int i = 0; i < UNKNOWN; i++)
        if (add(lane->reasons, reasons[i], tallies.ended[i]) < 0)
            return NULL;
    Py_RETURN_NONE;
}

static PyObject *lane_connections(PyObject *self, PyObject *none) {
    PyObject *found = PyList_New(0);
    for (Worker *each = ((Lane *)self)->first; found != NULL && each != NULL; each = each->next)
        if (PyList_Append(found, each->request) < 0)
            Py_CLEAR(found);
    return found;
}

static Py_ssize_t lane_length(PyObject *self) { return ((Lane *)self)->open; }

/* -- the type ----------------------------------------------------------------------------------------------------- */

static PyObject *lane_new(PyTypeObject *type, PyObject *args, PyObject *words) {
    PyObject *hub, *busy, *way;
    if (!PyArg_ParseTuple(args, "O!O!O!:Lane", Hub_Type, &hub, &PySet_Type, &busy, &PyTuple_Type, &way))
        return NULL;
    Lane *lane = (Lane *)type->tp_alloc(type, 0);
    if (lane == NULL)
        return NULL;
    if (!PyArg_ParseTuple(way, "OOO!O!O!O!OOOOO", &lane->server, &lane->registry, &PyDict_Type, &lane->filed,
                          &PyDict_Type, &lane->counts, &PyDict_Type, &lane->reasons, &PyDict_Type,
                          &lane->subscribers, &lane->remember, &lane->close, &lane->failed, &lane->shown, &lane->enter)) {
        lane->server = NULL; /* nothing is owned yet */
        memset(&lane->server, 0, offsetof(Lane, sock) - offsetof(Lane, server));
        Py_DECREF(lane);
        return NULL;
    }
    for (PyObject **each = &lane->server; each <= &lane->enter; each++)
        Py_INCREF(*each);
    lane->hub = (Hub *)Py_NewRef(hub);
    lane->busy = Py_NewRef(busy);
    if (lane_know_registry(Py_TYPE(lane->registry)) < 0)
        Py_CLEAR(lane);
    return (PyObject *)lane;
}

static int lane_traverse(PyObject *self, visitproc visit, void *arg) {
    Lane *lane = (Lane *)self;
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(lane->hub);
    Py_VISIT(lane->busy);
    Py_VISIT(lane->names);
    for (PyObject **each = &lane->server; each <= &lane->gate; each++)
        Py_VISIT(*each);
    for (int i = 0; i < lane->idle_count; i++) {
        Py_VISIT(lane->idle[i].green);
        Py_VISIT(lane->idle[i].worker);
    }
    return 0;
}

static int lane_clear(PyObject *self) {
    Lane *lane = (Lane *)self;
    lane->closed = true;
    lane->trusted = 0;
    Py_CLEAR(lane->names);
    while (lane->idle_count > 0)
        lane_drop_resting(lane, lane->idle_count - 1);
    for (PyObject **each = &lane->server; each <= &lane->gate; each++)
        Py_CLEAR(*each);
    return 0;
}

static void lane_dealloc(PyObject *self) {
    Lane *lane = (Lane *)self;
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    lane_clear(self);
    Py_CLEAR(lane->busy);
    Py_CLEAR(lane->hub);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyMethodDef lane_methods[] = {
    {"take", FAST(lane_take), METH_FASTCALL, "take(listener, most, terms): let in what is there; how many."},
    {"trust", FAST(lane_trust), METH_FASTCALL, "trust(door, places): so many may be let in without asking, for a moment."},
    {"distrust", lane_distrust, METH_NOARGS, "distrust(): no more. Any thread."},
    {"collect", lane_collect, METH_NOARGS, "collect(): tell the books what was counted since. Any thread."},
    {"connections", lane_connections, METH_NOARGS, "connections(): the open ones that have no record. Any thread."},
    {"close", lane_close, METH_NOARGS, "Keep no green thread for connections to come. Any thread."},
    {NULL},
};

static PyMemberDef lane_members[] = {
    {"closed", T_BOOL, offsetof(Lane, closed), READONLY, "Whether no connection will come any more."},
    {NULL},
};

static PyType_Slot lane_slots[] = {
    {Py_tp_doc, "Lane(hub, busy, way): connections from door to end; the contract stands in harken._hub."},
    {Py_tp_new, lane_new},
    {Py_tp_dealloc, lane_dealloc},
    {Py_tp_traverse, lane_traverse},
    {Py_tp_clear, lane_clear},
    {Py_tp_methods, lane_methods},
    {Py_tp_members, lane_members},
    {Py_sq_length, lane_length},
    {0, NULL},
};

static PyType_Spec lane_spec = {
    .name = "harken._hub.compiled.Lane",
    .basicsize = sizeof(Lane),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .slots = lane_slots,
};

int lane_ready(PyObject *module) {
    const struct {
        PyObject **word;
        const char *text;
    } words[] = {{&word_accepted, "accepted"},
                 {&word_opened, "opened"},
                 {&word_class, "RequestHandlerClass"},
                 {&word_socket, "socket"},
                 {&reasons[RETURNED], "handler_returned"},
                 {&reasons[CLOSED], "peer_closed"},
                 {&reasons[RESET], "peer_reset"}};
    for (size_t i = 0; i < sizeof words / sizeof *words; i++)
        if ((*words[i].word = PyUnicode_InternFromString(words[i].text)) == NULL)
            return -1;
    Lane_Type = (PyTypeObject *)PyType_FromSpec(&lane_spec);
    if (Lane_Type == NULL || workers_ready() < 0)
        return -1;
    return PyModule_AddObjectRef(module, "Lane", (PyObject *)Lane_Type);
}
