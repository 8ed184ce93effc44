/* Which instructions loops may use. The library runs on any processor of its platform and asks this one what it has: no
 * flag of the compiler, and no resolver of the dynamic linker, which musl and sanitizers lack. */
#ifndef JASPER_PROCESSOR_H
#define JASPER_PROCESSOR_H

#if defined(__x86_64__) && defined(__GNUC__)
#define HAS_AVX 1
#endif

/* Instruction sets that loops are compiled for. */
enum { BASELINE, AVX2, AVX512 };

/* The best set that this processor has, or fewer. */
int jasper_instructions(void);

/* Use this set at most. Returns which is used: a lesser one where the processor lacks it. Tests compare them. */
int jasper_use_instructions(int most);

/* Whether this processor multiplies bytes and adds up their products in 32 bits, which takes a quarter of the time of a
 * product of floats (AVX-512 VNNI: Cascade Lake of 2019, Zen 4 of 2022). */
int jasper_multiplies_bytes(void);

#endif
