// The arguments of the kernels: one struct for each function, filled in Python (arguments.py mirrors this file field by field)
// and passed by pointer, to the shell of the CPU's kernels and to the CUDA library alike.
//
// Pointers are to the memory of the device that runs the function, null where there is nothing. All matrices are row-major and
// contiguous. Columns [group_size * i, group_size * (i + 1)) of a row are its group i; a row has n_groups = ceil(columns /
// group_size), the last of which may be shorter. Fields "CUDA only" are not read by the CPU's kernels.
#pragma once

#include <cstdint>

#include "input.h"

namespace mpsearch {

enum Dtype : int { kFloat32, kFloat16, kBFloat16 };

// A weight packed for the products.
struct WeightFormat {
    int64_t rows;
    int64_t columns;
    int bits;  // 1..8
    int64_t group_size;
    bool half_scales;  // scales are float16
    bool symmetric;
};

struct QuantizeArguments {
    const float* weight;      // [rows, columns]
    const float* importance;  // [rows / rows_per_importance, columns], or null: all ones
    const float* ratios;      // [n_ratios] clip ratios, or null: plain min-max
    uint8_t* codes;           // [rows, columns]
    void* scales;             // [rows, n_groups] float16 or float32
    uint8_t* zero_points;     // [rows, n_groups], or null: symmetric
    int* not_finite;          // [1] becomes 1 where a weight or a scale is not finite
    int64_t rows;
    int64_t columns;
    int64_t group_size;
    int64_t n_groups;
    int64_t rows_per_importance;
    int64_t n_ratios;
    int bits;
    bool symmetric;
    bool half_scales;
};

// Packing takes codes, [numel], to the stream, [ceil(numel * bits / 8)]; unpacking takes the stream to codes.
struct PackArguments {
    const uint8_t* source;
    uint8_t* target;
    int* seen;  // [1] becomes all codes or-ed together; packing only
    int64_t numel;
    int bits;
};

struct DequantizeArguments {
    const uint8_t* packed;       // [ceil(rows * columns * bits / 8)]
    const void* scales;          // [rows, n_groups] float16 or float32
    const uint8_t* zero_points;  // [rows, n_groups], or null: symmetric
    float* weight;               // [rows, columns]
    int64_t rows;
    int64_t columns;
    int64_t group_size;
    int64_t n_groups;
    int bits;
    bool half_scales;
};

// Of packing a weight for the products, and of unpacking it.
struct WeightArguments {
    uint8_t* codes;        // [rows, columns]
    void* scales;          // [rows, n_groups] float16 or float32
    uint8_t* zero_points;  // [rows, n_groups], or null: symmetric
    uint8_t* packed;       // [packed_bytes]
    int* seen;             // [1] becomes all codes or-ed together, and 256 where a scale is not finite; packing only
    int64_t packed_bytes;
    WeightFormat format;
};

// y = x W^T + bias.
struct LinearArguments {
    const void* x;          // [n_tokens, columns] of `dtype`
    const uint8_t* packed;  // the weight
    const float* bias;      // [rows], or null
    void* y;                // [n_tokens, rows] of `dtype`
    int64_t n_tokens;
    WeightFormat format;
    InputFormat input;  // int8 input only
    bool int8_input;
    int dtype;         // CUDA only; else float32
    int n_processors;  // CUDA only
    uint8_t* scratch;  // CUDA only: `mpsearch_linear_scratch` bytes, from an address that is a multiple of 16
};

// CUDA only: a weight that is packed for the products, as a matrix.
struct StreamArguments {
    const uint8_t* packed;
    void* weight;  // [rows, columns] of `dtype`
    WeightFormat format;
    int dtype;
};

struct EmbeddingArguments {
    const void* indices;    // [n_indices] int64 or int32
    const uint8_t* packed;  // the weight
    float* y;               // [n_indices, columns]
    int64_t* bad_place;     // [1] becomes the place of the first index outside [0, rows), if any; y is then not written
    int64_t n_indices;
    WeightFormat format;
    bool wide_indices;  // int64
};

// Rows of x times a Hadamard matrix of signs; `factors` are +-1 / sqrt(columns of the block).
struct RotateArguments {
    const void* x;         // [rows, columns] of `dtype`
    const float* factors;  // [columns]
    void* y;               // [rows, columns] of `dtype`, may be x
    int64_t rows;
    int64_t columns;
    bool back;  // the factors come last: the inverse
    int dtype;  // CUDA only; else float32
};

// Rounding with feedback; row r takes matrix r / rows_per_matrix.
struct FeedbackArguments {
    const float* weight;           // [rows, columns]
    const float* feedback;         // [n_matrices, columns, columns]
    const float* scales;           // [rows, n_groups]
    const float* zero_points;      // [rows, n_groups]
    const int32_t* column_groups;  // [columns], in [0, n_groups)
    const float* errors;           // [rows, columns] to begin with, or null: none yet
    const uint8_t* fixed;          // [rows, columns]: 1 where the error stays what it is, or null: nowhere
    uint8_t* codes;                // [rows, columns]
    int64_t columns;
    int64_t n_groups;
    int64_t n_matrices;
    int64_t rows_per_matrix;
    int bits;
};

// Rounding rows jointly, in place.
struct JointArguments {
    const float* weight;           // [rows, columns]
    const float* row_feedback;     // [rows, rows], ones on the diagonal
    const float* column_feedback;  // [columns, columns], ones on the diagonal
    const float* column_weights;   // [columns], read where scales are fitted
    const float* zero_points;      // [rows, n_groups]
    const int32_t* column_groups;  // [columns], in [0, n_groups); ascending where scales are fitted
    const uint8_t* fixed;          // [rows, columns]: 1 where the error stays what it is, or null: nowhere
    float* scales;                 // [rows, n_groups]
    uint8_t* codes;                // [rows, columns]
    int64_t* n_changed;            // [n_passes] codes that a pass changed
    int64_t rows;
    int64_t columns;
    int64_t n_groups;
    int64_t n_passes;
    int64_t n_fits;  // passes, the first ones, that fit the scales
    int bits;
    bool begin;        // there are no codes yet, and both feedbacks are lower triangular
    bool half_scales;  // scales are rounded to float16
};

// Half-quadratic fitting of grids, in place.
struct HalfQuadraticArguments {
    const float* weight;  // [rows, columns]
    const float* betas;   // [n_betas]
    float* scales;        // [rows, n_groups]
    float* zero_points;   // [rows, n_groups]
    uint8_t* codes;       // [rows, columns]
    int64_t rows;
    int64_t columns;
    int64_t group_size;
    int64_t n_groups;
    int64_t n_betas;
    int bits;
    bool fit_zeros;
    bool half_scales;  // scales are rounded to float16
};

// A convolution in two dimensions, one being a height of 1. x and y are [channels, height, width], or [height, width, channels]
// where channels_last.
struct ConvShape {
    int64_t n_samples, channels, height, width;
    int64_t rows, out_height, out_width;
    int64_t kernel_h, kernel_w;
    int64_t stride_h, stride_w;
    int64_t padding_h, padding_w;
    int64_t dilation_h, dilation_w;
    int64_t groups;  // of the convolution
    int64_t group_size;
    int bits;
    int order;  // of the codes (conv.h)
    bool half_scales;
    bool symmetric;
    bool channels_last;
};

struct ConvArguments {
    const float* x;         // [n_samples, channels, height, width]
    const uint8_t* packed;  // the weight
    const float* bias;      // [rows], or null
    float* y;               // [n_samples, rows, out_height, out_width]
    ConvShape shape;
    InputFormat input;  // int8 input only
    bool int8_input;
};

// Compared with the sum of Python's structs when a library is loaded; JointArguments is compared by itself.
constexpr int64_t kArgumentsBytes = sizeof(QuantizeArguments) + sizeof(PackArguments) + sizeof(DequantizeArguments) +
                                    sizeof(WeightArguments) + sizeof(LinearArguments) + sizeof(StreamArguments) +
                                    sizeof(EmbeddingArguments) + sizeof(RotateArguments) + sizeof(FeedbackArguments) +
                                    sizeof(HalfQuadraticArguments) + sizeof(ConvArguments);

}  // namespace mpsearch
