/* SPDX-License-Identifier: MIT
 *
 * What the two halves of the load generator share: load.c reads the arguments and reports, wires.c talks,
 * tls.c encrypts. */
#ifndef HARKEN_LOAD_H
#define HARKEN_LOAD_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/socket.h>
#include <sys/types.h>

#include "histogram.h"

struct plan {
    const char *mode;
    struct sockaddr_storage address;
    socklen_t address_length;
    unsigned connections, sources;
    unsigned idle;           /* connections beside those, that have one answer and then keep silent */
    size_t size, depth;      /* bytes of a message; messages in flight on a connection */
    double warmup, seconds;
    bool lines;              /* each message ends in a newline and holds no other */
    bool reopen;             /* churn: a new connection for each message */
    bool datagram;
    bool hold;               /* idle: one message a connection, then silence */
    bool silent;             /* as idle, but only one connection in SILENT_BATCH speaks at all */
    bool tls;
    bool on_word;            /* the timed window begins when a line comes on stdin, after "ready" went to stderr */
};

struct tally {
    uint64_t messages, bytes, errors, connects;
    unsigned open;           /* connections that have had an answer and are still there */
    double seconds, opening; /* of the timed window; from the first connect to the last connection's first answer */
    struct histogram latency;
};

uint64_t nanoseconds(void);
void die(const char *what, const char *which);

/* A TLS session over a connected, non-blocking socket; these return and set errno as send and recv do, and EAGAIN
 * stands for EPOLLIN whatever TLS waits for: what the load sends fits the socket's buffer or waits by `*wants_out`. */
void *tls_open(int fd);
ssize_t tls_send(void *session, const void *data, size_t length, bool *wants_out);
ssize_t tls_receive(void *session, void *data, size_t room);
void tls_close(void *session);

/* Runs the plan. Writes the lines "begin" and "end" to stderr where the timed window begins and ends. */
void run_plan(const struct plan *plan, struct tally *tally);

#endif
