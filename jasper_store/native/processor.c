/* Asks the processor what it has, once. */
#include "processor.h"

#include <stdatomic.h>

static atomic_int instructions;

int jasper_use_instructions(int most)
{
    int best = BASELINE;
#ifdef HAS_AVX
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2"))
        best = AVX2;
    if (best == AVX2 && __builtin_cpu_supports("avx512f"))
        best = AVX512;
#endif
    best = best < most ? best : most;
    atomic_store(&instructions, best);
    return best;
}

__attribute__((constructor)) static void find_instructions(void) { jasper_use_instructions(AVX512); }

int jasper_instructions(void) { return atomic_load_explicit(&instructions, memory_order_relaxed); }

int jasper_multiplies_bytes(void)
{
#ifdef HAS_AVX
    return __builtin_cpu_supports("avx512vnni") != 0;
#else
    return 0;
#endif
}
