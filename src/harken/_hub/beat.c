/* SPDX-License-Identifier: MIT
 *
 * Beat: what a loop says of itself, for a watchdog that needs no GIL to listen.
 *
 * The loop notes when each piece of its work began, and 0 before it sleeps; that is all that watching costs it. The
 * watchdog looks now and then while there is work, and sleeps without a timeout while there is none: an idle machine is
 * not woken. Looking needs no GIL, so that a piece that holds it is suspected while it runs; the watchdog then asks for
 * the GIL, and gets it where that piece first lets go: still at the same line. */
#include "hub.h"
#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

/* Between two looks at a loop that works. Answers that a handler has written and not sent wait for one or two. */
#define LOOK_NS 25000000
#define SHORTEST_NS 1000000
/* A piece of work that takes so long is told of while it goes on: it may never end. */
#define LONG_NS ((int64_t)5 * 1000000000)

enum { STOPPED, LATE, OVER, LONG, UNSENT };

HIDDEN PyTypeObject *Beat_Type;

/* -- the loop's side ---------------------------------------------------------------------------------------------- */

/* Good to some milliseconds and five times cheaper than the exact one; the end of a stall is read from that. */
int64_t coarse_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

static void ring(Beat *beat) {
    atomic_store(&beat->bell, 1);
    syscall(SYS_futex, &beat->bell, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
}

void beat_wake(Beat *beat) {
    atomic_store(&beat->parked, 0);
    ring(beat);
}

void beat_over(Beat *beat) {
    atomic_store(&beat->ended, now_ns());
    atomic_store(&beat->caught, 0);
    ring(beat);
}

/* In a forked child, which has no watchdog yet. */
void beat_forget(Beat *beat) {
    atomic_store(&beat->since, 0);
    atomic_store(&beat->caught, 0);
    atomic_store(&beat->ended, 0);
    atomic_store(&beat->parked, 0);
}

/* -- the watchdog's side ------------------------------------------------------------------------------------------ */

/* Sleep until somebody rings, or so long. */
static void rest(Beat *beat, int64_t ns) {
    struct timespec patience = {.tv_sec = ns / 1000000000, .tv_nsec = ns % 1000000000};
    syscall(SYS_futex, &beat->bell, FUTEX_WAIT_PRIVATE, 0, ns < 0 ? NULL : &patience, NULL, 0);
    atomic_store(&beat->bell, 0);
}

static int64_t interval(Beat *beat) {
    int64_t after = beat->after;
    if (after < 0 || after / 4 > LOOK_NS)
        return LOOK_NS;
    return after / 4 > SHORTEST_NS ? after / 4 : SHORTEST_NS;
}

/* The loop sleeps: sleep until it wakes us, and then let it work for a while. */
static void park(Beat *beat) {
    atomic_store(&beat->parked, 1);
    if (atomic_load(&beat->since) == 0 && !atomic_load(&beat->stopped) && !atomic_load(&beat->ended))
        rest(beat, -1);
    atomic_store(&beat->parked, 0);
    if (!atomic_load(&beat->stopped) && !atomic_load(&beat->ended))
        rest(beat, interval(beat));
}

/* The piece of work that began at `since` is late. The loop says when it ends from now on. */
static int catch(Beat *beat, int64_t since) {
    beat->told_long = false;
    beat->suspect = since;
    atomic_store(&beat->caught, since);
    if (atomic_load(&beat->since) != since && atomic_exchange(&beat->caught, 0) != 0)
        atomic_store(&beat->ended, now_ns()); /* it ended at this very moment */
    return LATE;
}

/* Whether there is something to tell; -1: nothing, and `*patience` says how long to sleep before the next look. */
static int look(Beat *beat, int64_t *patience) {
    int64_t since = atomic_load(&beat->since), age = now_ns() - since, left;
    if (atomic_load(&beat->ended) != 0) {
        beat->seconds = (double)(atomic_exchange(&beat->ended, 0) - beat->suspect) / 1e9;
        return OVER;
    }
    if (atomic_load(&beat->stopped))
        return STOPPED;
    *patience = -1;
    if (since == 0)
        return -1;
    *patience = interval(beat);
    beat->seconds = (double)age / 1e9;
    if (since != beat->seen) { /* seen twice, so that a process that was held as a whole blames nobody */
        beat->seen = since;
        return -1;
    }
    if (atomic_load(&beat->caught) != 0) {
        if (!beat->told_long && age >= LONG_NS) {
            beat->told_long = true;
            return LONG;
        }
    } else if (beat->after >= 0) {
        if (age >= beat->after)
            return catch(beat, since);
        left = beat->after - age;
        if (left < *patience)
            *patience = left > SHORTEST_NS ? left : SHORTEST_NS;
    }
    bool owes = false;
    for (int i = 0; i < 4; i++)
        owes |= beat->owed[i] != NULL && *beat->owed[i] > 0;
    return owes && age >= LOOK_NS ? UNSENT : -1;
}

static int watch(Beat *beat) {
    int64_t patience;
    int news = beat->rests ? -1 : look(beat, &patience); /* at once, while we hold the GIL that we waited for */
    if (news < 0) {
        Py_BEGIN_ALLOW_THREADS;
        if (beat->rests)
            rest(beat, interval(beat));
        while ((news = look(beat, &patience)) < 0)
            if (patience < 0)
                park(beat);
            else
                rest(beat, patience);
        Py_END_ALLOW_THREADS;
    }
    beat->rests = news == UNSENT;
    return news;
}

static PyObject *beat_watch(PyObject *self, PyObject *none) {
    Beat *beat = (Beat *)self;
    static const char *words[] = {"stopped", "late", "over", "long", "unsent"};
    int news = watch(beat);
    return Py_BuildValue("sd", words[news], beat->seconds);
}

static PyObject *beat_same(PyObject *self, PyObject *none) {
    Beat *beat = (Beat *)self;
    return PyBool_FromLong(atomic_load(&beat->since) == beat->suspect && beat->suspect != 0);
}

static PyObject *beat_stop(PyObject *self, PyObject *none) {
    atomic_store(&((Beat *)self)->stopped, 1);
    ring((Beat *)self);
    Py_RETURN_NONE;
}

static PyObject *beat_enter(PyObject *self, PyObject *none) {
    beat_wakes((Beat *)self);
    Py_RETURN_NONE;
}

static PyObject *beat_leave(PyObject *self, PyObject *none) {
    beat_sleeps((Beat *)self);
    Py_RETURN_NONE;
}

static PyObject *get_after(PyObject *self, void *closure) {
    Beat *beat = (Beat *)self;
    return beat->after < 0 ? Py_NewRef(Py_None) : PyFloat_FromDouble((double)beat->after / 1e9);
}

static int set_after(PyObject *self, PyObject *seconds, void *closure) {
    int64_t ns = -1;
    if (seconds == NULL) {
        PyErr_SetString(PyExc_AttributeError, "after cannot be deleted; None watches for no stall");
        return -1;
    }
    if (seconds != Py_None && seconds_to_ns(seconds, &ns) < 0)
        return -1;
    ((Beat *)self)->after = ns;
    return 0;
}

/* -- the type ----------------------------------------------------------------------------------------------------- */

static PyObject *beat_new(PyTypeObject *type, PyObject *args, PyObject *words) {
    Beat *beat = (Beat *)type->tp_alloc(type, 0);
    if (beat != NULL)
        beat->after = -1;
    return (PyObject *)beat;
}

static void beat_dealloc(PyObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyMethodDef beat_methods[] = {
    {"enter", beat_enter, METH_NOARGS, "A piece of work begins."},
    {"leave", beat_leave, METH_NOARGS, "The loop is about to sleep."},
    {"watch", beat_watch, METH_NOARGS, "watch(): wait for news, (word, seconds), without the GIL."},
    {"same", beat_same, METH_NOARGS, "Whether the late piece of work still runs."},
    {"stop", beat_stop, METH_NOARGS, "Let watch() return 'stopped', now and from now on."},
    {NULL},
};

static PyGetSetDef beat_attributes[] = {
    {"after", get_after, set_after, "Seconds after which a piece of work is late; None: never.", NULL},
    {NULL},
};

static PyType_Slot beat_slots[] = {
    {Py_tp_doc, "What a loop says of itself; the contract stands in harken._hub."},
    {Py_tp_new, beat_new},
    {Py_tp_dealloc, beat_dealloc},
    {Py_tp_methods, beat_methods},
    {Py_tp_getset, beat_attributes},
    {0, NULL},
};

static PyType_Spec beat_spec = {
    .name = "harken._hub.compiled.Beat",
    .basicsize = sizeof(Beat),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = beat_slots,
};

int beat_ready(PyObject *module) {
    Beat_Type = (PyTypeObject *)PyType_FromSpec(&beat_spec);
    return Beat_Type == NULL ? -1 : PyModule_AddObjectRef(module, "Beat", (PyObject *)Beat_Type);
}
