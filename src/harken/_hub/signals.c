/* SPDX-License-Identifier: MIT
 *
 * Signals wake the loop. */
#include "hub.h"
#include <sys/socket.h>
#include <unistd.h>

PyObject *wakeup_fd(int fd) {
    PyObject *module = PyImport_ImportModule("signal"), *before = NULL;
    PyObject *function = module == NULL ? NULL : PyObject_GetAttrString(module, "set_wakeup_fd");
    PyObject *args = function == NULL ? NULL : Py_BuildValue("(i)", fd);
    PyObject *words = args == NULL ? NULL : Py_BuildValue("{s:O}", "warn_on_full_buffer", Py_False);
    if (words != NULL)
        before = PyObject_Call(function, args, words);
    Py_XDECREF(words);
    Py_XDECREF(args);
    Py_XDECREF(function);
    Py_XDECREF(module);
    return before;
}

/* Between the last look for signals and epoll_wait there is a gap; a byte on a socket closes it. (An eventfd takes no
 * single byte.) Only the main thread may ask for that, and only one can have it: a host that does keeps it. */
int watch_signals(Hub *hub) {
    if (hub->signals[0] >= 0 ||
        socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, hub->signals) < 0)
        return 0; /* without them signals are seen at the next wake-up */
    PyObject *before = wakeup_fd(hub->signals[1]);
    if (before == NULL && !PyErr_ExceptionMatches(PyExc_ValueError))
        return -1;
    long others = before == NULL ? 0 : PyLong_AsLong(before);
    Py_XDECREF(before);
    PyErr_Clear();
    if (others == -1 && watch_fd(hub, hub->signals[0], SIGNAL_TAG) == 0)
        return 0;
    if (others > 0)
        Py_XDECREF(wakeup_fd((int)others));
    close_fd(&hub->signals[0]);
    close_fd(&hub->signals[1]);
    PyErr_Clear();
    return 0;
}

void unwatch_signals(Hub *hub) {
    if (hub->signals[0] < 0)
        return;
    PyObject *type, *error, *trace;
    PyErr_Fetch(&type, &error, &trace);
    PyObject *now = wakeup_fd(-1);
    long fd = now == NULL ? -1 : PyLong_AsLong(now);
    Py_XDECREF(now);
    if (fd >= 0 && fd != hub->signals[1]) /* somebody took it over meanwhile */
        Py_XDECREF(wakeup_fd((int)fd));
    PyErr_Restore(type, error, trace);
    close_fd(&hub->signals[0]);
    close_fd(&hub->signals[1]);
}

void drain_signals(Hub *hub) {
    char numbers[256];
    while (read(hub->signals[0], numbers, sizeof numbers) > 0)
        ;
}
