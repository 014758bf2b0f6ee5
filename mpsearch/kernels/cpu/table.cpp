// The table of an instruction set's kernels.
#include "kernels.h"

namespace mpsearch::MPSEARCH_ISA {

const Kernels kernels = {
    .quantize = quantize,
    .dequantize = dequantize,
    .pack = pack,
    .unpack = unpack,
    .pack_weight = pack_weight,
    .unpack_weight = unpack_weight,
    .tokens_per_block = tokens_per_block,
    .stage = stage,
    .stage_int8 = stage_int8,
    .linear = linear,
    .linear_a8 = linear_a8,
    .embed = embed,
    .round_with_feedback = round_with_feedback,
    .joint_load = joint_load,
    .joint_load_columns = joint_load_columns,
    .joint_store = joint_store,
    .joint_add = joint_add,
    .joint_fit = joint_fit,
    .joint_round = joint_round,
    .half_quadratic = half_quadratic,
    .rotate = rotate,
    .conv_float = &conv_float,
    .conv_int8 = &conv_int8,
    .conv_lanes = &conv_lanes,
};

}  // namespace mpsearch::MPSEARCH_ISA
