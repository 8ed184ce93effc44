/* What the parts of the harness share. */
#ifndef HARNESS_H
#define HARNESS_H

#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

/* Defects that a build has on purpose, so that each sanitizer is known to find one. */
#ifndef PLANT_OVERFLOW
#define PLANT_OVERFLOW 0
#endif
#ifndef PLANT_RACE
#define PLANT_RACE 0
#endif
#ifndef PLANT_UB
#define PLANT_UB 0
#endif

#define CHECK(condition)                                                                \
    do {                                                                                \
        if (!(condition)) {                                                             \
            fprintf(stderr, "%s:%d: %s does not hold\n", __FILE__, __LINE__, #condition); \
            abort();                                                                    \
        }                                                                               \
    } while (0)

/* Pseudo-random numbers, xorshift. */
struct rng {
    uint64_t state;
};

static inline uint64_t below(struct rng *rng, uint64_t n)
{
    rng->state ^= rng->state << 13, rng->state ^= rng->state >> 7, rng->state ^= rng->state << 17;
    return (rng->state >> 11) % n;
}

/* The byte at an offset of every file and table of the harness. */
static inline unsigned char byte_at(uint64_t offset) { return (unsigned char)((offset * 2654435761u) >> 13); }

/* What was done, of all threads. */
struct counts {
    atomic_ulong gathers, refused, located, reads, abandoned, cut, without_memory, children;
};
extern struct counts counts;

/* Memory that is there whatever fault_rate is: what the harness itself needs. */
void *need(size_t nbytes);

/* One random scenario each; they may run in several threads at once, and end the process if a result is wrong. */
void gather_some(struct rng *rng);
void gather_in_parts(struct rng *rng);
void read_some(struct rng *rng, int file);
void read_while_cut(struct rng *rng, const char *directory);

/* For the end of a thread that has read. */
void close_kept_reader(void);

/* A reading that is begun here and finished in this process, or in a forked child. */
struct begun;
struct begun *begin_reading(struct rng *rng, int file);
void finish_reading(struct begun *begun, int in_child);

/* Small cases with a known result. */
void check_edges(int file);

enum { FILE_NBYTES = 4 << 20 };

#endif
