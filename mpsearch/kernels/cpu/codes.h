// Codes (one byte each) between memory and F8 lanes, and between bytes and the dense bit stream.
//
// The stream is little-endian: code i occupies bits [i * bits, (i + 1) * bits), bit 0 of a byte being the lowest. Eight
// codes fill exactly `bits` bytes. They are moved within one 64-bit word by halving steps: neighbours are pushed
// together in pairs, fours, then all eight, twelve operations for any width.
#pragma once

#include "simd.h"

namespace mpsearch::MPSEARCH_ISA {

// Eight codes per 64-bit lane.
constexpr int kWords = kNative / 2;
typedef uint64_t Words __attribute__((vector_size(8 * kWords)));

// Ones in bits [from, from + width) of every field of `field` bits.
constexpr uint64_t ones(int from, int width, int field) {
    uint64_t mask = 0;
    for (int at = from; at < 64; at += field) mask |= ~uint64_t{0} >> (64 - width) << at;
    return mask;
}

// The upper half of every `field` bits, `width` bits wide, moved down until it meets a lower half as wide; and back.
template <int width, int field, class Word>
MPSEARCH_INLINE Word push_together(Word word) {
    const Word upper = word & ones(field / 2, width, field);
    return (word ^ upper) | upper >> (field / 2 - width);
}
template <int width, int field, class Word>
MPSEARCH_INLINE Word pull_apart(Word word) {
    const Word upper = word & ones(width, width, field);
    return (word ^ upper) | upper << (field / 2 - width);
}

// Eight bytes of `bits` bits -> the 8 * bits low bits of the same word.
template <int bits, class Word>
MPSEARCH_INLINE Word compress(Word codes) {
    return push_together<4 * bits, 64>(push_together<2 * bits, 32>(push_together<bits, 16>(codes)));
}

// The inverse of `compress`; bits above 8 * bits are ignored.
template <int bits, class Word>
MPSEARCH_INLINE Word expand(Word stream) {
    return pull_apart<bits, 16>(pull_apart<2 * bits, 32>(pull_apart<4 * bits, 64>(stream & ones(0, 8 * bits, 64))));
}

// Calls f.template operator()<bits>() for bits known only at run time.
template <class Function>
MPSEARCH_INLINE void with_bits(int bits, Function f) {
    switch (bits) {
        case 1:
            return f.template operator()<1>();
        case 2:
            return f.template operator()<2>();
        case 3:
            return f.template operator()<3>();
        case 4:
            return f.template operator()<4>();
        case 5:
            return f.template operator()<5>();
        case 6:
            return f.template operator()<6>();
        case 7:
            return f.template operator()<7>();
        default:
            return f.template operator()<8>();
    }
}

// Eight codes as floats; reads 8 bytes.
MPSEARCH_INLINE F8 load_codes(const uint8_t* from) {
#if defined(__AVX2__)
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
    return F8{{_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes))}};
#elif defined(__aarch64__)
    const uint16x8_t pairs = vmovl_u8(vld1_u8(from));
    return F8{{vcvtq_f32_u32(vmovl_u16(vget_low_u16(pairs))), vcvtq_f32_u32(vmovl_high_u16(pairs))}};
#else
    float lanes[8];
    for (int i = 0; i < 8; ++i) lanes[i] = static_cast<float>(from[i]);
    return load(lanes);
#endif
}

// The first n of eight integers in [0, 255] as bytes.
MPSEARCH_INLINE void store_codes(F8 value, uint8_t* to, int64_t n) {
    float lanes[8];
    store(value, lanes);
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<uint8_t>(lanes[i]);
}

// 32 integers in [0, 255] as bytes.
MPSEARCH_INLINE void store_codes(const F8 (&value)[4], uint8_t* to) {
#if defined(__AVX2__)
    const __m256i low = _mm256_packus_epi32(_mm256_cvtps_epi32(value[0].part[0]), _mm256_cvtps_epi32(value[1].part[0]));
    const __m256i high =
        _mm256_packus_epi32(_mm256_cvtps_epi32(value[2].part[0]), _mm256_cvtps_epi32(value[3].part[0]));
    // Packing works within 128-bit halves; the permutation puts the groups of four back in order.
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(low, high), order);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), bytes);
#elif defined(__aarch64__)
    for (int i = 0; i < 4; ++i) {
        const uint32x4_t low = vcvtq_u32_f32(value[i].part[0]), high = vcvtq_u32_f32(value[i].part[1]);
        vst1_u8(to + 8 * i, vmovn_u16(vcombine_u16(vmovn_u32(low), vmovn_u32(high))));
    }
#else
    for (int i = 0; i < 4; ++i) store_codes(value[i], to + 8 * i, 8);
#endif
}

}  // namespace mpsearch::MPSEARCH_ISA
