// The weight of a matrix product as the kernels stream it, one layout for 1 to 8 bits and for every instruction set.
//
//     packed   [n_tiles][n_groups] records          a tile is 16 rows of the weight; rows beyond the last have scale 0
//     record   header, then the group's blocks      a group's columns are padded to whole blocks of 32
//     header   16 scales (float16: 32 bytes, float32: 64), 16 doubled zero points (int16: 32 bytes), padding to 64 bytes
//     block    32 columns of 16 rows: `bits` vectors of 64 bytes, from which 8 quads are unpacked
//     quad     64 bytes, the codes of 4 columns: byte 4 * row + k is column k of `row`
//
// A quad's 32-bit lanes are rows, so that x is broadcast, scales are plain vectors and sums need no adding across lanes.
// Zero points are doubled because the implied one of symmetric 1-bit codes is 0.5.
//
// Eight quads become `bits` vectors byte by byte. Vector i has 8 / bits whole fields, field f of them (from bit f * bits)
// the code of quad i + bits * f. The bits above the fields, as many in each vector as there are quads left over, make a
// stream, those of vector 0 first and of each byte the lowest first, in which the codes of the quads left over lie end
// to end. So every width takes exactly `bits` bits, and most codes are one shift and one mask away.
#pragma once

#include "codes.h"
#include "half.h"
#include "kernels.h"
#include "simd.h"

namespace mpsearch::MPSEARCH_ISA {

constexpr int kTileRows = 16;
constexpr int kQuads = 8;  // of a block
constexpr int kBlockColumns = 4 * kQuads;
constexpr int kQuadBytes = 4 * kTileRows;

// A quad is one vector with AVX-512, two with AVX2, four elsewhere.
#if defined(__AVX512BW__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
constexpr int kVectors = kQuadBytes / kVectorBytes;
constexpr int kVectorRows = kTileRows / kVectors;

typedef uint8_t Bytes __attribute__((vector_size(kVectorBytes)));
typedef uint16_t Pairs __attribute__((vector_size(kVectorBytes)));
typedef int16_t Shorts __attribute__((vector_size(kVectorBytes)));
typedef int32_t Ints __attribute__((vector_size(kVectorBytes)));
typedef float Lanes __attribute__((vector_size(kVectorBytes)));

template <class Vector>
MPSEARCH_INLINE Vector load_vector(const void* from) {
    Vector vector;
    memcpy(&vector, from, sizeof(vector));
    return vector;
}

MPSEARCH_INLINE int64_t header_bytes(bool half_scales) {
    return half_scales ? 64 : 128;
}

MPSEARCH_INLINE int64_t record_bytes(const LinearJob& job) {
    return header_bytes(job.half_scales) + job.group_blocks * job.bits * kQuadBytes;
}

// `width` bits of every byte, moved from bit `from` to bit `to`; the other bits become 0.
MPSEARCH_INLINE Bytes move_bits(Bytes bytes, int from, int to, int width) {
    const Pairs pairs = (Pairs)bytes;
    const Bytes moved = (Bytes)(from > to ? pairs >> (from - to) : pairs << (to - from));
    const uint8_t mask = static_cast<uint8_t>(((1 << width) - 1) << to);
    return moved & mask;
}

// Where bits of both vector i and the code of left-over quad q lie, if there are such.
struct StreamPiece {
    int in_vector, in_code, width;
};
constexpr StreamPiece stream_piece(int bits, int i, int q) {
    const int fields = 8 / bits, left_over = 8 - fields * bits;
    const int begin = i * left_over > q * bits ? i * left_over : q * bits;  // bits [begin, end) of the stream
    const int end = (i + 1) * left_over < (q + 1) * bits ? (i + 1) * left_over : (q + 1) * bits;
    return {fields * bits + begin - i * left_over, begin - q * bits, end - begin};
}

// Vector `part` of the eight quads of a block, codes from bit `to` of their bytes.
template <int bits, int to = 0>
MPSEARCH_INLINE void unpack_quads(const uint8_t* block, int part, Bytes (&quads)[kQuads]) {
    constexpr int fields = 8 / bits, left_over = 8 - fields * bits;
    Bytes packed[bits];
#pragma GCC unroll 8
    for (int i = 0; i < bits; ++i) {
        packed[i] = load_vector<Bytes>(block + i * kQuadBytes + part * kVectorBytes);
#pragma GCC unroll 8
        for (int f = 0; f < fields; ++f) quads[i + bits * f] = move_bits(packed[i], bits * f, to, bits);
    }
#pragma GCC unroll 8
    for (int q = 0; q < left_over; ++q) {
        Bytes code = {};
#pragma GCC unroll 8
        for (int i = 0; i < bits; ++i) {
            const StreamPiece piece = stream_piece(bits, i, q);
            if (piece.width > 0) code |= move_bits(packed[i], piece.in_vector, piece.in_code + to, piece.width);
        }
        quads[8 - left_over + q] = code;
    }
}

// Scales and doubled zero points of the rows in vector `part`.
MPSEARCH_INLINE Lanes load_scales(const uint8_t* record, bool half_scales, int part) {
    if (!half_scales) return load_vector<Lanes>(record + part * kVectorBytes);
    const uint8_t* from = record + part * kVectorBytes / 2;
#if defined(__AVX512BW__)
    // The form without a mask makes GCC 12 warn of a variable of its own header.
    return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__AVX2__)
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#elif defined(__aarch64__)
    return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(from)));
#else
    Lanes scales;
    for (int i = 0; i < kVectorRows; ++i) {
        uint16_t half;
        memcpy(&half, from + 2 * i, sizeof(half));
        scales[i] = float_from_half(half);
    }
    return scales;
#endif
}

MPSEARCH_INLINE Ints load_doubled_zeros(const uint8_t* record, bool half_scales, int part) {
    typedef int16_t Halves __attribute__((vector_size(kVectorBytes / 2)));
    const uint8_t* from = record + (half_scales ? 32 : 64) + part * kVectorBytes / 2;
    return __builtin_convertvector(load_vector<Halves>(from), Ints);
}

// Adds the bias to 16 rows of one token and writes them; rows beyond the weight's last are dropped.
MPSEARCH_INLINE void store_rows(const LinearJob& job, int64_t token, int64_t tile, const Lanes (&sums)[kVectors]) {
    const int64_t row = tile * kTileRows, left = job.rows - row;
    const size_t n_bytes = static_cast<size_t>(left < kTileRows ? left : kTileRows) * sizeof(float);
    Lanes values[kVectors];
    memcpy(values, sums, sizeof(values));
    if (job.bias) {
        Lanes bias[kVectors] = {};
        memcpy(bias, job.bias + row, n_bytes);
        for (int v = 0; v < kVectors; ++v) values[v] += bias[v];
    }
    memcpy(job.y + token * job.rows + row, values, n_bytes);
}

// Tokens that are multiplied together where there are many, and how many are few enough for `multiply_few`.
constexpr int kBlockTokens = kVectors == 1 ? 8 : 4;
#if defined(__AVX512VNNI__)
constexpr int kFewTokens = 16;
#else
constexpr int kFewTokens = 1;
#endif

// Calls f.template operator()<n>() for the tokens_per_block that `tokens_per_block` gives.
template <class Function>
MPSEARCH_INLINE void with_tokens(int n, Function f) {
    if (n == 1) return f.template operator()<1>();
    if (n == 4) return f.template operator()<4>();
    if constexpr (kVectors == 1)
        if (n == 8) return f.template operator()<8>();
    if constexpr (kFewTokens == 16) {
        if (n == 12) return f.template operator()<12>();
        if (n == 16) return f.template operator()<16>();
    }
}

// Tiles [begin, end) for all tokens. `Product` has
//
//     multiply_few<bits, tokens, n>(job, first, apart)     one block of tokens, n tiles in lock-step, `apart` tiles apart
//     multiply_many<bits, tokens, n>(job, first)           any number of blocks of up to kBlockTokens, n neighbouring tiles
//     kFew, kTiles                                         the most tokens of the first and tiles of the second
template <class Product>
MPSEARCH_INLINE void walk_tiles(const LinearJob& job, int64_t begin, int64_t end) {
    with_bits(job.bits, [&]<int bits>() {
        with_tokens(job.tokens_per_block, [&]<int tokens>() {
            int64_t tile = begin;
            if constexpr (tokens <= Product::kFew) {
                if (job.n_token_blocks == 1) {
                    constexpr int n = tokens == 1 ? 4 : 1;
                    const int64_t apart = (end - begin) / n;
                    for (; tile < begin + apart; ++tile)
                        Product::template multiply_few<bits, tokens, n>(job, tile, apart);
                    for (tile = begin + n * apart; tile < end; ++tile)
                        Product::template multiply_few<bits, tokens, 1>(job, tile, 0);
                    return;
                }
            }
            if constexpr (tokens == kBlockTokens || (tokens == 4 && tokens > Product::kFew)) {
                for (; tile + Product::kTiles <= end; tile += Product::kTiles)
                    Product::template multiply_many<bits, tokens, Product::kTiles>(job, tile);
                for (; tile < end; ++tile) Product::template multiply_many<bits, tokens, 1>(job, tile);
            }
        });
    });
}

}  // namespace mpsearch::MPSEARCH_ISA
