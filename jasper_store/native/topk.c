/* Keeps the best columns of each row of matrix products that arrive block by block.
 *
 * A task keeps a reservoir: columns whose product was above its floor, up to a capacity. A full reservoir is cut to the
 * best `keep`, and the floor rises to the worst of these. So nearly all of a product is only compared with the floor, by a
 * loop that the compiler turns into vector instructions, and read once.
 */
#include "helpers.h"

#include <math.h>
#include <stdint.h>

enum {
    CHUNK = 64,                      /* columns that are compared before it is asked which are above */
    MIN_PARALLEL_COLUMNS = 64 << 10, /* numbers of a product below which waking a thread costs more than it saves */
    PARTS_PER_THREAD = 4,
    MAX_THREADS = 1024,
};

/* A product and the reservoirs that it is offered to. native/topk.py packs it as fifteen 64-bit numbers. */
struct offer {
    const float *product; /* [units, columns] */
    uint64_t stride;      /* numbers from one row of it to the next */
    uint64_t units;
    uint64_t columns;
    int64_t position;          /* of the first column */
    const int64_t *first_task; /* [units + 1]: the tasks of a unit are consecutive */
    float *values;             /* [tasks, capacity], -inf where there is none */
    int32_t *positions;        /* [tasks, capacity] */
    int64_t *fill;             /* [tasks] */
    float *floor;              /* [tasks]: what is not above it is not looked at */
    const float *ceiling;      /* [tasks]: what is above it is counted, and not kept */
    int64_t *above;            /* [tasks]: how many were */
    uint64_t keep;
    uint64_t capacity;
    uint64_t threads;
};

struct offer_task {
    struct parallel_task task;
    const struct offer *offer;
    uint64_t part_units;
    atomic_ullong next_unit;
};

static void swap(float *values, int32_t *positions, uint64_t a, uint64_t b)
{
    const float value = values[a];
    const int32_t position = positions[a];
    values[a] = values[b];
    positions[a] = positions[b];
    values[b] = value;
    positions[b] = position;
}

/* Move the `keep` largest of n values to the front: Hoare's selection, with the middle value as the pivot. */
static void select_largest(float *values, int32_t *positions, uint64_t n, uint64_t keep)
{
    int64_t low = 0, high = (int64_t)n - 1;
    const int64_t last = (int64_t)keep - 1;
    while (low < high) {
        const float pivot = values[low + (high - low) / 2];
        int64_t i = low, j = high;
        while (i <= j) {
            while (values[i] > pivot)
                i++;
            while (values[j] < pivot)
                j--;
            if (i <= j)
                swap(values, positions, (uint64_t)i++, (uint64_t)j--);
        }
        if (last <= j)
            high = j;
        else if (last >= i)
            low = i;
        else
            return;
    }
}

/* Cut a full reservoir to the best, and raise its floor to the worst of these. */
static void cut(const struct offer *offer, int64_t task)
{
    float *values = offer->values + (uint64_t)task * offer->capacity;
    select_largest(values, offer->positions + (uint64_t)task * offer->capacity, offer->capacity, offer->keep);
    float worst = values[0];
    for (uint64_t i = 1; i < offer->keep; i++)
        worst = values[i] < worst ? values[i] : worst;
    if (worst > offer->floor[task])
        offer->floor[task] = worst;
    for (uint64_t i = offer->keep; i < offer->capacity; i++)
        values[i] = -INFINITY;
    offer->fill[task] = (int64_t)offer->keep;
}

static void offer_column(const struct offer *offer, int64_t task, uint64_t column, float value)
{
    if (value > offer->ceiling[task]) {
        offer->above[task]++;
        return;
    }
    const uint64_t at = (uint64_t)task * offer->capacity + (uint64_t)offer->fill[task]++;
    offer->values[at] = value;
    offer->positions[at] = (int32_t)(offer->position + (int64_t)column);
    if ((uint64_t)offer->fill[task] == offer->capacity)
        cut(offer, task);
}

static int any_above(const float *values, float floor)
{
    int found = 0;
    for (int i = 0; i < CHUNK; i++)
        found |= values[i] > floor;
    return found;
}

static void offer_row(const struct offer *offer, int64_t task, const float *row)
{
    uint64_t column = 0;
    for (; column + CHUNK <= offer->columns; column += CHUNK) {
        if (!any_above(row + column, offer->floor[task]))
            continue;
        for (uint64_t i = column; i < column + CHUNK; i++)
            if (row[i] > offer->floor[task])
                offer_column(offer, task, i, row[i]);
    }
    for (; column < offer->columns; column++)
        if (row[column] > offer->floor[task])
            offer_column(offer, task, column, row[column]);
}

static int offer_part(struct parallel_task *task)
{
    struct offer_task *work = (struct offer_task *)task;
    const struct offer *offer = work->offer;
    const uint64_t first = atomic_fetch_add(&work->next_unit, work->part_units);
    if (first >= offer->units)
        return 0;
    const uint64_t end = first + work->part_units < offer->units ? first + work->part_units : offer->units;
    for (uint64_t unit = first; unit < end; unit++)
        for (int64_t each = offer->first_task[unit]; each < offer->first_task[unit + 1]; each++)
            offer_row(offer, each, offer->product + unit * offer->stride);
    return 1;
}

/* Offer a product to the reservoirs of its units' tasks. */
void jasper_offer(const struct offer *offer)
{
    const uint64_t threads = offer->threads < MAX_THREADS ? offer->threads : MAX_THREADS;
    const int parallel = threads > 1 && offer->units * offer->columns >= MIN_PARALLEL_COLUMNS;
    struct offer_task work = {.task = {offer_part}, .offer = offer, .part_units = offer->units};
    if (parallel)
        work.part_units = offer->units / (threads * PARTS_PER_THREAD) + 1;
    atomic_init(&work.next_unit, 0);
    jasper_parallel_for(&work.task, parallel ? (unsigned)threads - 1 : 0);
}
