/* The helper threads of this process.
 *
 * The pool is our own because an OpenMP parallel loop ends only when all of its threads have reached the end: when
 * another program kept a core busy, each gather waited 8 ms for a thread that had no work left. Here the caller runs
 * every part that no helper has claimed, and then waits only for the parts that are still running.
 *
 * The first helper also runs background tasks. Reading rows from a disk is some hundred short steps with waits between
 * them. A dedicated I/O thread wakes up for each step and preempts whatever runs on that core; a helper takes the steps
 * between two parts and preempts nothing (measured in docs/notes-paging.md).
 */
#define _GNU_SOURCE
#include "helpers.h"

#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum {
    MAX_HELPERS = 15,
    SPIN_LIMIT = 20000,        /* iterations of a spin loop before the thread sleeps: some 400 us */
    YIELD_INTERVAL = 512,      /* iterations between two calls of sched_yield */
    BACKGROUND_INTERVAL = 128, /* iterations between two background steps */
    PREEMPTED_NS = 1000000,    /* a sched_yield that takes longer than this means that another thread used the core */
    BACKOFF_CALLS = 30,        /* calls for which a preempted helper sleeps at once instead of spinning */
    BACKGROUND_NAP_NS = 5000,  /* sleep between two background steps while there is nothing else to do */
    PREEMPTED_NAP_NS = 20000,  /* sleep of a caller whose helper was preempted in the middle of a part */
    MAX_BACKGROUND = 8,
};

/* Where helpers find a task. They read `task` only while they are counted in `active`: once `task` is another and
 * `active` was 0, no helper can reach the old one any more. */
struct slot {
    _Atomic(struct parallel_task *) task; /* or NULL */
    atomic_uint active;                   /* helpers that may hold a pointer to `task` */
};

static struct {
    pthread_mutex_t caller_lock;          /* held by the caller that has the helpers */
    atomic_uint started;                  /* helpers that were started */
    atomic_uint wanted;                   /* helpers that may work for the current caller */
    struct slot current;                  /* of the current caller */
    struct slot begun;                    /* whose owner does something else meanwhile */
    atomic_uint calls;                    /* futex; increases with each call, and sleeping helpers wait for that */
    atomic_uint sleeping;                 /* helpers that sleep on `calls` */
    pthread_mutex_t submit_lock;          /* serialises additions to `background` */
    _Atomic(struct background_task *) background[MAX_BACKGROUND]; /* ring of [head, tail); NULL once a task is done */
    atomic_uint head, tail;
    atomic_uint done_count;      /* futex; increases when a background task is done */
    atomic_uint fork_generation; /* increases in a forked child */
} pool = {.caller_lock = PTHREAD_MUTEX_INITIALIZER, .submit_lock = PTHREAD_MUTEX_INITIALIZER};

static void cpu_relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void sleep_ns(long nanoseconds)
{
    nanosleep(&(struct timespec){.tv_nsec = nanoseconds}, NULL);
}

/* Bits of a futex by which the first helper is woken without the others. */
enum { FIRST = 1, OTHERS = 2, ANY = FIRST | OTHERS };

static void futex_wait(atomic_uint *word, unsigned seen, unsigned bits)
{
    syscall(SYS_futex, word, FUTEX_WAIT_BITSET_PRIVATE, seen, NULL, NULL, bits);
}

static void futex_wake(atomic_uint *word, unsigned count, unsigned bits)
{
    syscall(SYS_futex, word, FUTEX_WAKE_BITSET_PRIVATE, count, NULL, NULL, bits);
}

int64_t jasper_monotonic_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
}

static int has_background(void) { return atomic_load(&pool.head) != atomic_load(&pool.tail); }

/* Advance the oldest background task; advance newer ones too once it is draining. */
static void run_background_step(void)
{
    const unsigned tail = atomic_load(&pool.tail);
    for (unsigned i = atomic_load(&pool.head); i != tail; i++) {
        struct background_task *task = atomic_load(&pool.background[i % MAX_BACKGROUND]);
        const int state = task ? task->step(task) : DONE;
        if (state == BUSY)
            return;
        if (state != DONE)
            continue;
        atomic_store(&pool.background[i % MAX_BACKGROUND], NULL);
        if (i == atomic_load(&pool.head))
            atomic_store(&pool.head, i + 1);
        if (!task)
            continue;
        /* The submitter may free the task as soon as `done` is set, so nothing below touches it. */
        atomic_store(&task->done, 1);
        atomic_fetch_add(&pool.done_count, 1);
        futex_wake(&pool.done_count, INT_MAX, ANY);
    }
}

/* Run one part of the task in a slot. Returns 0 if there is none. */
static int run_one_part(struct slot *slot)
{
    atomic_fetch_add(&slot->active, 1);
    struct parallel_task *task = atomic_load(&slot->task);
    const int ran = task && task->run_next_part(task);
    atomic_fetch_sub(&slot->active, 1);
    return ran;
}

/* Wait until no helper can reach the task that was in a slot. */
static void wait_idle(struct slot *slot)
{
    for (unsigned spins = 0; atomic_load(&slot->active); spins++) {
        if (spins < SPIN_LIMIT)
            cpu_relax();
        else
            /* The helper was preempted. Sleeping leaves this core to it; spinning or yielding would not. */
            sleep_ns(PREEMPTED_NAP_NS);
    }
}

/* What the first helper does besides parts of the current task. Returns 0 if nothing was there to begin at once. */
static int run_other_work(void)
{
    if (has_background())
        run_background_step();
    return atomic_load(&pool.begun.task) && run_one_part(&pool.begun);
}

/* Spin until a new call arrives or SPIN_LIMIT is reached, yielding the core now and then. Returns whether another
 * thread wants the core. */
static int spin_wait(unsigned seen, int is_first)
{
    for (unsigned spins = 1; spins <= SPIN_LIMIT && atomic_load(&pool.calls) == seen; spins++) {
        cpu_relax();
        if (is_first && spins % BACKGROUND_INTERVAL == 0)
            while (run_other_work() && atomic_load(&pool.calls) == seen)
                continue;
        if (spins % YIELD_INTERVAL)
            continue;
        const int64_t before = jasper_monotonic_ns();
        sched_yield();
        if (jasper_monotonic_ns() - before > PREEMPTED_NS)
            return 1;
    }
    return 0;
}

static void *helper_main(void *data)
{
    const unsigned number = (unsigned)(uintptr_t)data;
    const int is_first = number == 0;
    for (unsigned seen = 0, backoff = 0;;) {
        /* If other threads want this core, as torch's own do that spin between operations, spinning takes time from
         * both. The scheduler prefers a thread that was asleep when it is woken, so the helper sleeps instead. */
        if (backoff)
            backoff--;
        else if (spin_wait(seen, is_first))
            backoff = BACKOFF_CALLS;
        while (atomic_load(&pool.calls) == seen) {
            if (is_first && run_other_work())
                continue;
            if (is_first && has_background()) {
                sleep_ns(BACKGROUND_NAP_NS);
                continue;
            }
            atomic_fetch_add(&pool.sleeping, 1);
            futex_wait(&pool.calls, seen, is_first ? FIRST : OTHERS);
            atomic_fetch_sub(&pool.sleeping, 1);
        }
        seen = atomic_load(&pool.calls);
        while (number < atomic_load(&pool.wanted) && run_one_part(&pool.current))
            if (is_first)
                run_background_step();
    }
    return NULL;
}

/* Reset the pool in a forked child: threads do not survive a fork, and a lock may be held by a thread that does not
 * exist in the child. */
static void reset_after_fork(void)
{
    pthread_mutex_init(&pool.caller_lock, NULL);
    atomic_store(&pool.started, 0);
    atomic_store(&pool.current.task, NULL);
    atomic_store(&pool.current.active, 0);
    atomic_store(&pool.begun.task, NULL);
    atomic_store(&pool.begun.active, 0);
    atomic_store(&pool.sleeping, 0);
    pthread_mutex_init(&pool.submit_lock, NULL);
    atomic_store(&pool.head, 0);
    atomic_store(&pool.tail, 0);
    atomic_fetch_add(&pool.fork_generation, 1);
}

__attribute__((constructor)) static void register_fork_handler(void) { pthread_atfork(NULL, NULL, reset_after_fork); }

/* Start helpers until there are `count`; fewer if the system refuses a thread. The caller holds caller_lock. */
static void start_helpers(unsigned count)
{
    static const int faults[] = {SIGBUS, SIGSEGV, SIGFPE, SIGILL};
    sigset_t all, before;
    sigfillset(&all);
    /* Signals are for the program's own threads, but a fault is for the thread that has it: blocked it ends the process. */
    for (unsigned i = 0; i < sizeof faults / sizeof *faults; i++)
        sigdelset(&all, faults[i]);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (atomic_load(&pool.started) < count) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, helper_main, (void *)(uintptr_t)atomic_load(&pool.started)))
            break;
        pthread_detach(thread);
        atomic_fetch_add(&pool.started, 1);
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

static void notify_helpers(unsigned count, unsigned bits)
{
    atomic_fetch_add(&pool.calls, 1);
    if (atomic_load(&pool.sleeping))
        futex_wake(&pool.calls, count, bits);
}

void jasper_parallel_for(struct parallel_task *task, unsigned helpers)
{
    if (helpers > MAX_HELPERS)
        helpers = MAX_HELPERS;
    if (!helpers || pthread_mutex_trylock(&pool.caller_lock)) {
        while (task->run_next_part(task))
            continue;
        return;
    }
    if (atomic_load(&pool.started) < helpers)
        start_helpers(helpers);
    atomic_store(&pool.wanted, helpers);
    atomic_store(&pool.current.task, task);
    notify_helpers(helpers, ANY);
    while (task->run_next_part(task))
        continue;
    atomic_store(&pool.current.task, NULL);
    wait_idle(&pool.current);
    pthread_mutex_unlock(&pool.caller_lock);
}

static int nothing_left(struct parallel_task *task) { return (void)task, 0; }

/* Returns 0 if there is no helper, and none could be started. */
static int have_helper(void)
{
    if (!atomic_load(&pool.started) && !pthread_mutex_trylock(&pool.caller_lock)) {
        start_helpers(1);
        pthread_mutex_unlock(&pool.caller_lock);
    }
    return atomic_load(&pool.started) > 0;
}

int jasper_parallel_begin(struct parallel_task *task)
{
    struct parallel_task *none = NULL;
    if (!have_helper() || !atomic_compare_exchange_strong(&pool.begun.task, &none, task))
        return 0;
    notify_helpers(1, FIRST);
    return 1;
}

void jasper_parallel_finish(struct parallel_task *task, unsigned helpers)
{
    static struct parallel_task closing = {nothing_left};
    jasper_parallel_for(task, helpers);
    /* Closed until no helper can reach the task, so that none waits for the next one, offered by another thread. */
    struct parallel_task *mine = task;
    if (!atomic_compare_exchange_strong(&pool.begun.task, &mine, &closing))
        return;
    wait_idle(&pool.begun);
    atomic_store(&pool.begun.task, NULL);
}

int jasper_submit_background(struct background_task *task)
{
    if (!have_helper())
        return 0;
    pthread_mutex_lock(&pool.submit_lock);
    const unsigned tail = atomic_load(&pool.tail);
    const int has_room = tail - atomic_load(&pool.head) < MAX_BACKGROUND;
    if (has_room) {
        atomic_store(&pool.background[tail % MAX_BACKGROUND], task);
        atomic_store(&pool.tail, tail + 1);
    }
    pthread_mutex_unlock(&pool.submit_lock);
    if (has_room)
        notify_helpers(1, FIRST);
    return has_room;
}

void jasper_wait_background(struct background_task *task)
{
    for (unsigned seen; seen = atomic_load(&pool.done_count), !atomic_load(&task->done);)
        futex_wait(&pool.done_count, seen, ANY);
}

unsigned jasper_fork_generation(void) { return atomic_load(&pool.fork_generation); }
