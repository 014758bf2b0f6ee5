// How a warp reads a packed weight: the streaming layout that all backends share (reference.py), walked for tensor cores.
//
// A strip is two tiles, 32 rows; a step is four blocks of 32 columns of it, which a warp reads together. Lane 4 g + t takes
// rows 4 g to 4 g + 3 of the strip in block t: of each of the block's `bits` vectors 16 bytes, an aligned load, from which
// come 8 quads (4 columns each) of 4 rows. A quad is what a lane gives to a multiplication of fragments: 4 columns of two
// rows. So nothing is shuffled, and only the order of columns and rows in a fragment differs from theirs in the weight.
//
// All lanes of a fragment are summed, so its columns must share a scale. Where a group is longer than a block, steps stay
// within groups. Where it is one block (or two), a step holds four groups (two), called classes, and x is spread over as
// many columns of the fragment: column `token * classes + c` holds x where lane t's block is of class c and 0 elsewhere.
//
// Weights come through a ring in shared memory, several steps ahead. Each lane copies what itself will read, so the ring
// needs no barrier.
#pragma once

#include "../cpu/arguments.h"
#include "ptx.cuh"

namespace mpsearch::cuda {

constexpr int kTileRows = 16;
constexpr int kStripRows = 2 * kTileRows;
constexpr int kBlockColumns = 32;
constexpr int kStepBlocks = 4;
constexpr int kQuads = 8;       // of a block
constexpr int kQuadBytes = 64;  // of a tile

// A packed weight and the steps over one of its strips.
struct Stream {
    const uint8_t* packed;  // [n_tiles, n_groups, record]
    int64_t rows;
    int64_t columns;
    int64_t group_size;
    int64_t record_bytes;
    int64_t n_tiles;
    int64_t n_strips;
    int n_groups;
    int group_blocks;  // blocks that a group is padded to
    int n_blocks;      // n_groups * group_blocks
    int classes;       // groups in a step: 4, 2 or 1
    int group_steps;   // steps over a group, where classes is 1
    int n_steps;
    int header_bytes;
    bool half_scales;
};

inline Stream make_stream(const uint8_t* packed, const WeightFormat& format) {
    Stream stream{};
    stream.packed = packed;
    stream.rows = format.rows;
    stream.columns = format.columns;
    stream.group_size = format.group_size;
    stream.n_tiles = (format.rows + kTileRows - 1) / kTileRows;
    stream.n_strips = (stream.n_tiles + 1) / 2;
    stream.n_groups = static_cast<int>((format.columns + format.group_size - 1) / format.group_size);
    stream.group_blocks = static_cast<int>((format.group_size + kBlockColumns - 1) / kBlockColumns);
    stream.n_blocks = stream.n_groups * stream.group_blocks;
    stream.classes = stream.group_blocks == 1 ? 4 : stream.group_blocks == 2 ? 2 : 1;
    stream.group_steps = (stream.group_blocks + kStepBlocks - 1) / kStepBlocks;
    stream.n_steps =
        stream.classes == 1 ? stream.n_groups * stream.group_steps : (stream.n_blocks + kStepBlocks - 1) / kStepBlocks;
    stream.half_scales = format.half_scales;
    stream.header_bytes = format.half_scales ? 64 : 128;
    stream.record_bytes = stream.header_bytes + int64_t{stream.group_blocks} * format.bits * kQuadBytes;
    return stream;
}

// The group of a step, where classes is 1; divides only where groups are long and several.
MPSEARCH_DEVICE int group_of(const Stream& stream, int step) {
    return stream.group_steps == 1 ? step : stream.n_groups == 1 ? 0 : step / stream.group_steps;
}

// The block of lane t in a step. One that is not there stands for the last that is; x is 0 for it.
struct Place {
    int group, block;  // block of the group
    bool there;
};
MPSEARCH_DEVICE Place place_of(const Stream& stream, int step, int t) {
    if (stream.classes == 1) {
        const int group = group_of(stream, step), block = (step - group * stream.group_steps) * kStepBlocks + t;
        const bool there = block < stream.group_blocks;
        return {group, there ? block : stream.group_blocks - 1, there};
    }
    const bool there = step * kStepBlocks + t < stream.n_blocks;
    const int block = there ? step * kStepBlocks + t : stream.n_blocks - 1, group = block >> (stream.group_blocks - 1);
    return {group, block - group * stream.group_blocks, there};
}

// The first of a step's blocks, counted through the row.
MPSEARCH_DEVICE int first_block(const Stream& stream, int step) {
    if (stream.classes > 1) return step * kStepBlocks;
    const int group = group_of(stream, step);
    return group * stream.group_blocks + (step - group * stream.group_steps) * kStepBlocks;
}

MPSEARCH_DEVICE const uint8_t* record_of(const Stream& stream, int64_t tile, int group) {
    tile = tile < stream.n_tiles ? tile : stream.n_tiles - 1;
    return stream.packed + (tile * stream.n_groups + group) * stream.record_bytes;
}

// Steps kept in the ring: enough bytes in flight for any width, and small enough for two blocks on a processor.
MPSEARCH_HOST_DEVICE constexpr int ring_steps(int bits) {
    return bits <= 2 ? 6 : bits == 3 ? 5 : bits <= 5 ? 4 : 3;
}
// A step's slot: of each lane its codes (16 bytes `bits` times), doubled zero points (8) and scales (8 or 16), next to those of
// the other lanes.
MPSEARCH_HOST_DEVICE constexpr int zeros_at(int bits) {
    return bits * 16 * kWarp;
}
MPSEARCH_HOST_DEVICE constexpr int scales_at(int bits) {
    return zeros_at(bits) + 8 * kWarp;
}
MPSEARCH_HOST_DEVICE constexpr int step_bytes(int bits, bool with_scales, bool half_scales) {
    return with_scales ? scales_at(bits) + (half_scales ? 8 : 16) * kWarp : zeros_at(bits);
}

// Begins to copy what a lane reads of a step of a strip.
template <int bits, bool with_scales>
MPSEARCH_DEVICE void fetch(const Stream& stream, uint8_t* slot, int64_t strip, int step, int lane) {
    const int g = lane / 4, t = lane % 4;
    const Place place = place_of(stream, step, t);
    const uint8_t* record = record_of(stream, 2 * strip + g / 4, place.group);
    const uint8_t* from = record + stream.header_bytes + place.block * (bits * kQuadBytes) + g % 4 * 16;
#pragma unroll
    for (int i = 0; i < bits; ++i) copy_async_16(slot + (i * kWarp + lane) * 16, from + i * kQuadBytes);
    if (with_scales) {
        copy_async_8(slot + zeros_at(bits) + lane * 8, record + stream.header_bytes / 2 + g % 4 * 8);
        if (stream.half_scales) {
            copy_async_8(slot + scales_at(bits) + lane * 8, record + g % 4 * 8);
        } else {
            copy_async_16(slot + scales_at(bits) + lane * 16, record + g % 4 * 16);
        }
    }
}

// The 8 quads of one row from its word in each of a block's vectors; a quad's bytes are codes, times 2 where `doubled`.
template <int bits, bool doubled>
MPSEARCH_DEVICE void unpack_words(const uint32_t (&packed)[bits], uint32_t (&quads)[kQuads]) {
    constexpr int fields = 8 / bits, left_over = 8 - fields * bits, up = doubled ? 1 : 0;
    const auto moved = [](uint32_t word, int from, int to, int width) {
        return (from > to ? word >> (from - to) : word << (to - from)) & (((1u << width) - 1) << to) * 0x01010101u;
    };
#pragma unroll
    for (int i = 0; i < bits; ++i)
#pragma unroll
        for (int f = 0; f < fields; ++f) quads[i + bits * f] = moved(packed[i], bits * f, up, bits);
#pragma unroll
    for (int q = 0; q < left_over; ++q) {
        uint32_t code = 0;
#pragma unroll
        for (int i = 0; i < bits; ++i) {
            // Bits [begin, end) of the stream above the fields are both in vector i and in this code.
            const int begin = i * left_over > q * bits ? i * left_over : q * bits;
            const int end = (i + 1) * left_over < (q + 1) * bits ? (i + 1) * left_over : (q + 1) * bits;
            if (begin < end)
                code |= moved(packed[i], fields * bits + begin - i * left_over, begin - q * bits + up, end - begin);
        }
        quads[8 - left_over + q] = code;
    }
}

// Doubled zero points and scales of a lane's 4 rows.
MPSEARCH_DEVICE void load_zeros(const uint8_t* slot, int bits, int lane, uint32_t (&doubled)[4]) {
    const auto* from = reinterpret_cast<const uint32_t*>(slot + zeros_at(bits)) + 2 * lane;
    for (int i = 0; i < 4; ++i) doubled[i] = from[i / 2] >> 16 * (i % 2) & 0xffff;
}
MPSEARCH_DEVICE void load_scales(const uint8_t* slot, int bits, int lane, bool half_scales, float (&scales)[4]) {
    const auto* from = reinterpret_cast<const uint32_t*>(slot + scales_at(bits));
    for (int i = 0; i < 4; ++i)
        scales[i] = half_scales ? float_from_half(static_cast<uint16_t>(from[2 * lane + i / 2] >> 16 * (i % 2)))
                                : float_of(from[4 * lane + i]);
}

}  // namespace mpsearch::cuda
