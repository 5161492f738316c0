/* SPDX-License-Identifier: MIT
 *
 * Results of recv() whose memory is used again.
 *
 * A message of some 16 KiB is received into an object of its own, and the handler gives that back when its next one is
 * there. malloc, asked for as much as the handler would take and then to have the rest back, costs a server in C a
 * twentieth of such an echo. So the last results are held here, and the oldest is given out again if nobody else holds
 * it: as if it had been freed and made anew, and as CPython does with the tuples of zip().
 *
 * - Only for TCP, where to ask the kernel for less than the handler did loses nothing. What does not fit is received
 *   behind it (see receive_rest), so that the handler gets what it would have got.
 * - An object has an eighth more room than its first message, so that a program which keeps messages wastes no more, and
 *   one that ends is told from one that goes on.
 * - As many are held as connections are in the midst of such messages, and MOST at the most: a megabyte or two. */
#include "hub.h"

#define MOST 64       /* where more connections take turns, their results are made anew */
#define LARGEST 32768 /* bytes: larger ones drive one another out of the cache, and were slower */

static Result ring[MOST]; /* the oldest first; owned */
static size_t first, count;
static bool usable; /* this interpreter's bytes can be cut */

static bool is_free(void) { return count > 0 && Py_REFCNT(ring[first].bytes) == 1; }

static Result take_oldest(void) {
    Result oldest = ring[first];
    first = (first + 1) % MOST;
    count--;
    return oldest;
}

/* As _PyBytes_Resize, without a word to malloc. Nobody else may know the object. */
static void cut(PyObject *bytes, size_t size) {
    Py_SET_SIZE(bytes, (Py_ssize_t)size);
    PyBytes_AS_STRING(bytes)[size] = 0;
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations" /* no function does this alone */
    ((PyBytesObject *)bytes)->ob_shash = -1;
#pragma GCC diagnostic pop
}

bool result_fits(size_t size) { return usable && size > LARGE && size <= LARGEST; }

/* Something to receive so many bytes into; or, if it may have been used before, fewer. False with an exception: there is
 * no memory. */
bool result_make(Result *result, size_t size, bool again) {
    if (again && is_free()) {
        *result = take_oldest();
        cut(result->bytes, result->room);
        if (is_free())
            Py_DECREF(take_oldest().bytes); /* more are held than take turns */
        return true;
    }
    if (again && count == MOST)
        Py_DECREF(take_oldest().bytes); /* somebody keeps it */
    *result = (Result){PyBytes_FromStringAndSize(NULL, (Py_ssize_t)size), size};
    return result->bytes != NULL;
}

/* Hold it, with room for a little more than came. */
static void hold(Result *result, size_t got, bool made) {
    if (made) {
        result->room = got + got / 8;
        if (_PyBytes_Resize(&result->bytes, (Py_ssize_t)result->room) < 0)
            return; /* which has taken it away */
    }
    cut(result->bytes, got);
    if (count < MOST)
        ring[(first + count++) % MOST] = (Result){Py_NewRef(result->bytes), result->room};
}

/* What recv() returns for a result with so many bytes in it, of those that were asked for; the result is no more. NULL
 * with an exception: there is no memory. */
PyObject *result_finish(Result *result, size_t got, size_t asked, bool again) {
    bool made = result->room == asked;
    if (again && result_fits(got) && (!made || got + got / 8 < asked))
        hold(result, got, made);
    else if (got < result->room)
        _PyBytes_Resize(&result->bytes, (Py_ssize_t)got);
    return result->bytes;
}

/* Whether bytes that were cut are what others of their content are. */
int results_ready(void) {
    PyObject *bytes = PyBytes_FromStringAndSize("harken", 6), *like = PyBytes_FromStringAndSize("ha", 2);
    Py_hash_t whole = bytes == NULL ? -1 : PyObject_Hash(bytes), hash = like == NULL ? -1 : PyObject_Hash(like);
    int same = -1;
    if (whole != -1 && hash != -1) {
        cut(bytes, 2);
        same = PyObject_RichCompareBool(bytes, like, Py_EQ);
        usable = same == 1 && PyObject_Hash(bytes) == hash;
    }
    Py_XDECREF(bytes);
    Py_XDECREF(like);
    return same < 0 ? -1 : 0;
}
