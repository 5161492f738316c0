/* SPDX-License-Identifier: MIT
 *
 * The floor under TLS: OpenSSL over level-triggered epoll, one thread, no state but the session. It waits for a client
 * that does not read its answer, as floor.c does.
 *
 *   floor_tls --work tls --certificate FILE --key FILE        prints the port on 127.0.0.1 and serves until it is killed */
#define _GNU_SOURCE
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/epoll.h>

#include <openssl/err.h>
#include <openssl/ssl.h>

#include "door.h"

#define MAX_EVENTS 256
#define MAX_BURST 64
#define RECEIVE_BYTES 65536 /* as the handlers of the other servers */
#define STUCK_AFTER 10000   /* ms a client may leave its answer unread */

static char buffer[RECEIVE_BYTES];

static bool would_wait(SSL *ssl, int result) {
    int error = SSL_get_error(ssl, result);
    ERR_clear_error();
    return error == SSL_ERROR_WANT_READ || error == SSL_ERROR_WANT_WRITE;
}

static bool send_all(SSL *ssl, const char *data, int length) {
    while (length > 0) {
        int done = SSL_write(ssl, data, length);
        if (done <= 0) {
            struct pollfd writable = {.fd = SSL_get_fd(ssl), .events = POLLOUT};
            if (!would_wait(ssl, done) || poll(&writable, 1, STUCK_AFTER) < 1)
                return false;
            continue;
        }
        data += done, length -= done;
    }
    return true;
}

/* Shakes hands and echoes what has come. True: the connection goes on. */
static bool serve(SSL *ssl) {
    do {
        int length = SSL_read(ssl, buffer, sizeof buffer);
        if (length <= 0)
            return would_wait(ssl, length);
        if (!send_all(ssl, buffer, length))
            return false;
    } while (SSL_has_pending(ssl));
    return true;
}

static void leave(SSL *ssl) {
    int fd = SSL_get_fd(ssl);
    SSL_shutdown(ssl);
    ERR_clear_error();
    SSL_free(ssl);
    close(fd);
}

static void accept_some(int door, int poller, SSL_CTX *context) { /* a bounded burst, as floor.c */
    int fd;
    for (int i = 0; i < MAX_BURST && (fd = accept4(door, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0; i++) {
        SSL *ssl = SSL_new(context);
        struct epoll_event event = {.events = EPOLLIN, .data.ptr = ssl};
        if (!ssl || !SSL_set_fd(ssl, fd))
            die("SSL_new");
        SSL_set_accept_state(ssl);
        if (!serve(ssl) || epoll_ctl(poller, EPOLL_CTL_ADD, fd, &event))
            leave(ssl);
    }
}

int main(int count, char **words) {
    if (count != 7 || strcmp(words[2], "tls") || strcmp(words[3], "--certificate") || strcmp(words[5], "--key")) {
        fputs("usage: floor_tls --work tls --certificate FILE --key FILE\n", stderr);
        return 2;
    }
    signal(SIGPIPE, SIG_IGN);
    SSL_CTX *context = SSL_CTX_new(TLS_server_method());
    if (!context || SSL_CTX_use_certificate_chain_file(context, words[4]) != 1 ||
        SSL_CTX_use_PrivateKey_file(context, words[6], SSL_FILETYPE_PEM) != 1)
        die("certificate or key");
    SSL_CTX_set_num_tickets(context, 1); /* as the others */
    SSL_CTX_set_mode(context, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
    int door = open_door(false), poller = epoll_create1(EPOLL_CLOEXEC);
    struct epoll_event events[MAX_EVENTS], news = {.events = EPOLLIN, .data.ptr = NULL};
    if (poller < 0 || epoll_ctl(poller, EPOLL_CTL_ADD, door, &news))
        die("epoll");
    for (;;) {
        int ready = epoll_wait(poller, events, MAX_EVENTS, -1);
        for (int i = 0; i < ready; i++)
            if (!events[i].data.ptr)
                accept_some(door, poller, context);
            else if (!serve(events[i].data.ptr))
                leave(events[i].data.ptr);
    }
}
