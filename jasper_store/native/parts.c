/* Finds where rows lie whose tensor is in several parts: of each row its address, which the gather then reads from.
 *
 * A tensor of k parts has k + 1 first rows. A table over equal spans of rows says which part the first row of each span
 * is in, so that a row is found in one step where parts are about equally long, and by halving what is left where they
 * are not. Rows are independent of each other, so the processor overlaps the lookups.
 */
#include <stddef.h>
#include <stdint.h>

/* parts.py packs it. */
struct parts {
    const int64_t *starts; /* first row of each part, and the number of rows: n_parts + 1 */
    const int64_t *spans;  /* part of the first row of each span of 2^shift rows, and n_parts - 1 in the end */
    uint64_t n_parts;
    uint64_t shift;
    int64_t row_nbytes;
};

static uint64_t part_of(const struct parts *parts, int64_t row)
{
    const uint64_t span = (uint64_t)row >> parts->shift;
    uint64_t low = (uint64_t)parts->spans[span], high = (uint64_t)parts->spans[span + 1];
    while (low < high) {
        const uint64_t middle = (low + high + 1) / 2;
        if (parts->starts[middle] <= row)
            low = middle;
        else
            high = middle - 1;
    }
    return low;
}

/* Address of each row. `bases` has for each part the address that row 0 would have if all rows lay as this part's do;
 * `unmapped` stands there for a part that is not mapped. Returns -1; the position of the first row that is out of range
 * (then nothing is written); or -2 if a row is in a part that is not mapped: its address is `unmapped`. */
int64_t jasper_locate_rows(const struct parts *parts, const int64_t *bases, int64_t unmapped, const int64_t *rows,
                           int64_t rows_step, uint64_t n, int64_t *addresses)
{
    const uint64_t n_rows = (uint64_t)parts->starts[parts->n_parts];
    for (uint64_t i = 0; i < n; i++)
        if ((uint64_t)rows[(int64_t)i * rows_step] >= n_rows)
            return (int64_t)i;
    int missing = 0;
    for (uint64_t i = 0; i < n; i++) {
        const int64_t row = rows[(int64_t)i * rows_step], base = bases[part_of(parts, row)];
        missing |= base == unmapped;
        addresses[i] = base == unmapped ? unmapped : base + row * parts->row_nbytes;
    }
    return missing ? -2 : -1;
}

/* Part number of each row, all of which are in range. */
void jasper_parts_of_rows(const struct parts *parts, const int64_t *rows, int64_t rows_step, uint64_t n, int64_t *found)
{
    for (uint64_t i = 0; i < n; i++)
        found[i] = (int64_t)part_of(parts, rows[(int64_t)i * rows_step]);
}
