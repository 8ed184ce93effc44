/* The helper threads of this process: they share the work of a caller that waits for it, and between two such calls
 * they advance background tasks. */
#ifndef JASPER_HELPERS_H
#define JASPER_HELPERS_H

#include <stdatomic.h>
#include <stdint.h>

/* Work that is split into parts. Any thread may run any part. `run_next_part` claims a part and runs it; it returns 0
 * if no part is left to claim. */
struct parallel_task {
    int (*run_next_part)(struct parallel_task *);
};

/* Run all parts of a task in the calling thread and in up to `helpers` helper threads. Returns when every part is done.
 * One caller at a time gets the helpers; a concurrent caller runs all of its parts itself. */
void jasper_parallel_for(struct parallel_task *task, unsigned helpers);

/* Let the first helper begin a task while the caller does something else. The caller calls jasper_parallel_finish before
 * it frees the task. Returns 0, and does nothing, if another task is begun or no helper could be started. */
int jasper_parallel_begin(struct parallel_task *task);

/* Run the parts of a task that are left, as jasper_parallel_for does. In a process that was forked meanwhile, those that
 * a helper had claimed are not done. */
void jasper_parallel_finish(struct parallel_task *task, unsigned helpers);

/* State of a background task after a step. BUSY: it still has requests to submit, so later tasks wait. DRAINING: it
 * only waits for requests in flight, so later tasks may start. DONE: its step is never called again. */
enum { BUSY, DRAINING, DONE };

/* Work in short steps that mostly waits for a disk. At most one thread at a time calls `step`. */
struct background_task {
    int (*step)(struct background_task *);
    atomic_int done;
};

/* Queue a task for the first helper, which advances it between the parts it runs, in the order of submission. The
 * caller keeps the memory valid until the task is done. Returns 0 if the task was not queued: no helper could be
 * started, or the queue is full. */
int jasper_submit_background(struct background_task *task);

/* Wait until a queued task is done. It never will be if it was queued before this process was forked. */
void jasper_wait_background(struct background_task *task);

/* A clock that is never set, in nanoseconds. */
int64_t jasper_monotonic_ns(void);

/* A number that is another one in each process of a chain of forks. */
unsigned jasper_fork_generation(void);

#endif
