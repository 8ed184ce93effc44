/* Turns SIGBUS inside of a copy from a map into a return value. */
#define _GNU_SOURCE
#include "map_faults.h"

#include <setjmp.h>
#include <signal.h>
#include <stdatomic.h>
#include <stddef.h>
#include <time.h>

/* Where the handler leaves a copy to; NULL: this thread runs nothing guarded. A handler may not allocate, which the first
 * access to a thread's variable of a loaded library does, unless it was given a place when the library was loaded. musl
 * gives each its place then, and refuses the attribute. */
#ifdef __GLIBC__
__attribute__((tls_model("initial-exec")))
#endif
static _Thread_local sigjmp_buf *volatile landing;

enum { SLOTS = 8 };

/* Handlers of others that were found in place of ours, a stack. Each is used once: one that was installed over ours gives
 * the signal back to ours when it has done its work, as Python's faulthandler does, and then the one below is next. */
static struct sigaction others[SLOTS];
static atomic_uint n_others;
static _Atomic int64_t fault_address;

/* The tick of the kernel's clock in which our handler was last seen in its place; 0: it is not there. */
static _Atomic int64_t seen_in_tick;

static void on_fault(int number, siginfo_t *info, void *context)
{
    (void)context;
    sigjmp_buf *const here = landing;
    if (here && info->si_code == BUS_ADRERR) {
        atomic_store(&fault_address, (int64_t)(intptr_t)info->si_addr);
        siglongjmp(*here, 1);
    }
    /* Not ours: with the handler of before in place, the instruction is tried again and faults again. */
    atomic_store(&seen_in_tick, 0);
    struct sigaction next = {.sa_handler = SIG_DFL};
    unsigned count = atomic_load(&n_others);
    while (count && !atomic_compare_exchange_weak(&n_others, &count, count - 1))
        continue;
    if (count)
        next = others[(count - 1) % SLOTS];
    sigaction(number, &next, NULL);
    if (info->si_code <= 0)
        raise(number); /* sent by a process, and no instruction will repeat it */
}

static void install_handler(void)
{
    struct sigaction found;
    sigaction(SIGBUS, NULL, &found);
    if ((found.sa_flags & SA_SIGINFO) && found.sa_sigaction == on_fault)
        return;
    others[atomic_fetch_add(&n_others, 1) % SLOTS] = found;
    struct sigaction ours = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO};
    sigemptyset(&ours.sa_mask);
    sigaction(SIGBUS, &ours, NULL);
}

/* Of 1 to 10 ms, read in a few nanoseconds. */
static int64_t clock_tick(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
    return now.tv_sec * INT64_C(1000000000) + now.tv_nsec + 1;
}

void jasper_catch_faults(void)
{
    const int64_t tick = clock_tick();
    if (atomic_load(&seen_in_tick) == tick)
        return;
    install_handler();
    atomic_store(&seen_in_tick, tick);
}

/* The handler did not return, which would have unblocked the signal, and a fault that is blocked ends the process. Here and not
 * by a flag of our handler: another one that calls ours, as a sanitizer's does, has flags of its own. */
static void unblock(void)
{
    sigset_t fault;
    sigemptyset(&fault);
    sigaddset(&fault, SIGBUS);
    pthread_sigmask(SIG_UNBLOCK, &fault, NULL);
}

int jasper_run_guarded(void (*work)(const void *), const void *data)
{
    sigjmp_buf here;
    if (sigsetjmp(here, 0)) {
        landing = NULL;
        unblock();
        return 0;
    }
    landing = &here;
    work(data);
    landing = NULL;
    return 1;
}

int64_t jasper_fault_address(void) { return atomic_load(&fault_address); }
