// Eight floats at a time, on every instruction set.
//
// F8 is the unit in which the specification orders its sums, so it has eight lanes everywhere: one 256-bit vector with
// AVX2 and AVX-512, two 128-bit vectors on the x86-64 baseline and on NEON. Arithmetic is written with the compilers'
// vector extensions; intrinsics stand only where those give poor code (minimum and maximum, partial loads, rounding,
// float16, narrowing).
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace mpsearch::MPSEARCH_ISA {

#if defined(__AVX2__)
constexpr int kNative = 8;
#else
constexpr int kNative = 4;
#endif
constexpr int kParts = 8 / kNative;

typedef float Floats __attribute__((vector_size(4 * kNative)));

struct F8 {
    Floats part[kParts];
};

#define MPSEARCH_INLINE static inline __attribute__((always_inline))

template <class Operation>
MPSEARCH_INLINE F8 each(F8 a, F8 b, Operation operation) {
    F8 result;
    for (int i = 0; i < kParts; ++i) result.part[i] = operation(a.part[i], b.part[i]);
    return result;
}

MPSEARCH_INLINE F8 operator+(F8 a, F8 b) {
    return each(a, b, [](Floats x, Floats y) { return x + y; });
}
MPSEARCH_INLINE F8 operator-(F8 a, F8 b) {
    return each(a, b, [](Floats x, Floats y) { return x - y; });
}
MPSEARCH_INLINE F8 operator*(F8 a, F8 b) {
    return each(a, b, [](Floats x, Floats y) { return x * y; });
}
MPSEARCH_INLINE F8 operator/(F8 a, F8 b) {
    return each(a, b, [](Floats x, Floats y) { return x / y; });
}
// a > b ? a : b, so that max(-0, +0) is +0 and a NaN in `a` gives b; x86's instruction is defined so, NEON's where b is not
// NaN, as it nowhere is.
MPSEARCH_INLINE F8 max(F8 a, F8 b) {
#if defined(__AVX2__)
    return F8{{_mm256_max_ps(a.part[0], b.part[0])}};
#elif defined(__aarch64__)
    return F8{{vmaxnmq_f32(a.part[0], b.part[0]), vmaxnmq_f32(a.part[1], b.part[1])}};
#else
    return each(a, b, [](Floats x, Floats y) { return x > y ? x : y; });
#endif
}
// a < b ? a : b; of two zeros any, which shows in no result.
MPSEARCH_INLINE F8 min(F8 a, F8 b) {
#if defined(__AVX2__)
    return F8{{_mm256_min_ps(a.part[0], b.part[0])}};
#elif defined(__aarch64__)
    return F8{{vminnmq_f32(a.part[0], b.part[0]), vminnmq_f32(a.part[1], b.part[1])}};
#else
    return each(a, b, [](Floats x, Floats y) { return x < y ? x : y; });
#endif
}
// a < b ? yes : no
MPSEARCH_INLINE F8 where_less(F8 a, F8 b, F8 yes, F8 no) {
    F8 result;
    for (int i = 0; i < kParts; ++i) result.part[i] = a.part[i] < b.part[i] ? yes.part[i] : no.part[i];
    return result;
}

MPSEARCH_INLINE F8 broadcast(float value) {
    F8 result;
    for (int i = 0; i < kParts; ++i) result.part[i] = value - Floats{};
    return result;
}
MPSEARCH_INLINE F8 load(const float* from) {
    F8 result;
    memcpy(&result, from, sizeof(result));
    return result;
}
MPSEARCH_INLINE void store(F8 value, float* to) {
    memcpy(to, &value, sizeof(value));
}

// The first n floats (0 <= n <= 8), then zeros; reads nothing beyond them.
MPSEARCH_INLINE F8 load_first(const float* from, int64_t n) {
#if defined(__AVX2__)
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), lane);
    return F8{{_mm256_maskload_ps(from, mask)}};
#else
    float lanes[8] = {};
    for (int64_t i = 0; i < n; ++i) lanes[i] = from[i];
    return load(lanes);
#endif
}
// Stores the first n lanes (0 <= n <= 8).
MPSEARCH_INLINE void store_first(F8 value, float* to, int64_t n) {
#if defined(__AVX2__)
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    _mm256_maskstore_ps(to, _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), lane), value.part[0]);
#else
    float lanes[8];
    store(value, lanes);
    for (int64_t i = 0; i < n; ++i) to[i] = lanes[i];
#endif
}

// Rounds half to even; for lanes in [0, 2^22), and never gives -0 for +0. 2^23 + x has no bits left for a fraction.
MPSEARCH_INLINE F8 round_nonnegative(F8 value) {
#if defined(__AVX2__)
    return F8{{_mm256_round_ps(value.part[0], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}};
#elif defined(__aarch64__)
    return F8{{vrndnq_f32(value.part[0]), vrndnq_f32(value.part[1])}};
#else
    const F8 shift = broadcast(8388608.0f);
    return (value + shift) - shift;
#endif
}

// Rounded as IEEE says, on every instruction set.
MPSEARCH_INLINE F8 square_root(F8 value) {
#if defined(__AVX2__)
    return F8{{_mm256_sqrt_ps(value.part[0])}};
#elif defined(__aarch64__)
    return F8{{vsqrtq_f32(value.part[0]), vsqrtq_f32(value.part[1])}};
#else
    F8 result;
    for (int i = 0; i < kParts; ++i)
        for (int k = 0; k < kNative; ++k) result.part[i][k] = __builtin_sqrtf(value.part[i][k]);
    return result;
#endif
}

// [a0 + a1, a2 + a3, b0 + b1, b2 + b3], with AVX2 the same of lanes 4..7 behind them in the upper half.
MPSEARCH_INLINE Floats add_pairs(Floats a, Floats b) {
#if defined(__AVX2__)
    return _mm256_hadd_ps(a, b);
#elif defined(__aarch64__)
    return vpaddq_f32(a, b);
#else
    return __builtin_shufflevector(a, b, 0, 2, 4, 6) + __builtin_shufflevector(a, b, 1, 3, 5, 7);
#endif
}

// The sums of the lanes of four vectors, each ((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7)).
MPSEARCH_INLINE void store_sums(const F8 (&of)[4], float* to) {
    Floats half[kParts];
    for (int i = 0; i < kParts; ++i)
        half[i] = add_pairs(add_pairs(of[0].part[i], of[1].part[i]), add_pairs(of[2].part[i], of[3].part[i]));
#if defined(__AVX2__)
    _mm_storeu_ps(to, _mm256_castps256_ps128(half[0]) + _mm256_extractf128_ps(half[0], 1));
#else
    const Floats sums = half[0] + half[1];
    memcpy(to, &sums, sizeof(sums));
#endif
}

// The largest and the smallest lane, where no lane is NaN.
MPSEARCH_INLINE float largest(F8 value) {
#if defined(__AVX2__)
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(value.part[0]), _mm256_extractf128_ps(value.part[0], 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
#elif defined(__aarch64__)
    return vmaxnmvq_f32(vmaxnmq_f32(value.part[0], value.part[1]));
#else
    Floats m = value.part[0] > value.part[1] ? value.part[0] : value.part[1];
    const float a = m[0] > m[1] ? m[0] : m[1], b = m[2] > m[3] ? m[2] : m[3];
    return a > b ? a : b;
#endif
}
MPSEARCH_INLINE float smallest(F8 value) {
    return -largest(broadcast(0) - value);
}

}  // namespace mpsearch::MPSEARCH_ISA
