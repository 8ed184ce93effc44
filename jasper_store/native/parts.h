/* Where rows lie whose tensor is in several parts.
 *
 * A tensor of k parts has k + 1 first rows. A table over equal spans of rows says which part the first row of each span
 * is in, so that a row is found in one step where parts are about equally long, and by halving what is left where they
 * are not. Rows are independent of each other, so the processor overlaps the lookups.
 */
#ifndef JASPER_PARTS_H
#define JASPER_PARTS_H

#include <stdint.h>

/* parts.py packs it. */
struct parts {
    const int64_t *starts; /* first row of each part, and the number of rows: n_parts + 1 */
    const int64_t *spans;  /* part of the first row of each span of 2^shift rows, and n_parts - 1 in the end */
    const int64_t *bases;  /* for each part the address that row 0 would have if all rows lay as this part's do */
    uint64_t n_parts;
    uint64_t shift;
    int64_t row_nbytes;
};

static inline uint64_t jasper_part_of(const struct parts *parts, int64_t row)
{
    const uint64_t span = (uint64_t)row >> parts->shift;
    uint64_t low = (uint64_t)parts->spans[span], high = (uint64_t)parts->spans[span + 1];
    while (high - low > 1) {
        const uint64_t middle = low + (high - low) / 2;
        if (parts->starts[middle] <= row)
            low = middle;
        else
            high = middle - 1;
    }
    /* Of random rows, a processor cannot predict this choice, so it is none: GCC makes a conditional move of it. */
    return parts->starts[high] <= row ? high : low;
}

#endif
