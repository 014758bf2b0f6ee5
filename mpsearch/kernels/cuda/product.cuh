// What the shell (linear.cu) hands to the two products, each compiled once per width from product_float.cu, product_int8.cu.
#pragma once

#include "api.h"
#include "stream.cuh"

namespace mpsearch::cuda {

constexpr int kTileColumns = 8;                // of the result, in one fragment
constexpr int kMostColumns = 64;               // of fragments, in one pass: 8 tiles
constexpr int kSumStride = kStripRows + 4;     // floats between columns of a strip's sums: their banks differ
constexpr int64_t kSumBytes = 4 * kSumStride;  // of one column

struct ProductJob {
    Stream stream;
    const uint8_t* x;           // staged, or x itself where it needs no staging (`direct`)
    const float* bias;          // [rows], or null
    void* y;                    // [n_tokens, rows] of `dtype`
    float* partial;             // [n_ranges, 2, n_tokens, 32]: sums of strips that several blocks share
    const float* token_scales;  // int8 only, [n_tokens]
    const int32_t* token_sums;  // int8 only, [n_tokens, n_groups]
    int dtype;
    int parts;
    int n_tokens;
    int n_ranges;  // CUDA blocks, each taking an equal part of all steps of all strips
    bool direct;   // float16 and bfloat16 only: x is [n_tokens, n_blocks, 32]
};

// The steps of block r of a float product: [range_begin(r), range_begin(r + 1)) of n_strips * n_steps.
MPSEARCH_HOST_DEVICE int64_t range_begin(const ProductJob& job, int64_t range) {
    return job.stream.n_strips * job.stream.n_steps * range / job.n_ranges;
}

MPSEARCH_DEVICE void store_value(const ProductJob& job, int token, int64_t row, float value) {
    const int64_t at = token * job.stream.rows + row;
    if (job.bias) value += job.bias[row];
    if (job.dtype == kFloat32)
        static_cast<float*>(job.y)[at] = value;
    else
        static_cast<uint16_t*>(job.y)[at] = job.dtype == kFloat16 ? half_from_float(value) : bfloat_from_float(value);
}

// n_tiles: tiles of 8 columns; 1, 2, 4 or 8 (float), 1 or 4 (int8).
template <int bits>
int multiply_float(const ProductJob& job, int n_tiles, uintptr_t stream);
template <int bits>
int multiply_int8(const ProductJob& job, int n_tiles, uintptr_t stream);

}  // namespace mpsearch::cuda
