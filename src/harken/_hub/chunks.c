/* SPDX-License-Identifier: MIT
 *
 * The memory of Python stacks: a cache for it, and less of it to begin with.
 *
 * CPython takes the frames of a new greenlet from a chunk of 16 KiB that it maps for it, and unmaps at its end: with
 * the page fault that is nine tenths of what a green thread costs. PyObject_SetArenaAllocator is public, and CPython's
 * chunks come from there. Blocks of exactly that size are kept for the next one; all else goes through unchanged.
 *
 * A green thread that waits for its client has three or four frames, and would keep a page of 4 KiB for them. So it
 * begins on a small chunk of ours, before it has any frame; deeper calls go on in one of CPython's own, which the cache
 * makes cheap. The chunk is the root of the list, which CPython never frees; what it may do is free it as the stack of
 * a greenlet whose thread has died, by the allocator that is ours. */
#include "hub.h"
#include <stdatomic.h>

#define CHUNK_BYTES 16384 /* DATA_STACK_CHUNK_SIZE in CPython's pystate.c, 3.11 to 3.13 */
#define MOST 256          /* 4 MiB at the most */
#define FIRST_BYTES 1024  /* a handler in recv() with its callers: some 600 */

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
    if (size == FIRST_BYTES) { /* no arena and no chunk of CPython's is so small */
        PyMem_RawFree(block);
        return;
    }
    if (size == CHUNK_BYTES && !atomic_flag_test_and_set_explicit(&taken, memory_order_acquire)) {
        if ((keep = kept_count < MOST))
            kept[kept_count++] = block;
        atomic_flag_clear_explicit(&taken, memory_order_release);
    }
    if (!keep)
        plain.free(plain.ctx, block, size);
}

#if PY_VERSION_HEX >= 0x030B0000 && PY_VERSION_HEX < 0x030E0000 && !defined(Py_GIL_DISABLED)

/* Whether the cache is in use: on the versions that were tested, and nowhere else. */
bool chunks_install(void) {
    if (plain.alloc == NULL) { /* once a process: what was wrapped stays wrapped */
        PyObject_GetArenaAllocator(&plain);
        PyObjectArenaAllocator cached = {NULL, take, give};
        PyObject_SetArenaAllocator(&cached);
    }
    return true;
}

/* At the start of a green thread, when it has no frame yet. */
void *stack_begin(void) {
    PyThreadState *thread = PyThreadState_Get();
    if (thread->datastack_chunk != NULL)
        return NULL;
    _PyStackChunk *chunk = PyMem_RawMalloc(FIRST_BYTES);
    if (chunk == NULL)
        return NULL;
    chunk->previous = NULL;
    chunk->size = FIRST_BYTES;
    chunk->top = 0;
    thread->datastack_chunk = chunk;
    thread->datastack_top = &chunk->data[1]; /* as push_chunk() leaves a root: its first place is never popped */
    thread->datastack_limit = (PyObject **)((char *)chunk + FIRST_BYTES);
    return chunk;
}

/* At its end, when it has none any more. */
void stack_end(void *begun) {
    PyThreadState *thread = PyThreadState_Get();
    if (begun == NULL || (void *)thread->datastack_chunk != begun)
        return;
    thread->datastack_chunk = NULL;
    thread->datastack_top = thread->datastack_limit = NULL;
    PyMem_RawFree(begun);
}

#else

bool chunks_install(void) { return false; }
void *stack_begin(void) { return NULL; }
void stack_end(void *begun) {}

#endif
