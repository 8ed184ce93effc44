/* Finds rows of a tensor that is in several parts. */
#include "parts.h"

/* Address of each row. `unmapped` stands in `bases` for a part that is not mapped. Returns -1; the position of the first
 * row that is out of range (then nothing is written); or -2 if a row is in a part that is not mapped: its address is
 * `unmapped`. */
int64_t jasper_locate_rows(const struct parts *parts, int64_t unmapped, const int64_t *rows, int64_t rows_step, uint64_t n,
                           int64_t *addresses)
{
    const uint64_t n_rows = (uint64_t)parts->starts[parts->n_parts];
    for (uint64_t i = 0; i < n; i++)
        if ((uint64_t)rows[(int64_t)i * rows_step] >= n_rows)
            return (int64_t)i;
    int missing = 0;
    for (uint64_t i = 0; i < n; i++) {
        const int64_t row = rows[(int64_t)i * rows_step], base = parts->bases[jasper_part_of(parts, row)];
        missing |= base == unmapped;
        addresses[i] = base == unmapped ? unmapped : base + row * parts->row_nbytes;
    }
    return missing ? -2 : -1;
}

/* Part number of each row, all of which are in range. */
void jasper_parts_of_rows(const struct parts *parts, const int64_t *rows, int64_t rows_step, uint64_t n, int64_t *found)
{
    for (uint64_t i = 0; i < n; i++)
        found[i] = (int64_t)jasper_part_of(parts, rows[(int64_t)i * rows_step]);
}
