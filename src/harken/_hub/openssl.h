/* SPDX-License-Identifier: MIT
 *
 * What secured.c does with OpenSSL: its own functions, where openssl.c finds them, and the guard before them. */
#ifndef HARKEN_OPENSSL_H
#define HARKEN_OPENSSL_H
#include "hub.h"

typedef struct ssl_st SSL; /* as <openssl/types.h> has it; OpenSSL's headers are not needed to build */

/* openssl.c */
HIDDEN void openssl_find(void);
HIDDEN PyObject *reach_openssl(PyObject *module, PyObject *yes);
HIDDEN PyObject *openssl_keepers(PyObject *module, PyObject *none);
HIDDEN SSL *ssl_of(PyObject *sslobj);
HIDDEN size_t ssl_at_hand(SSL *ssl);
HIDDEN size_t ssl_unsaid(SSL *ssl);
enum {
    FEED_SSL = 0, /* more is needed from the wire */
    ASK_SSL = -1  /* something else: Python's object, asked for the same, does it or says why not */
};
HIDDEN int ssl_shake(SSL *ssl);
HIDDEN ssize_t ssl_decrypt(SSL *ssl, const char *wire, size_t got, char *plain, size_t size);
HIDDEN size_t ssl_room(SSL *ssl, size_t size);
HIDDEN size_t ssl_encrypt(SSL *ssl, const char *plain, size_t size, size_t *taken, char *wire, size_t room);
HIDDEN void ssl_bye(SSL *ssl);
#define PIECE 16384 /* as in _hubbed.py: plain text in a record, at the most */

/* guard.c: waited for without the GIL, and held without it only by Python's calls of OpenSSL. */
extern HIDDEN PyTypeObject *Guard_Type;
HIDDEN int guard_ready(PyObject *module);
HIDDEN bool guard_try(PyObject *guard);
HIDDEN void guard_take(PyObject *guard);
HIDDEN void guard_give_back(PyObject *guard);
#endif
