/* Tries ways of copying in turn, for each power of two of sizes, and now and then again. */
#include "ways.h"

#include <stdatomic.h>

enum {
    WAYS = 4,
    SIZES = 16,      /* powers of two of bytes that are told apart */
    SMALLEST = 16,   /* binary logarithm of the smallest */
    TRIALS = 8,      /* copies of each way; their least time counts, since anything else on the machine adds to it */
    PERIOD = 4096,   /* copies from one round of trials to the next: data may have moved into memory */
};

/* Of one size. Threads that write at once may lose a trial. */
static struct {
    atomic_uint copies;
    atomic_int best;
    _Atomic uint64_t least[WAYS]; /* picoseconds a byte, of this round */
} sizes[SIZES];

/* What all copies use instead, or -1. */
static atomic_int given = -1;

void jasper_use_way(int way) { atomic_store(&given, way); }

static int size_of(uint64_t nbytes)
{
    const int bits = 63 - __builtin_clzll(nbytes | 1) - SMALLEST;
    return bits < 0 ? 0 : bits < SIZES ? bits : SIZES - 1;
}

int jasper_way(uint64_t nbytes, int n_ways, int *trial)
{
    const int size = size_of(nbytes), use = atomic_load_explicit(&given, memory_order_relaxed);
    *trial = 0;
    if (use >= 0)
        return use % n_ways;
    const unsigned phase = atomic_fetch_add_explicit(&sizes[size].copies, 1, memory_order_relaxed) % PERIOD;
    *trial = phase < (unsigned)(TRIALS * n_ways);
    if (!phase)
        for (int way = 0; way < WAYS; way++)
            atomic_store(&sizes[size].least[way], UINT64_MAX);
    if (phase == (unsigned)(TRIALS * n_ways)) {
        int best = 0;
        for (int way = 1; way < n_ways; way++)
            if (atomic_load(&sizes[size].least[way]) < atomic_load(&sizes[size].least[best]))
                best = way;
        atomic_store(&sizes[size].best, best);
    }
    return *trial ? (int)(phase % (unsigned)n_ways) : atomic_load(&sizes[size].best);
}

void jasper_way_took(uint64_t nbytes, int way, int64_t ns)
{
    const int size = size_of(nbytes);
    const uint64_t rate = (uint64_t)ns * 1000 / nbytes;
    if (rate < atomic_load(&sizes[size].least[way]))
        atomic_store(&sizes[size].least[way], rate);
}
