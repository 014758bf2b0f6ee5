// What the convolutions' kernels share: unpacking a tile, walking over output positions, storing results.
#pragma once

#include "kernels.h"
#include "tile.h"

namespace mpsearch::MPSEARCH_ISA {

// Output positions that are computed together, as many as there are registers for.
constexpr int kPositions = kVectors == 1 ? 8 : kVectors == 2 ? 4 : 2;

MPSEARCH_INLINE Lanes multiply_add(Lanes a, Lanes b, Lanes c) {
#if defined(__AVX512BW__)
    return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
    return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
    return vfmaq_f32(c, a, b);
#else
    return a * b + c;
#endif
}

MPSEARCH_INLINE Lanes broadcast_lanes(float value) {
    return value - Lanes{};
}

// What is staged of x (input.h), as an integer + 0x4b400000: 1.5 * 2^23 + x has no bits left for a fraction. Maximum and
// minimum give the least for NaN.
constexpr int32_t kCodeBits = 0x4b400000;
MPSEARCH_INLINE Ints quantized_bits(Lanes x, const InputGrid& grid) {
    const Lanes at = x * grid.inverse, low = broadcast_lanes(grid.least), high = broadcast_lanes(grid.most);
#if defined(__AVX2__) && !defined(__AVX512BW__)
    const Lanes clamped = _mm256_min_ps(_mm256_max_ps(at, low), high);
#else
    const Lanes above = at > low ? at : low;
    const Lanes clamped = above < high ? above : high;
#endif
    return (Ints)(clamped + 12582912.0f) + grid.shift;
}

// Scales and doubled zero points of a scale group of a tile's rows; 0 for rows that are not there.
MPSEARCH_INLINE void read_group(const ConvJob& job, int64_t tile, int64_t group, float* scales, int32_t* doubled) {
    const int64_t rows = tile_rows(job, tile);
    const int implied = job.bits == 1 ? 1 : 1 << job.bits;
    for (int64_t i = 0; i < kTileRows; ++i) {
        const int64_t at = (first_row(job, tile) + i) * job.n_groups + group;
        scales[i] = i >= rows         ? 0.0f
                    : job.half_scales ? float_from_half(static_cast<const uint16_t*>(job.scales)[at])
                                      : static_cast<const float*>(job.scales)[at];
        doubled[i] = i >= rows ? 0 : job.zero_points ? 2 * job.zero_points[at] : implied;
    }
}

MPSEARCH_INLINE void read_bias(const ConvJob& job, int64_t tile, float* bias) {
    const int64_t rows = tile_rows(job, tile);
    for (int64_t i = 0; i < kTileRows; ++i) bias[i] = job.bias && i < rows ? job.bias[first_row(job, tile) + i] : 0.0f;
}

// The codes of a tile as quads [n_units, 16 rows, 4 columns], 0 where there is no such row or column. `stream` takes
// 16 * columns codes, and as whole tiles of whole units are in that order already, it may be what is returned.
MPSEARCH_INLINE const uint8_t* unpack_tile(const ConvJob& job, int64_t tile, uint8_t* quads, uint8_t* stream) {
    const int64_t rows = tile_rows(job, tile), run = tile / job.tiles_per_run, in_run = tile % job.tiles_per_run;
    const uint8_t* packed = job.codes + run * stream_bytes(job, job.tiled_rows) + in_run * stream_bytes(job, kTileRows);
    const int64_t n_codes = rows * job.columns;
    unpack_codes(packed, stream, n_codes, job.bits);
    if (rows == kTileRows && job.columns == 4 * job.n_units) return stream;
    memset(quads, 0, job.n_units * kQuadBytes);
    for (int64_t unit = 0; unit < job.n_units; ++unit) {
        const int64_t n = job.unit_columns[unit];
        for (int64_t i = 0; i < rows; ++i)
            for (int64_t k = 0; k < n; ++k) quads[unit * kQuadBytes + 4 * i + k] = *stream++;
    }
    return quads;
}

MPSEARCH_INLINE int64_t round_up(int64_t value, int64_t to) {
    return (value + to - 1) / to * to;
}

// Walks over output positions row by row; `base` is where the window begins in the staged map, in elements.
struct Position {
    int64_t column, base;

    Position(const ConvJob& job, int64_t position, int64_t pixel)
        : column(position % job.out_width),
          base((position / job.out_width * job.stride_h * job.padded_width + column * job.stride_w) * pixel) {}
    void advance(const ConvJob& job, int64_t pixel) {
        base += job.stride_w * pixel;
        if (++column == job.out_width) {
            column = 0;
            base += (job.stride_h * job.padded_width - job.out_width * job.stride_w) * pixel;
        }
    }
};

// A quarter is 4 rows: 16 bytes of a vector, which has kQuarters of them.
typedef float Floats4 __attribute__((vector_size(16)));
constexpr int kQuarters = kVectorBytes / 16;

// In every quarter elements i, j, k and l of a's and b's quarter there, b's counted from kB.
constexpr int kB = kVectorRows;
#if defined(__AVX512BW__)
#define MPSEARCH_SELECT(a, b, i, j, k, l)                                                                             \
    __builtin_shufflevector(a, b, i, j, k, l, (i) + 4, (j) + 4, (k) + 4, (l) + 4, (i) + 8, (j) + 8, (k) + 8, (l) + 8, \
                            (i) + 12, (j) + 12, (k) + 12, (l) + 12)
#elif defined(__AVX2__)
#define MPSEARCH_SELECT(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l, (i) + 4, (j) + 4, (k) + 4, (l) + 4)
#else
#define MPSEARCH_SELECT(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#endif

// Within each quarter, 4 vectors of 4 rows as 4 rows of 4 vectors; the inverse is the same.
MPSEARCH_INLINE void transpose_quarters(Lanes (&of)[4]) {
    const Lanes a = MPSEARCH_SELECT(of[0], of[1], 0, kB, 1, kB + 1);
    const Lanes b = MPSEARCH_SELECT(of[0], of[1], 2, kB + 2, 3, kB + 3);
    const Lanes c = MPSEARCH_SELECT(of[2], of[3], 0, kB, 1, kB + 1);
    const Lanes d = MPSEARCH_SELECT(of[2], of[3], 2, kB + 2, 3, kB + 3);
    of[0] = MPSEARCH_SELECT(a, c, 0, 1, kB, kB + 1);
    of[1] = MPSEARCH_SELECT(a, c, 2, 3, kB + 2, kB + 3);
    of[2] = MPSEARCH_SELECT(b, d, 0, 1, kB, kB + 1);
    of[3] = MPSEARCH_SELECT(b, d, 2, 3, kB + 2, kB + 3);
}

MPSEARCH_INLINE void store_quarter(Lanes of, int quarter, float* to) {
    Floats4 value;
#if defined(__AVX512BW__)
    value = quarter == 0   ? __builtin_shufflevector(of, of, 0, 1, 2, 3)
            : quarter == 1 ? __builtin_shufflevector(of, of, 4, 5, 6, 7)
            : quarter == 2 ? __builtin_shufflevector(of, of, 8, 9, 10, 11)
                           : __builtin_shufflevector(of, of, 12, 13, 14, 15);
#elif defined(__AVX2__)
    value = quarter == 0 ? __builtin_shufflevector(of, of, 0, 1, 2, 3) : __builtin_shufflevector(of, of, 4, 5, 6, 7);
#else
    (void)quarter;
    value = of;
#endif
    memcpy(to, &value, sizeof(value));
}

// Quarter q from the 4 floats at from(q).
template <class From>
MPSEARCH_INLINE Lanes load_quarters(From from) {
    const Floats4 first = load_vector<Floats4>(from(0));
#if defined(__AVX2__)
    const auto pair = __builtin_shufflevector(first, load_vector<Floats4>(from(1)), 0, 1, 2, 3, 4, 5, 6, 7);
#if defined(__AVX512BW__)
    const Floats4 third = load_vector<Floats4>(from(2));
    const auto other = __builtin_shufflevector(third, load_vector<Floats4>(from(3)), 0, 1, 2, 3, 4, 5, 6, 7);
    return __builtin_shufflevector(pair, other, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
#else
    return pair;
#endif
#else
    return first;
#endif
}

// Writes a tile's rows of n output positions.
MPSEARCH_INLINE void store_block(
    const ConvJob& job, int64_t tile, int64_t position, int64_t n, const Lanes (&values)[kPositions][kVectors]) {
    const int64_t row = first_row(job, tile), rows = tile_rows(job, tile);
    if (job.channels_last) {
        for (int64_t t = 0; t < n; ++t) {
            float* to = job.y + (position + t) * job.rows + row;
            if (rows == kTileRows)
                memcpy(to, values[t], sizeof(values[t]));
            else
                memcpy(to, values[t], rows * sizeof(float));
        }
        return;
    }
    const int64_t apart = job.out_height * job.out_width;
    float* to = job.y + row * apart + position;
    if constexpr (kPositions % 4 == 0) {
        if (n == kPositions && rows == kTileRows) {
#pragma GCC unroll 2
            for (int t = 0; t < kPositions; t += 4)
#pragma GCC unroll 2
                for (int v = 0; v < kVectors; ++v) {
                    Lanes part[4] = {values[t][v], values[t + 1][v], values[t + 2][v], values[t + 3][v]};
                    transpose_quarters(part);
#pragma GCC unroll 4
                    for (int q = 0; q < kQuarters; ++q)
#pragma GCC unroll 4
                        for (int i = 0; i < 4; ++i)
                            store_quarter(part[i], q, to + (v * kVectorRows + 4 * q + i) * apart + t);
                }
            return;
        }
    }
    float block[kPositions][kTileRows];
    memcpy(block, values, sizeof(block));
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t t = 0; t < n; ++t) to[i * apart + t] = block[t][i];
}

// Calls body(tile, position, n, x) for each n <= kPositions output positions of items [begin, end); x[t] is where the
// window of position t begins in the staged map, which has `pixel` elements a pixel; the last one is repeated beyond n.
template <class Element, class Body>
MPSEARCH_INLINE void for_each_block(const ConvJob& job, int64_t begin, int64_t end, int64_t chunk, Body body) {
    const int64_t n_positions = job.out_height * job.out_width, n_chunks = (n_positions + chunk - 1) / chunk;
    for (int64_t item = begin; item < end; ++item) {
        const int64_t tile = item / n_chunks, from = item % n_chunks * chunk;
        const int64_t to = from + chunk < n_positions ? from + chunk : n_positions;
        const Element* base = static_cast<const Element*>(job.staged) + tile / job.tiles_per_run * job.group_staged;
        Position at(job, from, job.staged_channels);
        for (int64_t position = from; position < to; position += kPositions) {
            const int64_t n = to - position < kPositions ? to - position : kPositions;
            const Element* x[kPositions];
            for (int t = 0; t < kPositions; ++t) {
                if (t < n) {
                    x[t] = base + at.base;
                    at.advance(job, job.staged_channels);
                } else {
                    x[t] = x[t - 1];
                }
            }
            body(tile, position, n, x);
        }
    }
}

// kGathered: the values of kPositions windows as [n_units][kPositions][4], 0 where there is no column.
template <class Element>
MPSEARCH_INLINE void gather(const ConvJob& job, const Element* const (&x)[kPositions], Element zero, Element* to) {
    for (int64_t unit = 0; unit < job.n_units; ++unit)
        for (int t = 0; t < kPositions; ++t)
            for (int k = 0; k < 4; ++k) {
                const int64_t offset = job.offsets[4 * unit + k];
                *to++ = offset < 0 ? zero : x[t][offset];
            }
}

}  // namespace mpsearch::MPSEARCH_ISA
