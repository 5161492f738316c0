/* SPDX-License-Identifier: MIT
 *
 * TLS for the load generator, by OpenSSL: full handshakes, no certificate checked, since the server is ours. */
#include <errno.h>

#include "load.h"

#ifdef WITHOUT_TLS

void *tls_open(int fd) {
    (void)fd;
    die("built without OpenSSL's headers (Debian package libssl-dev)", "tls://");
    return NULL;
}
ssize_t tls_send(void *session, const void *data, size_t length, bool *wants_out) {
    (void)session, (void)data, (void)length, (void)wants_out;
    return -1;
}
ssize_t tls_receive(void *session, void *data, size_t room) {
    (void)session, (void)data, (void)room;
    return -1;
}
void tls_close(void *session) { (void)session; }

#else

#include <openssl/err.h>
#include <openssl/ssl.h>

static SSL_CTX *make_context(void) {
    SSL_CTX *context = SSL_CTX_new(TLS_client_method());
    if (!context)
        die("SSL_CTX_new", ERR_error_string(ERR_get_error(), NULL));
    SSL_CTX_set_session_cache_mode(context, SSL_SESS_CACHE_OFF);
    SSL_CTX_set_mode(context, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER | SSL_MODE_RELEASE_BUFFERS);
    return context;
}

void *tls_open(int fd) {
    static SSL_CTX *context;
    if (!context)
        context = make_context();
    SSL *ssl = SSL_new(context);
    if (!ssl || !SSL_set_fd(ssl, fd))
        die("SSL_new", ERR_error_string(ERR_get_error(), NULL));
    SSL_set_connect_state(ssl);
    return ssl;
}

/* Sets errno for a call that did nothing. */
static int judge(SSL *ssl, int result) {
    int error = SSL_get_error(ssl, result), reason = errno;
    ERR_clear_error();
    errno = error == SSL_ERROR_WANT_READ || error == SSL_ERROR_WANT_WRITE ? EAGAIN
          : error == SSL_ERROR_SYSCALL && reason                          ? reason
                                                                           : ECONNRESET;
    return error;
}

ssize_t tls_send(void *session, const void *data, size_t length, bool *wants_out) {
    int done = SSL_write(session, data, (int)length);
    if (done > 0)
        return done;
    *wants_out = judge(session, done) != SSL_ERROR_WANT_READ;
    return -1;
}

ssize_t tls_receive(void *session, void *data, size_t room) {
    int done = SSL_read(session, data, (int)room);
    if (done > 0)
        return done;
    return judge(session, done) == SSL_ERROR_ZERO_RETURN ? 0 : -1;
}

void tls_close(void *session) {
    SSL_shutdown(session); /* one close_notify; the server's is not awaited */
    ERR_clear_error();
    SSL_free(session);
}

#endif
