/* SPDX-License-Identifier: MIT
 *
 * What lane.c, which takes connections at the door, and workers.c, whose green threads serve them to their end, share.
 *
 * A lane is the way of connections whose server overrides no hook: what harken.straight does in Python, for a server of
 * whose connections nobody has to be told. Preambles are Python's affair, and what comes after them; so are limits,
 * which are asked at the door and told of the end.
 *
 * Of a short connection the kernel has five sixths; what is left to us is some fifteen microseconds, and a call of
 * Python's is one or two tenths of one. So what nobody asks for is not made: a connection has no Record until somebody
 * reads its `record`, and its green thread is one that has served others before it. */
#ifndef HARKEN_LANE_H
#define HARKEN_LANE_H
#include "hub.h"

#define MOST_IDLE 64 /* green threads that rest, of some 2 KiB: as many as one burst starts */

typedef struct Lane Lane;

/* What a green thread of a lane runs. */
typedef struct Worker {
    PyObject_HEAD
    struct Worker *next, *previous; /* of those whose connections are open and have no record */
    int64_t started;                /* when the connection was accepted, in nanoseconds of CLOCK_MONOTONIC */
    Lane *lane;
    PyGreenlet *green; /* borrowed: it holds this */
    PyObject *request, *address, *kind; /* of the connection that it serves; NULL: it rests */
    PyObject *ticket;                   /* what that was let in by, until its record has it; or NULL */
    PyObject *context;                  /* to serve it in; NULL: there is none */
    bool lean, leaves;
} Worker;

typedef struct {
    PyGreenlet *green;
    Worker *worker;
} Resting; /* both owned */

/* What Python's books will be told, when somebody reads them. */
typedef struct {
    long long taken, opened, ended[3]; /* by what `reasons` says */
} Tallies;

struct Lane {
    PyObject_HEAD
    Hub *hub;
    PyObject *busy; /* a set that holds the green threads that serve */
    /* A Way of harken.engines, read out. */
    PyObject *server, *registry, *filed, *counts, *reasons, *subscribers, *remember, *close, *failed, *shown, *enter;
    PyObject *sock, *kind, *gate; /* the listening socket, the handler class, and who is asked, at the last take() */
    bool lean, stamps, closed;
    int64_t trusted; /* until when the door need not be looked at by Python; 0: now */
    long places;     /* and how many may come in until then */
    /* What Python has looked at: the server's attributes, and the versions of the two classes. */
    PyObject *names;
    Py_ssize_t name_count;
    unsigned int versions[2];
    Worker *first; /* of those whose connections are open and have no record */
    Py_ssize_t open;
    Tallies tallies; /* since collect() */
    Resting idle[MOST_IDLE];
    int idle_count;
};

enum { RETURNED, CLOSED, RESET, UNKNOWN }; /* why a connection has ended */

HIDDEN int workers_ready(void);
HIDDEN int lane_know_registry(PyTypeObject *type);
HIDDEN bool lane_unheard(Lane *lane, PyObject *event);
HIDDEN int lane_start(Lane *lane, PyObject *request, PyObject *address, PyObject *ticket, bool now);
HIDDEN void lane_end(Lane *lane, PyObject *request);
HIDDEN void lane_drop_resting(Lane *lane, int place);

#endif
