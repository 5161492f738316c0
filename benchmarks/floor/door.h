/* SPDX-License-Identifier: MIT
 *
 * How the floors open their port and say which it is. */
#ifndef HARKEN_DOOR_H
#define HARKEN_DOOR_H

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#define BACKLOG 4096 /* what every server in these benchmarks asks for */

static void die(const char *what) {
    perror(what);
    exit(1);
}

static void raise_file_limit(void) {
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) == 0) {
        limit.rlim_cur = limit.rlim_max;
        setrlimit(RLIMIT_NOFILE, &limit);
    }
}

/* Binds a free port of 127.0.0.1, prints it, and returns the socket; one for connections listens and does not block. */
static int open_door(bool datagram) {
    int one = 1, door = socket(AF_INET, datagram ? SOCK_DGRAM : SOCK_STREAM | SOCK_NONBLOCK, 0);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t length = sizeof address;
    raise_file_limit();
    if (!datagram) /* accepted connections inherit it */
        setsockopt(door, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (bind(door, (struct sockaddr *)&address, length) || getsockname(door, (struct sockaddr *)&address, &length))
        die("bind");
    if (!datagram && listen(door, BACKLOG))
        die("listen");
    printf("%d\n", ntohs(address.sin_port)), fflush(stdout);
    return door;
}

#endif
