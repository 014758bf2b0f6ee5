// Staging: x in the order in which a product's lanes read it, in the number format that its tensor cores multiply.
//
//     staged  [n_steps, n_tiles, chunks, 32 lanes, 16 bytes]: a lane's 32 columns for one tile of 8 columns of the result
//
// Column n of the fragments is `(token * parts + part) * classes + c` (stream.cuh): x of that token where lane t's block is
// of class c, 0 elsewhere, and where x has no such token or column. float16 and bfloat16 stay what they are (4 chunks of 8).
// A float32 is the exact sum of its 3 parts, each the next 8 bits of its significand as a bfloat16. int8 (2 chunks of 16):
//
// holds what ../cpu/input.h says; then the sum of a token's values in each group.
#pragma once

#include "stream.cuh"

namespace mpsearch::cuda {

struct StageJob {
    Stream stream;
    const void* x;        // [n_tokens, columns] of `dtype`
    uint8_t* staged;      // as above
    float* token_scales;  // [n_tokens], int8 only
    int32_t* token_sums;  // [n_tokens, n_groups], int8 only
    InputFormat input;    // int8 only
    int dtype;
    int parts;
    int n_tokens;
    int n_tiles;        // of 8 columns of the result
    int n_blocks_each;  // CUDA blocks for each column
};

int stage_floats(const StageJob& job, uintptr_t stream);
int stage_int8(const StageJob& job, uintptr_t stream);

}  // namespace mpsearch::cuda
