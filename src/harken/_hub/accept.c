/* SPDX-License-Identifier: MIT
 *
 * accept(2) straight into a Connection.
 *
 * socket.socket.__init__ asks the kernel four things that we know, and runs in Python. So the C part of a connection is
 * copied from a socket that went through it, and the numbers are put in their places: these are CPython's own, and are
 * looked up and tried out at import. Where they are not as expected, connections are made the plain way. */
#include "hub.h"
#include <arpa/inet.h>
#include <errno.h>
#include <limits.h>
#include <poll.h>
#include <stddef.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

HIDDEN PyTypeObject *Wire_Type, *Socket_Type;

/* The head of CPython's PySocketSockObject (Modules/socketmodule.h), the same in 3.11 to 3.13. */
typedef struct {
    PyObject_HEAD
    int fd, family, kind, proto;
} Head;

static bool quick;              /* Head is right, and `pattern` may be copied */
static PyObject *pattern;       /* a closed _socket.socket that does not block */
static Py_ssize_t io_refs, closed; /* offsets of socket.socket's __slots__ */
static PyObject *part_names[3], *get_default_timeout, *timeout_name, *close_name;

int socket_fd(PyObject *sock) {
    if (quick)
        return ((Head *)sock)->fd;
    PyObject *number = PyObject_CallMethod(sock, "fileno", NULL); /* which sends what was written: once */
    int fd = number == NULL ? -1 : (int)PyLong_AsLong(number);
    Py_XDECREF(number);
    return fd;
}

int socket_parts(PyObject *sock, int *fd, int *family, int *kind, int *proto) {
    if (quick) {
        Head *head = (Head *)sock;
        *fd = head->fd, *family = head->family, *kind = head->kind, *proto = head->proto;
        return 0;
    }
    int *parts[] = {family, kind, proto};
    for (int i = 0; i < 3; i++) {
        PyObject *number = PyObject_GetAttr(sock, part_names[i]);
        *parts[i] = number == NULL ? -1 : (int)PyLong_AsLong(number);
        Py_XDECREF(number);
        if (number == NULL || (*parts[i] == -1 && PyErr_Occurred()))
            return -1;
    }
    *fd = socket_fd(sock);
    return *fd < 0 && PyErr_Occurred() ? -1 : 0;
}

static void set_slot(PyObject *object, Py_ssize_t offset, PyObject *value) {
    Py_XSETREF(*(PyObject **)((char *)object + offset), value);
}

/* Do for a new socket what socket.socket.__init__ does for a descriptor that is known to be right and does not block. */
static void fill_socket(PyObject *made, int fd, int family, int kind, int proto) {
    memcpy((char *)made + sizeof(PyObject), (char *)pattern + sizeof(PyObject),
           (size_t)Wire_Type->tp_basicsize - sizeof(PyObject));
    Head *head = (Head *)made;
    head->fd = fd;
    head->family = family;
    head->kind = kind;
    head->proto = proto;
    set_slot(made, io_refs, PyLong_FromLong(0));
    set_slot(made, closed, Py_NewRef(Py_False));
}

/* The same for a new connection. False: it must be called. */
static bool fill_in(PyObject *made, int fd, int family, int kind, int proto) {
    if (!quick)
        return false;
    fill_socket(made, fd, family, kind, proto);
    make_stream_known(state_of(made), family, kind, proto);
    return true;
}

/* The same for a new object of another class of sockets, which is to have the descriptor of `sock` too. */
bool stand_for(PyObject *made, PyObject *sock) {
    if (!quick || !PyObject_TypeCheck(made, Socket_Type) || ((Head *)made)->fd != -1)
        return false;
    Head *head = (Head *)sock;
    fill_socket(made, head->fd, head->family, head->kind, head->proto);
    return true;
}

/* Whether files made of the connection keep it open. */
static bool refers(PyObject *sock) {
    PyObject *count = *(PyObject **)((char *)sock + io_refs);
    return count == NULL || !PyLong_Check(count) || PyLong_AsLong(count) > 0;
}

PyObject *make_connection(PyTypeObject *type, int fd, int family, int kind, int proto) {
    if (!quick || type->tp_init != Connection_Type->tp_init || type->tp_new != Connection_Type->tp_new)
        return PyObject_CallFunction((PyObject *)type, "iiii", family, kind, proto, fd);
    PyObject *made = type->tp_alloc(type, 0);
    if (made != NULL)
        fill_in(made, fd, family, kind, proto);
    return made;
}

/* Connection(family, type, proto, fileno) with plain numbers, as an acceptor calls it. 1: done; 0: not that; -1. */
int quick_init(PyObject *self, PyObject *args, PyObject *words) {
    int numbers[4];
    if (!quick || words != NULL || PyTuple_GET_SIZE(args) != 4 || ((Head *)self)->fd != -1)
        return 0;
    for (int i = 0; i < 4; i++) {
        PyObject *number = PyTuple_GET_ITEM(args, i);
        long value = PyLong_CheckExact(number) ? PyLong_AsLong(number) : -1;
        if (value < 0 || value > INT_MAX) {
            PyErr_Clear();
            return 0;
        }
        numbers[i] = (int)value;
    }
    if (numbers[1] & (SOCK_NONBLOCK | SOCK_CLOEXEC)) /* to be stripped */
        return 0;
    struct sockaddr_storage own;
    socklen_t length = sizeof own;
    int yes = 1, fd = numbers[3];
    if (getsockname(fd, (struct sockaddr *)&own, &length) < 0 || ioctl(fd, FIONBIO, &yes) < 0)
        return fail(errno);
    return fill_in(self, fd, numbers[0], numbers[1], numbers[2]);
}

/* -- addresses ---------------------------------------------------------------------------------------------------- */

#define HOSTS 256 /* clients come back; a collision costs what it cost before */
static struct {
    in_addr_t address;
    PyObject *text;
} hosts[HOSTS];

static PyObject *host_of(struct in_addr address) {
    uint32_t mixed = ntohl(address.s_addr) * 2654435761u;
    size_t place = mixed >> 24;
    if (hosts[place].text != NULL && hosts[place].address == address.s_addr)
        return Py_NewRef(hosts[place].text);
    char text[INET_ADDRSTRLEN];
    inet_ntop(AF_INET, &address, text, sizeof text);
    PyObject *made = PyUnicode_FromString(text);
    if (made != NULL) {
        hosts[place].address = address.s_addr;
        Py_XSETREF(hosts[place].text, Py_NewRef(made));
    }
    return made;
}

typedef union {
    struct sockaddr any;
    struct sockaddr_in v4;
    struct sockaddr_in6 v6;
    struct sockaddr_un local;
    struct sockaddr_storage room;
} Address;

static PyObject *local_name(struct sockaddr_un *address, socklen_t length) {
    size_t size = length > offsetof(struct sockaddr_un, sun_path) ? length - offsetof(struct sockaddr_un, sun_path) : 0;
    if (size > 0 && address->sun_path[0] == 0) /* abstract: bytes, as the socket module has it */
        return PyBytes_FromStringAndSize(address->sun_path, (Py_ssize_t)size);
    return PyUnicode_DecodeFSDefaultAndSize(address->sun_path, (Py_ssize_t)strnlen(address->sun_path, size));
}

/* The address in the form in which the socket module gives it. */
static PyObject *describe(PyObject *connection, Address *address, socklen_t length) {
    char text[INET6_ADDRSTRLEN];
    PyObject *host, *port, *pair;
    switch (address->any.sa_family) {
    case AF_INET:
        host = host_of(address->v4.sin_addr);
        port = PyLong_FromLong(ntohs(address->v4.sin_port));
        pair = host == NULL || port == NULL ? NULL : PyTuple_Pack(2, host, port);
        Py_XDECREF(host);
        Py_XDECREF(port);
        return pair;
    case AF_INET6:
        inet_ntop(AF_INET6, &address->v6.sin6_addr, text, sizeof text);
        return Py_BuildValue("siII", text, ntohs(address->v6.sin6_port), (unsigned)ntohl(address->v6.sin6_flowinfo),
                             (unsigned)address->v6.sin6_scope_id);
    case AF_UNIX:
        return local_name(&address->local, length);
    default:
        return connection == NULL ? Py_NewRef(Py_None) : PyObject_CallMethod(connection, "getpeername", NULL);
    }
}

/* The address of a datagram's sender; None for a Unix socket that has no name. */
PyObject *address_of(const void *address, unsigned length) {
    return length < sizeof(sa_family_t) ? Py_NewRef(Py_None) : describe(NULL, (Address *)address, length);
}

/* -- accepting ---------------------------------------------------------------------------------------------------- */

/* 0; -1 with an exception: BlockingIOError when nobody is there. */
static int accept_into(PyTypeObject *type, const Listening *door, PyObject **connection, PyObject **peer) {
    Address address;
    socklen_t length = sizeof address;
    int accepted;
    while ((accepted = accept4(door->fd, &address.any, &length, SOCK_NONBLOCK | SOCK_CLOEXEC)) < 0) {
        if (errno != EINTR)
            return fail(errno);
        if (PyErr_CheckSignals() < 0)
            return -1;
    }
    if (length < sizeof(sa_family_t))
        address.any.sa_family = (sa_family_t)door->family;
    *connection = make_connection(type, accepted, door->family, door->kind, door->proto);
    if (*connection == NULL) {
        close(accepted);
        return -1;
    }
    *peer = describe(*connection, &address, length);
    if (*peer != NULL)
        return 0;
    Py_CLEAR(*connection);
    return -1;
}

/* (connection, address) */
PyObject *accept_from(PyTypeObject *type, int fd, int family, int kind, int proto) {
    Listening door = {.fd = fd, .family = family, .kind = kind, .proto = proto};
    PyObject *connection, *peer;
    if (accept_into(type, &door, &connection, &peer) < 0)
        return NULL;
    PyObject *pair = PyTuple_Pack(2, connection, peer);
    Py_DECREF(connection);
    Py_DECREF(peer);
    return pair;
}

PyObject *accept_one(PyObject *module, PyObject *listener) {
    int fd, family, kind, proto;
    if (!PyObject_TypeCheck(listener, Wire_Type)) {
        PyErr_Format(PyExc_TypeError, "a listening socket is needed, not %.100s", Py_TYPE(listener)->tp_name);
        return NULL;
    }
    if (socket_parts(listener, &fd, &family, &kind, &proto) < 0)
        return NULL;
    return accept_from(Connection_Type, fd, family, kind, proto);
}

/* socket.setdefaulttimeout() holds for accepted connections too. */
int default_timeout(State *state) {
    PyObject *seconds = PyObject_CallNoArgs(get_default_timeout);
    if (seconds != NULL && seconds != Py_None) {
        state->timeout = PyFloat_AsDouble(seconds);
        state->nonblocking = state->timeout == 0;
    }
    Py_XDECREF(seconds);
    return PyErr_Occurred() ? -1 : 0;
}

/* accept(2) blocks on a listener that does, and its flags belong to every process that shares it. */
static bool anybody(int fd) {
    struct pollfd door = {.fd = fd, .events = POLLIN};
    return poll(&door, 1, 0) != 0; /* an error too: accept() tells which */
}

static int never_blocks(PyObject *listener) {
    PyObject *timeout = PyObject_CallMethodNoArgs(listener, timeout_name);
    int zero = timeout == NULL ? -1 : PyFloat_CheckExact(timeout) && PyFloat_AS_DOUBLE(timeout) == 0.0;
    Py_XDECREF(timeout);
    return zero;
}

/* Look at a listening socket before connections are taken from it. */
int listening_begin(Listening *door, PyObject *listener) {
    if (socket_parts(listener, &door->fd, &door->family, &door->kind, &door->proto) < 0)
        return -1;
    int quiet = never_blocks(listener);
    door->quiet = quiet > 0;
    return quiet < 0 ? -1 : 0;
}

/* Take one, without waiting. 1: there was one; 0: nobody is there; -1. */
int listening_accept(const Listening *door, PyTypeObject *type, PyObject **connection, PyObject **peer) {
    if (!door->quiet && !anybody(door->fd))
        return 0;
    if (accept_into(type, door, connection, peer) < 0) {
        if (!PyErr_ExceptionMatches(PyExc_BlockingIOError))
            return -1;
        PyErr_Clear();
        return 0;
    }
    if (default_timeout(state_of(*connection)) == 0)
        return 1;
    Py_DECREF(*connection);
    Py_DECREF(*peer);
    return -1;
}

/* Connection.take(listener, most): accept at most so many, without waiting: [(connection, address)]. What fails after
 * the first is left for the next call to meet. */
PyObject *connection_take(PyObject *type, PyObject *const *args, Py_ssize_t count) {
    Listening door;
    Py_ssize_t most = count == 2 ? PyNumber_AsSsize_t(args[1], PyExc_OverflowError) : -1;
    if (count != 2 || !PyObject_TypeCheck(args[0], Wire_Type)) {
        PyErr_SetString(PyExc_TypeError, "take() takes a listening socket and a number");
        return NULL;
    }
    if ((most < 0 && PyErr_Occurred()) || listening_begin(&door, args[0]) < 0)
        return NULL;
    PyObject *taken = PyList_New(0);
    while (taken != NULL && PyList_GET_SIZE(taken) < most) {
        PyObject *connection, *peer;
        int found = listening_accept(&door, (PyTypeObject *)type, &connection, &peer);
        if (found == 0 || (found < 0 && PyList_GET_SIZE(taken) > 0 && PyErr_ExceptionMatches(PyExc_OSError))) {
            PyErr_Clear();
            break;
        }
        PyObject *pair = found < 0 ? NULL : PyTuple_Pack(2, connection, peer);
        if (found > 0) {
            Py_DECREF(connection);
            Py_DECREF(peer);
        }
        if (pair == NULL || PyList_Append(taken, pair) < 0)
            Py_CLEAR(taken);
        Py_XDECREF(pair);
    }
    return taken;
}

/* -- the end ------------------------------------------------------------------------------------------------------ */

/* Whether close() will close the descriptor, rather than a file of it later. */
bool closes_at_once(PyObject *sock) { return quick && socket_fd(sock) >= 0 && !refers(sock); }

/* A socket is closed: its descriptor is another one's to close. Only where closes_at_once(). */
void stand_down(PyObject *sock) {
    ((Head *)sock)->fd = -1;
    set_slot(sock, closed, Py_NewRef(Py_True));
}

/* What shutdown_request() and close_request() do together. close() alone tells the peer as much, where it has closed
 * its side already and nobody else can hold the descriptor. */
PyObject *connection_end(PyObject *self, PyObject *none) {
    State *state = state_of(self);
    if (socket_fd(self) >= 0 && flush_to_leave(self) < 0)
        PyErr_Clear();         /* the peer has gone: nobody is left to be told */
    int fd = socket_fd(self); /* others may have run meanwhile, and closed it: the number may be another's */
    if (fd >= 0 && (!state->ended || !state->stream || state->exposed || forked))
        shutdown(fd, SHUT_WR); /* the peer, or the handler, may have been quicker */
    if (!closes_at_once(self)) {
        PyObject *done = PyObject_CallMethodNoArgs(self, close_name);
        Py_XDECREF(done);
        return done == NULL ? NULL : PyBool_FromLong(socket_fd(self) < 0);
    }
    if (!state->exposed && !forked)
        leave_unasked(state); /* the kernel takes a file that nobody has any more out of the epoll set */
    let_go(self, state);
    if ((fd = socket_fd(self)) >= 0) { /* as above */
        stand_down(self);
        close(fd);
    }
    Py_RETURN_TRUE;
}

/* -- looking CPython up ------------------------------------------------------------------------------------------- */

/* Where an instance has what `__slots__` names; -1: it does not. */
Py_ssize_t slot_offset(PyTypeObject *type, const char *name) {
    PyObject *descriptor = PyObject_GetAttrString((PyObject *)type, name);
    Py_ssize_t offset = -1;
    if (descriptor != NULL && Py_IS_TYPE(descriptor, &PyMemberDescr_Type))
        offset = ((PyMemberDescrObject *)descriptor)->d_member->offset;
    Py_XDECREF(descriptor);
    PyErr_Clear();
    return offset;
}

static bool head_is(PyObject *sock, int fd, int family, int kind, int proto) {
    Head *head = (Head *)sock;
    return head->fd == fd && head->family == family && head->kind == kind && head->proto == proto;
}

/* Whether what a real socket holds lies where Head has it: tried with two that differ in every number. */
static bool look_up(void) {
    bool right = false;
    int fds[2] = {-1, -1}, other[2] = {-1, -1};
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds) == 0 &&
        socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, other) == 0) {
        PyObject *first = PyObject_CallFunction((PyObject *)Wire_Type, "iiii", AF_UNIX, SOCK_STREAM, 0, fds[0]);
        PyObject *second = PyObject_CallFunction((PyObject *)Wire_Type, "iiii", AF_INET6, SOCK_SEQPACKET, 7, other[0]);
        PyObject *done = first == NULL ? NULL : PyObject_CallMethod(first, "setblocking", "O", Py_False);
        if (done != NULL && second != NULL && Wire_Type->tp_basicsize >= (Py_ssize_t)sizeof(Head))
            right = head_is(first, fds[0], AF_UNIX, SOCK_STREAM, 0) &&
                    head_is(second, other[0], AF_INET6, SOCK_SEQPACKET, 7);
        Py_XDECREF(done);
        for (PyObject *sock = first; sock != NULL; sock = sock == first ? second : NULL) {
            done = PyObject_CallMethod(sock, "close", NULL);
            Py_XDECREF(done);
        }
        right = right && head_is(first, -1, AF_UNIX, SOCK_STREAM, 0);
        pattern = first; /* kept for ever */
        Py_XDECREF(second);
        if (first == NULL)
            close(fds[0]);
        if (second == NULL)
            close(other[0]);
        close(fds[1]);
        close(other[1]);
    }
    PyErr_Clear();
    io_refs = slot_offset(Socket_Type, "_io_refs");
    closed = slot_offset(Socket_Type, "_closed");
    return right && io_refs > 0 && closed > 0;
}

int accept_ready(void) {
    static const char *names[] = {"family", "type", "proto"};
    PyObject *wire = PyImport_ImportModule("_socket"), *module = PyImport_ImportModule("harken.unpatched");
    if (wire != NULL)
        Wire_Type = (PyTypeObject *)PyObject_GetAttrString(wire, "socket");
    if (module != NULL)
        Socket_Type = (PyTypeObject *)PyObject_GetAttrString(module, "Socket");
    get_default_timeout = wire == NULL ? NULL : PyObject_GetAttrString(wire, "getdefaulttimeout");
    Py_XDECREF(wire);
    Py_XDECREF(module);
    if (get_default_timeout == NULL)
        return -1;
    timeout_name = PyUnicode_InternFromString("gettimeout");
    close_name = PyUnicode_InternFromString("close");
    if (timeout_name == NULL || close_name == NULL)
        return -1;
    for (int i = 0; i < 3; i++)
        if ((part_names[i] = PyUnicode_InternFromString(names[i])) == NULL)
            return -1;
    if (Wire_Type == NULL || Socket_Type == NULL)
        return -1;
#if PY_VERSION_HEX >= 0x030B0000 && PY_VERSION_HEX < 0x030E0000
    quick = look_up();
#endif
    return 0;
}
