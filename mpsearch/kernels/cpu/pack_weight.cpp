// Packing for the products: codes, scales and zero points of a weight <-> the layout of tile.h.
//
// One thread handles a range of tiles (16 rows). A block's 16 lines of 32 codes are 16 x 8 numbers of 32 bits, whose
// transpose is its quads; these are then moved bit field by bit field into `bits` vectors, or back. Bytes moved per
// code: 1 + bits / 8. Bound: the transpose, about half an operation per code.
#include "tile.h"

namespace mpsearch::MPSEARCH_ISA {

struct Block {
    uint32_t line[kTileRows][kQuads];
};

// The inverse of `unpack_quads`.
template <int bits>
MPSEARCH_INLINE void pack_quads(const Bytes (&quads)[kQuads], int part, uint8_t* block) {
    constexpr int fields = 8 / bits, left_over = 8 - fields * bits;
#pragma GCC unroll 8
    for (int i = 0; i < bits; ++i) {
        Bytes packed = {};
#pragma GCC unroll 8
        for (int f = 0; f < fields; ++f) packed |= move_bits(quads[i + bits * f], 0, bits * f, bits);
#pragma GCC unroll 8
        for (int q = 0; q < left_over; ++q) {
            const StreamPiece piece = stream_piece(bits, i, q);
            if (piece.width > 0)
                packed |= move_bits(quads[8 - left_over + q], piece.in_code, piece.in_vector, piece.width);
        }
        memcpy(block + i * kQuadBytes + part * kVectorBytes, &packed, sizeof(packed));
    }
}

template <int bits>
static Bytes pack_block(const Block& block, uint8_t* to) {
    uint32_t numbers[kQuads][kTileRows];
#pragma GCC unroll 8
    for (int q = 0; q < kQuads; ++q)
        for (int i = 0; i < kTileRows; ++i) numbers[q][i] = block.line[i][q];
    Bytes seen = {};
    for (int part = 0; part < kVectors; ++part) {
        Bytes quads[kQuads];
        for (int q = 0; q < kQuads; ++q) {
            quads[q] = load_vector<Bytes>(reinterpret_cast<const uint8_t*>(numbers[q]) + part * kVectorBytes);
            seen |= quads[q];
        }
        pack_quads<bits>(quads, part, to);
    }
    return seen;
}

template <int bits>
static void unpack_block(const uint8_t* from, Block& block) {
    uint32_t numbers[kQuads][kTileRows];
    for (int part = 0; part < kVectors; ++part) {
        Bytes quads[kQuads];
        unpack_quads<bits>(from, part, quads);
        for (int q = 0; q < kQuads; ++q)
            memcpy(reinterpret_cast<uint8_t*>(numbers[q]) + part * kVectorBytes, &quads[q], sizeof(quads[q]));
    }
#pragma GCC unroll 8
    for (int q = 0; q < kQuads; ++q)
        for (int i = 0; i < kTileRows; ++i) block.line[i][q] = numbers[q][i];
}

// Calls f(record, first row, rows that there are, group) for each record of tiles [begin, end).
template <class Function>
MPSEARCH_INLINE void for_each_record(const WeightJob& job, int64_t begin, int64_t end, Function f) {
    const int64_t n_bytes = header_bytes(job.half_scales) + job.group_blocks * job.bits * kQuadBytes;
    for (int64_t tile = begin; tile < end; ++tile) {
        const int64_t row = tile * kTileRows, left = job.rows - row;
        for (int64_t group = 0; group < job.n_groups; ++group)
            f(job.packed + (tile * job.n_groups + group) * n_bytes, row, left < kTileRows ? left : kTileRows, group);
    }
}

// Columns that block `b` of a group has: 32, at a group's end fewer, behind it none.
MPSEARCH_INLINE int64_t columns_of(const WeightJob& job, int64_t group, int64_t b) {
    const int64_t in_row = job.columns - group * job.group_size;
    const int64_t left = (in_row < job.group_size ? in_row : job.group_size) - b * kBlockColumns;
    return left < 0 ? 0 : left < kBlockColumns ? left : kBlockColumns;
}

int pack_weight(const WeightJob& job, int64_t begin, int64_t end) {
    const int64_t scale_bytes = job.half_scales ? 2 : 4;
    const uint32_t infinity = job.half_scales ? 0x7c00 : 0x7f800000;
    bool finite = true;
    Bytes seen = {};
    for_each_record(job, begin, end, [&](uint8_t* record, int64_t row, int64_t n_rows, int64_t group) {
        memset(record, 0, header_bytes(job.half_scales));
        uint8_t* blocks = record + header_bytes(job.half_scales);
        for (int64_t i = 0; i < n_rows; ++i) {
            const int64_t at = (row + i) * job.n_groups + group;
            uint32_t scale = 0;  // its bits
            memcpy(&scale, static_cast<const uint8_t*>(job.scales) + at * scale_bytes, scale_bytes);
            memcpy(record + i * scale_bytes, &scale, scale_bytes);
            finite &= (scale & infinity) != infinity;
            const int16_t doubled = job.zero_points ? 2 * job.zero_points[at] : 1 << job.bits >> (job.bits == 1);
            memcpy(record + kTileRows * scale_bytes + 2 * i, &doubled, sizeof(doubled));
        }
        for (int64_t b = 0; b < job.group_blocks; ++b) {
            const int64_t n = columns_of(job, group, b);
            const uint8_t* codes = job.codes + row * job.columns + group * job.group_size + b * kBlockColumns;
            Block block;
            if (n < kBlockColumns || n_rows < kTileRows) {
                memset(&block, 0, sizeof(block));
                for (int64_t i = 0; i < n_rows; ++i) memcpy(block.line[i], codes + i * job.columns, n);
            } else {
                for (int64_t i = 0; i < kTileRows; ++i) memcpy(block.line[i], codes + i * job.columns, kBlockColumns);
            }
            with_bits(job.bits, [&]<int bits>() { seen |= pack_block<bits>(block, blocks + b * bits * kQuadBytes); });
        }
    });
    int all = finite ? 0 : 256;
    for (int i = 0; i < kVectorBytes; ++i) all |= seen[i];
    return all;
}

void unpack_weight(const WeightJob& job, int64_t begin, int64_t end) {
    const int64_t scale_bytes = job.half_scales ? 2 : 4;
    for_each_record(job, begin, end, [&](const uint8_t* record, int64_t row, int64_t n_rows, int64_t group) {
        const uint8_t* blocks = record + header_bytes(job.half_scales);
        for (int64_t i = 0; i < n_rows; ++i) {
            const int64_t at = (row + i) * job.n_groups + group;
            memcpy(static_cast<uint8_t*>(job.scales) + at * scale_bytes, record + i * scale_bytes, scale_bytes);
            int16_t doubled;
            memcpy(&doubled, record + kTileRows * scale_bytes + 2 * i, sizeof(doubled));
            if (job.zero_points) job.zero_points[at] = static_cast<uint8_t>(doubled / 2);
        }
        for (int64_t b = 0; b < job.group_blocks; ++b) {
            const int64_t n = columns_of(job, group, b);
            uint8_t* codes = job.codes + row * job.columns + group * job.group_size + b * kBlockColumns;
            Block block;
            with_bits(job.bits, [&]<int bits>() { unpack_block<bits>(blocks + b * bits * kQuadBytes, block); });
            if (n == kBlockColumns)
                for (int64_t i = 0; i < n_rows; ++i) memcpy(codes + i * job.columns, block.line[i], kBlockColumns);
            else
                for (int64_t i = 0; i < n_rows; ++i) memcpy(codes + i * job.columns, block.line[i], n);
        }
    });
}

}  // namespace mpsearch::MPSEARCH_ISA
