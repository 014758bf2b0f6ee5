// float16 (IEEE binary16), rounded to nearest even, with and without instructions for it.
#pragma once

#include "simd.h"

namespace mpsearch::MPSEARCH_ISA {

MPSEARCH_INLINE uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof(bits));
    return bits;
}
MPSEARCH_INLINE float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof(value));
    return value;
}

// The exponent is rebased from 127 to 15 (a difference of 112) and the fraction loses 13 of its 23 bits.
MPSEARCH_INLINE uint16_t half_from_float(float value) {
    const uint32_t sign = (bits_of(value) >> 16) & 0x8000u;
    const uint32_t magnitude = bits_of(value) & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);   // NaN
    if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and above: infinity
    if (magnitude < 0x38800000u)  // below 2^-14: subnormal, a multiple of 2^-24, which is 0.5's last bit
        return static_cast<uint16_t>(sign | (bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f)));
    const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
    return static_cast<uint16_t>(sign | ((rounded - (112u << 23)) >> 13));
}
MPSEARCH_INLINE float float_from_half(uint16_t half) {
    const uint32_t sign = (half & 0x8000u) << 16, magnitude = half & 0x7fffu;
    if (magnitude >= 0x7c00u) return float_of(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
    if (magnitude < 0x400u) return float_of(sign | bits_of(static_cast<float>(magnitude) * 0x1p-24f));
    return float_of(sign | ((magnitude << 13) + (112u << 23)));
}

// Each lane as the nearest float16 has it.
MPSEARCH_INLINE F8 round_to_half(F8 value) {
#if defined(__F16C__)
    return F8{{_mm256_cvtph_ps(_mm256_cvtps_ph(value.part[0], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC))}};
#elif defined(__aarch64__)
    return F8{{vcvt_f32_f16(vcvt_f16_f32(value.part[0])), vcvt_f32_f16(vcvt_f16_f32(value.part[1]))}};
#else
    float lanes[8];
    store(value, lanes);
    for (float& lane : lanes) lane = float_from_half(half_from_float(lane));
    return load(lanes);
#endif
}

}  // namespace mpsearch::MPSEARCH_ISA
