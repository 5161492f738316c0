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
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <unistd.h>

#include "load.h"

#define OPENING_AT_ONCE 64           /* well under the default backlog of 128, so that no handshake is dropped */
#define OPENING_SECONDS 5.0          /* begins without the connections that have no answer by then */
#define MANY 2000                    /* connections that take longer than that to open */
#define HOLD_SECONDS 60.0            /* the same for idle and for so many; and how long a word on stdin is awaited */
#define LEAVING_SECONDS 0.5          /* for the answers still under way at the end; a reset would be the server's trouble */
#define LOST_AFTER 1000000000u       /* ns without an answer after which a datagram is taken for lost */
#define SILENT_BATCH 1000            /* silent: connections opened at once; the last of them speaks, so that all are accepted */
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
    void *tls;            /* its session, or NULL */
    unsigned start;       /* message of the pool that this connection began with */
    uint64_t sent, received;
    uint64_t *stamps;     /* ns at which each message in flight was offered, a ring of `depth` */
};

static const struct plan *plan;
static struct tally *tally;
static struct wire *wires;
static char *pool, *buffer;
static size_t pool_messages, pool_bytes;
static unsigned total, opened, answered, broken, next_source;
static bool opening;      /* not all have had their first answer: those that have wait, or the later ones would wait for them */
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
    if (wire->tls)
        tls_close(wire->tls), wire->tls = NULL;
    close(wire->fd);
    wire->fd = -1;
    if (wire->answered && !plan->reopen)
        tally->open--;
}

/* The idle ones come first, so that all are open before the window begins. */
static bool is_held(const struct wire *wire) { return plan->hold || wire - wires < plan->idle; }

static bool speaks(const struct wire *wire) {
    unsigned number = (unsigned)(wire - wires) + 1;
    return !plan->silent || number % SILENT_BATCH == 0 || number == total;
}

static ssize_t transmit(struct wire *wire, const char *data, size_t length, bool *wants_out) {
    *wants_out = true;
    return wire->tls ? tls_send(wire->tls, data, length, wants_out) : send(wire->fd, data, length, MSG_NOSIGNAL);
}

/* Sends what the depth allows. False: the wire is broken. */
static bool push(struct wire *wire, uint64_t now) {
    uint64_t goal = (wire->received / plan->size + plan->depth) * plan->size;
    if (is_held(wire) || opening)
        goal = speaks(wire) ? plan->size : 0;
    if (leaving && goal > wire->sent)
        goal = (wire->sent + plan->size - 1) / plan->size * plan->size;
    for (uint64_t message = (wire->sent + plan->size - 1) / plan->size; message * plan->size < goal; message++)
        wire->stamps[message % plan->depth] = now;
    while (wire->sent < goal) {
        size_t position = ring_position(wire, wire->sent), part = pool_bytes - position;
        part = part < goal - wire->sent ? part : (size_t)(goal - wire->sent);
        bool wants_out;
        ssize_t done = transmit(wire, pool + position, part, &wants_out);
        if (done < 0) {
            if (errno != EAGAIN && errno != ENOTCONN)
                return false;
            if (wire->wants_out != wants_out)
                register_wire(wire, EPOLL_CTL_MOD, wants_out);
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
    bool refused = connect(wire->fd, (const struct sockaddr *)&plan->address, plan->address_length) &&
                   errno != EINPROGRESS;
    if (plan->tls && !refused)
        wire->tls = tls_open(wire->fd);
    /* On the loopback the handshake is over by now, as a rule: the first send needs no wait. */
    if (refused || !push(wire, now))
        fail(wire);
}

/* Counts an error; the wire stays closed, but for churn, where the loop opens it again. */
static void fail(struct wire *wire) {
    tally->errors++;
    if (!wire->answered && !plan->reopen)
        broken++;
    drop(wire);
}

/* Opens the next one that speaks, and the silent ones before it. */
static void open_next(uint64_t now) {
    while (opened < total) {
        struct wire *wire = &wires[opened++];
        open_wire(wire, now);
        if (speaks(wire))
            break;
    }
}

/* How many connections a first answer shows to be accepted: a listener's queue keeps the order. */
static unsigned batch(const struct wire *wire) {
    unsigned number = (unsigned)(wire - wires) + 1;
    return plan->silent ? (number % SILENT_BATCH ? number % SILENT_BATCH : SILENT_BATCH) : 1;
}

static void note_first_answer(struct wire *wire, uint64_t now) {
    wire->answered = true;
    tally->open += batch(wire);
    answered += batch(wire);
    if (answered == total)
        tally->opening = (double)(now - birth) / 1e9;
    open_next(now);
}

static void note_answers(struct wire *wire, uint64_t before, uint64_t now) {
    for (uint64_t message = before / plan->size; message < wire->received / plan->size; message++) {
        histogram_add(&tally->latency, now - wire->stamps[message % plan->depth]);
        tally->messages++;
        if (!wire->answered)
            note_first_answer(wire, now);
    }
}

/* A datagram that was taken for lost may come after all: it is the answer before the one waited for. */
static bool is_stale(const struct wire *wire, size_t length) {
    return length == plan->size && wire->received >= plan->size &&
           matches(wire, wire->received - plan->size, buffer, length);
}

static bool pull(struct wire *wire, uint64_t now) {
    ssize_t length = wire->tls ? tls_receive(wire->tls, buffer, RECEIVE_BYTES) : recv(wire->fd, buffer, RECEIVE_BYTES, 0);
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

static bool all_answered(void) { return answered + broken == total; }

static bool has_word(void) {
    struct pollfd word = {.fd = STDIN_FILENO, .events = POLLIN};
    return poll(&word, 1, 0) > 0;
}

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

static void set_going(void) {
    opening = false;
    for (unsigned i = 0; i < opened; i++)
        if (wires[i].fd >= 0 && !push(&wires[i], nanoseconds()))
            fail(&wires[i]);
}

void run_plan(const struct plan *the_plan, struct tally *the_tally) {
    plan = the_plan, tally = the_tally;
    poller = epoll_create1(EPOLL_CLOEXEC);
    total = plan->idle + plan->connections;
    wires = calloc(total, sizeof *wires);
    uint64_t *stamps = calloc(total * plan->depth, sizeof *stamps);
    if (!wires || !stamps || poller < 0)
        die("out of memory or files", plan->mode);
    make_pool();
    birth = nanoseconds();
    for (unsigned i = 0; i < total; i++)
        wires[i] = (struct wire){.fd = -1, .start = i % (unsigned)pool_messages, .stamps = stamps + i * plan->depth};
    bool many = plan->hold || plan->idle || total > MANY;
    opening = true;
    for (unsigned i = 0; i < (plan->silent ? 1 : OPENING_AT_ONCE); i++)
        open_next(nanoseconds());
    turn_until(birth + (uint64_t)((many ? HOLD_SECONDS : OPENING_SECONDS) * 1e9), all_answered);
    set_going();
    if (!plan->hold)
        turn_until(nanoseconds() + (uint64_t)(plan->warmup * 1e9), NULL);
    if (plan->on_word) {
        fputs("ready\n", stderr);
        turn_until(nanoseconds() + (uint64_t)(HOLD_SECONDS * 1e9), has_word);
    }
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
