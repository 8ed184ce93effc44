#define _GNU_SOURCE
#include "faults.h"

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/types.h>

atomic_uint fault_rate;
atomic_int no_queue, no_threads, lost_queue;
atomic_ulong faults;

static pthread_mutex_t in_allocator = PTHREAD_MUTEX_INITIALIZER;
static atomic_int guarded_forks;

long __real_syscall(long number, ...);
int __real_pthread_create(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *);
void *__real_malloc(size_t);
void *__real_calloc(size_t, size_t);
void *__real_realloc(void *, size_t);
void __real_free(void *);
void *__real_mmap(void *, size_t, int, int, int, off_t);
ssize_t __real_pread(int, void *, size_t, off_t);

long __wrap_syscall(long number, long a, long b, long c, long d, long e, long f);
int __wrap_pthread_create(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *);
void *__wrap_malloc(size_t);
void *__wrap_calloc(size_t, size_t);
void *__wrap_realloc(void *, size_t);
void __wrap_free(void *);
void *__wrap_mmap(void *, size_t, int, int, int, off_t);
ssize_t __wrap_pread(int, void *, size_t, off_t);

static void before_fork(void)
{
    if (atomic_load(&guarded_forks))
        pthread_mutex_lock(&in_allocator);
}

static void after_fork(void)
{
    if (atomic_load(&guarded_forks))
        pthread_mutex_unlock(&in_allocator);
}

void guard_forks(int guarded)
{
    static int registered;
    atomic_store(&guarded_forks, guarded);
    if (!registered)
        pthread_atfork(before_fork, after_fork, after_fork);
    registered = 1;
}

/* Whether the next call shall fail. */
static int fails(unsigned times)
{
    static _Thread_local uint64_t state;
    if (!state)
        state = (uint64_t)(uintptr_t)&state | 1;
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    if (state % 1000 >= atomic_load(&fault_rate) * times)
        return 0;
    atomic_fetch_add(&faults, 1);
    return 1;
}

static long refuse(int code)
{
    errno = code;
    return -1;
}

/* The library passes numbers and pointers, at most six, and reads as many as it passes. */
long __wrap_syscall(long number, long a, long b, long c, long d, long e, long f)
{
    switch (number) {
    case SYS_io_setup:
        if (atomic_load(&no_queue) || fails(20))
            return refuse(EAGAIN);
        break;
    case SYS_io_submit:
        if (fails(4))
            return refuse(EAGAIN);
        if (b > 1 && fails(4))
            b = 1;
        break;
    case SYS_io_getevents:
        if (atomic_load(&lost_queue) || fails(1))
            return refuse(EPERM);
        if (fails(4))
            return refuse(EINTR);
        break;
    case SYS_io_destroy:
        if (atomic_load(&lost_queue))
            return refuse(EPERM);
        break;
    }
    return __real_syscall(number, a, b, c, d, e, f);
}

ssize_t __wrap_pread(int file, void *buffer, size_t nbytes, off_t offset)
{
    return fails(4) ? refuse(EINTR) : __real_pread(file, buffer, nbytes, offset);
}

struct start {
    void *(*run)(void *);
    void *data;
    atomic_int begun;
};

static void *begin_thread(void *data)
{
    struct start *start = data;
    void *(*const run)(void *) = start->run;
    void *const given = start->data;
    atomic_store(&start->begun, 1);
    return run(given);
}

/* A sanitizer allocates where a thread is created and in the thread as it begins: no process is forked meanwhile. */
int __wrap_pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*run)(void *), void *data)
{
    if (atomic_load(&no_threads)) {
        atomic_fetch_add(&faults, 1);
        return EAGAIN;
    }
    if (!atomic_load(&guarded_forks))
        return __real_pthread_create(thread, attributes, run, data);
    struct start start = {.run = run, .data = data};
    before_fork();
    const int failed = __real_pthread_create(thread, attributes, begin_thread, &start);
    while (!failed && !atomic_load(&start.begun))
        sched_yield();
    after_fork();
    return failed;
}

void *__wrap_malloc(size_t nbytes)
{
    if (fails(1))
        return NULL;
    before_fork();
    void *made = __real_malloc(nbytes);
    after_fork();
    return made;
}

void *__wrap_calloc(size_t count, size_t nbytes)
{
    if (fails(1))
        return NULL;
    before_fork();
    void *made = __real_calloc(count, nbytes);
    after_fork();
    return made;
}

void *__wrap_realloc(void *old, size_t nbytes)
{
    if (fails(4))
        return NULL;
    before_fork();
    void *made = __real_realloc(old, nbytes);
    after_fork();
    return made;
}

void __wrap_free(void *old)
{
    before_fork();
    __real_free(old);
    after_fork();
}

void *__wrap_mmap(void *address, size_t nbytes, int protection, int flags, int file, off_t offset)
{
    if (fails(20)) {
        errno = ENOMEM;
        return MAP_FAILED;
    }
    return __real_mmap(address, nbytes, protection, flags, file, offset);
}
