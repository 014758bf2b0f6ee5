// Convolution with packed weights and float32 input: one sample.
//
//     y[r, p] = bias[r] + sum over the columns c of weight[r, c] * x[c, p]        weight = (code - zero) * scale, rounded
//
// where x[c, p] is the value under column c of the window of output position p. The sum is kept in float32, fused where
// that can be, in an order that depends on the instruction set alone; it is within
// (columns + 8) * 2^-24 * (|bias| + sum |weight * x|) of the exact result.
//
// Weights are made floats once a call. A tile's record: bias [16], weights [n_units, 4 columns, 16 rows]. The map is staged
// channels-last and padded (conv_stage.h), so that no window is copied unless a scale covers parts of channels.
//
// One thread handles a tile for a chunk of positions, kPositions of them at a time. Bytes moved: the records from the
// second cache, once for each chunk. Bound: arithmetic, a fused multiply-add for each 16 weights and position.
#include "conv_stage.h"

namespace mpsearch::MPSEARCH_ISA {

static int64_t element_bytes(const ConvJob&) {
    return sizeof(float);
}

static int64_t record_bytes(const ConvJob& job) {
    return (1 + 4 * job.n_units) * kTileRows * sizeof(float);
}

static int64_t chunk(const ConvJob&) {
    return 64;
}

static void decode(const ConvJob& job, int64_t begin, int64_t end) {
    const int64_t stream_room = round_up(kTileRows * job.columns + 64, 64);
    uint8_t* stream = job.scratch(stream_room + job.n_units * kQuadBytes);
    for (int64_t tile = begin; tile < end; ++tile) {
        float* record = reinterpret_cast<float*>(job.records + tile * job.record_bytes);
        const uint8_t* quads = unpack_tile(job, tile, stream + stream_room, stream);
        read_bias(job, tile, record);
        for (int64_t group = 0; group < job.n_groups; ++group) {
            alignas(64) float scales[kTileRows];
            alignas(64) int32_t doubled[kTileRows];
            read_group(job, tile, group, scales, doubled);
            for (int v = 0; v < kVectors; ++v) {
                const Lanes scale = load_vector<Lanes>(scales + v * kVectorRows);
                const Lanes zero = __builtin_convertvector(load_vector<Ints>(doubled + v * kVectorRows), Lanes) * 0.5f;
                for (int64_t unit = job.group_units[group]; unit < job.group_units[group + 1]; ++unit) {
                    const Ints quad = load_vector<Ints>(quads + unit * kQuadBytes + v * kVectorBytes);
                    for (int k = 0; k < 4; ++k) {
                        const Lanes code = __builtin_convertvector(quad >> 8 * k & 0xff, Lanes);
                        const Lanes weight = k < job.unit_columns[unit] ? (code - zero) * scale : Lanes{};
                        memcpy(record + (1 + 4 * unit + k) * kTileRows + v * kVectorRows, &weight, sizeof(weight));
                    }
                }
            }
        }
    }
}

struct Copy {
    __attribute__((always_inline)) void vector(Lanes x, float* to) const { memcpy(to, &x, sizeof(x)); }
    __attribute__((always_inline)) void quads(const Lanes (&x)[4], float (*to)[4]) const {
        Lanes pixels[4] = {x[0], x[1], x[2], x[3]};
        transpose_quarters(pixels);
        for (int q = 0; q < kQuarters; ++q)
            for (int i = 0; i < 4; ++i) store_quarter(pixels[i], q, to[4 * q + i]);
    }
};

static void stage(const ConvJob& job, int64_t begin, int64_t end) {
    stage_map<float>(job, begin, end, Copy{});
}

static void clear(const ConvJob& job) {
    clear_map<float>(job, 0);
}

static void multiply(const ConvJob& job, int64_t begin, int64_t end) {
    const bool gathered = job.order == Order::kGathered;
    float* windows =
        gathered ? reinterpret_cast<float*>(job.scratch(job.n_units * kPositions * 4 * sizeof(float))) : nullptr;
    for_each_block<float>(
        job, begin, end, chunk(job),
        [&](int64_t tile, int64_t position, int64_t n, const float*(&x)[kPositions]) __attribute__((always_inline)) {
            const float* weights = reinterpret_cast<const float*>(job.records + tile * job.record_bytes);
            if (gathered) {
                gather(job, x, 0.0f, windows);
                for (int t = 0; t < kPositions; ++t) x[t] = windows + 4 * t;
            }
            Lanes sums[kPositions][kVectors];
            for (int t = 0; t < kPositions; ++t) memcpy(sums[t], weights, sizeof(sums[t]));
            weights += kTileRows;
            for (int64_t unit = 0; unit < job.n_units; ++unit) {
                const int64_t offset = gathered ? unit * kPositions * 4 : job.offsets[unit];
#pragma GCC unroll 4
                for (int k = 0; k < 4; ++k)
#pragma GCC unroll 4
                    for (int v = 0; v < kVectors; ++v) {
                        const Lanes weight = load_vector<Lanes>(weights + k * kTileRows + v * kVectorRows);
#pragma GCC unroll 8
                        for (int t = 0; t < kPositions; ++t)
                            sums[t][v] = multiply_add(weight, broadcast_lanes(x[t][offset + k]), sums[t][v]);
                    }
                weights += 4 * kTileRows;
            }
            store_block(job, tile, position, n, sums);
        });
}

const ConvKernels conv_float = {
    .element_bytes = element_bytes,
    .record_bytes = record_bytes,
    .decode = decode,
    .range = nullptr,
    .clear = clear,
    .stage = stage,
    .chunk = chunk,
    .multiply = multiply,
};

}  // namespace mpsearch::MPSEARCH_ISA
