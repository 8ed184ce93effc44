/* Gathers rows of arrays in memory, several arrays in one call.
 *
 * A gather of scattered rows is bound by memory latency: the processor cannot predict where the next row lies, so each
 * row begins with a cache miss. The index list is known, so the loop prefetches the fourth row after the one it copies,
 * which hides most of that latency. Measured figures are in docs/notes-paging.md.
 *
 * Plain C without Python's headers: one library serves every Python version, called through ctypes, which releases the
 * interpreter lock.
 */
#include "helpers.h"
#include "map_faults.h"
#include "parts.h"
#include "processor.h"
#include "ways.h"

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#ifdef HAS_AVX
#include <immintrin.h>
#endif

enum {
    ABI = 18,
    PREFETCH_DISTANCE = 4,          /* rows from the one that is copied to the one that is prefetched */
    CACHE_LINE = 64,                /* bytes */
    MAX_PART_NBYTES = 512 << 10,    /* bytes that a thread copies per part, at most */
    MIN_PARALLEL_NBYTES = 64 << 10, /* below this, waking a thread costs more than it saves */
    MIN_DENSE_NBYTES = 32 << 10,    /* the same while calls follow one another, so that threads are awake */
    DENSE_NS = 50000,               /* from call to call; helpers stay awake for longer */
    MIN_STREAM_NBYTES = 2 << 20,    /* from this on the result leaves the core's own caches before it is read */
    MAX_THREADS = 1024,             /* more are never there; twice as many must fit an unsigned */
    LOCATED_ROWS = 256,             /* rows whose addresses are found before they are copied */
};

/* Result of jasper_gather_mapped; gather.py knows it. */
enum { UNREADABLE = -1 };

/* Given instead of a stride: `source` is a struct parts, all of whose parts are mapped. */
#define IN_PARTS UINT64_MAX

/* One gather. gather.py packs it as ten 64-bit numbers, and a single one with the number of threads behind it. */
struct gather {
    const char *source;
    uint64_t n_rows;
    uint64_t row_nbytes;
    uint64_t stride; /* bytes from one row of the source to the next, or IN_PARTS */
    const int64_t *rows;
    uint64_t rows_step; /* elements from one of `rows` to the next */
    uint64_t n;
    char *target;   /* n rows without gaps */
    int64_t widen;  /* 0: copy; 1, 2, 4: convert signed integers of that many bytes to int64; -1: unsigned bytes */
    uint64_t stage; /* gathers of one stage depend only on gathers of earlier stages */
};

struct single_gather {
    struct gather gather;
    uint64_t threads;
};

/* The gathers of one stage, split into parts. */
struct gather_task {
    struct parallel_task task;
    const struct gather *gathers;
    uint64_t n_gathers;
    uint64_t nbytes;
    uint64_t part_nbytes;
    uint64_t n_parts;
    unsigned helpers; /* that may run parts besides the caller */
    int way;   /* of copying: see ways.h */
    int trial; /* whether its time is to be told */
    int mapped; /* whether sources are maps of files, whose pages may be gone */
    atomic_int unreadable; /* whether a page was */
    atomic_ullong next_part;
};

/* A gather whose caller does something else until it wants the results. gather.py makes room for it. */
struct begun_gather {
    struct gather_task task;
    unsigned fork_generation;
};
_Static_assert(sizeof(struct begun_gather) <= 16 * sizeof(int64_t), "gather.py makes room for 16 numbers");

/* Rows of a gather: a part of a task. */
struct row_range {
    const struct gather *gather;
    uint64_t first, last;
    int way;
};

/* Where a row lies. In integers: the source is NULL where rows are addresses, and adding to that is undefined. */
static inline const char *row_at(uintptr_t source, int64_t row, uint64_t stride)
{
    return (const char *)(source + (uint64_t)row * stride);
}

/* Prefetch a row into the first-level cache, or the second, which allows more outstanding misses. */
static void prefetch_row(const char *row, uint64_t nbytes, int way)
{
    if (way & NEAR)
        for (uint64_t k = 0; k < nbytes; k += CACHE_LINE)
            __builtin_prefetch(row + k, 0, 3);
    else
        for (uint64_t k = 0; k < nbytes; k += CACHE_LINE)
            __builtin_prefetch(row + k, 0, 1);
}

__attribute__((always_inline)) static inline void copy_rows_inline(const struct gather *gather, uint64_t first,
                                                                   uint64_t last, int way)
{
    const uintptr_t source = (uintptr_t)gather->source;
    const uint64_t nbytes = gather->row_nbytes, stride = gather->stride, step = gather->rows_step;
    const int64_t *rows = gather->rows;
    for (uint64_t i = first; i < last; i++) {
        if (i + PREFETCH_DISTANCE < gather->n)
            prefetch_row(row_at(source, rows[(i + PREFETCH_DISTANCE) * step], stride), nbytes, way);
        const char *from = row_at(source, rows[i * step], stride);
        char *to = gather->target + i * nbytes;
        uint64_t k = 0;
        for (; k + CACHE_LINE <= nbytes; k += CACHE_LINE)
            __builtin_memcpy(to + k, from + k, CACHE_LINE);
        memcpy(to + k, from + k, nbytes - k);
    }
}

static void copy_rows_baseline(const struct gather *gather, uint64_t first, uint64_t last, int way)
{
    copy_rows_inline(gather, first, last, way);
}

#ifdef HAS_AVX
__attribute__((target("avx2"))) static void copy_rows_avx2(const struct gather *gather, uint64_t first, uint64_t last, int way)
{
    copy_rows_inline(gather, first, last, way);
}

__attribute__((target("avx512f"))) static void copy_rows_avx512(const struct gather *gather, uint64_t first,
                                                                uint64_t last, int way)
{
    copy_rows_inline(gather, first, last, way);
}
#endif

static void copy_rows(const struct gather *gather, uint64_t first, uint64_t last, int way)
{
#ifdef HAS_AVX
    const int best = jasper_instructions();
    if (best == AVX512) {
        copy_rows_avx512(gather, first, last, way);
        return;
    }
    if (best == AVX2) {
        copy_rows_avx2(gather, first, last, way);
        return;
    }
#endif
    copy_rows_baseline(gather, first, last, way);
}

/* The same with stores that bypass the cache: a cache line that is written as a whole need not be read first.
 *
 * The loop stands here three times because one inline body, with the store as a constant argument, made the AVX-512
 * function 4 to 8 % slower (GCC 12, rows of 768 and 1536 bytes, 3 to 12 MB per call). */
#ifdef HAS_AVX
__attribute__((target("avx512f")))
static void stream_rows_avx512(const struct gather *gather, uint64_t first, uint64_t last, int way)
{
    const uintptr_t source = (uintptr_t)gather->source;
    const uint64_t nbytes = gather->row_nbytes, stride = gather->stride, step = gather->rows_step;
    const int64_t *rows = gather->rows;
    for (uint64_t i = first; i < last; i++) {
        if (i + PREFETCH_DISTANCE < gather->n)
            prefetch_row(row_at(source, rows[(i + PREFETCH_DISTANCE) * step], stride), nbytes, way);
        const char *from = row_at(source, rows[i * step], stride);
        char *to = gather->target + i * nbytes;
        for (uint64_t k = 0; k < nbytes; k += CACHE_LINE)
            _mm512_stream_si512((__m512i *)(to + k), _mm512_loadu_si512(from + k));
    }
    _mm_sfence();
}

/* Two stores a line, for processors of AMD without AVX-512. On those of Intel they gained nothing over the cache, but
 * all that run this loop are old. */
__attribute__((target("avx2")))
static void stream_rows_avx2(const struct gather *gather, uint64_t first, uint64_t last, int way)
{
    const uintptr_t source = (uintptr_t)gather->source;
    const uint64_t nbytes = gather->row_nbytes, stride = gather->stride, step = gather->rows_step;
    const int64_t *rows = gather->rows;
    for (uint64_t i = first; i < last; i++) {
        if (i + PREFETCH_DISTANCE < gather->n)
            prefetch_row(row_at(source, rows[(i + PREFETCH_DISTANCE) * step], stride), nbytes, way);
        const char *from = row_at(source, rows[i * step], stride);
        char *to = gather->target + i * nbytes;
        for (uint64_t k = 0; k < nbytes; k += CACHE_LINE) {
            const __m256i low = _mm256_loadu_si256((const __m256i *)(from + k));
            const __m256i high = _mm256_loadu_si256((const __m256i *)(from + k + sizeof low));
            _mm256_stream_si256((__m256i *)(to + k), low);
            _mm256_stream_si256((__m256i *)(to + k + sizeof low), high);
        }
    }
    _mm_sfence();
}

static void stream_rows(const struct gather *gather, uint64_t first, uint64_t last, int way)
{
    if (jasper_instructions() == AVX512)
        stream_rows_avx512(gather, first, last, way);
    else
        stream_rows_avx2(gather, first, last, way);
}

static int can_stream(const struct gather *gather)
{
    return ((uintptr_t)gather->target | gather->row_nbytes) % CACHE_LINE == 0 &&
           jasper_instructions() >= AVX2;
}
#else
static int can_stream(const struct gather *gather) { return (void)gather, 0; }
#define stream_rows copy_rows
#endif

/* Prefetch the rows that are copied before any that the loop prefetches. A processor has requests of its own for a row in
 * flight too, but only for as many instructions ahead as it keeps. */
static void prefetch_first(const struct gather *gather, uint64_t first, uint64_t last, int way)
{
    if (last - first > PREFETCH_DISTANCE)
        last = first + PREFETCH_DISTANCE;
    for (uint64_t i = first; i < last; i++)
        prefetch_row(row_at((uintptr_t)gather->source, gather->rows[i * gather->rows_step], gather->stride),
                     gather->row_nbytes, way);
}

/* Short rows of a size that the compiler knows: a few loads and stores, where a call of memcpy would take 15 ns. */
#define COPY_SHORT(nbytes)                                                          \
    case nbytes:                                                                    \
        for (uint64_t i = first; i < last; i++)                                     \
            memcpy(gather->target + i * (nbytes), row_at(source, rows[i * step], stride), nbytes); \
        return 1;

/* Copy rows of 1 to 7 numbers of 64 bits, or of one of 32. Returns 0 if they are of another size. */
static int copy_short_rows(const struct gather *gather, uint64_t first, uint64_t last)
{
    const uintptr_t source = (uintptr_t)gather->source;
    const uint64_t stride = gather->stride, step = gather->rows_step;
    const int64_t *rows = gather->rows;
    switch (gather->row_nbytes) {
        COPY_SHORT(4)
        COPY_SHORT(8)
        COPY_SHORT(16)
        COPY_SHORT(24)
        COPY_SHORT(32)
        COPY_SHORT(40)
        COPY_SHORT(48)
        COPY_SHORT(56)
    }
    return 0;
}

#define WIDEN_NUMBERS(type)                                                         \
    for (uint64_t i = first; i < last; i++) {                                       \
        const char *from = row_at(source, rows[i * step], stride);                  \
        for (uint64_t k = 0; k < width; k++) {                                      \
            type value;                                                             \
            memcpy(&value, from + k * sizeof value, sizeof value);                  \
            const int64_t wide = value;                                             \
            memcpy(gather->target + (i * width + k) * sizeof wide, &wide, sizeof wide); \
        }                                                                           \
    }

/* Rows first to last - 1 of a gather from one place. */
static void gather_from_one(const struct gather *gather, uint64_t first, uint64_t last, int way)
{
    const uintptr_t source = (uintptr_t)gather->source;
    const uint64_t stride = gather->stride, step = gather->rows_step;
    const int64_t *rows = gather->rows;
    const uint64_t item = gather->widen < 0 ? 1 : (uint64_t)gather->widen;
    const uint64_t width = item ? gather->row_nbytes / item : 0;
    switch (gather->widen) {
    case 0:
        if (!copy_short_rows(gather, first, last)) {
            prefetch_first(gather, first, last, way);
            if ((way & STREAM) && can_stream(gather))
                stream_rows(gather, first, last, way);
            else
                copy_rows(gather, first, last, way);
        }
        break;
    case -1:
        WIDEN_NUMBERS(uint8_t)
        break;
    case 1:
        WIDEN_NUMBERS(int8_t)
        break;
    case 2:
        WIDEN_NUMBERS(int16_t)
        break;
    case 4:
        WIDEN_NUMBERS(int32_t)
        break;
    }
}

/* Rows first to last - 1 of a gather. */
static void gather_rows(const struct gather *gather, uint64_t first, uint64_t last, int way)
{
    if (gather->stride != IN_PARTS) {
        gather_from_one(gather, first, last, way);
        return;
    }
    const struct parts *parts = (const struct parts *)gather->source;
    int64_t addresses[LOCATED_ROWS];
    const uint64_t item = gather->widen < 0 ? 1 : (uint64_t)gather->widen;
    const uint64_t out_nbytes = item ? gather->row_nbytes / item * sizeof(int64_t) : gather->row_nbytes;
    for (uint64_t n; first < last; first += n) {
        n = last - first < LOCATED_ROWS ? last - first : LOCATED_ROWS;
        for (uint64_t i = 0; i < n; i++) {
            const int64_t row = gather->rows[(first + i) * gather->rows_step];
            addresses[i] = parts->bases[jasper_part_of(parts, row)] + row * parts->row_nbytes;
        }
        struct gather some = *gather;
        some.source = NULL, some.stride = 1, some.rows = addresses, some.rows_step = 1, some.n = n;
        some.target = gather->target + first * out_nbytes;
        gather_from_one(&some, 0, n, way);
    }
}

static void gather_range(const void *data)
{
    const struct row_range *range = data;
    gather_rows(range->gather, range->first, range->last, range->way);
}

static uint64_t rows_per_part(const struct gather_task *task, const struct gather *gather)
{
    const uint64_t rows = task->part_nbytes / (gather->row_nbytes ? gather->row_nbytes : 1);
    return rows ? rows : 1;
}

static uint64_t count_parts(const struct gather_task *task, const struct gather *gather)
{
    const uint64_t rows = rows_per_part(task, gather);
    return (gather->n + rows - 1) / rows;
}

static int run_next_part(struct parallel_task *parallel)
{
    struct gather_task *task = (struct gather_task *)parallel;
    uint64_t part = atomic_fetch_add(&task->next_part, 1);
    if (part >= task->n_parts)
        return 0;
    const struct gather *gather = task->gathers;
    for (uint64_t count; part >= (count = count_parts(task, gather)); part -= count)
        gather++;
    const uint64_t rows = rows_per_part(task, gather), first = part * rows;
    const struct row_range range = {gather, first, gather->n - first < rows ? gather->n : first + rows, task->way};
    if (!task->mapped)
        gather_range(&range);
    else if (!atomic_load(&task->unreadable) && !jasper_run_guarded(gather_range, &range))
        atomic_store(&task->unreadable, 1);
    return 1;
}

static int rows_in_range(const struct gather *gather)
{
    uint64_t bad = 0;
    for (uint64_t i = 0; i < gather->n; i++)
        bad |= (uint64_t)gather->rows[i * gather->rows_step] >= gather->n_rows;
    return !bad;
}

/* Whether the last gather of such a size has just been. */
static int calls_are_dense(void)
{
    static _Atomic int64_t last;
    const int64_t now = jasper_monotonic_ns();
    return now - atomic_exchange(&last, now) < DENSE_NS;
}

/* Plan a task of gathers that do not depend on each other. Returns 0, or the number (from 1) of the first gather with a
 * row out of range. */
static int64_t plan_stage(struct gather_task *task, const struct gather *gathers, uint64_t n_gathers, unsigned threads)
{
    uint64_t nbytes = 0;
    for (uint64_t k = 0; k < n_gathers; k++) {
        if (!rows_in_range(&gathers[k]))
            return (int64_t)k + 1;
        nbytes += gathers[k].n * gathers[k].row_nbytes;
    }
    *task = (struct gather_task){
        .task = {run_next_part}, .gathers = gathers, .n_gathers = n_gathers, .nbytes = nbytes, .part_nbytes = MAX_PART_NBYTES};
    threads = threads < MAX_THREADS ? threads : MAX_THREADS;
    const int parallel =
        threads > 1 && nbytes >= MIN_DENSE_NBYTES && (nbytes >= MIN_PARALLEL_NBYTES || calls_are_dense());
    task->helpers = parallel ? threads - 1 : 0;
    /* Parts are as large as possible, because the first rows of each are not prefetched; but each thread gets at least
     * two, so that the others can take over the second part of one that starts late. */
    if (parallel && nbytes / (2 * threads) < MAX_PART_NBYTES)
        task->part_nbytes = nbytes / (2 * threads);
    for (uint64_t k = 0; k < n_gathers; k++)
        task->n_parts += count_parts(task, &gathers[k]);
    if (nbytes >= MIN_PARALLEL_NBYTES)
        task->way = jasper_way(nbytes, nbytes >= MIN_STREAM_NBYTES ? 2 * STREAM : STREAM, &task->trial);
    return 0;
}

static void run_task(struct gather_task *task)
{
    const int64_t began = task->trial ? jasper_monotonic_ns() : 0;
    if (task->helpers)
        jasper_parallel_for(&task->task, task->helpers);
    else
        while (run_next_part(&task->task))
            continue;
    if (task->trial)
        jasper_way_took(task->nbytes, task->way, jasper_monotonic_ns() - began);
}

/* Run gathers that do not depend on each other. Returns 0; the number (from 1) of the first gather with a row out of
 * range: then nothing was written; or UNREADABLE. */
static int64_t run_stage(const struct gather *gathers, uint64_t n_gathers, unsigned threads, int mapped)
{
    struct gather_task task;
    const int64_t bad = plan_stage(&task, gathers, n_gathers, threads);
    if (bad)
        return bad;
    task.mapped = mapped;
    run_task(&task);
    return atomic_load(&task.unreadable) ? UNREADABLE : 0;
}

/* Run all gathers, stage by stage. Returns 0, or the number (from 1) of the first gather with a row out of range: then
 * its stage and later stages have written nothing. */
int64_t jasper_gather(const struct gather *gathers, uint64_t n_gathers, unsigned threads)
{
    for (uint64_t first = 0, last = 0; first < n_gathers; first = last) {
        while (last < n_gathers && gathers[last].stage == gathers[first].stage)
            last++;
        const int64_t bad = run_stage(gathers + first, last - first, threads, 0);
        if (bad)
            return (int64_t)first + bad;
    }
    return 0;
}

/* Whether helpers may begin a task before its caller does. The time of one on trial would count what the caller does. */
static int can_begin(const struct gather_task *task) { return task->helpers && !task->trial; }

/* Run all gathers but those of the last stage, which a helper begins. Results as jasper_gather. Whatever it is,
 * jasper_gather_finish or jasper_gather_cancel must be called before any memory that was passed is freed. */
int64_t jasper_gather_begin(struct begun_gather *begun, const struct gather *gathers, uint64_t n_gathers, unsigned threads)
{
    uint64_t first = n_gathers;
    while (first && gathers[first - 1].stage == gathers[n_gathers - 1].stage)
        first--;
    int64_t bad = jasper_gather(gathers, first, threads);
    if (bad)
        return bad;
    bad = plan_stage(&begun->task, gathers + first, n_gathers - first, threads);
    if (bad)
        return (int64_t)first + bad;
    begun->fork_generation = jasper_fork_generation();
    if (can_begin(&begun->task))
        jasper_parallel_begin(&begun->task.task);
    return 0;
}

/* Run what no thread has begun, and wait for the rest. */
void jasper_gather_finish(struct begun_gather *begun)
{
    struct gather_task *task = &begun->task;
    if (begun->fork_generation != jasper_fork_generation()) {
        /* A thread that this process does not have may have been at it: everything once more. */
        begun->fork_generation = jasper_fork_generation();
        atomic_store(&task->next_part, 0);
    }
    if (!can_begin(task))
        run_task(task);
    else
        /* Helpers are woken only for parts that no thread has begun. */
        jasper_parallel_finish(&task->task, atomic_load(&task->next_part) < task->n_parts ? task->helpers : 0);
}

/* Leave undone what no thread has begun, and wait for the rest. */
void jasper_gather_cancel(struct begun_gather *begun)
{
    struct gather_task *task = &begun->task;
    atomic_store(&task->next_part, task->n_parts);
    if (can_begin(task))
        jasper_parallel_finish(&task->task, 0);
}

/* As jasper_gather, for one stage of gathers from maps. Returns UNREADABLE, besides, if a page of a map could not be read:
 * jasper_fault_address names it, and what was written is undefined. */
int64_t jasper_gather_mapped(const struct gather *gathers, uint64_t n_gathers, unsigned threads)
{
    jasper_catch_faults();
    return run_stage(gathers, n_gathers, threads, 1);
}

/* One gather from memory or, with the result of jasper_gather_mapped, from a map. ctypes takes a fifth of a microsecond
 * for three arguments more than for one, which a gather of 32 rows of 1.5 KB feels. */
int64_t jasper_gather_one(const struct single_gather *one)
{
    return run_stage(&one->gather, 1, (unsigned)one->threads, 0);
}

int64_t jasper_gather_one_mapped(const struct single_gather *one)
{
    jasper_catch_faults();
    return run_stage(&one->gather, 1, (unsigned)one->threads, 1);
}

/* Version of this library's interface; library.py expects the same number. */
int jasper_rows_abi(void) { return ABI; }
