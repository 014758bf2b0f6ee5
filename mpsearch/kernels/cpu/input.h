// How the products quantize their input: a row of x to a Linear layer, a sample to a convolution; a "token" either way.
//
//     symmetric    scale = max(-low, high) / largest             codes from -largest to largest
//     asymmetric   scale = high / largest - low / largest        codes from 0 to largest, zero = rint(clamp(-low * inverse))
//     staged       rint(clamp(x * inverse, least, most)) + shift      inverse = 1 / scale, or 0 where that is below 2^-126
//
// where low <= 0 <= high are a token's ends; or scale and zero point are given. What is staged is an int8: a code less its
// zero point, or where `largest` is above 127 (then the zero point is given) a code less 127. A value that is not finite
// makes the scale NaN, and with it all that is multiplied by it.
#pragma once

#if defined(__CUDACC__)
#define MPSEARCH_EVERYWHERE __host__ __device__
#else
#define MPSEARCH_EVERYWHERE
#endif

namespace mpsearch {

struct InputFormat {
    float scale;     // of every token, or 0: each has its own, and its own zero point
    int largest;     // code, 1 to 127; to 254 where the zero point is given
    int zero_point;  // 0 to `largest`; -1: symmetric
};

struct InputGrid {
    float scale, inverse, least, most;
    int shift;
};

// Ends of a token with a value that is not finite are infinite or NaN.
MPSEARCH_EVERYWHERE static inline InputGrid input_grid(const InputFormat& format, float low, float high) {
    const float largest = static_cast<float>(format.largest), poison = (low - low) + (high - high);
    const bool symmetric = format.zero_point < 0;
    float scale = symmetric ? (high > -low ? high : -low) / largest : high / largest - low / largest;
    scale = (format.scale > 0 ? format.scale : scale) + poison;
    const float inverse = scale >= 0x1p-126f ? 1.0f / scale : 0.0f;
    float zero = static_cast<float>(format.zero_point);
    if (format.scale == 0) {
        const float at = -low * inverse, round = 12582912.0f;  // 1.5 * 2^23 + x has no bits left for a fraction
        zero = ((at > 0 ? (at < largest ? at : largest) : 0.0f) + round) - round;
    }
    const int shift = format.largest > 127 ? format.zero_point - 127 : 0;
    return {scale, inverse, symmetric ? -largest : -zero, symmetric ? largest : largest - zero, shift};
}

}  // namespace mpsearch
