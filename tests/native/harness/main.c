/* A stress of the library alone: harness SECONDS DIRECTORY [SEED].
 *
 * Threads gather and read at random while calls of the system fail at random, and children are forked meanwhile that do
 * the same. Every result is compared. The sanitizer that the harness was built with sees the rest.
 *
 * harness --bare SECONDS DIRECTORY forks children of threads that allocate, and calls nothing of the library: how many
 * of them hang is what the allocator of a sanitizer does to forks. */
#define _GNU_SOURCE
#include "harness.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "faults.h"
#include "library.h"

enum { THREADS = 4, CHILD_SECONDS = 60, BARE_CHILD_SECONDS = 5, CHILD_ROUNDS = 12 };

/* ThreadSanitizer of GCC 12 ends a child of several threads that starts a thread of an id of its parent's ("dup thread with
 * used id"), and qemu-user fails an assertion there. Their children gather and read without helpers. */
#if defined(__SANITIZE_THREAD__) && !defined(CHILD_HAS_NO_THREADS)
#define CHILD_HAS_NO_THREADS 1
#elif !defined(CHILD_HAS_NO_THREADS)
#define CHILD_HAS_NO_THREADS 0
#endif

struct counts counts;
static atomic_int over;
static int file;
static const char *directory;

void *need(size_t nbytes)
{
    for (;;) {
        void *made = malloc(nbytes ? nbytes : 1);
        if (made)
            return made;
    }
}

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec * 1e-9;
}

static void round_of(struct rng *rng)
{
    switch (below(rng, 20)) {
    case 0:
        read_while_cut(rng, directory); /* slow: a file is written for it */
        break;
    case 1:
    case 2:
    case 3:
        gather_in_parts(rng);
        break;
    case 4:
    case 5:
    case 6:
    case 7:
    case 8:
    case 9:
        gather_some(rng);
        break;
    default:
        read_some(rng, file);
    }
}

static void *stress(void *data)
{
    struct rng rng = {(uint64_t)(uintptr_t)data};
    while (!atomic_load(&over))
        round_of(&rng);
    close_kept_reader();
    return NULL;
}

static void *allocate(void *data)
{
    struct rng rng = {(uint64_t)(uintptr_t)data};
    while (!atomic_load(&over))
        free(need(1 + below(&rng, 5000)));
    return NULL;
}

/* Wait for a child. Returns 1 if its alarm ended it; any other end than 0 is an error. */
static int reap(pid_t child)
{
    int status;
    while (waitpid(child, &status, 0) < 0)
        CHECK(errno == EINTR);
    if (WIFSIGNALED(status) && WTERMSIG(status) == SIGALRM)
        return 1;
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    return 0;
}

/* Fork while a request is under way and the other threads go on. */
static void fork_one(struct rng *rng)
{
    struct begun *begun = begin_reading(rng, file);
    const pid_t child = fork();
    CHECK(child >= 0);
    if (!child) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        alarm(CHILD_SECONDS);
        atomic_store(&no_threads, CHILD_HAS_NO_THREADS || below(rng, 2));
        finish_reading(begun, 1);
        for (int k = 0; k < CHILD_ROUNDS; k++)
            round_of(rng);
        _exit(0);
    }
    if (reap(child)) {
        fprintf(stderr, "a child met its alarm of %d s\n", CHILD_SECONDS);
        abort();
    }
    atomic_fetch_add(&counts.children, 1);
    finish_reading(begun, 0);
}

static void make_file(void)
{
    char path[4096], *content = need(FILE_NBYTES);
    snprintf(path, sizeof path, "%s/file-%d", directory, (int)getpid());
    for (uint64_t i = 0; i < FILE_NBYTES; i++)
        content[i] = (char)byte_at(i);
    const int writing = open(path, O_WRONLY | O_CREAT | O_EXCL, 0600);
    CHECK(writing >= 0 && write(writing, content, FILE_NBYTES) == FILE_NBYTES);
    close(writing);
    free(content);
    file = open(path, O_RDONLY | O_DIRECT);
    if (file < 0)
        file = open(path, O_RDONLY);
    CHECK(file >= 0);
    unlink(path);
}

static void run_threads(void *(*run)(void *), uint64_t seed, pthread_t *threads)
{
    for (uint64_t k = 0; k < THREADS; k++)
        CHECK(!pthread_create(&threads[k], NULL, run, (void *)(uintptr_t)((seed + 1) * 7919 + k * 104729)));
}

static void join_threads(const pthread_t *threads)
{
    atomic_store(&over, 1);
    for (int k = 0; k < THREADS; k++)
        pthread_join(threads[k], NULL);
}

static int bare(double until)
{
    pthread_t threads[THREADS];
    unsigned children = 0, hung = 0;
    run_threads(allocate, 1, threads);
    for (; now() < until; children++) {
        const pid_t child = fork();
        CHECK(child >= 0);
        if (!child) {
            alarm(BARE_CHILD_SECONDS);
            struct rng rng = {7};
            for (int k = 0; k < 1000; k++)
                free(need(1 + below(&rng, 5000)));
            _exit(0);
        }
        hung += (unsigned)reap(child);
    }
    join_threads(threads);
    printf("%u children without the library, %u hung\n", children, hung);
    return 0;
}

int main(int argc, char **argv)
{
    const int is_bare = argc > 1 && !strcmp(argv[1], "--bare");
    argc -= is_bare, argv += is_bare;
    if (argc < 3)
        return fprintf(stderr, "usage: harness [--bare] SECONDS DIRECTORY [SEED]\n"), 2;
    const double until = now() + atof(argv[1]);
    const uint64_t seed = argc > 3 ? strtoull(argv[3], NULL, 10) : 1;
    directory = argv[2];
    if (is_bare)
        return bare(until);
    make_file();
    guard_forks(1);
    check_edges(file);
    atomic_store(&fault_rate, 2);
    pthread_t threads[THREADS];
    run_threads(stress, seed, threads);
    struct rng rng = {seed * 31 + 5};
    do {
        for (int most = 0; most < 3; most++) {
            jasper_use_instructions(most);
            fork_one(&rng);
        }
    } while (now() < until);
    join_threads(threads);
    close_kept_reader();
    close(file);
    printf("%lu gathers, %lu refused, %lu in parts; %lu readings, %lu abandoned, %lu of files cut meanwhile; %lu children; "
           "%lu faults, %lu times without memory\n",
           counts.gathers, counts.refused, counts.located, counts.reads, counts.abandoned, counts.cut, counts.children,
           faults, counts.without_memory);
    return 0;
}
