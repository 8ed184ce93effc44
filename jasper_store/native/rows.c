/* Gathers rows of arrays in memory, several arrays in one call.
 *
 * A gather of scattered rows waits for memory: the processor cannot guess where the next row lies, so each row begins
 * with a miss. The list of rows says it, and asking for the fourth row after while one is copied hides most of that
 * wait. Measured figures stand in docs/notes-paging.md.
 *
 * Plain C without Python's headers: one library serves every Python, called through ctypes, which lets go of the
 * interpreter lock.
 */
#include "helpers.h"

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__linux__) && defined(__GLIBC__) && defined(__GNUC__)
#include <immintrin.h>
#define HAS_LINE_STORES 1
#endif

enum {
    ABI = 7,
    AHEAD = 4,               /* rows asked for ahead of the one that is copied */
    LINE = 64,               /* bytes of a cache line */
    PART_NBYTES = 512 << 10, /* what a thread takes at a time, at most */
    SMALL_NBYTES = 64 << 10, /* below it, waking a thread costs more than it saves */
    LARGE_NBYTES = 2 << 20,  /* from here on what is written leaves the core's cache before anybody reads it */
};

/* As gather.py packs it: ten 64-bit numbers. */
struct job {
    const char *source;
    uint64_t n_rows;
    uint64_t row_nbytes;
    uint64_t stride; /* bytes from one row of the source to the next */
    const int64_t *rows;
    uint64_t rows_step; /* numbers from one of `rows` to the next */
    uint64_t n;
    char *target; /* n rows without gaps */
    int64_t widen; /* 0: copy; 1, 2, 4: signed integers of that many bytes, made int64; -1: unsigned bytes */
    uint64_t stage; /* jobs of a stage do not depend on each other, only on those of stages before */
};

struct work {
    struct shared_work shared;
    const struct job *jobs;
    uint64_t n_jobs;
    uint64_t part_nbytes;
    uint64_t parts;
    int past_cache; /* whether what is written goes past the cache */
    atomic_ullong next;
};

#if defined(HAS_LINE_STORES) && !defined(__clang__)
#define WIDEST __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define WIDEST
#endif

/* Into the second level of the cache, which has room for more misses under way than the first. */
static void ask_for(const char *row, uint64_t nbytes)
{
    for (uint64_t k = 0; k < nbytes; k += LINE)
        __builtin_prefetch(row + k, 0, 1);
}

WIDEST
static void copy_rows(const struct job *job, uint64_t first, uint64_t last)
{
    const uint64_t nbytes = job->row_nbytes, stride = job->stride, step = job->rows_step;
    const int64_t *rows = job->rows;
    for (uint64_t i = first; i < last; i++) {
        if (i + AHEAD < job->n)
            ask_for(job->source + (uint64_t)rows[(i + AHEAD) * step] * stride, nbytes);
        const char *from = job->source + (uint64_t)rows[i * step] * stride;
        char *to = job->target + i * nbytes;
        uint64_t k = 0;
        for (; k + LINE <= nbytes; k += LINE)
            __builtin_memcpy(to + k, from + k, LINE);
        memcpy(to + k, from + k, nbytes - k);
    }
}

/* The same past the cache: a whole line that is written at once need not be read first. (Two or four stores a line are
 * no quicker than the cache.) */
#ifdef HAS_LINE_STORES
__attribute__((target("avx512f")))
static void stream_rows(const struct job *job, uint64_t first, uint64_t last)
{
    const uint64_t nbytes = job->row_nbytes, stride = job->stride, step = job->rows_step;
    const int64_t *rows = job->rows;
    for (uint64_t i = first; i < last; i++) {
        if (i + AHEAD < job->n)
            ask_for(job->source + (uint64_t)rows[(i + AHEAD) * step] * stride, nbytes);
        const char *from = job->source + (uint64_t)rows[i * step] * stride;
        char *to = job->target + i * nbytes;
        for (uint64_t k = 0; k < nbytes; k += LINE)
            _mm512_stream_si512((__m512i *)(to + k), _mm512_loadu_si512(from + k));
    }
    _mm_sfence();
}

static int can_stream(const struct job *job)
{
    return ((uintptr_t)job->target | job->row_nbytes) % LINE == 0 && __builtin_cpu_supports("avx512f");
}
#else
static int can_stream(const struct job *job) { return (void)job, 0; }
#define stream_rows copy_rows
#endif

/* Rows of a few bytes: a number of a known width is one load and one store. */
#define COPY_NUMBERS(type)                                                          \
    for (uint64_t i = first; i < last; i++) {                                       \
        type value;                                                                 \
        memcpy(&value, job->source + (uint64_t)rows[i * step] * stride, sizeof value); \
        memcpy(job->target + i * sizeof value, &value, sizeof value);               \
    }

#define WIDEN_NUMBERS(type)                                                         \
    for (uint64_t i = first; i < last; i++) {                                       \
        const char *from = job->source + (uint64_t)rows[i * step] * stride;         \
        for (uint64_t k = 0; k < width; k++) {                                      \
            type value;                                                             \
            memcpy(&value, from + k * sizeof value, sizeof value);                  \
            const int64_t wide = value;                                             \
            memcpy(job->target + (i * width + k) * sizeof wide, &wide, sizeof wide); \
        }                                                                           \
    }

static void do_part(const struct job *job, uint64_t first, uint64_t last, int past_cache)
{
    const uint64_t stride = job->stride, step = job->rows_step;
    const int64_t *rows = job->rows;
    const uint64_t item = job->widen < 0 ? 1 : (uint64_t)job->widen;
    const uint64_t width = item ? job->row_nbytes / item : 0;
    switch (job->widen) {
    case 0:
        if (job->row_nbytes == 8) {
            COPY_NUMBERS(uint64_t)
        } else if (job->row_nbytes == 4) {
            COPY_NUMBERS(uint32_t)
        } else if (past_cache && can_stream(job)) {
            stream_rows(job, first, last);
        } else {
            copy_rows(job, first, last);
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

static uint64_t rows_per_part(const struct work *work, const struct job *job)
{
    const uint64_t rows = work->part_nbytes / (job->row_nbytes ? job->row_nbytes : 1);
    return rows ? rows : 1;
}

static uint64_t parts_of(const struct work *work, const struct job *job)
{
    const uint64_t rows = rows_per_part(work, job);
    return (job->n + rows - 1) / rows;
}

static int one_part(struct shared_work *shared)
{
    struct work *work = (struct work *)shared;
    uint64_t number = atomic_fetch_add(&work->next, 1);
    if (number >= work->parts)
        return 0;
    const struct job *job = work->jobs;
    for (uint64_t parts; number >= (parts = parts_of(work, job)); number -= parts)
        job++;
    const uint64_t rows = rows_per_part(work, job), first = number * rows;
    do_part(job, first, job->n - first < rows ? job->n : first + rows, work->past_cache);
    return 1;
}

static int in_range(const struct job *job)
{
    uint64_t bad = 0;
    for (uint64_t i = 0; i < job->n; i++)
        bad |= (uint64_t)job->rows[i * job->rows_step] >= job->n_rows;
    return !bad;
}

/* Do jobs that do not depend on each other. Returns the number from 1 of the first that names a row out of range: then
 * nothing was written; else 0. */
static int64_t do_stage(const struct job *jobs, uint64_t n_jobs, unsigned threads)
{
    uint64_t nbytes = 0;
    for (uint64_t k = 0; k < n_jobs; k++) {
        if (!in_range(&jobs[k]))
            return (int64_t)k + 1;
        nbytes += jobs[k].n * jobs[k].row_nbytes;
    }
    struct work work = {.shared = {one_part}, .jobs = jobs, .n_jobs = n_jobs, .part_nbytes = PART_NBYTES};
    work.past_cache = nbytes >= LARGE_NBYTES;
    const int shared = threads > 1 && nbytes >= SMALL_NBYTES;
    /* Large parts: the first rows of each are not asked for. At least two for each thread, for one that comes late. */
    if (shared && nbytes / (2 * threads) < PART_NBYTES)
        work.part_nbytes = nbytes / (2 * threads);
    for (uint64_t k = 0; k < n_jobs; k++)
        work.parts += parts_of(&work, &jobs[k]);
    if (shared)
        jasper_do_together(&work.shared, threads - 1);
    else
        while (one_part(&work.shared))
            continue;
    return 0;
}

/* Do all jobs, stage by stage. Returns 0, or the number from 1 of the first job that names a row out of range: then
 * nothing was written by its stage and those after it. */
int64_t jasper_gather(const struct job *jobs, uint64_t n_jobs, unsigned threads)
{
    for (uint64_t first = 0, last = 0; first < n_jobs; first = last) {
        while (last < n_jobs && jobs[last].stage == jobs[first].stage)
            last++;
        const int64_t bad = do_stage(jobs + first, last - first, threads);
        if (bad)
            return (int64_t)first + bad;
    }
    return 0;
}

/* What library.py was written for. */
int jasper_rows_abi(void) { return ABI; }
