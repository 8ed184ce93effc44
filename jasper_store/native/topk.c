/* Keeps the best columns of each row of matrix products that arrive block by block.
 *
 * A task keeps a reservoir: columns whose product was above its floor, up to a capacity. A full reservoir is cut to the
 * best `keep`, and the floor rises to the worst of these. So nearly all of a product is only compared with the floor, by a
 * loop that the compiler turns into vector instructions, and read once.
 *
 * A product of bytes stands for one of floats: with the distances of the rows from their bytes it bounds that from above
 * and below. Where the bound reaches the floor and the ceiling is not surely passed, which is rare, the product of the
 * floats is made for this one column.
 */
#include "helpers.h"
#include "processor.h"

#include <math.h>
#include <stdint.h>

#ifdef HAS_AVX
#include <immintrin.h>
#endif

enum {
    CHUNK = 64,                      /* columns that are compared before it is asked which are above */
    MIN_PARALLEL_COLUMNS = 64 << 10, /* numbers of a product below which waking a thread costs more than it saves */
    LANES = 32,                      /* sums that a dot product is added up in */
    WAITING = 4,                     /* products that wait for their rows */
    FLOATS_PER_LINE = 16,            /* of the cache */
    PARTS_PER_THREAD = 4,
    MAX_THREADS = 1024,
};

/* Rows of floats, and as bytes: numbers of which a quantum is a step. */
struct rounded {
    const float *rows;    /* [n, dim] */
    const float *quantum; /* [n] */
    const float *length;  /* [n]: of the row that the bytes stand for, at least */
    const float *radius;  /* [n]: distance of that row from the row of floats, at least, and what rounding adds */
};

/* A product and the reservoirs that it is offered to. native/topk.py packs it as twenty-five 64-bit numbers. */
struct offer {
    const void *product; /* [units, columns]: float, or int32_t of bytes */
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
    uint64_t dim; /* 0: the product is of floats, and there is nothing behind this */
    struct rounded left, right;
    atomic_ullong *made; /* products of floats that were made are added to it */
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

static void keep_column(const struct offer *offer, int64_t task, uint64_t column, float value)
{
    const uint64_t at = (uint64_t)task * offer->capacity + (uint64_t)offer->fill[task]++;
    offer->values[at] = value;
    offer->positions[at] = (int32_t)(offer->position + (int64_t)column);
    if ((uint64_t)offer->fill[task] == offer->capacity)
        cut(offer, task);
}

static void offer_column(const struct offer *offer, int64_t task, uint64_t column, float value)
{
    if (value > offer->ceiling[task])
        offer->above[task]++;
    else
        keep_column(offer, task, column, value);
}

/* How many of a chunk are above a value: the compiler makes vector instructions of it. */
__attribute__((always_inline)) static inline unsigned count_above(const float *values, float least)
{
    int found = 0;
    for (int i = 0; i < CHUNK; i++)
        found += values[i] > least;
    return (unsigned)found;
}

__attribute__((always_inline)) static inline void offer_row_inline(const struct offer *offer, int64_t task,
                                                                   const float *row)
{
    const float ceiling = offer->ceiling[task];
    uint64_t column = 0;
    for (; column + CHUNK <= offer->columns; column += CHUNK) {
        const unsigned reaching = count_above(row + column, offer->floor[task]);
        if (!reaching)
            continue;
        const unsigned above = count_above(row + column, ceiling);
        offer->above[task] += above;
        if (above == reaching)
            continue;
        for (uint64_t i = column; i < column + CHUNK; i++)
            if (row[i] > offer->floor[task] && row[i] <= ceiling)
                keep_column(offer, task, i, row[i]);
    }
    for (; column < offer->columns; column++)
        if (row[column] > offer->floor[task])
            offer_column(offer, task, column, row[column]);
}

static void offer_row_baseline(const struct offer *offer, int64_t task, const float *row)
{
    offer_row_inline(offer, task, row);
}

#ifdef HAS_AVX
__attribute__((target("avx2"))) static void offer_row_avx2(const struct offer *offer, int64_t task, const float *row)
{
    offer_row_inline(offer, task, row);
}

__attribute__((target("avx512f"))) static void offer_row_avx512(const struct offer *offer, int64_t task, const float *row)
{
    offer_row_inline(offer, task, row);
}
#endif

static void offer_row(const struct offer *offer, int64_t task, const float *row)
{
#ifdef HAS_AVX
    if (jasper_instructions() == AVX512) {
        offer_row_avx512(offer, task, row);
        return;
    }
    if (jasper_instructions() == AVX2) {
        offer_row_avx2(offer, task, row);
        return;
    }
#endif
    offer_row_baseline(offer, task, row);
}

static void prefetch_row(const float *row, uint64_t n)
{
    for (uint64_t i = 0; i < n; i += FLOATS_PER_LINE)
        __builtin_prefetch(row + i);
}

/* What a product of bytes is looked at with: a loop for any processor, and one for AVX-512. */
struct looks {
    /* The columns, up to CHUNK, whose bounds reach a floor, as bits. Bounds and floor are in quanta of the unit. */
    uint64_t (*reaching)(const int32_t *row, const float *quantum, const float *radius, uint64_t n, float length,
                         float floor);
    float (*dot)(const float *a, const float *b, uint64_t n);
};

static uint64_t reaching_baseline(const int32_t *row, const float *quantum, const float *radius, uint64_t n, float length,
                                  float floor)
{
    uint64_t bits = 0;
    for (uint64_t i = 0; i < n; i++)
        bits |= (uint64_t)((float)row[i] * quantum[i] + length * radius[i] > floor) << i;
    return bits;
}

/* Sums by lanes, so that the compiler may add several at once; then of the lanes. */
static float dot_baseline(const float *a, const float *b, uint64_t n)
{
    float lanes[LANES] = {0};
    uint64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int lane = 0; lane < LANES; lane++)
            lanes[lane] += a[i + lane] * b[i + lane];
    for (; i < n; i++)
        lanes[i % LANES] += a[i] * b[i];
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int lane = 0; lane < half; lane++)
            lanes[lane] += lanes[lane + half];
    return lanes[0];
}

#ifdef HAS_AVX
__attribute__((target("avx512f"), always_inline)) static inline __mmask16
sixteen_reaching(const int32_t *row, const float *quantum, const float *radius, __mmask16 there, __m512 lengths,
                 __m512 floors)
{
    const __m512 numbers = _mm512_cvtepi32_ps(_mm512_maskz_loadu_epi32(there, row));
    const __m512 rest = _mm512_mul_ps(lengths, _mm512_maskz_loadu_ps(there, radius));
    const __m512 bound = _mm512_fmadd_ps(numbers, _mm512_maskz_loadu_ps(there, quantum), rest);
    return _mm512_mask_cmp_ps_mask(there, bound, floors, _CMP_GT_OQ);
}

__attribute__((target("avx512f"))) static inline uint64_t reaching_avx512(const int32_t *row, const float *quantum,
                                                                         const float *radius, uint64_t n, float length,
                                                                         float floor)
{
    const __m512 lengths = _mm512_set1_ps(length), floors = _mm512_set1_ps(floor);
    uint64_t bits = 0;
    if (n == CHUNK) {
        for (int i = 0; i < CHUNK; i += 16)
            bits |= (uint64_t)sixteen_reaching(row + i, quantum + i, radius + i, 0xffff, lengths, floors) << i;
        return bits;
    }
    for (uint64_t i = 0; i < n; i += 16) {
        const __mmask16 there = n - i < 16 ? (__mmask16)((1u << (n - i)) - 1) : 0xffff;
        bits |= (uint64_t)sixteen_reaching(row + i, quantum + i, radius + i, there, lengths, floors) << i;
    }
    return bits;
}

__attribute__((target("avx512f"))) static inline float dot_avx512(const float *a, const float *b, uint64_t n)
{
    __m512 sums[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
    uint64_t i = 0;
    for (; i + 64 <= n; i += 64)
        for (int k = 0; k < 4; k++)
            sums[k] = _mm512_fmadd_ps(_mm512_loadu_ps(a + i + 16 * k), _mm512_loadu_ps(b + i + 16 * k), sums[k]);
    for (; i < n; i += 16) {
        const __mmask16 there = n - i < 16 ? (__mmask16)((1u << (n - i)) - 1) : 0xffff;
        sums[0] = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(there, a + i), _mm512_maskz_loadu_ps(there, b + i), sums[0]);
    }
    return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3])));
}
#endif

/* Columns whose rows of floats were asked for, and whose products are made when WAITING more were found: until then the
 * rows have come from memory. */
struct waiting {
    uint64_t columns[WAITING];
    uint64_t found, made;
};

__attribute__((always_inline)) static inline void make_product(const struct offer *offer, int64_t task,
                                                               const float *unit_row, struct waiting *waiting,
                                                               const struct looks looks)
{
    const uint64_t column = waiting->columns[waiting->made++ % WAITING];
    const float value = looks.dot(unit_row, offer->right.rows + column * offer->dim, offer->dim);
    if (value > offer->floor[task])
        offer_column(offer, task, column, value);
}

/* Offer a row of a product of bytes; INT32_MIN is a column that is left out. Returns how many products were made. */
__attribute__((always_inline)) static inline uint64_t offer_bytes_inline(const struct offer *offer, int64_t task,
                                                                         uint64_t unit, const int32_t *row,
                                                                         const struct looks looks)
{
    const struct rounded *left = &offer->left, *right = &offer->right;
    const float quantum = left->quantum[unit], length = left->length[unit] / quantum;
    const float ceiling = (offer->ceiling[task] + left->radius[unit]) / quantum;
    const float *unit_row = left->rows + unit * offer->dim;
    struct waiting waiting = {.found = 0};
    for (uint64_t column = 0; column < offer->columns; column += CHUNK) {
        const uint64_t n = offer->columns - column < CHUNK ? offer->columns - column : CHUNK;
        const float floor = (offer->floor[task] - left->radius[unit]) / quantum;
        uint64_t bits = looks.reaching(row + column, right->quantum + column, right->radius + column, n, length, floor);
        for (; bits; bits &= bits - 1) {
            const uint64_t at = column + (uint64_t)__builtin_ctzll(bits);
            if (row[at] == INT32_MIN)
                continue;
            if ((float)row[at] * right->quantum[at] - length * right->radius[at] > ceiling) {
                offer->above[task]++;
                continue;
            }
            if (waiting.found - waiting.made == WAITING)
                make_product(offer, task, unit_row, &waiting, looks);
            prefetch_row(right->rows + at * offer->dim, offer->dim);
            waiting.columns[waiting.found++ % WAITING] = at;
        }
    }
    while (waiting.made < waiting.found)
        make_product(offer, task, unit_row, &waiting, looks);
    return waiting.made;
}

static uint64_t offer_bytes_baseline(const struct offer *offer, int64_t task, uint64_t unit, const int32_t *row)
{
    return offer_bytes_inline(offer, task, unit, row, (struct looks){reaching_baseline, dot_baseline});
}

#ifdef HAS_AVX
__attribute__((target("avx512f"))) static uint64_t offer_bytes_avx512(const struct offer *offer, int64_t task,
                                                                      uint64_t unit, const int32_t *row)
{
    return offer_bytes_inline(offer, task, unit, row, (struct looks){reaching_avx512, dot_avx512});
}
#endif

static uint64_t offer_bytes(const struct offer *offer, int64_t task, uint64_t unit, const int32_t *row)
{
#ifdef HAS_AVX
    if (jasper_instructions() == AVX512)
        return offer_bytes_avx512(offer, task, unit, row);
#endif
    return offer_bytes_baseline(offer, task, unit, row);
}

/* Offer a row of the product to the reservoir of a task. */
static void offer_unit(const struct offer *offer, int64_t task, uint64_t unit)
{
    const uint64_t at = unit * offer->stride;
    if (!offer->dim) {
        offer_row(offer, task, (const float *)offer->product + at);
        return;
    }
    const uint64_t made = offer_bytes(offer, task, unit, (const int32_t *)offer->product + at);
    atomic_fetch_add_explicit(offer->made, made, memory_order_relaxed);
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
            offer_unit(offer, each, unit);
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
