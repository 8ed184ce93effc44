/* Gathers of random tables, compared with a loop over bytes. */
#include "harness.h"

#include <string.h>

#include "library.h"

enum { MOST_GATHERS = 4 };

static const uint64_t row_sizes[] = {1, 4, 7, 8, 64, 100, 384, 1536};
static const uint64_t row_counts[] = {0, 1, 3, 4, 5, 64, 1000, 3000};
static const int64_t widths[] = {0, 0, 0, 0, -1, 1, 2, 4};
static const unsigned thread_counts[] = {0, 1, 2, 3, 16, UINT32_MAX};

static uint64_t out_nbytes(const struct gather *gather)
{
    const uint64_t item = gather->widen < 0 ? 1 : (uint64_t)gather->widen;
    return item ? gather->row_nbytes / item * 8 : gather->row_nbytes;
}

static void make_gather(struct rng *rng, struct gather *gather)
{
    gather->n_rows = 1 + below(rng, 300);
    gather->widen = widths[below(rng, 8)];
    do
        gather->row_nbytes = row_sizes[below(rng, 8)];
    while (gather->widen > 0 && gather->row_nbytes % (uint64_t)gather->widen);
    gather->stride = gather->row_nbytes + (below(rng, 2) ? 0 : 3);
    gather->n = row_counts[below(rng, 8)];
    gather->rows_step = 1 + below(rng, 2);
    gather->stage = 0;
    const uint64_t nbytes = gather->stride * (gather->n_rows - 1) + gather->row_nbytes;
    char *table = need(nbytes);
    for (uint64_t i = 0; i < nbytes; i++)
        table[i] = (char)byte_at(i);
    const uint64_t named = gather->n ? (gather->n - 1) * gather->rows_step + 1 : 0;
    int64_t *rows = need(named * sizeof *rows);
    for (uint64_t i = 0; i < named; i++)
        rows[i] = i % gather->rows_step ? INT64_MIN : (int64_t)below(rng, gather->n_rows);
    gather->source = table, gather->rows = rows;
    const uint64_t needed = gather->n * out_nbytes(gather);
    gather->target = need(needed - (PLANT_OVERFLOW && needed));
    memset(gather->target, 0xAA, needed - (PLANT_OVERFLOW && needed));
}

static int64_t widened(const unsigned char *from, int64_t widen)
{
    int8_t one;
    int16_t two;
    int32_t four;
    switch (widen) {
    case 1:
        return memcpy(&one, from, 1), one;
    case 2:
        return memcpy(&two, from, 2), two;
    case 4:
        return memcpy(&four, from, 4), four;
    default:
        return *from;
    }
}

static void check_gather(const struct gather *gather)
{
    const uint64_t item = gather->widen < 0 ? 1 : (uint64_t)gather->widen, wide = out_nbytes(gather);
    for (uint64_t i = 0; i < gather->n; i++) {
        const char *row = gather->source + (uint64_t)gather->rows[i * gather->rows_step] * gather->stride;
        const char *got = gather->target + i * wide;
        if (!item)
            CHECK(!memcmp(got, row, gather->row_nbytes));
        for (uint64_t k = 0; item && k < gather->row_nbytes / item; k++) {
            int64_t value;
            memcpy(&value, got + 8 * k, sizeof value);
            CHECK(value == widened((const unsigned char *)row + k * item, gather->widen));
        }
    }
}

static int untouched(const struct gather *gather)
{
    for (uint64_t i = 0; i < gather->n * out_nbytes(gather); i++)
        if ((unsigned char)gather->target[i] != 0xAA)
            return 0;
    return 1;
}

/* Run gathers, at once or begun before something else is done. Returns what the library does, and -1 where they were
 * cancelled. */
static int64_t run_gathers(struct rng *rng, const struct gather *gathers, uint64_t count)
{
    const unsigned threads = thread_counts[below(rng, 6)];
    if (count == 1 && below(rng, 2)) {
        const struct single_gather one = {gathers[0], threads};
        return jasper_gather_one(&one);
    }
    if (below(rng, 2))
        return jasper_gather(gathers, count, threads);
    int64_t begun[16] = {0};
    const int64_t bad = jasper_gather_begin(begun, gathers, count, threads);
    for (uint64_t k = below(rng, 20000); k; k--)
        __asm__ volatile("");
    if (!bad && below(rng, 4)) {
        jasper_gather_finish(begun);
        return 0;
    }
    jasper_gather_cancel(begun);
    return bad ? bad : -1;
}

void gather_some(struct rng *rng)
{
    struct gather gathers[MOST_GATHERS];
    const uint64_t count = 1 + below(rng, MOST_GATHERS), damaged = below(rng, 4 * MOST_GATHERS);
    for (uint64_t k = 0; k < count; k++)
        make_gather(rng, &gathers[k]);
    int64_t expected = 0;
    if (damaged < count && gathers[damaged].n) {
        const int64_t bad[] = {-1, (int64_t)gathers[damaged].n_rows, INT64_MAX, INT64_MIN};
        const uint64_t at = below(rng, gathers[damaged].n) * gathers[damaged].rows_step;
        ((int64_t *)gathers[damaged].rows)[at] = bad[below(rng, 4)];
        expected = (int64_t)damaged + 1;
    }
    const int64_t found = run_gathers(rng, gathers, count);
    CHECK(found == expected || (found < 0 && !expected));
    atomic_fetch_add(expected ? &counts.refused : &counts.gathers, 1);
    for (uint64_t k = 0; k < count; k++) {
        if (expected)
            CHECK(untouched(&gathers[k]));
        else if (!found)
            check_gather(&gathers[k]);
        free((void *)gathers[k].source);
        free((void *)gathers[k].rows);
        free(gathers[k].target);
    }
}

enum { MOST_PARTS = 20 };

/* The table that parts.py makes. */
static int64_t *make_spans(const int64_t *starts, uint64_t n_parts, uint64_t *shift)
{
    const uint64_t n_rows = (uint64_t)starts[n_parts];
    for (*shift = 0; n_rows / (2 * n_parts) >> (*shift + 1); ++*shift)
        continue;
    const uint64_t count = (n_rows + (UINT64_C(1) << *shift) - 1) >> *shift;
    int64_t *spans = need((count + 1) * sizeof *spans);
    for (uint64_t i = 0, part = 0; i < count; i++) {
        while (starts[part + 1] <= (int64_t)(i << *shift))
            part++;
        spans[i] = (int64_t)part;
    }
    spans[count] = (int64_t)n_parts - 1;
    return spans;
}

void gather_in_parts(struct rng *rng)
{
    const uint64_t n_parts = 1 + below(rng, MOST_PARTS), row_nbytes = row_sizes[below(rng, 8)], n = 700;
    int64_t starts[MOST_PARTS + 1] = {0}, bases[MOST_PARTS], *rows = need(n * sizeof *rows);
    int64_t *found = need(n * sizeof *found);
    char *memory[MOST_PARTS], *target = need(n * row_nbytes);
    for (uint64_t part = 0; part < n_parts; part++) {
        const uint64_t count = 1 + below(rng, below(rng, 5) ? 20 : 2000);
        starts[part + 1] = starts[part] + (int64_t)count;
        memory[part] = need(count * row_nbytes);
        for (uint64_t i = 0; i < count * row_nbytes; i++)
            memory[part][i] = (char)byte_at((uint64_t)starts[part] * row_nbytes + i);
        bases[part] = (int64_t)(intptr_t)memory[part] - starts[part] * (int64_t)row_nbytes;
    }
    struct parts parts = {.starts = starts, .bases = bases, .n_parts = n_parts, .row_nbytes = (int64_t)row_nbytes};
    parts.spans = make_spans(starts, n_parts, &parts.shift);
    const uint64_t n_rows = (uint64_t)starts[n_parts];
    for (uint64_t i = 0; i < n; i++)
        rows[i] = (int64_t)below(rng, n_rows);
    jasper_parts_of_rows(&parts, rows, 1, n, found);
    for (uint64_t i = 0; i < n; i++)
        CHECK(starts[found[i]] <= rows[i] && rows[i] < starts[found[i] + 1]);
    const struct gather gather = {(char *)&parts, n_rows, row_nbytes, UINT64_MAX, rows, 1, n, target, 0, 0};
    CHECK(jasper_gather(&gather, 1, 2) == 0);
    for (uint64_t i = 0; i < n * row_nbytes; i++)
        CHECK((unsigned char)target[i] == byte_at((uint64_t)rows[i / row_nbytes] * row_nbytes + i % row_nbytes));
    const uint64_t lost = below(rng, n_parts), at = below(rng, n);
    bases[lost] = INT64_MIN;
    int64_t missing = -1;
    for (uint64_t i = 0; i < n; i++)
        missing = rows[i] >= starts[lost] && rows[i] < starts[lost + 1] ? -2 : missing;
    CHECK(jasper_locate_rows(&parts, INT64_MIN, rows, 1, n, found) == missing);
    const int64_t bad[] = {-1, (int64_t)n_rows, INT64_MAX, INT64_MIN};
    rows[at] = bad[below(rng, 4)];
    CHECK(jasper_locate_rows(&parts, INT64_MIN, rows, 1, n, found) == (int64_t)at);
    CHECK(jasper_gather(&gather, 1, 2) == 1);
    atomic_fetch_add(&counts.located, 1);
    for (uint64_t part = 0; part < n_parts; part++)
        free(memory[part]);
    free((void *)parts.spans);
    free(rows);
    free(found);
    free(target);
}
