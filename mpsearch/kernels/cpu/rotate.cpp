// Rotates tokens by a Hadamard matrix of signs; reference_rotation.py has every rounding.
//
//     y = (x * factors) H, or (x H) * factors        H: a Walsh-Hadamard matrix for each block of columns
//
// The columns are cut into blocks, powers of two, the largest first. A block of n takes log2(n) stages; stage s replaces every
// pair (a, b) that lies 2^s apart by (a + b, a - b): three stages within a vector, up to three more among the vectors in
// registers, then three at a time over the row. Each value is the same sum in the same order whatever the width of vectors.
//
// One call handles whole rows. Bytes moved: each value once from x and once to y; the passes between are in the first cache.
// Bound: arithmetic, log2(n) additions a value, and loads and stores, one pair for three of them.
#include "kernels.h"
#include "simd.h"

namespace mpsearch::MPSEARCH_ISA {

// The stages of 1, 2 and 4 lanes: a lane and its partner's value, one of them with its sign turned.
MPSEARCH_INLINE F8 butterflies(F8 v) {
#if defined(__AVX2__)
    constexpr Floats one = {1, -1, 1, -1, 1, -1, 1, -1}, two = {1, 1, -1, -1, 1, 1, -1, -1};
    constexpr Floats four = {1, 1, 1, 1, -1, -1, -1, -1};
    Floats a = v.part[0];
    a = __builtin_shufflevector(a, a, 1, 0, 3, 2, 5, 4, 7, 6) + a * one;
    a = __builtin_shufflevector(a, a, 2, 3, 0, 1, 6, 7, 4, 5) + a * two;
    return F8{{__builtin_shufflevector(a, a, 4, 5, 6, 7, 0, 1, 2, 3) + a * four}};
#else
    constexpr Floats one = {1, -1, 1, -1}, two = {1, 1, -1, -1};
    for (Floats& a : v.part) {
        a = __builtin_shufflevector(a, a, 1, 0, 3, 2) + a * one;
        a = __builtin_shufflevector(a, a, 2, 3, 0, 1) + a * two;
    }
    return F8{{v.part[0] + v.part[1], v.part[0] - v.part[1]}};
#endif
}

// The stages among `count` vectors.
template <int count>
MPSEARCH_INLINE void butterflies(F8 (&v)[count]) {
#pragma GCC unroll 3
    for (int apart = 1; apart < count; apart *= 2)
#pragma GCC unroll 8
        for (int i = 0; i < count; ++i)
            if (!(i & apart)) {
                const F8 sum = v[i] + v[i + apart], difference = v[i] - v[i + apart];
                v[i] = sum, v[i + apart] = difference;
            }
}

// The first stages of n columns, 8 * count of them at a time; `before` and `after` are factors, or null.
template <int count>
static void first(const float* x, const float* before, const float* after, float* y, int64_t n) {
    for (int64_t at = 0; at < n; at += 8 * count) {
        F8 v[count];
#pragma GCC unroll 8
        for (int i = 0; i < count; ++i) {
            v[i] = load(x + at + 8 * i);
            if (before) v[i] = v[i] * load(before + at + 8 * i);
            v[i] = butterflies(v[i]);
        }
        butterflies(v);
#pragma GCC unroll 8
        for (int i = 0; i < count; ++i) store(after ? v[i] * load(after + at + 8 * i) : v[i], y + at + 8 * i);
    }
}

// The stages of `apart` columns and of its multiples by powers of two below `count`.
template <int count>
static void later(float* y, const float* after, int64_t n, int64_t apart) {
    for (int64_t begin = 0; begin < n; begin += count * apart)
        for (int64_t at = begin; at < begin + apart; at += 8) {
            F8 v[count];
#pragma GCC unroll 8
            for (int i = 0; i < count; ++i) v[i] = load(y + at + i * apart);
            butterflies(v);
#pragma GCC unroll 8
            for (int i = 0; i < count; ++i)
                store(after ? v[i] * load(after + at + i * apart) : v[i], y + at + i * apart);
        }
}

static void rotate_block(const float* x, const float* before, const float* after, float* y, int64_t n) {
    if (n < 8) {
        for (int64_t i = 0; i < n; ++i) y[i] = before ? x[i] * before[i] : x[i];
        for (int64_t apart = 1; apart < n; apart *= 2)
            for (int64_t i = 0; i < n; ++i)
                if (!(i & apart)) {
                    const float a = y[i], b = y[i + apart];
                    y[i] = a + b, y[i + apart] = a - b;
                }
        for (int64_t i = 0; after && i < n; ++i) y[i] *= after[i];
        return;
    }
    const float* last = n <= 64 ? after : nullptr;
    if (n == 8) return first<1>(x, before, last, y, n);
    if (n == 16) return first<2>(x, before, last, y, n);
    if (n == 32) return first<4>(x, before, last, y, n);
    first<8>(x, before, last, y, n);
    for (int64_t apart = 64; apart < n;) {
        const int64_t left = n / apart;
        last = left <= 8 ? after : nullptr;
        if (left == 2) return later<2>(y, last, n, apart);
        if (left == 4) return later<4>(y, last, n, apart);
        later<8>(y, last, n, apart);
        apart *= 8;
    }
}

void rotate(const RotateArguments& job, int64_t begin, int64_t end) {
    const float* x = static_cast<const float*>(job.x);
    float* y = static_cast<float*>(job.y);
    int64_t largest = 1;
    while (2 * largest <= job.columns) largest *= 2;
    for (int64_t row = begin; row < end; ++row) {
        int64_t at = 0;
        for (int64_t n = largest; at < job.columns; n /= 2) {
            if (n > job.columns - at) continue;
            const float* factors = job.factors + at;
            rotate_block(x + row * job.columns + at, job.back ? nullptr : factors, job.back ? factors : nullptr,
                         y + row * job.columns + at, n);
            at += n;
        }
    }
}

}  // namespace mpsearch::MPSEARCH_ISA
