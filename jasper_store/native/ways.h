/* Which way of copying rows is the quickest, found by trying.
 *
 * Processors differ: stores that bypass the caches make a gather of 12 MB 1.4 times as fast on one and a fifth slower on
 * another, whose third-level cache keeps the target from one gather to the next (docs/notes-paging.md). Their names say
 * little about that, and a virtual machine's say less. */
#ifndef JASPER_WAYS_H
#define JASPER_WAYS_H

#include <stdint.h>

/* Bits of a way. */
enum {
    NEAR = 1,   /* prefetch rows into the first-level cache, not the second */
    STREAM = 2, /* stores bypass the caches */
};

/* The way for a copy of so many bytes, of the first `n_ways`: 2 without STREAM, or 4. `*trial` is set if its time is to be told. */
int jasper_way(uint64_t nbytes, int n_ways, int *trial);

/* The time of a copy in a way that was a trial. */
void jasper_way_took(uint64_t nbytes, int way, int64_t ns);

/* Use this way from now on, or with -1 again the quickest. Tests compare them. */
void jasper_use_way(int way);

#endif
