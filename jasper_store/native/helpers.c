/* The helping threads of this process.
 *
 * They are our own, and nobody waits for them to come. A parallel loop of OpenMP ends when all its threads have: where
 * another program keeps a core busy, each gather waited 8 ms for a thread that had nothing left to do. Here the caller
 * works through all parts that nobody else has taken, and waits only for those that somebody is at.
 *
 * The first helper also does work on the side: reading from a disk is some hundred short steps, with waits between
 * them. A thread of its own for that wakes up on either core for each of them, and throws off it whoever is there; in a
 * helper it takes the time between two parts, and nobody is disturbed (figures in docs/notes-paging.md).
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
    SPINS = 20000,      /* looks for what another thread does before sleeping: some 400 us */
    OFFERED = 512,      /* looks after which the core is offered to others */
    ASIDE = 128,        /* looks after which the work on the side is looked at */
    TAKEN_NS = 1000000, /* a core that was offered, and comes back later than this, was taken */
    MODEST_CALLS = 30,  /* for which a helper whose core was taken sleeps at once */
    NAP_NS = 5000,      /* between two looks at the work on the side, where there is nothing else to do */
    MAX_ASIDE = 8,
};

static struct {
    pthread_mutex_t taken;
    atomic_uint helpers;               /* that were started */
    atomic_uint wanted;                /* that the present caller may have */
    _Atomic(struct shared_work *) now; /* what there is to do, or NULL */
    atomic_uint inside;                /* helpers that may be looking at it */
    atomic_uint calls;                 /* changes with each call; sleeping helpers wait for that */
    atomic_uint sleeping;
    pthread_mutex_t beginning; /* of work on the side */
    _Atomic(struct side_work *) aside[MAX_ASIDE]; /* a ring: those from first to last, NULL where one is finished */
    atomic_uint first, last;
    atomic_uint finished; /* changes when one of them is; who waits for that sleeps on it */
    atomic_uint process;  /* changes with a fork */
} pool = {.taken = PTHREAD_MUTEX_INITIALIZER, .beginning = PTHREAD_MUTEX_INITIALIZER};

static void rest(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

static void nap(long nanoseconds)
{
    nanosleep(&(struct timespec){.tv_nsec = nanoseconds}, NULL);
}

static void sleep_on(atomic_uint *word, unsigned seen)
{
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
}

static void wake(atomic_uint *word, unsigned count)
{
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, count, NULL, NULL, 0);
}

static int64_t nanoseconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
}

static int any_aside(void) { return atomic_load(&pool.first) != atomic_load(&pool.last); }

/* A step of the work on the side that was begun first, and of what may go on beside it. */
static void step_aside(void)
{
    const unsigned last = atomic_load(&pool.last);
    for (unsigned i = atomic_load(&pool.first); i != last; i++) {
        struct side_work *work = atomic_load(&pool.aside[i % MAX_ASIDE]);
        const int what = work ? work->step(work) : FINISHED;
        if (what == BUSY)
            return;
        if (what != FINISHED)
            continue;
        atomic_store(&pool.aside[i % MAX_ASIDE], NULL);
        if (i == atomic_load(&pool.first))
            atomic_store(&pool.first, i + 1);
        if (!work)
            continue;
        /* From here on it is its owner's, who may let go of its memory. */
        atomic_store(&work->finished, 1);
        atomic_fetch_add(&pool.finished, 1);
        wake(&pool.finished, INT_MAX);
    }
}

/* A part of what there is to do now. Returns 0 if there is none. */
static int help_once(void)
{
    atomic_fetch_add(&pool.inside, 1);
    struct shared_work *work = atomic_load(&pool.now);
    const int did = work && work->one_part(work);
    atomic_fetch_sub(&pool.inside, 1);
    return did;
}

/* Look for a new call for a while. Returns whether somebody else wants this core: it is offered now and then. */
static int look_out(unsigned seen, int aside)
{
    for (unsigned spins = 1; spins <= SPINS && atomic_load(&pool.calls) == seen; spins++) {
        rest();
        if (aside && spins % ASIDE == 0)
            step_aside();
        if (spins % OFFERED)
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
    const int aside = number == 0;
    for (unsigned seen = 0, modest = 0;;) {
        /* Where others want this core, as torch's own threads do that spin between operations, looking out takes time
         * from both; who sleeps is put first when woken. */
        if (modest)
            modest--;
        else if (look_out(seen, aside))
            modest = MODEST_CALLS;
        while (atomic_load(&pool.calls) == seen) {
            if (aside && any_aside()) {
                step_aside();
                nap(NAP_NS);
                continue;
            }
            atomic_fetch_add(&pool.sleeping, 1);
            sleep_on(&pool.calls, seen);
            atomic_fetch_sub(&pool.sleeping, 1);
        }
        seen = atomic_load(&pool.calls);
        while (number < atomic_load(&pool.wanted) && help_once())
            if (aside)
                step_aside();
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
    pthread_mutex_init(&pool.beginning, NULL);
    atomic_store(&pool.first, 0);
    atomic_store(&pool.last, 0);
    atomic_fetch_add(&pool.process, 1);
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

static void call_helpers(unsigned count)
{
    atomic_fetch_add(&pool.calls, 1);
    if (atomic_load(&pool.sleeping))
        wake(&pool.calls, count);
}

void jasper_do_together(struct shared_work *work, unsigned helpers)
{
    if (helpers > MAX_HELPERS)
        helpers = MAX_HELPERS;
    if (pthread_mutex_trylock(&pool.taken)) {
        while (work->one_part(work))
            continue;
        return;
    }
    if (atomic_load(&pool.helpers) < helpers)
        start_helpers(helpers);
    atomic_store(&pool.wanted, helpers);
    atomic_store(&pool.now, work);
    call_helpers(helpers);
    while (work->one_part(work))
        continue;
    /* A helper looks at `now` only while it is counted as inside, so after this none can reach the work any more. */
    atomic_store(&pool.now, NULL);
    for (unsigned spins = 0; atomic_load(&pool.inside); spins++) {
        if (spins < SPINS)
            rest();
        else
            /* It was interrupted. Sleeping leaves it this core, where spinning, or yielding, would not. */
            nap(20000);
    }
    pthread_mutex_unlock(&pool.taken);
}

int jasper_begin_aside(struct side_work *work)
{
    if (!atomic_load(&pool.helpers) && !pthread_mutex_trylock(&pool.taken)) {
        start_helpers(1);
        pthread_mutex_unlock(&pool.taken);
    }
    if (!atomic_load(&pool.helpers))
        return 0;
    work->process = atomic_load(&pool.process);
    pthread_mutex_lock(&pool.beginning);
    const unsigned last = atomic_load(&pool.last);
    const int room = last - atomic_load(&pool.first) < MAX_ASIDE;
    if (room) {
        atomic_store(&pool.aside[last % MAX_ASIDE], work);
        atomic_store(&pool.last, last + 1);
    }
    pthread_mutex_unlock(&pool.beginning);
    if (room)
        /* All are woken: the first of them is meant, and one that is woken may be another. */
        call_helpers(MAX_HELPERS);
    return room;
}

int jasper_await_aside(struct side_work *work)
{
    if (work->process != atomic_load(&pool.process))
        return atomic_load(&work->finished);
    for (unsigned seen; seen = atomic_load(&pool.finished), !atomic_load(&work->finished);)
        sleep_on(&pool.finished, seen);
    return 1;
}

unsigned jasper_helpers(void) { return atomic_load(&pool.helpers); }
