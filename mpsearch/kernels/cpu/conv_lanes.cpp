// Convolution with groups of few rows, depthwise the most of all: one sample, the input as it is or quantized to int8.
//
// The formulas are those of conv.cpp and conv_a8.cpp. A tile is 16 rows of several groups, each of which sees channels of
// its own, so a lane is a row with its own input: the part of the map that a few rows of output need is staged as
// [rows of the map][padded_width][channels of a group][16], lane i the channel that row i of the tile sees there.
//
// Both kinds multiply floats. Of int8 codes and 2 * code - 2 * zero the products and the sums of up to kExact of them are
// integers below 2^24, thus exact; then they go to int32. A tile's record:
//
//     scales [n_groups, 16], bias [16], weights [columns, 16], floats: weights, or for int8 input 2 * code - 2 * zero
//
// One thread handles a tile for some rows of output, kPositions positions at a time. Bytes moved per product: 4, from
// the first or second cache. Bound: arithmetic, a fused multiply-add for each 16 products.
#include "conv_tile.h"

namespace mpsearch::MPSEARCH_ISA {

constexpr int64_t kExact = 256;  // 256 * 510 * 127 < 2^24
constexpr int64_t kBandBytes = 128 << 10;

static int64_t element_bytes(const ConvJob&) {
    return 0;  // staged by `multiply`
}

static int64_t record_bytes(const ConvJob& job) {
    return (job.n_groups + 1 + job.columns) * kTileRows * sizeof(float);
}

static int64_t map_row_bytes(const ConvJob& job) {
    return job.padded_width * job.group_channels * kTileRows * static_cast<int64_t>(sizeof(float));
}

// Rows of the map that n rows of output need.
static int64_t map_rows(const ConvJob& job, int64_t n) {
    return (n - 1) * job.stride_h + job.dilation_h * (job.kernel_h - 1) + 1;
}

// As many rows of output as kBandBytes of the map allow, at least 1.
static int64_t chunk(const ConvJob& job) {
    const int64_t spare = kBandBytes / map_row_bytes(job) - map_rows(job, 1);
    const int64_t rows = spare < 0 ? 1 : 1 + spare / job.stride_h;
    return (rows < job.out_height ? rows : job.out_height) * job.out_width;
}

static void decode(const ConvJob& job, int64_t begin, int64_t end) {
    uint8_t* stream = job.scratch(kTileRows * job.columns + 64);
    for (int64_t tile = begin; tile < end; ++tile) {
        float* record = reinterpret_cast<float*>(job.records + tile * job.record_bytes);
        float* weights = record + (job.n_groups + 1) * kTileRows;
        const int64_t rows = tile_rows(job, tile);
        const int64_t n_codes = rows * job.columns;
        unpack_codes(job.codes + tile * stream_bytes(job, kTileRows), stream, n_codes, job.bits);
        read_bias(job, tile, record + job.n_groups * kTileRows);
        memset(weights, 0, job.columns * kTileRows * sizeof(float));
        for (int64_t group = 0; group < job.n_groups; ++group) {
            float* scales = record + group * kTileRows;
            int32_t doubled[kTileRows];
            read_group(job, tile, group, scales, doubled);
            for (int64_t c = job.group_units[group]; c < job.group_units[group + 1]; ++c)
                for (int64_t i = 0; i < rows; ++i) {
                    const float centred = static_cast<float>(2 * stream[c * rows + i] - doubled[i]);
                    weights[c * kTileRows + i] = job.int8_input ? centred : centred * 0.5f * scales[i];
                }
        }
    }
}

// Floats as they are, or as int8 codes.
MPSEARCH_INLINE Lanes staged_value(const ConvJob& job, Lanes x) {
    return job.int8_input ? (Lanes)quantized_bits(x, job.input) - 12582912.0f : x;
}

// For each row of a tile, the first channel of its group.
MPSEARCH_INLINE void lane_channels(const ConvJob& job, int64_t tile, int64_t (&channels)[kTileRows]) {
    const int64_t row = first_row(job, tile), last = tile_rows(job, tile) - 1;
    for (int64_t i = 0; i < kTileRows; ++i)
        channels[i] = (row + (i < last ? i : last)) / job.group_rows * job.group_channels;
}

// A row of pixels of one channel of each group, `apart` floats a channel, to to[column * between + lane].
static void stage_planes(const ConvJob& job,
                         const float* x,
                         int64_t apart,
                         const int64_t (&channels)[kTileRows],
                         float* to,
                         int64_t between) {
    int64_t column = 0;
    for (; column + 4 <= job.width; column += 4)
        for (int v = 0; v < kVectors; ++v) {
            const int64_t* of = channels + v * kVectorRows;
            Lanes part[4];
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i)
                part[i] = load_quarters([&](int q) { return x + of[4 * q + i] * apart + column; });
            transpose_quarters(part);
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
                const Lanes value = staged_value(job, part[i]);
                memcpy(to + (column + i) * between + v * kVectorRows, &value, sizeof(value));
            }
        }
    for (; column < job.width; ++column) {
        float lanes[kTileRows];
        for (int i = 0; i < kTileRows; ++i) lanes[i] = x[channels[i] * apart + column];
        for (int v = 0; v < kVectors; ++v) {
            const Lanes value = staged_value(job, load_vector<Lanes>(lanes + v * kVectorRows));
            memcpy(to + column * between + v * kVectorRows, &value, sizeof(value));
        }
    }
}

// The same where the channels of a pixel lie together.
static void stage_pixels(
    const ConvJob& job, const float* x, const int64_t (&channels)[kTileRows], float* to, int64_t between) {
    const bool together = channels[kTileRows - 1] - channels[0] == kTileRows - 1;
    for (int64_t column = 0; column < job.width; ++column, x += job.channels, to += between) {
        float lanes[kTileRows];
        if (!together)
            for (int i = 0; i < kTileRows; ++i) lanes[i] = x[channels[i]];
        const float* from = together ? x + channels[0] : lanes;
        for (int v = 0; v < kVectors; ++v) {
            const Lanes value = staged_value(job, load_vector<Lanes>(from + v * kVectorRows));
            memcpy(to + v * kVectorRows, &value, sizeof(value));
        }
    }
}

// n values of padding.
MPSEARCH_INLINE void pad(const ConvJob& job, int64_t n, float* to) {
    const float value = static_cast<float>(job.input.shift);
    for (int64_t i = 0; i < n; ++i) to[i] = value;
}

// One row of the map [padded_width][channels of a group][16]; `y` counts from the first row of padding.
static void stage_row(const ConvJob& job, const int64_t (&channels)[kTileRows], int64_t y, float* to) {
    const int64_t row = y - job.padding_h, between = job.group_channels * kTileRows;  // pixels
    if (row < 0 || row >= job.height) {
        pad(job, job.padded_width * between, to);
        return;
    }
    pad(job, job.padding_w * between, to);
    to += job.padding_w * between;
    pad(job, job.padding_w * between, to + job.width * between);
    const int64_t plane = job.height * job.width;
    for (int64_t c = 0; c < job.group_channels; ++c, to += kTileRows) {
        if (job.channels_last)
            stage_pixels(job, job.x + row * job.width * job.channels + c, channels, to, between);
        else
            stage_planes(job, job.x + c * plane + row * job.width, plane, channels, to, between);
    }
}

// sums += the products of columns [begin, end).
MPSEARCH_INLINE void add_columns(const ConvJob& job,
                                 const float* weights,
                                 const float* const (&x)[kPositions],
                                 int64_t begin,
                                 int64_t end,
                                 Lanes (&sums)[kPositions][kVectors]) {
    for (int64_t c = begin; c < end; ++c) {
        const int64_t offset = job.offsets[c];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
            const Lanes weight = load_vector<Lanes>(weights + c * kTileRows + v * kVectorRows);
#pragma GCC unroll 8
            for (int t = 0; t < kPositions; ++t)
                sums[t][v] = multiply_add(weight, load_vector<Lanes>(x[t] + offset + v * kVectorRows), sums[t][v]);
        }
    }
}

MPSEARCH_INLINE void multiply_block(const ConvJob& job,
                                    const float* record,
                                    const float* const (&x)[kPositions],
                                    Lanes (&totals)[kPositions][kVectors]) {
    const float* bias = record + job.n_groups * kTileRows;
    const float* weights = bias + kTileRows;
    if (!job.int8_input) {
        for (int t = 0; t < kPositions; ++t) memcpy(totals[t], bias, sizeof(totals[t]));
        add_columns(job, weights, x, 0, job.columns, totals);
        return;
    }
    memset(totals, 0, sizeof(totals));
    for (int64_t group = 0; group < job.n_groups; ++group) {
        Ints exact[kPositions][kVectors] = {};
        const int64_t end = job.group_units[group + 1];
        for (int64_t c = job.group_units[group]; c < end; c += kExact) {
            Lanes sums[kPositions][kVectors] = {};
            add_columns(job, weights, x, c, c + kExact < end ? c + kExact : end, sums);
            for (int t = 0; t < kPositions; ++t)
                for (int v = 0; v < kVectors; ++v) exact[t][v] += __builtin_convertvector(sums[t][v], Ints);
        }
        for (int t = 0; t < kPositions; ++t)
            for (int v = 0; v < kVectors; ++v)
                totals[t][v] += __builtin_convertvector(exact[t][v], Lanes) *
                                load_vector<Lanes>(record + group * kTileRows + v * kVectorRows);
    }
    const float half_scale = job.input.scale * 0.5f;
    for (int t = 0; t < kPositions; ++t)
        for (int v = 0; v < kVectors; ++v) {
            totals[t][v] = half_scale * totals[t][v];
            if (job.bias) totals[t][v] += load_vector<Lanes>(bias + v * kVectorRows);
        }
}

static void multiply(const ConvJob& job, int64_t begin, int64_t end) {
    const int64_t n_positions = job.out_height * job.out_width, each = chunk(job);
    const int64_t n_chunks = (n_positions + each - 1) / each, pixel = job.group_channels * kTileRows;
    float* map = reinterpret_cast<float*>(job.scratch(map_rows(job, each / job.out_width) * map_row_bytes(job)));
    for (int64_t item = begin; item < end; ++item) {
        const int64_t tile = item / n_chunks, from = item % n_chunks * each;
        const int64_t to = from + each < n_positions ? from + each : n_positions;
        const int64_t first = from / job.out_width * job.stride_h;
        const int64_t rows = map_rows(job, (to - from) / job.out_width);
        int64_t channels[kTileRows];
        lane_channels(job, tile, channels);
        for (int64_t row = 0; row < rows; ++row)
            stage_row(job, channels, first + row, map + row * job.padded_width * pixel);
        const float* record = reinterpret_cast<const float*>(job.records + tile * job.record_bytes);
        Position at(job, 0, pixel);
        for (int64_t position = from; position < to; position += kPositions) {
            const int64_t n = to - position < kPositions ? to - position : kPositions;
            const float* x[kPositions];
            for (int t = 0; t < kPositions; ++t) {
                if (t < n) {
                    x[t] = map + at.base;
                    at.advance(job, pixel);
                } else {
                    x[t] = x[t - 1];
                }
            }
            Lanes totals[kPositions][kVectors];
            multiply_block(job, record, x, totals);
            store_block(job, tile, position, n, totals);
        }
    }
}

const ConvKernels conv_lanes = {
    .element_bytes = element_bytes,
    .record_bytes = record_bytes,
    .decode = decode,
    .range = nullptr,
    .clear = nullptr,
    .stage = nullptr,
    .chunk = chunk,
    .multiply = multiply,
};

}  // namespace mpsearch::MPSEARCH_ISA
