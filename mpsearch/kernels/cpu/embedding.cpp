// A row of a packed weight as floats: weight = (code - zero) * scale, one rounding, as `dequantize` has it.
//
// The weight lies in tiles of 16 rows (tile.h), which a matrix product streams; a row is 4 bytes in each vector of 64. Those
// of a block hold the row's 32 codes just as whole vectors hold quads, so 32-bit words are unpacked by the same rule.
//
// One call handles one row. Bytes moved: the whole tile's, as each 64 hold 4 of the row, and 4 written for each column.
// Bound: the latency of memory, for rows that are not in a cache.
#include "tile.h"

namespace mpsearch::MPSEARCH_ISA {

MPSEARCH_INLINE uint32_t move_word_bits(uint32_t word, int from, int to, int width) {
    return (from > to ? word >> (from - to) : word << (to - from)) & 0x01010101u * (((1u << width) - 1) << to);
}

// The 32 codes of a row in a block; `unpack_quads` says how they lie.
template <int bits>
MPSEARCH_INLINE void unpack_row(const uint8_t* block, uint32_t (&quads)[kQuads]) {
    constexpr int fields = 8 / bits, left_over = 8 - fields * bits;
    uint32_t packed[bits];
#pragma GCC unroll 8
    for (int i = 0; i < bits; ++i) {
        memcpy(&packed[i], block + i * kQuadBytes, sizeof(packed[i]));
#pragma GCC unroll 8
        for (int f = 0; f < fields; ++f) quads[i + bits * f] = move_word_bits(packed[i], bits * f, 0, bits);
    }
#pragma GCC unroll 8
    for (int q = 0; q < left_over; ++q) {
        uint32_t code = 0;
#pragma GCC unroll 8
        for (int i = 0; i < bits; ++i) {
            const StreamPiece piece = stream_piece(bits, i, q);
            if (piece.width > 0) code |= move_word_bits(packed[i], piece.in_vector, piece.in_code, piece.width);
        }
        quads[8 - left_over + q] = code;
    }
}

void embed(const LinearJob& job, int64_t row, float* y) {
    const int64_t tile = row / kTileRows, lane = row % kTileRows;
    with_bits(job.bits, [&]<int bits>() {
        for (int64_t group = 0; group < job.n_groups; ++group) {
            const uint8_t* record = job.packed + (tile * job.n_groups + group) * record_bytes(job);
            const uint8_t* blocks = record + header_bytes(job.half_scales) + 4 * lane;
            float scale;
            int16_t doubled_zero;
            if (job.half_scales) {
                uint16_t half;
                memcpy(&half, record + 2 * lane, sizeof(half));
                scale = float_from_half(half);
            } else {
                memcpy(&scale, record + 4 * lane, sizeof(scale));
            }
            memcpy(&doubled_zero, record + (job.half_scales ? 32 : 64) + 2 * lane, sizeof(doubled_zero));
            const F8 zero = broadcast(0.5f * static_cast<float>(doubled_zero)), scales = broadcast(scale);
            const int64_t begin = group * job.group_size, left = job.columns - begin;
            const int64_t n = left < job.group_size ? left : job.group_size;
            for (int64_t c = 0; c < n; c += kBlockColumns) {
                uint32_t quads[kQuads];
                unpack_row<bits>(blocks + c * bits * kQuadBytes / kBlockColumns, quads);
                for (int64_t i = 0; i < kBlockColumns && c + i < n; i += 8) {
                    const F8 codes = load_codes(reinterpret_cast<const uint8_t*>(quads) + i);
                    const F8 weights = (codes - zero) * scales;
                    if (c + i + 8 <= n)
                        store(weights, y + begin + c + i);
                    else
                        store_first(weights, y + begin + c + i, n - c - i);
                }
            }
        }
    });
}

}  // namespace mpsearch::MPSEARCH_ISA
