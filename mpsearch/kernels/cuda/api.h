// What the library offers: C functions of addresses and sizes, which Python calls (cuda_backend.py) after checking tensors.
//
// Addresses are of the GPU's memory, 0 where there is none; matrices are row-major and contiguous. Work is put on `stream`.
// Each returns 0 or the number of a CUDA error, which `mpsearch_error` puts into words.
#pragma once

#include <cstdint>

#define MPSEARCH_API extern "C" __attribute__((visibility("default")))

enum : int { kFloat32, kFloat16, kBFloat16 };  // a dtype

MPSEARCH_API const char* mpsearch_error(int error);
MPSEARCH_API int mpsearch_count_devices(int* count);
MPSEARCH_API int mpsearch_use_device(int device);

// *not_finite becomes 1 where a weight or a scale is not finite.
MPSEARCH_API int mpsearch_quantize(const float* weight,      // [rows, columns]
                                   const float* importance,  // [rows / rows_per_importance, columns]
                                   const float* ratios,      // [n_ratios]
                                   uint8_t* codes,           // [rows, columns]
                                   void* scales,             // [rows, n_groups]
                                   uint8_t* zero_points,     // [rows, n_groups], or null: symmetric
                                   int* not_finite,
                                   int64_t rows,
                                   int64_t columns,
                                   int64_t group_size,
                                   int64_t rows_per_importance,
                                   int64_t n_ratios,
                                   int bits,
                                   int symmetric,
                                   int half_scales,
                                   uintptr_t stream);

// *seen becomes all codes or-ed together.
MPSEARCH_API int mpsearch_pack(
    const uint8_t* codes, uint8_t* packed, int* seen, int64_t numel, int bits, uintptr_t stream);
MPSEARCH_API int mpsearch_unpack(const uint8_t* packed, uint8_t* codes, int64_t numel, int bits, uintptr_t stream);
MPSEARCH_API int mpsearch_dequantize(const uint8_t* packed,
                                     const void* scales,          // [rows, n_groups]
                                     const uint8_t* zero_points,  // [rows, n_groups]
                                     float* weight,               // [rows, columns]
                                     int64_t rows,
                                     int64_t columns,
                                     int64_t group_size,
                                     int bits,
                                     int half_scales,
                                     uintptr_t stream);

// The weight of a product, from its streaming layout.
MPSEARCH_API int mpsearch_dequantize_stream(const uint8_t* packed,
                                            void* weight,  // [rows, columns] of `dtype`
                                            int dtype,
                                            int64_t rows,
                                            int64_t columns,
                                            int64_t group_size,
                                            int bits,
                                            int half_scales,
                                            uintptr_t stream);

// Each row times a Hadamard matrix of signs, or its inverse; blocks of up to 8192 columns.
MPSEARCH_API int mpsearch_rotate(const void* x,         // [rows, columns] of `dtype`
                                 const float* factors,  // [columns]
                                 void* y,               // [rows, columns] of `dtype`
                                 int64_t rows,
                                 int64_t columns,
                                 int dtype,
                                 int back,
                                 uintptr_t stream);

// y = x W^T + bias. `scratch` holds `mpsearch_linear_scratch` bytes, from an address that is a multiple of 16.
MPSEARCH_API int64_t mpsearch_linear_scratch(
    int int8_input, int dtype, int64_t n_tokens, int64_t rows, int64_t columns, int64_t group_size, int n_processors);
MPSEARCH_API int mpsearch_linear(int int8_input,
                                 int dtype,      // of x and y
                                 const void* x,  // [n_tokens, columns]
                                 const uint8_t* packed,
                                 const float* bias,  // [rows]
                                 void* y,            // [n_tokens, rows]
                                 uint8_t* scratch,
                                 float input_scale,  // int8 input: of all tokens; 0: each token has its own
                                 int largest_code,   // of int8 input
                                 int zero_point,     // of int8 input; -1: symmetric
                                 int64_t n_tokens,
                                 int64_t rows,
                                 int64_t columns,
                                 int64_t group_size,
                                 int bits,
                                 int half_scales,
                                 int n_processors,
                                 uintptr_t stream);
