/* SPDX-License-Identifier: MIT
 *
 * What the two halves of the load generator share: load.c reads the arguments and reports, wires.c talks. */
#ifndef HARKEN_LOAD_H
#define HARKEN_LOAD_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/socket.h>

#include "histogram.h"

struct plan {
    const char *mode;
    struct sockaddr_storage address;
    socklen_t address_length;
    unsigned connections, sources;
    size_t size, depth;      /* bytes of a message; messages in flight on a connection */
    double warmup, seconds;
    bool lines;              /* each message ends in a newline and holds no other */
    bool reopen;             /* churn: a new connection for each message */
    bool datagram;
    bool hold;               /* idle: one message a connection, then silence */
};

struct tally {
    uint64_t messages, bytes, errors, connects;
    unsigned open;           /* connections that have had an answer and are still there */
    double seconds, opening; /* of the timed window; from the first connect to the last connection's first answer */
    struct histogram latency;
};

uint64_t nanoseconds(void);
void die(const char *what, const char *which);

/* Runs the plan. Writes the lines "begin" and "end" to stderr where the timed window begins and ends. */
void run_plan(const struct plan *plan, struct tally *tally);

#endif
