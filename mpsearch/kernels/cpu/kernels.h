// What the shell hands to the kernels, and the table of kernels that every instruction set provides.
//
// Kernels work on a range of groups (or of tiles, rows, blocks of 8 codes), so that a thread takes any part of a matrix. Group
// i of a matrix is group i % n_groups of row i / n_groups.
#pragma once

#include <cstdint>

#include "arguments.h"
#include "conv.h"

namespace mpsearch {

// A weight before and after packing for the products; tile.h describes the layout of `packed`.
struct WeightJob {
    uint8_t* codes;        // [rows, columns]
    void* scales;          // [rows, n_groups] float16 or float32
    uint8_t* zero_points;  // [rows, n_groups], or null: symmetric
    uint8_t* packed;       // [n_tiles, n_groups, record], n_tiles = ceil(rows / 16)
    int64_t rows;
    int64_t columns;
    int64_t group_size;
    int64_t n_groups;      // per row
    int64_t group_blocks;  // ceil(group_size / 32): blocks of 32 columns that a group is padded to
    int bits;
    bool half_scales;
};

// y = x W^T with W packed for streaming; tile.h describes the layout of `packed`. The two products share the job: first x is
// staged, that is copied (or quantized to int8) into the order in which the kernels read it, then the tiles are multiplied.
struct LinearJob {
    const uint8_t* packed;  // [n_tiles, n_groups, record], n_tiles = ceil(rows / 16)
    const float* x;         // [n_tokens, columns]
    const float* bias;      // [rows], or null
    float* y;               // [n_tokens, rows]
    void* staged;           // [n_groups, n_token_blocks, columns of a group / 4, tokens_per_block, 4] float or int8
    float* token_scales;    // [n_token_blocks, tokens_per_block], int8 only: scale of a token
    int32_t* token_sums;    // [n_groups, n_token_blocks, tokens_per_block], int8 only: sum of a token over a group
    int64_t n_tokens;
    int64_t n_token_blocks;
    int64_t rows;
    int64_t columns;
    int64_t group_size;
    int64_t n_groups;      // per row
    int64_t group_blocks;  // ceil(group_size / 32): blocks of 32 columns that a group is padded to
    int tokens_per_block;  // 1, 4, 8, 12 or 16, as the kernels' `tokens_per_block` wants it
    int bits;
    bool half_scales;
    InputFormat input;  // int8 only
};

constexpr int64_t kFeedbackRows = 32;                   // of a tile of rounding with feedback
constexpr int64_t kJointRows = 32, kJointColumns = 64;  // of a tile and of a block of rounding jointly

// A tile of rows [row, row + n_rows) of rounding jointly: matrices of lanes, one for each row; those beyond the last are 0.
struct JointTile {
    const JointArguments* job;
    int64_t row, n_rows, padded_rows;                   // padded_rows: a multiple of kJointRows
    float* sums;                                        // [columns, padded_rows] of all rows
    float *weight, *codes, *values, *errors, *changes;  // [columns, lanes]; values: code - zero, 0 where fixed
    float *targets, *products;         // [columns, lanes]; products: values times the column feedback, of a group
    float* row_feedback;               // [padded_rows, lanes]
    float *scales, *inverses, *zeros;  // [n_groups, lanes]
    uint32_t* fixed;                   // [columns] bit r: lane r is
    int32_t* moved;                    // [n_moved] columns that have changes, ascending
    int64_t n_moved;
};

// out[j] = from[j] (null: 0) + the sum over terms k of lanes[k] * factors[j, k]
struct JointProduct {
    const float *lanes, *factors, *from;
    float* out;
    const int32_t* terms;  // [n_terms]
    int64_t factors_stride, from_stride, out_stride, n_terms;
};
constexpr int64_t kMostTokens = 256;  // of one LinearJob

struct Kernels {
    // Groups [begin, end). False where a weight or a scale is not finite.
    bool (*quantize)(const QuantizeArguments& job, int64_t begin, int64_t end);

    // Groups [begin, end).
    void (*dequantize)(const DequantizeArguments& job, int64_t begin, int64_t end);

    // Blocks [begin, end) of 8 codes. Packing returns all codes or-ed together, which shows whether they fit.
    uint8_t (*pack)(const PackArguments& job, int64_t begin, int64_t end);
    void (*unpack)(const PackArguments& job, int64_t begin, int64_t end);

    // Tiles [begin, end) of 16 rows. Packing returns all codes or-ed together, and 256 where a scale is not finite.
    int (*pack_weight)(const WeightJob& job, int64_t begin, int64_t end);
    void (*unpack_weight)(const WeightJob& job, int64_t begin, int64_t end);

    // How many tokens (rows of x) are multiplied together where there are n.
    int (*tokens_per_block)(int64_t n_tokens, bool int8_input);

    // Blocks [begin, end) of tokens, as they are or quantized to int8.
    void (*stage)(const LinearJob& job, int64_t begin, int64_t end);
    void (*stage_int8)(const LinearJob& job, int64_t begin, int64_t end);

    // Tiles [begin, end) of 16 rows of the weight, after all tokens are staged.
    void (*linear)(const LinearJob& job, int64_t begin, int64_t end);
    void (*linear_a8)(const LinearJob& job, int64_t begin, int64_t end);

    // Row `row` of a weight in the products' layout (x and tokens of the job are not used) to y, [columns].
    void (*embed)(const LinearJob& job, int64_t row, float* y);

    // Tiles [begin, end) of kFeedbackRows rows; a matrix's last one may be shorter. scratch is
    // [(columns + 128) * kFeedbackRows + 128 * 128].
    void (*round_with_feedback)(const FeedbackArguments& job, int64_t begin, int64_t end, float* scratch);

    // Rounding jointly: the tile's rows, their columns [begin, end), and back; a product for output columns [begin, end); the
    // scales of a group, columns [begin, end), true where one moves; the number of codes of columns [begin, end) that change.
    void (*joint_load)(JointTile& tile);
    void (*joint_load_columns)(const JointTile& tile, int64_t begin, int64_t end);
    void (*joint_store)(const JointTile& tile);
    void (*joint_add)(const JointProduct& product, int64_t begin, int64_t end);
    bool (*joint_fit)(JointTile& tile, int64_t group, int64_t begin, int64_t end);
    int64_t (*joint_round)(JointTile& tile, int64_t begin, int64_t end);

    // Groups [begin, end).
    void (*half_quadratic)(const HalfQuadraticArguments& job, int64_t begin, int64_t end);

    // Rows [begin, end).
    void (*rotate)(const RotateArguments& job, int64_t begin, int64_t end);

    // Float input, int8 input, and either for groups of few rows.
    const ConvKernels *conv_float, *conv_int8, *conv_lanes;
};

}  // namespace mpsearch

// An instruction set's kernels live in a namespace of its name. Their sources must not use inline functions of the
// standard library: the linker keeps one copy of each, perhaps one with instructions that the machine lacks.
#if defined(MPSEARCH_ISA)
namespace mpsearch::MPSEARCH_ISA {
bool quantize(const QuantizeArguments& job, int64_t begin, int64_t end);
void dequantize(const DequantizeArguments& job, int64_t begin, int64_t end);
uint8_t pack(const PackArguments& job, int64_t begin, int64_t end);
void unpack(const PackArguments& job, int64_t begin, int64_t end);
void unpack_codes(const uint8_t* packed, uint8_t* codes, int64_t numel, int bits);  // all of them, on one thread
int pack_weight(const WeightJob& job, int64_t begin, int64_t end);
void unpack_weight(const WeightJob& job, int64_t begin, int64_t end);
int tokens_per_block(int64_t n_tokens, bool int8_input);
void stage(const LinearJob& job, int64_t begin, int64_t end);
void stage_int8(const LinearJob& job, int64_t begin, int64_t end);
void linear(const LinearJob& job, int64_t begin, int64_t end);
void linear_a8(const LinearJob& job, int64_t begin, int64_t end);
void embed(const LinearJob& job, int64_t row, float* y);
void round_with_feedback(const FeedbackArguments& job, int64_t begin, int64_t end, float* scratch);
void joint_load(JointTile& tile);
void joint_load_columns(const JointTile& tile, int64_t begin, int64_t end);
void joint_store(const JointTile& tile);
void joint_add(const JointProduct& product, int64_t begin, int64_t end);
bool joint_fit(JointTile& tile, int64_t group, int64_t begin, int64_t end);
int64_t joint_round(JointTile& tile, int64_t begin, int64_t end);
void half_quadratic(const HalfQuadraticArguments& job, int64_t begin, int64_t end);
void rotate(const RotateArguments& job, int64_t begin, int64_t end);
extern const ConvKernels conv_float, conv_int8, conv_lanes;
extern const Kernels kernels;  // the table of all of them (table.cpp)
}  // namespace mpsearch::MPSEARCH_ISA
#endif
