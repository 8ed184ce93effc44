/* Calls of the library that fail when the harness wants them to. Linked with --wrap (see tools/sanitizers.py). */
#ifndef FAULTS_H
#define FAULTS_H

#include <stdatomic.h>

extern atomic_uint fault_rate; /* of 1000 calls that may fail, how many do */
extern atomic_int no_queue;    /* io_setup fails, as in a container whose limit of queues is reached */
extern atomic_int no_threads;  /* pthread_create fails, as at RLIMIT_NPROC */
extern atomic_int lost_queue;  /* io_getevents and io_destroy fail, as in a process that entered a sandbox */
extern atomic_ulong faults;    /* calls that failed on purpose */

/* Let forks wait until no thread is inside of the allocator, or not. Allocators of sanitizers are not for forks of several
 * threads: their locks stay locked in the child. */
void guard_forks(int guarded);

#endif
