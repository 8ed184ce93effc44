/* Gathers rows of arrays in memory, several arrays in one call.
 *
 * A gather of scattered rows waits for memory: the processor cannot guess where the next row lies, so each row begins
 * with a miss. The list of rows says it, and asking for the fourth row after while one is copied hides most of that
 * wait. Measured figures stand in docs/notes-paging.md.
 *
 * Plain C without Python's headers: one library serves every Python, called through ctypes, which lets go of the
 * interpreter lock.
 *
 * Helping threads are our own, and nobody waits for them to come. A parallel loop of OpenMP ends when all its threads
 * have: where another program keeps a core busy, each gather waited 8 ms for a thread that had nothing left to do. Here
 * the caller works through all parts that nobody else has taken, and waits only for those that somebody is at.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#if defined(__x86_64__) && defined(__linux__) && defined(__GLIBC__) && defined(__GNUC__)
#include <immintrin.h>
#define HAS_LINE_STORES 1
#endif

enum {
    ABI = 6,
    AHEAD = 4,               /* rows asked for ahead of the one that is copied */
    LINE = 64,               /* bytes of a cache line */
    PART_NBYTES = 512 << 10, /* what a thread takes at a time, at most */
    SMALL_NBYTES = 64 << 10, /* below it, waking a thread costs more than it saves */
    MAX_HELPERS = 15,
    SPINS = 20000,           /* looks for what another thread does before sleeping: some 400 us */
    TAKEN_NS = 200000,       /* a core that was offered, and comes back later than this, was taken */
    MODEST_CALLS = 30,       /* for which a helper whose core was taken sleeps at once */
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

static void do_parts(struct work *work)
{
    uint64_t number;
    while ((number = atomic_fetch_add(&work->next, 1)) < work->parts) {
        const struct job *job = work->jobs;
        for (uint64_t parts; number >= (parts = parts_of(work, job)); number -= parts)
            job++;
        const uint64_t rows = rows_per_part(work, job), first = number * rows;
        do_part(job, first, job->n - first < rows ? job->n : first + rows, work->past_cache);
    }
}

/* The helpers of this process. One caller at a time has them; another that comes meanwhile works alone. */
static struct {
    pthread_mutex_t taken;
    atomic_uint helpers;        /* that were started */
    atomic_uint wanted;         /* that the present caller may have */
    _Atomic(struct work *) now; /* what there is to do, or NULL */
    atomic_uint inside;         /* helpers that may be looking at it */
    atomic_uint calls;          /* changes with each call; sleeping helpers wait for that */
    atomic_uint sleeping;
} pool = {.taken = PTHREAD_MUTEX_INITIALIZER};

static void rest(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

static void help_once(void)
{
    atomic_fetch_add(&pool.inside, 1);
    struct work *work = atomic_load(&pool.now);
    if (work)
        do_parts(work);
    atomic_fetch_sub(&pool.inside, 1);
}

static int64_t nanoseconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
}

/* Look for a new call for a while. Returns whether somebody else wants this core: it is offered now and then. */
static int look_out(unsigned seen)
{
    for (unsigned spins = 1; spins <= SPINS && atomic_load(&pool.calls) == seen; spins++) {
        rest();
        if (spins % 512)
            continue;
        const int64_t before = nanoseconds();
        sched_yield();
        if (nanoseconds() - before > TAKEN_NS)
            return 1;
    }
    return 0;
}

static void *help(void *data)
{
    const unsigned number = (unsigned)(uintptr_t)data;
    for (unsigned seen = 0, modest = 0;;) {
        /* Where others want this core, as torch's own threads do that spin between operations, looking out takes time
         * from both; who sleeps is put first when woken. */
        if (modest)
            modest--;
        else if (look_out(seen))
            modest = MODEST_CALLS;
        while (atomic_load(&pool.calls) == seen) {
            atomic_fetch_add(&pool.sleeping, 1);
            syscall(SYS_futex, &pool.calls, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
            atomic_fetch_sub(&pool.sleeping, 1);
        }
        seen = atomic_load(&pool.calls);
        if (number < atomic_load(&pool.wanted))
            help_once();
    }
    return NULL;
}

static void forget_helpers(void)
{
    /* In a forked child: threads do not survive a fork, and the lock may be somebody's who does not exist here. */
    pthread_mutex_init(&pool.taken, NULL);
    atomic_store(&pool.helpers, 0);
    atomic_store(&pool.now, NULL);
    atomic_store(&pool.inside, 0);
    atomic_store(&pool.sleeping, 0);
}

__attribute__((constructor)) static void before_any_fork(void) { pthread_atfork(NULL, NULL, forget_helpers); }

/* Start helpers up to a number; fewer if the system has no more threads to give. Called by who has the pool. */
static void start_helpers(unsigned count)
{
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are for the program's own threads */
    while (atomic_load(&pool.helpers) < count) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, help, (void *)(uintptr_t)atomic_load(&pool.helpers)))
            break;
        pthread_detach(thread);
        atomic_fetch_add(&pool.helpers, 1);
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

static void do_together(struct work *work, unsigned helpers)
{
    if (helpers > MAX_HELPERS)
        helpers = MAX_HELPERS;
    if (pthread_mutex_trylock(&pool.taken)) {
        do_parts(work);
        return;
    }
    if (atomic_load(&pool.helpers) < helpers)
        start_helpers(helpers);
    atomic_store(&pool.wanted, helpers);
    atomic_store(&pool.now, work);
    atomic_fetch_add(&pool.calls, 1);
    if (atomic_load(&pool.sleeping))
        syscall(SYS_futex, &pool.calls, FUTEX_WAKE_PRIVATE, helpers, NULL, NULL, 0);
    do_parts(work);
    /* A helper looks at `now` only while it is counted as inside, so after this none can reach the work any more. */
    atomic_store(&pool.now, NULL);
    for (unsigned spins = 0; atomic_load(&pool.inside); spins++) {
        if (spins < SPINS)
            rest();
        else
            /* It was interrupted. Sleeping leaves it this core, where spinning, or yielding, would not. */
            nanosleep(&(struct timespec){.tv_nsec = 20000}, NULL);
    }
    pthread_mutex_unlock(&pool.taken);
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
    struct work work = {.jobs = jobs, .n_jobs = n_jobs, .part_nbytes = PART_NBYTES};
    work.past_cache = nbytes >= LARGE_NBYTES;
    const int shared = threads > 1 && nbytes >= SMALL_NBYTES;
    /* Large parts: the first rows of each are not asked for. At least two for each thread, for one that comes late. */
    if (shared && nbytes / (2 * threads) < PART_NBYTES)
        work.part_nbytes = nbytes / (2 * threads);
    for (uint64_t k = 0; k < n_jobs; k++)
        work.parts += parts_of(&work, &jobs[k]);
    if (shared)
        do_together(&work, threads - 1);
    else
        do_parts(&work);
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
