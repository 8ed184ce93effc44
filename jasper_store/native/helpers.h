/* Threads that help: with work that the caller waits for, and in between with work that somebody else waits for. */
#ifndef JASPER_HELPERS_H
#define JASPER_HELPERS_H

#include <stdatomic.h>

/* Work in parts, any of which may be done by any thread. `one_part` does one that nobody has begun, and returns 0 if
 * there is none left. */
struct shared_work {
    int (*one_part)(struct shared_work *);
};

/* Have parts done by the caller and by some helpers; returns when all of them are done. One caller at a time has the
 * helpers; another that comes meanwhile works alone. */
void jasper_do_together(struct shared_work *work, unsigned helpers);

/* What a step came to; while work is BUSY what was begun after it has to wait. */
enum { BUSY, ENDING, FINISHED };

/* Work in short steps that mostly waits for a disk. `step` is never called by two threads at a time, and not again once
 * it has returned FINISHED. */
struct side_work {
    int (*step)(struct side_work *);
    atomic_int finished;
    unsigned process; /* that it was begun in */
};

/* Have a helper do it, between the parts that it helps with, after what was begun before. Returns 0, and nothing will be
 * done, where no helper can be had or each place is taken. */
int jasper_begin_aside(struct side_work *work);

/* Wait until it is finished. Returns 0 where it never will be: it was begun before this process was forked. */
int jasper_await_aside(struct side_work *work);

/* How many there are: they are started by the first work that wants them, and a forked child has none at first. */
unsigned jasper_helpers(void);

#endif
