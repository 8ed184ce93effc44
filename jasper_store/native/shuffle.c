/* A Feistel network over [0, n), walked until it lands below n: the same numbers as those of _Feistel in
 * loading/order.py, which is what explains it. numpy takes 200 ns a number for its thirty passes over an array. */
#include <stdint.h>

/* order.py packs it as 64-bit numbers. */
struct shuffle {
    int64_t n;
    int64_t bits;  /* of the left half */
    int64_t right; /* values of the right half */
    int64_t n_keys;
    int64_t keys[];
};

/* Products wrap around, and shifts keep the sign: what int64 arrays do. */
static inline int64_t mix(int64_t half, int64_t key)
{
    int64_t mixed = (int64_t)((uint64_t)half * UINT64_C(0x9E3779B1) + (uint64_t)key);
    mixed ^= mixed >> 29;
    mixed = (int64_t)((uint64_t)mixed * UINT64_C(0x5851F42D4C957F2D));
    return mixed >> 33;
}

static inline int64_t run_rounds(const struct shuffle *shuffle, int64_t x)
{
    const int64_t mask = (INT64_C(1) << shuffle->bits) - 1, b = shuffle->right;
    int64_t left = x & mask, right = x >> shuffle->bits;
    for (int64_t k = 0; k < shuffle->n_keys; k++) {
        if (k % 2) {
            right += ((mix(left, shuffle->keys[k]) & INT64_C(0x7FFFFFFF)) * b) >> 31;
            right -= right >= b ? b : 0;
        } else {
            left ^= mix(right, shuffle->keys[k]) & mask;
        }
    }
    return right << shuffle->bits | left;
}

/* Images of `count` numbers in [0, n). `from` and `to` may be the same. */
void jasper_shuffle(const struct shuffle *shuffle, const int64_t *from, uint64_t count, int64_t *to)
{
    for (uint64_t i = 0; i < count; i++) {
        int64_t x = run_rounds(shuffle, from[i]);
        while (x >= shuffle->n)
            x = run_rounds(shuffle, x);
        to[i] = x;
    }
}
