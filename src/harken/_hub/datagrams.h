/* SPDX-License-Identifier: MIT
 *
 * What datagrams.c, which takes and serves them, and answers.c, which sends, share. */
#ifndef HARKEN_DATAGRAMS_H
#define HARKEN_DATAGRAMS_H
#include "hub.h"
#include <netinet/in.h>
#include <sys/socket.h>
#include <sys/un.h>

#define MOST 32 /* in a batch: of some 7 us each, so the first answer waits a quarter of a millisecond */
#define CONTROL CMSG_SPACE(sizeof(struct in6_pktinfo)) /* room for one of our addresses, of either kind */
#define ANY (-1)

typedef union {
    struct sockaddr any;
    struct sockaddr_storage room;
} Address;

/* The way back: where a datagram came from, and to which of our addresses. */
typedef struct {
    Address address;
    socklen_t length;
    int level; /* IPPROTO_IP, which is 0, or IPPROTO_IPV6; ANY: the kernel chooses our address */
    union {
        struct in_pktinfo v4;
        struct in6_pktinfo v6;
    } own;
} Way;

typedef struct {
    PyObject *request, *address; /* owned */
    Way way;
} Piece;

typedef struct {
    PyObject *data; /* owned */
    int piece;
} Answer;

/* A client that was here. */
typedef struct {
    in_addr_t host;
    in_port_t port;
    PyObject *address; /* owned, or NULL */
} Known;

#define KNOWN_BITS 6

/* What becomes of datagrams: a DatagramService of harken.engines, read out. */
typedef struct {
    PyObject *object; /* owned, with all below */
    PyObject *cut, *taken, *serve, *server, *failed;
    Py_ssize_t size;
    int lean;
} Service;

typedef struct Batch {
    PyObject_HEAD
    struct Batch *next; /* of all batches */
    Hub *hub;
    PyObject *sock;
    int fd, family;
    bool wildcard, joins;
    Service service;
    /* What was taken. */
    size_t room; /* for one, as messages and parts say */
    int used;    /* of messages, since they were prepared */
    struct mmsghdr messages[MOST];
    struct iovec parts[MOST];
    _Alignas(struct cmsghdr) char controls[MOST][2 * CONTROL]; /* a mapped datagram may say it in both ways */
    Piece pieces[MOST];
    Known known[1 << KNOWN_BITS];
    int count, at; /* pieces that are there, and the first that is not served */
    /* Who serves. */
    int current;       /* the one whose handler runs; -1: none, or it waits */
    bool answered;     /* it has answered: of a batch's last datagram only the first answer is sent at once */
    long turn;         /* counts who serves: a handler that finds another number has waited */
    PyObject *idle;    /* list: green threads for the next batch */
    PyGreenlet *active; /* borrowed: the one that serves */
    PyObject *waiting; /* dict: green threads whose handler waits, to (address, Way as bytes) */
    PyObject *busy;    /* set of the engine's: green threads that serve, or wait */
    PyObject *crowded, *more; /* the engine's */
    Py_ssize_t most_waiting;
    int64_t trusted; /* until when, by the coarse clock, nothing need be asked before datagrams are taken */
    /* What is to be sent. */
    Answer answers[MOST];
    size_t answer_count;
    int64_t oldest;
} Batch;

/* answers.c */
HIDDEN extern Batch *batches;
HIDDEN int answers_ready(PyObject *module);
HIDDEN size_t send_answers(Batch *batch, bool nowait);
HIDDEN void drop_answers(Batch *batch);
HIDDEN PyObject *batch_tell(PyObject *self, PyObject *const *args, Py_ssize_t count);

/* datagrams.c */
#endif
