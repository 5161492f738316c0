/* SPDX-License-Identifier: MIT
 *
 * A cache for the memory of Python stacks.
 *
 * CPython takes the frames of a new greenlet from a chunk of 16 KiB that it maps for it, and unmaps at its end: with
 * the page fault that is nine tenths of what a green thread costs. PyObject_SetArenaAllocator is public, and CPython's
 * chunks come from there. Blocks of exactly that size are kept for the next one; all else goes through unchanged. */
#include "hub.h"
#include <stdatomic.h>

#define CHUNK_BYTES 16384 /* DATA_STACK_CHUNK_SIZE in CPython's pystate.c, 3.11 to 3.13 */
#define MOST 256          /* 4 MiB at the most */

static PyObjectArenaAllocator plain;
static void *kept[MOST];
static int kept_count;
static atomic_flag taken = ATOMIC_FLAG_INIT; /* interpreters with a GIL of their own share the allocator */

static void *take(void *context, size_t size) {
    void *block = NULL;
    if (size == CHUNK_BYTES && !atomic_flag_test_and_set_explicit(&taken, memory_order_acquire)) {
        if (kept_count > 0)
            block = kept[--kept_count];
        atomic_flag_clear_explicit(&taken, memory_order_release);
    }
    return block != NULL ? block : plain.alloc(plain.ctx, size);
}

static void give(void *context, void *block, size_t size) {
    bool keep = false;
    if (size == CHUNK_BYTES && !atomic_flag_test_and_set_explicit(&taken, memory_order_acquire)) {
        if ((keep = kept_count < MOST))
            kept[kept_count++] = block;
        atomic_flag_clear_explicit(&taken, memory_order_release);
    }
    if (!keep)
        plain.free(plain.ctx, block, size);
}

/* Whether the cache is in use: on the versions that were tested, and nowhere else. */
bool chunks_install(void) {
#if PY_VERSION_HEX >= 0x030B0000 && PY_VERSION_HEX < 0x030E0000 && !defined(Py_GIL_DISABLED)
    if (plain.alloc == NULL) { /* once a process: what was wrapped stays wrapped */
        PyObject_GetArenaAllocator(&plain);
        PyObjectArenaAllocator cached = {NULL, take, give};
        PyObject_SetArenaAllocator(&cached);
    }
    return true;
#else
    return false;
#endif
}
