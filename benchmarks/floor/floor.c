/* SPDX-License-Identifier: MIT
 *
 * The floor: the echo server that does the least work there is, for other servers to be measured against. One thread,
 * level-triggered epoll, no state but the descriptor. An echo that sends short (the client does not read) waits for the
 * client: enough for a closed-loop load, wrong for anything else.
 *
 *   floor [--batch] --work echo|lines|churn|udp        prints the port on 127.0.0.1 and serves until it is killed
 *
 * Datagrams are answered one by one, or with --batch by as few system calls as possible. */
#define _GNU_SOURCE
#include <poll.h>
#include <stdbool.h>
#include <string.h>
#include <sys/epoll.h>

#include "door.h"

#define MAX_EVENTS 256
#define MAX_BURST 64        /* connections taken at a wake-up; redis takes 10, gevent 100 */
#define RECEIVE_BYTES 65536  /* as the handlers of the other servers */
#define BATCH 32             /* datagrams for one system call */
#define DATAGRAM_BYTES 8192  /* as socketserver's max_packet_size */
#define STUCK_AFTER 10000    /* ms a client may leave its answer unread */

static char buffer[RECEIVE_BYTES];

static bool send_all(int fd, const char *data, ssize_t length) {
    while (length > 0) {
        ssize_t done = send(fd, data, (size_t)length, MSG_NOSIGNAL);
        if (done < 0) {
            struct pollfd writable = {.fd = fd, .events = POLLOUT};
            if (errno != EAGAIN || poll(&writable, 1, STUCK_AFTER) < 1)
                return false;
            continue;
        }
        data += done, length -= done;
    }
    return true;
}

/* Echoes what has come. True: the connection goes on. */
static bool echo(int fd) {
    ssize_t length = recv(fd, buffer, sizeof buffer, 0);
    if (length < 0)
        return errno == EAGAIN;
    return length > 0 && send_all(fd, buffer, length);
}

/* A bounded burst: under a steady load a loop until EAGAIN never ends, and no client that has left is ever closed. */
static void accept_some(int listener, int poller) {
    int fd;
    for (int i = 0; i < MAX_BURST && (fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0; i++) {
        struct epoll_event event = {.events = EPOLLIN, .data.fd = fd};
        if (!echo(fd) || epoll_ctl(poller, EPOLL_CTL_ADD, fd, &event))
            close(fd);
    }
}

static void serve_stream(int listener) {
    int poller = epoll_create1(EPOLL_CLOEXEC);
    struct epoll_event events[MAX_EVENTS], door = {.events = EPOLLIN, .data.fd = listener};
    if (poller < 0 || epoll_ctl(poller, EPOLL_CTL_ADD, listener, &door))
        die("epoll");
    for (;;) {
        int ready = epoll_wait(poller, events, MAX_EVENTS, -1);
        for (int i = 0; i < ready; i++)
            if (events[i].data.fd == listener)
                accept_some(listener, poller);
            else if (!echo(events[i].data.fd))
                close(events[i].data.fd);
    }
}

static void serve_datagrams(int fd) {
    for (;;) {
        struct sockaddr_in peer;
        socklen_t length = sizeof peer;
        ssize_t got = recvfrom(fd, buffer, DATAGRAM_BYTES, 0, (struct sockaddr *)&peer, &length);
        if (got >= 0)
            sendto(fd, buffer, (size_t)got, 0, (struct sockaddr *)&peer, length);
    }
}

static void serve_batches(int fd) {
    static char data[BATCH][DATAGRAM_BYTES];
    static struct mmsghdr messages[BATCH];
    static struct iovec parts[BATCH];
    static struct sockaddr_in peers[BATCH];
    for (;;) {
        for (int i = 0; i < BATCH; i++) {
            parts[i] = (struct iovec){data[i], DATAGRAM_BYTES};
            messages[i].msg_hdr = (struct msghdr){
                .msg_name = &peers[i], .msg_namelen = sizeof peers[i], .msg_iov = &parts[i], .msg_iovlen = 1};
        }
        int count = recvmmsg(fd, messages, BATCH, MSG_WAITFORONE, NULL);
        if (count < 0)
            continue;
        for (int i = 0; i < count; i++)
            parts[i].iov_len = messages[i].msg_len;
        for (int sent = 0; sent < count;) {
            int done = sendmmsg(fd, messages + sent, (unsigned)(count - sent), 0);
            sent += done > 0 ? done : 1;
        }
    }
}

int main(int count, char **words) {
    bool batch = count == 4 && !strcmp(words[1], "--batch");
    if (count != 3 + batch || strcmp(words[1 + batch], "--work")) {
        fputs("usage: floor [--batch] --work echo|lines|churn|udp\n", stderr);
        return 2;
    }
    bool datagram = !strcmp(words[2 + batch], "udp");
    int door = open_door(datagram);
    if (!datagram)
        serve_stream(door);
    else if (batch)
        serve_batches(door);
    else
        serve_datagrams(door);
}
