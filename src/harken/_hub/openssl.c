/* SPDX-License-Identifier: MIT
 *
 * OpenSSL, without the ssl module between.
 *
 * Python's object for a TLS connection gives up the GIL in every call: whenever another thread computes, each message
 * waits for it twice, 5 ms each time. It parses arguments, too, and here it stands over memory, which OpenSSL's data
 * are copied into and out of.
 *
 * So the functions are called that the interpreter's _ssl is linked with, under the GIL, and for the time of a call its
 * memory is put aside: what was received is read where it lies. Before and after, everything is as _ssl made it, and
 * calls of Python's on the same object find what they expect. An error is left to them as well: it stays in OpenSSL's
 * queue, and a connection that has failed says the same again.
 *
 * Nothing is assumed of the interpreter. The loader is asked for the functions, by _ssl's own file; and where in _ssl's
 * object the SSL stands is seen by watching OpenSSL make one. Where that cannot be seen (it is built in, and hidden, or
 * something else than OpenSSL), ssl_of() says so, and Python's calls are used. */
#include "openssl.h"
#include <dlfcn.h>
#include <string.h>

typedef struct bio_st BIO;
typedef struct bio_method_st BIO_METHOD;
typedef void made(void *parent, void *data, void *all, int index, long number, void *argument);

/* <openssl/bio.h>, <openssl/crypto.h>, <openssl/ssl.h>: the same from OpenSSL 1.1.1 on. */
enum {
    BIO_CTRL_FLUSH = 11,
    BIO_FLAGS_READ = 1,
    BIO_FLAGS_WRITE = 2,
    BIO_FLAGS_RWS = 7,
    BIO_FLAGS_SHOULD_RETRY = 8,
    BIO_TYPE_SOURCE_SINK = 0x400,
    CRYPTO_EX_INDEX_SSL = 0,
    SSL_CTRL_CLEAR_MODE = 78,
    SSL_MODE_RELEASE_BUFFERS = 0x10,
    SSL_ERROR_WANT_READ = 2
};
/* What 16 KiB grow by: 320 bytes a record at the most (<openssl/ssl3.h>), of which 256 are padding that OpenSSL does
 * not make; two records under TLS 1.0. Where the room is too small after all, OpenSSL comes back for more. */
#define EXPANSION 384

#define FUNCTIONS(F)                                                               \
    F(int, SSL_read_ex, (SSL *, void *, size_t, size_t *))                         \
    F(int, SSL_write_ex, (SSL *, const void *, size_t, size_t *))                  \
    F(int, SSL_pending, (const SSL *))                                             \
    F(int, SSL_get_error, (const SSL *, int))                                      \
    F(int, SSL_do_handshake, (SSL *))                                              \
    F(int, SSL_shutdown, (SSL *))                                                  \
    F(long, SSL_ctrl, (SSL *, int, long, void *))                                  \
    F(int, SSL_set_ex_data, (SSL *, int, void *))                                  \
    F(void *, SSL_get_ex_data, (const SSL *, int))                                 \
    F(BIO *, SSL_get_rbio, (const SSL *))                                          \
    F(BIO *, SSL_get_wbio, (const SSL *))                                          \
    F(void, SSL_set0_rbio, (SSL *, BIO *))                                         \
    F(void, SSL_set0_wbio, (SSL *, BIO *))                                         \
    F(BIO *, BIO_new, (const BIO_METHOD *))                                        \
    F(int, BIO_up_ref, (BIO *))                                                    \
    F(int, BIO_read, (BIO *, void *, int))                                         \
    F(int, BIO_write, (BIO *, const void *, int))                                  \
    F(size_t, BIO_ctrl_pending, (BIO *))                                           \
    F(void, BIO_set_init, (BIO *, int))                                            \
    F(void, BIO_set_flags, (BIO *, int))                                           \
    F(void, BIO_clear_flags, (BIO *, int))                                         \
    F(BIO_METHOD *, BIO_meth_new, (int, const char *))                             \
    F(int, BIO_meth_set_read, (BIO_METHOD *, int (*)(BIO *, char *, int)))         \
    F(int, BIO_meth_set_write, (BIO_METHOD *, int (*)(BIO *, const char *, int)))  \
    F(int, BIO_meth_set_ctrl, (BIO_METHOD *, long (*)(BIO *, int, long, void *)))  \
    F(int, CRYPTO_get_ex_new_index, (int, long, void *, made *, void *, made *))   \
    F(int, CRYPTO_free_ex_index, (int, int))                                       \
    F(void, ERR_clear_error, (void))                                               \
    F(const char *, OpenSSL_version, (int))

#define DECLARED(type, name, arguments) static type(*name) arguments;
FUNCTIONS(DECLARED)

#define FOUND(type, name, arguments) {(void **)&name, #name},
static const struct {
    void **found;
    const char *name;
} functions[] = {FUNCTIONS(FOUND)};

/* -- the wire, as OpenSSL sees it ---------------------------------------------------------------------------------- */

/* What the call under way reads from and writes to: one at a time, under the GIL. (A callback in Python that talks TLS
 * itself would be a call within a call; so what was there is put back after each.) */
typedef struct {
    const char *from;
    char *to;
    size_t left;
} Wire;
static Wire coming, going;
static BIO *wire_bio;

/* How much of `size` bytes can be moved; -1: OpenSSL is to come back. */
static int movable(BIO *bio, const Wire *wire, int size, int direction) {
    BIO_clear_flags(bio, BIO_FLAGS_RWS | BIO_FLAGS_SHOULD_RETRY);
    if (wire->left > 0)
        return (size_t)size < wire->left ? size : (int)wire->left;
    BIO_set_flags(bio, direction | BIO_FLAGS_SHOULD_RETRY);
    return -1;
}

static int wire_read(BIO *bio, char *into, int size) {
    int count = movable(bio, &coming, size, BIO_FLAGS_READ);
    if (count > 0) {
        memcpy(into, coming.from, (size_t)count);
        coming.from += count;
        coming.left -= (size_t)count;
    }
    return count;
}

static int wire_write(BIO *bio, const char *data, int size) {
    int count = movable(bio, &going, size, BIO_FLAGS_WRITE);
    if (count > 0) {
        memcpy(going.to, data, (size_t)count);
        going.to += count;
        going.left -= (size_t)count;
    }
    return count;
}

static long wire_ctrl(BIO *bio, int command, long number, void *pointer) { return command == BIO_CTRL_FLUSH; }

static bool make_wire(void) {
    BIO_METHOD *method = BIO_meth_new(BIO_TYPE_SOURCE_SINK, "harken");
    if (method == NULL || !BIO_meth_set_read(method, wire_read) || !BIO_meth_set_write(method, wire_write) ||
        !BIO_meth_set_ctrl(method, wire_ctrl) || (wire_bio = BIO_new(method)) == NULL)
        return false;
    BIO_set_init(wire_bio, 1);
    return true;
}

/* Exchange what OpenSSL reads from, or writes to. It takes over the one, and lets go of the other. */
static void set_source(SSL *ssl, BIO *bio) {
    BIO_up_ref(bio);
    SSL_set0_rbio(ssl, bio);
}

static void set_sink(SSL *ssl, BIO *bio) {
    BIO_up_ref(bio);
    SSL_set0_wbio(ssl, bio);
}

/* -- buffers ------------------------------------------------------------------------------------------------------- */

/* Python's contexts let OpenSSL give its two buffers back after each record: an idle connection holds 34 KB less, and a
 * message costs two calls of malloc(3) and two of free(3) more, a twelfth of its instructions. So the first few
 * connections keep theirs; with thousands, those are no matter. */
#define MOST_KEEP 256 /* of the process, at a time: 9 MB */

static int keepers, mark; /* the mark is on each of them */

/* The keepers' objects are _ssl's, which frees them under the GIL. */
static void keeper_gone(void *parent, void *data, void *all, int index, long number, void *argument) {
    keepers -= data != NULL;
}

static bool make_mark(void) {
    mark = CRYPTO_get_ex_new_index(CRYPTO_EX_INDEX_SSL, 0, NULL, NULL, NULL, keeper_gone);
    return mark >= 0;
}

static void keep_buffers(SSL *ssl) {
    if (keepers == MOST_KEEP || SSL_get_ex_data(ssl, mark) != NULL || SSL_set_ex_data(ssl, mark, &keepers) != 1)
        return;
    keepers++;
    SSL_ctrl(ssl, SSL_CTRL_CLEAR_MODE, SSL_MODE_RELEASE_BUFFERS, NULL);
}

PyObject *openssl_keepers(PyObject *module, PyObject *none) { return PyLong_FromLong(keepers); }

/* -- what secured.c calls, with the guard -------------------------------------------------------------------------- */

/* How much can be read without more from the wire, at the most. */
size_t ssl_at_hand(SSL *ssl) { return BIO_ctrl_pending(SSL_get_rbio(ssl)) + (size_t)SSL_pending(ssl); }

/* How much OpenSSL has to say of its own accord. */
size_t ssl_unsaid(SSL *ssl) { return BIO_ctrl_pending(SSL_get_wbio(ssl)); }

static int outcome(SSL *ssl, int done) {
    return done == 1 ? 1 : SSL_get_error(ssl, done) == SSL_ERROR_WANT_READ ? FEED_SSL : ASK_SSL;
}

/* Go on with the handshake. 1: it is done. */
int ssl_shake(SSL *ssl) {
    int done = outcome(ssl, SSL_do_handshake(ssl));
    if (done == 1)
        keep_buffers(ssl);
    return done;
}

/* Read at most `size` bytes, at least one, out of what OpenSSL's memory holds, or, where that is nothing, out of what
 * was received; what is not used of that is kept there. */
ssize_t ssl_decrypt(SSL *ssl, const char *wire, size_t got, char *plain, size_t size) {
    size_t read = 0;
    if (got == 0) {
        int result = outcome(ssl, SSL_read_ex(ssl, plain, size, &read));
        return result == 1 ? (ssize_t)read : result;
    }
    BIO *memory = SSL_get_rbio(ssl);
    Wire outer = coming;
    coming = (Wire){.from = wire, .left = got};
    BIO_up_ref(memory); /* or it would go with its place */
    set_source(ssl, wire_bio);
    int result = outcome(ssl, SSL_read_ex(ssl, plain, size, &read));
    SSL_set0_rbio(ssl, memory);
    if (coming.left > 0)
        BIO_write(memory, coming.from, (int)coming.left);
    coming = outer;
    return result == 1 ? (ssize_t)read : result;
}

/* The room that the records of `size` bytes take at the most, and what OpenSSL has to say before them. */
size_t ssl_room(SSL *ssl, size_t size) { return ssl_unsaid(ssl) + size + (size / PIECE + 1) * EXPANSION; }

/* Make records, behind what OpenSSL has to say. Returns how much is to be sent; or, with less of `plain` taken, 0, and
 * what there is to send is in OpenSSL's memory. */
size_t ssl_encrypt(SSL *ssl, const char *plain, size_t size, size_t *taken, char *wire, size_t room) {
    BIO *memory = SSL_get_wbio(ssl);
    Wire outer = going;
    int said = BIO_read(memory, wire, (int)room);
    size_t before = said > 0 ? (size_t)said : 0, written;
    going = (Wire){.to = wire + before, .left = room - before};
    BIO_up_ref(memory);
    set_sink(ssl, wire_bio);
    for (*taken = 0; *taken < size; *taken += written)
        if (SSL_write_ex(ssl, plain + *taken, size - *taken < PIECE ? size - *taken : PIECE, &written) != 1)
            break;
    SSL_set0_wbio(ssl, memory);
    size_t made = room - going.left;
    going = outer;
    if (*taken == size)
        return made;
    BIO_write(memory, wire, (int)made);
    return 0;
}

/* Say close_notify, into OpenSSL's memory; whatever comes of it. */
void ssl_bye(SSL *ssl) {
    if (SSL_shutdown(ssl) < 0)
        ERR_clear_error(); /* or it would be the next connection's */
}

/* -- finding it ---------------------------------------------------------------------------------------------------- */

static PyTypeObject *object_type; /* _ssl._SSLSocket, once all was found */
static Py_ssize_t place;          /* of the SSL in it */
static bool wanted = true;

/* NULL: OpenSSL cannot be reached but by Python's calls. */
SSL *ssl_of(PyObject *sslobj) {
    return wanted && Py_IS_TYPE(sslobj, object_type) ? *(SSL **)((char *)sslobj + place) : NULL;
}

/* The functions, where they are OpenSSL's: others ("OpenSSL 1.1.1 (compatible; BoringSSL)") have the names alone. */
static bool find_functions(PyObject *module) {
    PyObject *path = PyModule_GetFilenameObject(module); /* an error where it is built in */
    PyErr_Clear();
    const char *name = path == NULL ? NULL : PyUnicode_AsUTF8(path);
    void *library = dlopen(name, RTLD_NOW | RTLD_NOLOAD);
    Py_XDECREF(path);
    if (library == NULL)
        return false;
    for (size_t each = 0; each < sizeof functions / sizeof *functions; each++)
        if ((*functions[each].found = dlsym(library, functions[each].name)) == NULL)
            return false;
    const char *version = OpenSSL_version(0); /* the library stays open */
    return strncmp(version, "OpenSSL ", 8) == 0 && strstr(version, "compatible") == NULL;
}

static __thread void *newest; /* the last SSL that was made in this thread */

static void note(void *parent, void *data, void *all, int index, long number, void *argument) { newest = parent; }

/* An object of _ssl's, with the SSL that was made for it in `newest`. */
static PyObject *make_watched(PyObject *module) {
    PyObject *server = PyObject_GetAttrString(module, "PROTOCOL_TLS_SERVER");
    PyObject *context = server == NULL ? NULL : PyObject_CallMethod(module, "_SSLContext", "N", server);
    PyObject *in = PyObject_CallMethod(module, "MemoryBIO", NULL);
    PyObject *out = PyObject_CallMethod(module, "MemoryBIO", NULL);
    newest = NULL;
    PyObject *made = context == NULL || in == NULL || out == NULL
                         ? NULL
                         : PyObject_CallMethod(context, "_wrap_bio", "OOO", in, out, Py_True);
    Py_XDECREF(context);
    Py_XDECREF(in);
    Py_XDECREF(out);
    return made;
}

/* Where in it the SSL stands, if that is in one place; else 0. */
static Py_ssize_t place_in(PyObject *object) {
    Py_ssize_t found = 0, last = Py_TYPE(object)->tp_basicsize - (Py_ssize_t)sizeof newest;
    for (Py_ssize_t at = sizeof(PyObject); newest != NULL && at <= last; at += sizeof newest) {
        if (*(void **)((char *)object + at) != newest)
            continue;
        if (found != 0)
            return 0;
        found = at;
    }
    return found;
}

static bool find_place(PyObject *module) {
    int index = CRYPTO_get_ex_new_index(CRYPTO_EX_INDEX_SSL, 0, NULL, note, NULL, NULL);
    PyObject *object = index < 0 ? NULL : make_watched(module);
    if (index >= 0)
        CRYPTO_free_ex_index(CRYPTO_EX_INDEX_SSL, index);
    if (object == NULL || (place = place_in(object)) == 0) {
        Py_XDECREF(object);
        return false;
    }
    object_type = (PyTypeObject *)Py_NewRef(Py_TYPE(object));
    Py_DECREF(object);
    return true;
}

/* Look for it, once. */
void openssl_find(void) {
    static bool sought = false;
    if (sought)
        return;
    sought = true;
    PyObject *module = PyImport_ImportModule("_ssl");
    if (module != NULL && find_functions(module) && make_wire() && make_mark())
        find_place(module);
    Py_XDECREF(module);
    PyErr_Clear();
}

PyObject *reach_openssl(PyObject *module, PyObject *yes) {
    int now = PyObject_IsTrue(yes);
    if (now < 0)
        return NULL;
    openssl_find();
    wanted = now;
    return PyBool_FromLong(wanted && object_type != NULL);
}
