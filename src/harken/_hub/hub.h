/* SPDX-License-Identifier: MIT
 *
 * The compiled hub: what its files share. The contract stands in __init__.py.
 *
 *   compiled.c    the module
 *   hub.c         Hub: the loop
 *   doors.c       what it calls while a listening socket has clients
 *   signals.c     what wakes it when a signal comes
 *   life.c        how it is made, closed, forked and given back
 *   methods.c     what Python sees of it
 *   queue.c       green threads that are due, and the function that each of them runs
 *   timers.c      deadlines: a binary heap
 *   slots.c       who waits for which descriptor: the epoll set, and waiting itself
 *   results.c     what its recv() returns, where that is used again
 *   connection.c  Connection: a socket.socket whose calls wait in the hub
 *   rare.c        what a Connection does less often
 *   traffic.c     what it notes and tells of its traffic
 *   handle.c      a reference that does not keep it
 *   accept.c      accept(2) straight into a Connection
 *   lane.c        connections of a plain server, at its door
 *   workers.c     the green threads that serve those, to their end
 *   handlers.c    calling handlers
 *   reader.c      rfile
 *   writer.c      wfile
 *   files.c       what both have in common
 *   pending.c     answers that are joined while requests lie there
 *   together.c    what a turn receives first, and sends last
 *   flow.c        large pieces of a stream, sent together
 *   owed.c        what the kernel did not take of either
 *   awaited.c     what coroutines await of their connection
 *   beat.c        what the loop says of itself, and the watchdog that listens
 *   secured.c     reading and writing under TLS
 *   openssl.c     OpenSSL, without the ssl module between
 *   guard.c       who may call it
 *   datagrams.c   datagrams in batches
 *   answers.c     what is sent to their senders
 *   chunks.c      the memory of Python stacks
 *
 * Everything here is guarded by the GIL, which is given up in epoll_wait, poll and sendfile alone; only a Beat is read
 * without it. */
#ifndef HARKEN_HUB_H
#define HARKEN_HUB_H
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-variable"
#include <greenlet.h>
#pragma GCC diagnostic pop
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/epoll.h>

#define HIDDEN __attribute__((visibility("hidden")))

/* greenlet.h gives each file a table of its own, to be imported there; we have one. */
extern HIDDEN void **greenlet_api;
#define _PyGreenlet_API greenlet_api

enum { READ, WRITE };

typedef struct Hub Hub;
typedef struct Node Node;

/* A deadline in a hub's heap. `fire` is called once it has passed and the node has left the heap. */
struct Node {
    int64_t deadline; /* nanoseconds of CLOCK_MONOTONIC */
    Py_ssize_t index; /* in the heap; -1: not in it */
    int (*fire)(Hub *, Node *);
};

/* The timeout of whoever waits on a slot. It stays in the heap when the wait ends: the next wait merely moves `wanted`,
 * and a node that fires too early goes back. So a timeout on every recv() costs no heap operation. */
typedef struct {
    Node node;
    int64_t wanted; /* 0: nobody has a timeout now */
    struct Slot *slot;
    int direction;
} SlotTimer;

/* What a hub knows of one descriptor. Slots live as long as their hub: a pointer to one stays good. */
typedef struct Slot {
    PyGreenlet *waiter[2]; /* owned */
    SlotTimer *timer[2];   /* made at the first timeout */
    PyObject *guest, *starter; /* a connection without a green thread, and what is called with it at its first event */
    PyObject *ahead;       /* bytes that were received before the reader went on; see together.c, also for what follows */
    void *debtor;          /* in gevent's loop, the greenlet whose answer was kept last: never looked into */
    uint32_t generation;   /* tells events of this registration from late ones of a closed descriptor */
    uint32_t want;         /* how many bytes the waiting reader has asked for, if they may be received ahead; or 0 */
    uint32_t owed_from;    /* of its connection's `owed` this was sent */
    int16_t fault;         /* the error that came in place of `ahead` */
    bool came : 1;         /* there is one or the other */
    bool registered : 1;   /* in the epoll set */
    bool owned : 1;        /* by a Connection: stays registered when nobody waits */
    bool dry : 1;          /* a short read took all there was: an event will come before there is more */
    bool sticky : 1;       /* an end, an error or urgent data was seen: reads may be short without being the last */
    uint8_t timed_out;     /* why a waiter was resumed: a bit for each direction */
} Slot;

/* One thing to do at the next turn. */
typedef struct {
    enum { CALL, SWITCH, THROW, NOTHING } kind; /* NOTHING: it was, and is not due any more */
    PyObject *target; /* CALL: a function; else a greenlet */
    PyObject *value;  /* CALL: its arguments; SWITCH: what park() returns, or NULL; THROW: the exception */
} Entry;

typedef struct {
    PyObject *door, *on_readable; /* NULL: free */
    PyObject *shortcut;           /* a Batch or a Lane that may see to it, or NULL */
    int fd;
    bool shared; /* with other processes: one of them wakes, and goes to the end of their queue */
    bool lost;   /* the kernel had no room for it there: it is not watched */
    uint32_t generation;
} Door;

/* An answer that was put off; see together.c. */
typedef struct {
    PyObject *owner, *data; /* a Connection, and bytes; owned */
    size_t sent; /* bytes */
} Later;

#define MOST_PUT_OFF 128 /* answers: 64 and 256 were as quick, and an answer waits for those before it */

/* What the running green thread has written of a stream, and not sent; see flow.c. */
#define FLOW_PIECES 16  /* a megabyte was 1.0 of the C floor with 4 or 8, and 1.2 with 16 */
#define FLOW_PIECE 4096 /* bytes of the smallest: a page, below which put_off() has them */
typedef struct {
    PyObject *owner; /* a Connection, owned; NULL: nothing */
    PyObject *pieces[FLOW_PIECES]; /* bytes, owned */
    size_t count, bytes, from; /* of the first piece this was sent */
} Flow;

/* What a loop says of itself; see beat.c. Times are nanoseconds of CLOCK_MONOTONIC. */
typedef struct {
    PyObject_HEAD
    _Atomic int64_t since;  /* when the running piece of work began; 0: the loop sleeps */
    _Atomic int64_t caught; /* `since` of the piece that is late, while it runs */
    _Atomic int64_t ended;  /* when it ended, until the watchdog has seen that */
    _Atomic uint32_t parked, stopped, bell;
    volatile size_t *owed[4]; /* what green threads have written, or answered, and the hub not sent; NULL: no hub */
    /* The watchdog's own. */
    int64_t after, seen, suspect; /* how long is late, -1: never; `since` of the last look, and of the last late one */
    double seconds;               /* of what is told */
    bool told_long, rests;
} Beat;

#define MAX_EVENTS 256 /* taken from the epoll set at once; what is left comes next turn */

struct Hub {
    PyObject_HEAD
    Hub *next, *previous; /* all hubs of the process, for fork */
    PyObject *weak;
    PyGreenlet *greenlet; /* the one that runs the loop; NULL outside a turn */
    PyGreenlet *passed;   /* the one to which another gave its turn last */
    int epoll, wakeup;
    bool woken;  /* the eventfd has been written and not read */
    bool turning; /* inside run() or step() */
    bool rounds;  /* inside run() */
    bool at_door; /* taking connections, of which more may wait */
    int64_t latest; /* when run()'s caller wants to be asked, whatever happens */
    bool occupies; /* this thread is the hub's between turns too: see occupy() */
    bool lent;   /* in a forked child, whose green thread ran here: it ends with that one */
    bool closed;
    bool news;   /* something has happened that run()'s caller wants to know of: a door, a wake-up, a signal, an end */
    bool asks_at_ends; /* whether the end of a green thread is news */
    int signals[2]; /* a socketpair for signal.set_wakeup_fd, or -1 */
    struct epoll_event *events; /* of this turn: `next_event` up to `event_count` are not handed out yet */
    int next_event, event_count;
    int budget;     /* operations that the running green thread may still do without waiting */
    Entry *queue;   /* a ring; capacity is a power of two */
    size_t head, count, capacity;
    PyObject *due;    /* dict: green threads that are in the queue */
    PyObject *greens; /* set: green threads that have not ended */
    Node **heap;
    Py_ssize_t heap_size, heap_capacity;
    Slot **pages;
    int page_count;
    Door *doors;
    int door_count;
    Node lost; /* in the heap while a door is */
    char *pending; /* what the running green thread has written and not sent, to pending_owner; see pending.c */
    size_t pending_size;
    PyObject *pending_owner;
    PyObject *pending_keeper; /* called with what the peer does not take at once; NULL: its green thread waits for that */
    size_t answers; /* to datagrams, joined and not sent; see datagrams.c */
    Later later[MOST_PUT_OFF];
    size_t later_count;
    PyObject *loose; /* owned: the connection whose answer was put off last, until its green thread waits; see together.c */
    Flow flow;
    bool full; /* the running green thread's last read took as much as it asked for */
    PyObject *batch; /* to which a wfile writes while more requests lie in its rfile, if under TLS: never looked into */
    PyObject *wrote; /* to which it last wrote a large piece, if it has not waited since: never looked into */
    Beat *beat;
};

extern HIDDEN __thread Hub *running_hub; /* whose turn runs in this thread, or ran last, if it occupies that */
extern HIDDEN int occupants;             /* hubs that occupy a thread */
extern HIDDEN Hub *all_hubs;
HIDDEN Hub *hub_among_several(void);
/* The hub of whoever calls, or NULL. Green threads of a hub share its thread, so the running one's is theirs, too. */
static inline Hub *hub_here(void) { return running_hub == NULL || occupants < 2 ? running_hub : hub_among_several(); }
/* As the contract has them, in __init__.py. */
#define BUSY "this socket is already used by another green thread"
#define DOOR_BURST 64
#define TURN_BUDGET 64 /* TURN_OPERATIONS, and TURN_BYTES in pieces of 16 KiB: */
#define PIECES(size) ((int)((size) >> 14))

extern HIDDEN PyTypeObject *Hub_Type, *Lane_Type, *Timer_Type, *Task_Type, *Connection_Type, *Beat_Type;

HIDDEN int64_t now_ns(void);
HIDDEN int seconds_to_ns(PyObject *seconds, int64_t *ns);
HIDDEN bool in_turn(Hub *hub);
HIDDEN bool in_hub(Hub *hub); /* whether the loop itself is running, rather than a green thread */

/* What epoll hands back for descriptors that are not in a slot: doors have this bit and their place. */
#define DOOR_BIT 0x80000000u
#define WAKEUP_TAG 0xffffffffu
#define SIGNAL_TAG 0xfffffffeu

/* Set once this process has forked: a child may hold copies of any descriptor. */
extern HIDDEN bool forked;

/* hub.c */
HIDDEN int hub_wake(Hub *hub);
HIDDEN void occupy(Hub *hub, bool yes);
HIDDEN int hub_may_run(Hub *hub);
HIDDEN Hub *hub_enter(Hub *hub); /* which one this thread's was before */
HIDDEN void hub_leave(Hub *hub, Hub *before);
HIDDEN PyObject *hub_run(PyObject *self, PyObject *args, PyObject *words);
HIDDEN PyObject *hub_step(PyObject *self, PyObject *timeout);
HIDDEN bool fetch_in_its_place(Hub *hub);
HIDDEN void resume(Hub *hub, PyGreenlet *green, PyObject *value);

/* doors.c */
HIDDEN int open_door(Hub *hub, uint32_t place, uint32_t generation);
HIDDEN void drop_doors(Hub *hub);
HIDDEN void hub_set_shortcut(Hub *hub, PyObject *door, PyObject *shortcut);
HIDDEN PyObject *hub_watch(PyObject *self, PyObject *const *args, Py_ssize_t count);
HIDDEN PyObject *hub_unwatch(PyObject *self, PyObject *door);

/* signals.c */
HIDDEN int watch_signals(Hub *hub);
HIDDEN void unwatch_signals(Hub *hub);
HIDDEN void drain_signals(Hub *hub);
HIDDEN PyObject *wakeup_fd(int fd); /* signal.set_wakeup_fd: the one before, or NULL and an exception */

/* life.c */
HIDDEN int watch_fd(Hub *hub, int fd, uint64_t tag);
HIDDEN void close_fd(int *fd);
HIDDEN void hubs_after_fork(void);
HIDDEN PyObject *hub_new(PyTypeObject *type, PyObject *args, PyObject *words);
HIDDEN PyObject *hub_close(PyObject *self, PyObject *none);
HIDDEN int hub_traverse(PyObject *self, visitproc visit, void *arg);
HIDDEN int hub_clear(PyObject *self);
HIDDEN void hub_dealloc(PyObject *self);

/* methods.c */
HIDDEN int hub_ready(PyObject *module);
HIDDEN PyObject *hub_current(PyObject *module, PyObject *none);

/* queue.c */
HIDDEN int queue_ready(PyObject *module);
HIDDEN int enqueue(Hub *hub, int kind, PyObject *target, PyObject *value);
HIDDEN int run_queue(Hub *hub);
HIDDEN int is_due(Hub *hub, PyGreenlet *green);
HIDDEN int make_due(Hub *hub, PyGreenlet *green, PyObject *value);
HIDDEN void undo_due(Hub *hub);
HIDDEN int throw_into(Hub *hub, PyGreenlet *green, PyObject *error);
HIDDEN void end_process(void);
HIDDEN void queue_clear(Hub *hub, bool abandon);
HIDDEN int give_way(Hub *hub);
HIDDEN void leave_hub(Hub *hub, PyGreenlet *me);
HIDDEN PyObject *spawn(Hub *hub, PyObject *busy, PyObject *function, PyObject *const *args, Py_ssize_t count);
HIDDEN void unmake(Hub *hub, PyObject *busy, PyGreenlet *green);
HIDDEN int report(PyObject *function);
HIDDEN void show_exception(PyObject *function);

/* timers.c */
HIDDEN int timers_ready(PyObject *module);
HIDDEN int heap_insert(Hub *hub, Node *node);
HIDDEN void heap_remove(Hub *hub, Node *node);
HIDDEN int heap_run(Hub *hub);
HIDDEN void heap_clear(Hub *hub, bool abandon);
HIDDEN PyObject *timer_new(Hub *hub, int64_t deadline, PyObject *function, PyObject *args);
HIDDEN int sleep_until(Hub *hub, int64_t deadline);
HIDDEN PyObject *node_owner(Node *node);

/* slots.c */
#define ENDS (EPOLLRDHUP | EPOLLHUP | EPOLLERR | EPOLLPRI)
#define NOTED (1u << 20) /* in an event, and none of the kernel's: note() has nothing to add */
HIDDEN Slot *event_slot(Hub *hub, struct epoll_event *event);
HIDDEN Slot *slot_of(Hub *hub, int fd);
HIDDEN void slot_renew(Hub *hub, Slot *slot);
HIDDEN void slot_leave(Hub *hub, Slot *slot, int fd);
HIDDEN int slot_wait(Hub *hub, PyGreenlet *me, Slot *slot, int fd, int direction, int64_t deadline);
HIDDEN PyObject *pass_on(Hub *hub, PyGreenlet *me);
HIDDEN int slot_lodge(Hub *hub, Slot *slot, int fd, PyObject *guest, PyObject *starter);
HIDDEN void slot_event(Hub *hub, struct epoll_event *event);
HIDDEN int poll_wait(int fd, int direction, int64_t deadline);
HIDDEN int wait_fd(Hub *hub, int fd, int direction, int64_t deadline);
HIDDEN int timed_out(void);
HIDDEN void slots_abandon(Hub *hub);
HIDDEN void slots_forget_waiters(Hub *hub);
HIDDEN void slots_free(Hub *hub);
#define SLOTS_A_PAGE 256

/* connection.c */

/* What a Connection notes of its traffic, for deadlines and books. Times are nanoseconds of CLOCK_MONOTONIC; 0: never. */
typedef struct {
    int64_t since[2];  /* when the operation that waits, or waited last, began to */
    int64_t first;     /* when the first byte of the request came */
    int64_t moved;     /* when bytes last moved, on what is no TCP */
    uint64_t count[2]; /* bytes received and sent */
    uint64_t requests; /* that have begun */
    bool whole;        /* a call of a file goes on: its next receive() is no new operation */
    bool waits[2];     /* somebody waits at the moment, by direction */
    bool answered;     /* something was sent since the first byte of the request */
} Marks;

/* What a Connection keeps behind its socket.socket. */
typedef struct {
    PyObject *hub;  /* in which it last waited; a T_OBJECT_EX member, so that the type machinery visits it */
    Slot *slot;     /* there */
    struct Handle *handle; /* owned; or NULL */
    uint32_t generation;
    bool prepared : 1;    /* O_NONBLOCK was set, and `stream` is known */
    bool stream : 1;      /* TCP: a short read tells that nothing is left */
    bool large : 1;       /* the last read was large: receive into the result itself */
    bool again : 1;       /* which may be one that was used before; see results.c */
    bool nonblocking : 1; /* a timeout of 0 */
    bool ended : 1;       /* the last thing that the peer did was to close its side; nothing was sent since */
    bool broken : 1;      /* it was reset */
    bool traced : 1;      /* somebody follows it: what moves is told; see harken.tracing */
    bool exposed : 1;     /* somebody has asked for the descriptor, and may have made another of it: see show_flags() */
    bool later : 1;       /* an answer was put off, and not sent; see together.c, also for what follows */
    bool flowing : 1;     /* pieces of a stream are kept for it in some hub; see flow.c */
    bool joined : 1;      /* answers are joined for it in some hub; see pending.c */
    bool answers : 1;     /* it has answered since it last waited for a request */
    uint8_t flow : 4;     /* how often a large piece was followed by another, likewise; see flow.c */
    bool reader_pays : 1; /* who waits to send the rest of `owed` is in a call that reads */
    uint8_t rhythm : 4;   /* how often it has answered and then waited for the next request, up to STEADY; or NEVER */
    double timeout;   /* seconds; 0: none */
    PyObject *owed;   /* bytes: what was put off or kept and could not be sent at once, and a member as `hub` is; NULL: nothing */
    PyObject *marked; /* bytes that hold Marks, and a member as `hub` is; NULL: nobody wants to know */
    struct Worker *worker; /* borrowed: who serves it on a lane, and knows what its record will be made of; or NULL */
} State;

extern HIDDEN Py_ssize_t state_offset;
static inline State *state_of(PyObject *self) { return (State *)((char *)self + state_offset); }
static inline Marks *marks_of(State *state) {
    return state->marked == NULL ? NULL : (Marks *)PyBytes_AS_STRING(state->marked);
}
/* The first byte of a request has come. */
static inline void begin_request(Marks *marks, int64_t now) {
    marks->first = now;
    marks->requests++;
}

/* traffic.c */
HIDDEN PyObject *connection_keep_stamps(PyObject *self, PyObject *none);
HIDDEN PyObject *connection_stamps(PyObject *self, PyObject *none);
HIDDEN PyObject *connection_trace(PyObject *self, PyObject *yes);
HIDDEN Marks *marks_made(State *state);
HIDDEN void note_moved(State *state, int direction, size_t size);
HIDDEN void tell_traffic(PyObject *self, int direction, const char *data, size_t size);
HIDDEN void tell_call(PyObject *self, const char *name, PyObject *args, PyObject *result);

/* Bytes have moved; `data` is NULL where they did not pass through here. */
static inline void moved(PyObject *self, State *state, int direction, const char *data, size_t size) {
    note_moved(state, direction, size);
    if (state->traced)
        tell_traffic(self, direction, data, size);
}

/* A call that reads begins: after an answer that means the next request. */
static inline void begin_reading(State *state) {
    Marks *marks = marks_of(state);
    if (marks == NULL)
        return;
    marks->since[READ] = 0;
    if (marks->answered) {
        marks->answered = false;
        marks->first = 0;
    }
}

/* A call that writes begins. */
static inline void begin_writing(State *state) {
    Marks *marks = marks_of(state);
    if (marks == NULL)
        return;
    marks->since[WRITE] = 0;
    marks->answered = true;
}

HIDDEN int connection_ready(PyObject *module);
HIDDEN PyObject *connection_adopt(PyObject *sock);
HIDDEN int connection_lodge(Hub *hub, PyObject *self, PyObject *starter);
HIDDEN PyObject *rebuild(PyObject *module, PyObject *args);
HIDDEN int begin(PyObject *self, State *state);
HIDDEN bool attached(State *state);
HIDDEN int attach(State *state, Hub *hub, int fd);
HIDDEN void show_flags(State *state, int fd);
HIDDEN bool hush(State *state, int fd);
HIDDEN void unhush(PyObject *self);
HIDDEN int wait_ready(PyObject *self, State *state, int direction, int64_t *deadline, size_t want);
HIDDEN int fail(int error);
HIDDEN bool is_outcome(void);
HIDDEN void let_go(PyObject *self, State *state);
HIDDEN void leave_unasked(State *state);
HIDDEN void make_stream_known(State *state, int family, int kind, int proto);

HIDDEN ssize_t receive(PyObject *self, State *state, char *into, size_t size, int flags);
HIDDEN ssize_t receive_whole(PyObject *self, State *state, size_t size, int flags, PyObject **whole);

/* results.c */
#define LARGE 8192 /* bytes of a message: beyond, a copy costs more than giving memory back */
typedef struct {
    PyObject *bytes;
    size_t room; /* bytes that it has memory for */
} Result;
HIDDEN int results_ready(void);
HIDDEN bool result_fits(size_t size);
HIDDEN bool result_make(Result *result, size_t size, bool again);
HIDDEN PyObject *result_finish(Result *result, size_t got, size_t asked, bool again);

/* How much transmit() sends: whatever can be at once, as much as send(2) of a socket that blocks, or all. */
typedef enum { SOME, MUCH, ALL } Share;
HIDDEN Share share_of(State *state, int flags);
HIDDEN ssize_t transmit(PyObject *self, State *state, const char *data, size_t size, int flags, Share share);
#define SCRATCH 65536 /* what handlers ask for at once; a small message is copied from here */
extern HIDDEN char scratch[SCRATCH]; /* good from recv() until anybody waits */

/* files.c, reader.c, writer.c */
HIDDEN int files_ready(PyObject *module);
HIDDEN PyObject *on_growth(PyObject *module, PyObject *function);
HIDDEN PyObject *connection_open_reader(PyObject *self, PyObject *const *args, Py_ssize_t count);
HIDDEN PyObject *connection_open_writer(PyObject *self, PyObject *const *args, Py_ssize_t count);

/* pending.c */
/* Whether the running green thread has written what was not sent. */
static inline bool has_unsent(Hub *hub) {
    return hub->pending_owner != NULL || hub->loose != NULL || hub->flow.owner != NULL;
}
HIDDEN int flush_pending(Hub *hub);
HIDDEN int flush_turn(Hub *hub);
HIDDEN int flush_of(PyObject *sock);
HIDDEN int settle_of(PyObject *sock);
HIDDEN int flush_to_leave(PyObject *sock);
HIDDEN size_t flush_pending_nowait(Hub *hub);
HIDDEN void unsent_unseen(Hub *hub);
/* The hub has its turn back from a green thread, which has seen to what it wrote, unless it did not ask the hub to wait. */
static inline void take_back(Hub *hub) {
    if (has_unsent(hub))
        unsent_unseen(hub);
}

/* together.c */
enum { STEADY = 8, NEVER = 15 }; /* times: few to learn, many for a handler that then does something else; and four bits */
HIDDEN void receive_ahead(Hub *hub);
HIDDEN ssize_t take_ahead(Slot *slot, char *into, size_t size, int flags, PyObject **whole);
HIDDEN void hubs_before_fork(void);
HIDDEN int put_off(PyObject *self, State *state, PyObject *data);
HIDDEN int put_off_copy(PyObject *self, State *state, const char *data, size_t size);
HIDDEN size_t send_all_later(Hub *hub);
HIDDEN bool tells_nothing(State *state);
HIDDEN void note_rhythm(Hub *hub, PyObject *self, State *state);
HIDDEN size_t send_later_nowait(Hub *hub);
/* Whether an answer has to be sent before this thread reads; one that its own hub will send goes in time. */
static inline bool owes(State *state) {
    return state->owed != NULL || (state->later && state->hub != (PyObject *)hub_here());
}
static inline void send_later(Hub *hub) {
    if (hub->later_count > 0)
        send_all_later(hub);
}

/* owed.c */
HIDDEN void owe(State *state, PyObject *data, size_t sent);
HIDDEN void note_debtor(Hub *hub, Slot *slot);
HIDDEN void owe_unseen(PyObject *self, State *state, PyObject *data, size_t sent);
HIDDEN int settle_answers(PyObject *self, State *state);
HIDDEN int settle_to_read(PyObject *self, State *state, bool waits);
HIDDEN int settle_now(PyObject *self, State *state);
HIDDEN int settle_loose(Hub *hub, bool interrupted);

/* flow.c */
HIDDEN int flow_join(PyObject *self, State *state, PyObject *data);
HIDDEN int flow_flush(Hub *hub);
HIDDEN int flow_flush_of(PyObject *self);
HIDDEN int flow_leave(PyObject *self);
HIDDEN int flow_settle(Hub *hub, PyObject *user);
HIDDEN int flow_interrupted(Hub *hub);
HIDDEN size_t flow_flush_nowait(Hub *hub);
HIDDEN PyObject *flow_take(Hub *hub, PyObject **owner);
HIDDEN void flow_drop(Hub *hub);

/* awaited.c */
HIDDEN int awaited_ready(PyObject *module);

/* rare.c */
HIDDEN int rare_ready(void);
extern HIDDEN PyMethodDef rare_methods[];
#define FAST(function) ((PyCFunction)(void (*)(void))(function))

HIDDEN PyObject **record_slot(PyObject *self);
HIDDEN void make_record(PyObject *self);

/* lane.c, workers.c */
HIDDEN int lane_ready(PyObject *module);
HIDDEN int lane_shortcut(PyObject *self);
HIDDEN PyObject *lane_record(PyObject *request);
HIDDEN void lane_forget(PyObject *request);

/* handle.c */
HIDDEN int handle_ready(void);
HIDDEN void handle_lose(State *state);
HIDDEN PyObject *connection_handle(PyObject *self, PyObject *none);

/* handlers.c */
HIDDEN int handlers_ready(void);
HIDDEN int tell_failure(PyObject *failed, PyObject *request, PyObject *address);
HIDDEN PyObject *handle_plainly(PyTypeObject *type, PyObject *const *args);
HIDDEN PyObject *handle_fully(PyObject *kind, PyObject *const *args);

/* accept.c */
HIDDEN int accept_ready(void);
HIDDEN PyObject *accept_one(PyObject *module, PyObject *listener);
HIDDEN PyObject *connection_take(PyObject *type, PyObject *const *args, Py_ssize_t count);
HIDDEN PyObject *connection_end(PyObject *self, PyObject *none);
HIDDEN int default_timeout(State *state);
HIDDEN PyObject *make_connection(PyTypeObject *type, int fd, int family, int kind, int proto);
/* A listening socket that was looked at. */
typedef struct {
    int fd, family, kind, proto;
    bool quiet; /* it does not block */
} Listening;
HIDDEN int listening_begin(Listening *door, PyObject *listener);
HIDDEN int listening_accept(const Listening *door, PyTypeObject *type, PyObject **connection, PyObject **peer);
HIDDEN bool closes_at_once(PyObject *sock);
HIDDEN bool stand_for(PyObject *made, PyObject *sock);
HIDDEN void stand_down(PyObject *sock);
HIDDEN PyObject *accept_from(PyTypeObject *type, int fd, int family, int kind, int proto);
HIDDEN int quick_init(PyObject *self, PyObject *args, PyObject *words);
HIDDEN int socket_parts(PyObject *sock, int *fd, int *family, int *kind, int *proto);
HIDDEN int socket_fd(PyObject *sock);
HIDDEN Py_ssize_t slot_offset(PyTypeObject *type, const char *name);
HIDDEN PyObject *address_of(const void *address, unsigned length);
extern HIDDEN PyTypeObject *Wire_Type;   /* _socket.socket */
extern HIDDEN PyTypeObject *Socket_Type; /* socket.socket */

/* beat.c */
HIDDEN int beat_ready(PyObject *module);
HIDDEN int64_t coarse_ns(void);
HIDDEN void beat_wake(Beat *beat);
HIDDEN void beat_over(Beat *beat);
HIDDEN void beat_forget(Beat *beat);

static inline void beat_set(Beat *beat, int64_t since, memory_order order) {
    atomic_store_explicit(&beat->since, since, order);
    if (__builtin_expect(atomic_load_explicit(&beat->caught, memory_order_relaxed) != 0, 0))
        beat_over(beat);
}

/* The next piece of work begins. */
static inline void beat_piece(Beat *beat) { beat_set(beat, coarse_ns(), memory_order_relaxed); }

/* The loop is about to sleep, or to leave. */
static inline void beat_sleeps(Beat *beat) { beat_set(beat, 0, memory_order_relaxed); }

/* It has slept; a watchdog that went to sleep meanwhile looks again. */
static inline void beat_wakes(Beat *beat) {
    beat_set(beat, coarse_ns(), memory_order_seq_cst);
    if (atomic_load(&beat->parked))
        beat_wake(beat);
}

/* datagrams.c */
HIDDEN int datagrams_ready(PyObject *module);
HIDDEN int batch_shortcut(PyObject *batch);
/* answers.c */
HIDDEN size_t answers_nowait(Hub *hub);

/* secured.c */
HIDDEN bool secured_holds(PyObject *self);
HIDDEN PyObject *quicken(PyObject *module, PyObject *type);

/* chunks.c */
HIDDEN bool chunks_install(void);
HIDDEN void *stack_begin(void);
HIDDEN void stack_end(void *begun);
#endif
