/* Reading maps of files whose pages may be gone: a file that was truncated after it was mapped, or that its disk cannot read.
 *
 * The kernel has no return value for an instruction, so it sends SIGBUS. Nothing that is looked up before helps against a
 * file that is cut in the middle of a copy; the signal itself does, since it arrives in the thread that copies. */
#ifndef JASPER_MAP_FAULTS_H
#define JASPER_MAP_FAULTS_H

#include <stdint.h>

/* Make this process ready for jasper_run_guarded. Call it before each use: other programs install handlers of SIGBUS too,
 * as PyTorch does in workers. Theirs gets every signal that is not of jasper_run_guarded. It is looked for once in a tick of the
 * kernel's clock (4 ms, mostly), since asking takes 0.4 us: one that is installed between two gathers of one tick gets the
 * faults of the rest of that tick. */
void jasper_catch_faults(void);

/* Run `work`, which copies from maps and does nothing that must be undone. Returns 0 if it was broken off because a page
 * cannot be read. */
int jasper_run_guarded(void (*work)(const void *), const void *data);

/* Address of the page that broke off the latest guarded work of this process. */
int64_t jasper_fault_address(void);

#endif
