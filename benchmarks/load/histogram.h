/* SPDX-License-Identifier: MIT
 *
 * A histogram of nanoseconds with 64 steps in each power of two (an error of at most 1.6 %), in fixed memory:
 * the idea of HdrHistogram in the few lines that a benchmark needs. */
#ifndef HARKEN_HISTOGRAM_H
#define HARKEN_HISTOGRAM_H

#include <stdint.h>
#include <string.h>

#define STEP_BITS 6
#define STEPS (1u << STEP_BITS)
#define BUCKETS ((64 - STEP_BITS + 1) * STEPS)

struct histogram {
    uint64_t count, max;
    uint64_t buckets[BUCKETS];
};

static inline void histogram_clear(struct histogram *h) { memset(h, 0, sizeof *h); }

static inline void histogram_add(struct histogram *h, uint64_t value) {
    unsigned bucket = (unsigned)value;
    if (value >= STEPS) {
        unsigned shift = 63u - (unsigned)__builtin_clzll(value) - STEP_BITS;
        bucket = (shift + 1) * STEPS + (unsigned)((value >> shift) - STEPS);
    }
    h->buckets[bucket]++;
    h->count++;
    if (value > h->max)
        h->max = value;
}

/* The upper edge of the bucket that holds the given share (0 to 1) of all values; 0 when there are none. */
static inline uint64_t histogram_at(const struct histogram *h, double share) {
    uint64_t seen = 0, wanted = (uint64_t)(share * (double)h->count);
    for (unsigned bucket = 0; bucket < BUCKETS && h->count; bucket++) {
        seen += h->buckets[bucket];
        if (seen <= wanted && seen < h->count)
            continue;
        uint64_t edge = bucket;
        if (bucket >= STEPS)
            edge = ((uint64_t)(bucket % STEPS + STEPS + 1) << (bucket / STEPS - 1)) - 1;
        return edge < h->max ? edge : h->max;
    }
    return 0;
}

#endif
