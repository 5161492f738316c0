/* SPDX-License-Identifier: MIT
 *
 * The connections ("wires") of the load generator and the loop that drives them.
 *
 * What is sent is an endless walk round a ring of messages (the pool), begun at a different message on each wire, so
 * that an answer is checked by comparing it with the ring at the number of bytes received so far. Level-triggered:
 * one recv and one send a message, and no read that finds nothing. */
#define _GNU_SOURCE
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <unistd.h>

#include "load.h"

#define OPENING_AT_ONCE 64           /* well under the default backlog of 128, so that no handshake is dropped */
#define OPENING_SECONDS 5.0          /* after the warm-up: begins without the connections that have no answer by then */
#define HOLD_SECONDS 60.0            /* the same for idle, which may open very many */
#define LEAVING_SECONDS 0.5          /* for the answers still under way at the end; a reset would be the server's trouble */
#define LOST_AFTER 1000000000u       /* ns without an answer after which a datagram is taken for lost */
#define SWEEP_EVERY 100              /* ms: how often lost datagrams and deadlines are looked for */
#define MAX_ERRORS 10000             /* the server is broken: stop and report */
#define MAX_EVENTS 256
#define RECEIVE_BYTES (1 << 18)
#define POOL_MESSAGES 61             /* a prime, so that wires drift apart */
#define POOL_BYTES (1 << 21)         /* fewer messages than that when they are long */

struct wire {
    int fd;               /* -1: not open */
    bool answered;        /* has had its first answer */
    bool wants_out;       /* registered for EPOLLOUT */
    unsigned start;       /* message of the pool that this connection began with */
    uint64_t sent, received;
    uint64_t *stamps;     /* ns at which each message in flight was offered, a ring of `depth` */
};

static const struct plan *plan;
static struct tally *tally;
static struct wire *wires;
static char *pool, *buffer;
static size_t pool_messages, pool_bytes;
static unsigned opened, answered, next_source;
static bool leaving;      /* the window is over: no new messages */
static uint64_t birth;
static int poller;

static void make_pool(void) {
    pool_messages = POOL_BYTES / plan->size;
    pool_messages = pool_messages > POOL_MESSAGES ? POOL_MESSAGES : pool_messages < 2 ? 2 : pool_messages;
    pool_bytes = pool_messages * plan->size;
    pool = malloc(pool_bytes);
    buffer = malloc(RECEIVE_BYTES);
    if (!pool || !buffer)
        die("out of memory", plan->mode);
    uint32_t random = 2463534242u; /* xorshift32, Marsaglia 2003 */
    for (size_t i = 0; i < pool_bytes; i++) {
        random ^= random << 13, random ^= random >> 17, random ^= random << 5;
        pool[i] = (char)('a' + random % 26);
        if (plan->lines && i % plan->size == plan->size - 1)
            pool[i] = '\n';
    }
}

static size_t ring_position(const struct wire *wire, uint64_t bytes) {
    return (wire->start * plan->size + bytes) % pool_bytes;
}

static bool matches(const struct wire *wire, uint64_t at, const char *data, size_t length) {
    while (length) {
        size_t position = ring_position(wire, at), part = pool_bytes - position;
        part = part < length ? part : length;
        if (memcmp(pool + position, data, part))
            return false;
        data += part, at += part, length -= part;
    }
    return true;
}

static void register_wire(struct wire *wire, int operation, bool out) {
    struct epoll_event event = {.events = EPOLLIN | (out ? EPOLLOUT : 0u), .data.ptr = wire};
    if (epoll_ctl(poller, operation, wire->fd, &event))
        die("epoll_ctl", strerror(errno));
    wire->wants_out = out;
}

static void drop(struct wire *wire) {
    close(wire->fd);
    wire->fd = -1;
    if (wire->answered && !plan->reopen)
        tally->open--;
}

/* Sends what the depth allows. False: the wire is broken. */
static bool push(struct wire *wire, uint64_t now) {
    uint64_t goal = (wire->received / plan->size + plan->depth) * plan->size;
    if (plan->hold)
        goal = plan->size;
    if (leaving && goal > wire->sent)
        goal = (wire->sent + plan->size - 1) / plan->size * plan->size;
    for (uint64_t message = (wire->sent + plan->size - 1) / plan->size; message * plan->size < goal; message++)
        wire->stamps[message % plan->depth] = now;
    while (wire->sent < goal) {
        size_t position = ring_position(wire, wire->sent), part = pool_bytes - position;
        part = part < goal - wire->sent ? part : (size_t)(goal - wire->sent);
        ssize_t done = send(wire->fd, pool + position, part, MSG_NOSIGNAL);
        if (done < 0) {
            if (errno != EAGAIN && errno != ENOTCONN)
                return false;
            if (!wire->wants_out)
                register_wire(wire, EPOLL_CTL_MOD, true);
            return true;
        }
        wire->sent += (uint64_t)done;
    }
    if (wire->wants_out)
        register_wire(wire, EPOLL_CTL_MOD, false);
    return true;
}

static int open_socket(void) {
    int type = (plan->datagram ? SOCK_DGRAM : SOCK_STREAM) | SOCK_NONBLOCK | SOCK_CLOEXEC, one = 1;
    int fd = socket(plan->address.ss_family, type, 0);
    if (fd < 0)
        die("socket", strerror(errno));
    if (plan->address.ss_family == AF_INET && plan->reopen) {
        /* A closed connection holds its port for a minute (TIME_WAIT): 28,000 ports are a second's worth. */
        struct sockaddr_in source = {.sin_family = AF_INET};
        source.sin_addr.s_addr = htonl(0x7f000001u + next_source++ % plan->sources);
        setsockopt(fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &one, sizeof one);
        if (bind(fd, (struct sockaddr *)&source, sizeof source))
            die("bind", strerror(errno));
    } else if (plan->address.ss_family == AF_INET && !plan->datagram)
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    return fd;
}

static void fail(struct wire *wire);

static void open_wire(struct wire *wire, uint64_t now) {
    wire->fd = open_socket();
    wire->start = (wire->start + 1) % (unsigned)pool_messages;
    wire->sent = wire->received = 0;
    tally->connects++;
    register_wire(wire, EPOLL_CTL_ADD, false);
    bool broken = connect(wire->fd, (const struct sockaddr *)&plan->address, plan->address_length) &&
                  errno != EINPROGRESS;
    /* On the loopback the handshake is over by now, as a rule: the first send needs no wait. */
    if (broken || !push(wire, now))
        fail(wire);
}

/* Counts an error; the wire stays closed, but for churn, where the loop opens it again. */
static void fail(struct wire *wire) {
    tally->errors++;
    drop(wire);
}

static void open_next(uint64_t now) {
    if (opened < plan->connections)
        open_wire(&wires[opened++], now);
}

static void note_answers(struct wire *wire, uint64_t before, uint64_t now) {
    for (uint64_t message = before / plan->size; message < wire->received / plan->size; message++) {
        histogram_add(&tally->latency, now - wire->stamps[message % plan->depth]);
        tally->messages++;
        if (!wire->answered) {
            wire->answered = true;
            tally->open++;
            if (++answered == plan->connections)
                tally->opening = (double)(now - birth) / 1e9;
            open_next(now);
        }
    }
}

/* A datagram that was taken for lost may come after all: it is the answer before the one waited for. */
static bool is_stale(const struct wire *wire, size_t length) {
    return length == plan->size && wire->received >= plan->size &&
           matches(wire, wire->received - plan->size, buffer, length);
}

static bool pull(struct wire *wire, uint64_t now) {
    ssize_t length = recv(wire->fd, buffer, RECEIVE_BYTES, 0);
    if (length < 0)
        return errno == EAGAIN;
    if (length == 0 && !plan->datagram)
        return false;
    uint64_t before = wire->received;
    bool fits = plan->datagram ? (size_t)length == plan->size : before + (uint64_t)length <= wire->sent;
    if (!fits || !matches(wire, before, buffer, (size_t)length))
        return plan->datagram && is_stale(wire, (size_t)length);
    wire->received += (uint64_t)length;
    tally->bytes += (uint64_t)length;
    note_answers(wire, before, now);
    return true;
}

static void serve_wire(struct wire *wire, uint32_t events) {
    uint64_t now = nanoseconds();
    if (events & (EPOLLIN | EPOLLHUP | EPOLLERR) && !pull(wire, now)) {
        fail(wire);
    } else if (plan->reopen && wire->received >= plan->size) {
        drop(wire);
    } else {
        if (!push(wire, now))
            fail(wire);
        return;
    }
    if (plan->reopen && !leaving && tally->errors < MAX_ERRORS)
        open_wire(wire, nanoseconds());
}

static void resend_lost(uint64_t now) {
    for (unsigned i = 0; i < opened; i++) {
        struct wire *wire = &wires[i];
        if (wire->fd < 0 || now < wire->stamps[0] + LOST_AFTER)
            continue;
        tally->errors++;
        wire->sent = wire->received;
        push(wire, now);
    }
}

static bool all_answered(void) { return answered == plan->connections; }

static bool all_quiet(void) {
    for (unsigned i = 0; i < opened; i++)
        if (wires[i].fd >= 0 && wires[i].sent > wires[i].received)
            return false;
    return true;
}

/* Runs until the deadline, in ns, or until `done`, if there is such a condition. */
static void turn_until(uint64_t deadline, bool (*done)(void)) {
    struct epoll_event events[MAX_EVENTS];
    uint64_t swept = nanoseconds();
    for (uint64_t now = swept; now < deadline && tally->errors < MAX_ERRORS; now = nanoseconds()) {
        if (done && done())
            return;
        uint64_t left = (deadline - now) / 1000000u + 1;
        int ready = epoll_wait(poller, events, MAX_EVENTS, left < SWEEP_EVERY ? (int)left : SWEEP_EVERY);
        for (int i = 0; i < ready; i++)
            serve_wire(events[i].data.ptr, events[i].events);
        if (plan->datagram && now - swept > SWEEP_EVERY * 1000000u)
            resend_lost(now), swept = now;
    }
}

void run_plan(const struct plan *the_plan, struct tally *the_tally) {
    plan = the_plan, tally = the_tally;
    poller = epoll_create1(EPOLL_CLOEXEC);
    wires = calloc(plan->connections, sizeof *wires);
    uint64_t *stamps = calloc(plan->connections * plan->depth, sizeof *stamps);
    if (!wires || !stamps || poller < 0)
        die("out of memory or files", plan->mode);
    make_pool();
    birth = nanoseconds();
    for (unsigned i = 0; i < plan->connections; i++)
        wires[i] = (struct wire){.fd = -1, .start = i % (unsigned)pool_messages, .stamps = stamps + i * plan->depth};
    for (unsigned i = 0; i < OPENING_AT_ONCE; i++)
        open_next(nanoseconds());
    if (!plan->hold)
        turn_until(birth + (uint64_t)(plan->warmup * 1e9), NULL);
    turn_until(nanoseconds() + (uint64_t)((plan->hold ? HOLD_SECONDS : OPENING_SECONDS) * 1e9), all_answered);
    if (!plan->hold) { /* errors stay: one in the warm-up is as bad */
        histogram_clear(&tally->latency);
        tally->messages = tally->bytes = tally->connects = 0;
    }
    fputs("begin\n", stderr);
    uint64_t begin = nanoseconds();
    turn_until(begin + (uint64_t)(plan->seconds * 1e9), NULL);
    tally->seconds = (double)(nanoseconds() - begin) / 1e9;
    fputs("end\n", stderr);
    static struct tally window;
    window = *tally;
    leaving = true;
    turn_until(nanoseconds() + (uint64_t)(LEAVING_SECONDS * 1e9), all_quiet);
    window.errors = tally->errors;
    *tally = window;
}
