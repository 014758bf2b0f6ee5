// What the shell hands to the kernels, and the table of kernels that every instruction set provides.
//
// All matrices are row-major and contiguous. "Group" i of a [rows, columns] matrix is columns
// [group_size * (i % n_groups), ...) of row i / n_groups, where n_groups = ceil(columns / group_size); a row's last
// group may be shorter. Kernels work on a range of groups (or of blocks of 8 codes), so that a thread takes any part of
// a matrix.
#pragma once

#include <cstdint>

namespace mpsearch {

struct QuantizeJob {
    const float* weight;      // [rows, columns]
    const float* importance;  // [rows / rows_per_importance, columns], or null: all ones
    const float* ratios;      // [n_ratios] clip ratios, or null: plain min-max
    uint8_t* codes;           // [rows, columns], or null
    float* dequantized;       // [rows, columns], or null
    void* scales;             // [rows, n_groups] float16 or float32, or null
    uint8_t* zero_points;     // [rows, n_groups], or null
    int64_t columns;
    int64_t group_size;
    int64_t n_groups;  // per row
    int64_t rows_per_importance;
    int64_t n_ratios;
    int bits;  // 1..8
    bool symmetric;
    bool half_scales;  // scales are float16
};

struct DequantizeJob {
    const uint8_t* packed;       // [ceil(rows * columns * bits / 8)]
    const void* scales;          // [rows, n_groups] float16 or float32
    const uint8_t* zero_points;  // [rows, n_groups], or null: symmetric
    float* weight;               // [rows, columns]
    int64_t rows;
    int64_t columns;
    int64_t group_size;
    int64_t n_groups;  // per row
    int bits;
    bool half_scales;
};

struct Kernels {
    // Groups [begin, end). False where a weight or a scale is not finite.
    bool (*quantize)(const QuantizeJob& job, int64_t begin, int64_t end);

    // Groups [begin, end).
    void (*dequantize)(const DequantizeJob& job, int64_t begin, int64_t end);

    // Blocks [begin, end) of 8 codes. Returns all codes or-ed together, which shows whether they fit.
    uint8_t (*pack)(const uint8_t* codes,  // [numel]
                    uint8_t* packed,       // [ceil(numel * bits / 8)]
                    int64_t numel,
                    int bits,
                    int64_t begin,
                    int64_t end);

    // Blocks [begin, end) of 8 codes.
    void (*unpack)(const uint8_t* packed,  // [ceil(numel * bits / 8)]
                   uint8_t* codes,         // [numel]
                   int64_t numel,
                   int bits,
                   int64_t begin,
                   int64_t end);
};

}  // namespace mpsearch

// An instruction set's kernels live in a namespace of its name. Their sources must not use inline functions of the
// standard library: the linker keeps one copy of each, perhaps one with instructions that the machine lacks.
#define MPSEARCH_DECLARE_KERNELS(isa)                                                                         \
    namespace mpsearch::isa {                                                                                 \
    bool quantize(const QuantizeJob& job, int64_t begin, int64_t end);                                        \
    void dequantize(const DequantizeJob& job, int64_t begin, int64_t end);                                    \
    uint8_t pack(const uint8_t* codes, uint8_t* packed, int64_t numel, int bits, int64_t begin, int64_t end); \
    void unpack(const uint8_t* packed, uint8_t* codes, int64_t numel, int bits, int64_t begin, int64_t end);  \
    }
