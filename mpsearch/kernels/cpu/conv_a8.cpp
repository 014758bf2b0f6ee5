// Convolution with packed weights, the input quantized to int8: one sample.
//
//     D[r, p, g] = sum over the columns c of scale group g of (2 * code[r, c] - 2 * zero[r, g]) * x8[c, p]   exact, int32
//     y[r, p]    = (scale * 0.5) * (sum over g, ascending, of float(D[r, p, g]) * scale[r, g]) + bias[r]
//
// where x8[c, p] is what is staged (input.h) of the value under column c of the window of output position p, and `scale` the
// sample's. Every operation on floats is rounded by itself, so that all instruction sets, thread counts and batches give the
// same bits.
//
// The staged map is channels-last and padded (conv_stage.cpp), so that 4 channels are one broadcast and no window is
// copied; only where a scale covers parts of channels (kGathered) the windows of a block of positions are. A tile's record:
//
//     scales float [n_groups, 16], start int32 [n_groups, 16], bias float [16], weights [n_units, 16 rows, 4 columns]
//
// With AVX-512-VNNI or NEON's dotprod weights are int8, code - zero (1-bit symmetric ones doubled). VNNI multiplies int8 by
// uint8, so there x8 is staged + 128, and start is -128 * the sum of a row's weights. Elsewhere, and for 8-bit codes with
// zero points, which need 9 bits, weights are int16, 2 * code - 2 * zero, in pairs of columns [n_units, 2, 16, 2], x8 is
// int16 and start is 0.
//
// One thread handles a tile for a chunk of positions, kPositions of them at a time. Bytes moved: the records from the
// second cache, once for each chunk. Bound: arithmetic, 64 (int8) or 32 products an instruction of 512 bits.
#include "conv_stage.h"

namespace mpsearch::MPSEARCH_ISA {

// Instructions that multiply and add quads of bytes; what is added to staged values for those that take them unsigned.
#if defined(__AVX512VNNI__)
#define MPSEARCH_QUADS 1
constexpr int32_t kPlus = 128;
#elif defined(__ARM_FEATURE_DOTPROD)
#define MPSEARCH_QUADS 1
constexpr int32_t kPlus = 0;
#else
#define MPSEARCH_QUADS 0
constexpr int32_t kPlus = 0;
#endif

MPSEARCH_INLINE bool takes_bytes(const ConvJob& job) {
    return MPSEARCH_QUADS && (job.bits < 8 || !job.zero_points);
}

// What a record's sums are shifted by to be D: int8 weights are not doubled, but for 1-bit symmetric codes.
MPSEARCH_INLINE int sum_shift(const ConvJob& job) {
    return takes_bytes(job) && (job.bits > 1 || job.zero_points) ? 1 : 0;
}

struct Record {
    float* scales;   // [n_groups, 16]
    int32_t* start;  // [n_groups, 16]
    float* bias;     // [16]
    uint8_t* weights;
};

MPSEARCH_INLINE Record record_of(const ConvJob& job, int64_t tile) {
    uint8_t* at = job.records + tile * job.record_bytes;
    return Record{reinterpret_cast<float*>(at), reinterpret_cast<int32_t*>(at + job.n_groups * 64),
                  reinterpret_cast<float*>(at + job.n_groups * 128), at + job.n_groups * 128 + 64};
}

static int64_t element_bytes(const ConvJob& job) {
    return takes_bytes(job) ? 1 : 2;
}

static int64_t record_bytes(const ConvJob& job) {
    return job.n_groups * 128 + 64 + job.n_units * kQuadBytes * element_bytes(job);
}

static int64_t chunk(const ConvJob&) {
    return 64;
}

// A mask of the first n bits of 32; columns that a unit lacks have weights of 0, as what is staged there may not be 0.
MPSEARCH_INLINE int32_t first_bits(int n) {
    return n <= 0 ? 0 : n >= 32 ? -1 : static_cast<int32_t>((1u << n) - 1);
}

#if MPSEARCH_QUADS
// sum + the products of quads: of weights, and of one word of x.
MPSEARCH_INLINE Ints add_quads(Ints sum, Bytes weights, int32_t x) {
#if defined(__AVX512VNNI__)
    return (Ints)_mm512_dpbusd_epi32((__m512i)sum, _mm512_set1_epi32(x), (__m512i)weights);
#else
    return (Ints)vdotq_s32((int32x4_t)sum, (int8x16_t)weights, vreinterpretq_s8_s32(vdupq_n_s32(x)));
#endif
}

// Centred codes as int8, and start.
MPSEARCH_INLINE void decode_bytes(
    const ConvJob& job, const Record& record, const uint8_t* quads, int64_t group, const int32_t* doubled) {
    const int doubling = job.bits == 1 && !job.zero_points ? 1 : 0;
    const uint8_t all = doubling ? 0xff : 0;
    for (int v = 0; v < kVectors; ++v) {
        const Ints zero = load_vector<Ints>(doubled + v * kVectorRows) >> (1 - doubling);
        const Bytes zeros = (Bytes)(zero * 0x01010101);  // zero points below 2^8 in each byte
        Ints sums = {};
        for (int64_t unit = job.group_units[group]; unit < job.group_units[group + 1]; ++unit) {
            const int64_t at = unit * kQuadBytes + v * kVectorBytes;
            const Bytes code = load_vector<Bytes>(quads + at);
            const Bytes weights = code + (code & all) - (Bytes)((Ints)zeros & first_bits(8 * job.unit_columns[unit]));
            memcpy(record.weights + at, &weights, sizeof(weights));
            if (kPlus) sums = add_quads(sums, weights, kPlus * 0x01010101u);
        }
        const Ints start = -sums;
        memcpy(record.start + group * kTileRows + v * kVectorRows, &start, sizeof(start));
    }
}
#endif

// Doubled centred codes as pairs of int16.
MPSEARCH_INLINE void decode_shorts(
    const ConvJob& job, const Record& record, const uint8_t* quads, int64_t group, const int32_t* doubled) {
    for (int v = 0; v < kVectors; ++v) {
        const Ints zero = load_vector<Ints>(doubled + v * kVectorRows);
        const Shorts zeros = (Shorts)(zero | zero << 16);
        for (int64_t unit = job.group_units[group]; unit < job.group_units[group + 1]; ++unit) {
            const Ints quad = load_vector<Ints>(quads + unit * kQuadBytes + v * kVectorBytes);
            const Ints pairs[2] = {(quad & 0xff) | (quad & 0xff00) << 8, (quad >> 16 & 0xff) | (quad >> 8 & 0xff0000)};
            for (int p = 0; p < 2; ++p) {
                const Ints here = (Ints)zeros & first_bits(16 * (job.unit_columns[unit] - 2 * p));
                const Shorts weights = (Shorts)pairs[p] + (Shorts)pairs[p] - (Shorts)here;
                memcpy(record.weights + (2 * unit + p) * kQuadBytes + v * kVectorBytes, &weights, sizeof(weights));
            }
        }
    }
    memset(record.start + group * kTileRows, 0, kTileRows * sizeof(int32_t));
}

static void decode(const ConvJob& job, int64_t begin, int64_t end) {
    const int64_t stream_room = round_up(kTileRows * job.columns + 64, 64);
    uint8_t* stream = job.scratch(stream_room + job.n_units * kQuadBytes);
    for (int64_t tile = begin; tile < end; ++tile) {
        const Record record = record_of(job, tile);
        const uint8_t* quads = unpack_tile(job, tile, stream + stream_room, stream);
        read_bias(job, tile, record.bias);
        for (int64_t group = 0; group < job.n_groups; ++group) {
            alignas(64) int32_t doubled[kTileRows];
            read_group(job, tile, group, record.scales + group * kTileRows, doubled);
#if MPSEARCH_QUADS
            if (takes_bytes(job)) {
                decode_bytes(job, record, quads, group, doubled);
                continue;
            }
#endif
            decode_shorts(job, record, quads, group, doubled);
        }
    }
}

MPSEARCH_INLINE int32_t load_word(const void* from) {
    int32_t word;
    memcpy(&word, from, sizeof(word));
    return word;
}

// sum + products of int16 pairs, neighbours added.
MPSEARCH_INLINE Ints add_pairs(Ints sum, Shorts weights, int32_t x) {
#if defined(__AVX512VNNI__)
    return (Ints)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)weights, _mm512_set1_epi32(x));
#elif defined(__AVX512BW__)
    return sum + (Ints)_mm512_madd_epi16((__m512i)weights, _mm512_set1_epi32(x));
#elif defined(__AVX2__)
    return sum + (Ints)_mm256_madd_epi16((__m256i)weights, _mm256_set1_epi32(x));
#elif defined(__SSE2__)
    return sum + (Ints)_mm_madd_epi16((__m128i)weights, _mm_set1_epi32(x));
#elif defined(__aarch64__)
    const int16x8_t pairs = (int16x8_t)weights, values = vreinterpretq_s16_s32(vdupq_n_s32(x));
    return sum + (Ints)vpaddq_s32(vmull_s16(vget_low_s16(pairs), vget_low_s16(values)), vmull_high_s16(pairs, values));
#else
    const Ints pairs = (Ints)weights;
    return sum + (pairs << 16 >> 16) * static_cast<int16_t>(x) + (pairs >> 16) * (x >> 16);
#endif
}

// Adds the products of a unit, the values of x at x[t] + offset.
MPSEARCH_INLINE void add_unit(const uint8_t* weights,
                              const int16_t* const (&x)[kPositions],
                              int64_t offset,
                              Ints (&sums)[kPositions][kVectors]) {
#pragma GCC unroll 2
    for (int p = 0; p < 2; ++p)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
            const Shorts pairs = load_vector<Shorts>(weights + p * kQuadBytes + v * kVectorBytes);
#pragma GCC unroll 8
            for (int t = 0; t < kPositions; ++t)
                sums[t][v] = add_pairs(sums[t][v], pairs, load_word(x[t] + offset + 2 * p));
        }
}

#if MPSEARCH_QUADS
MPSEARCH_INLINE void add_unit(const uint8_t* weights,
                              const uint8_t* const (&x)[kPositions],
                              int64_t offset,
                              Ints (&sums)[kPositions][kVectors]) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
        const Bytes quads = load_vector<Bytes>(weights + v * kVectorBytes);
#pragma GCC unroll 8
        for (int t = 0; t < kPositions; ++t) sums[t][v] = add_quads(sums[t][v], quads, load_word(x[t] + offset));
    }
}
#endif

template <class Element>
static void multiply_as(const ConvJob& job, int64_t begin, int64_t end) {
    const bool gathered = job.order == Order::kGathered;
    const int shift = sum_shift(job);
    const float half_scale = job.input.scale * 0.5f;
    const Element zero = sizeof(Element) == 1 ? kPlus : 0;
    Element* windows =
        gathered ? reinterpret_cast<Element*>(job.scratch(job.n_units * kPositions * 4 * sizeof(Element))) : nullptr;
    for_each_block<Element>(
        job, begin, end, chunk(job),
        [&](int64_t tile, int64_t position, int64_t n, const Element*(&x)[kPositions]) __attribute__((always_inline)) {
            const Record record = record_of(job, tile);
            if (gathered) {
                gather(job, x, zero, windows);
                for (int t = 0; t < kPositions; ++t) x[t] = windows + 4 * t;
            }
            Lanes totals[kPositions][kVectors] = {};
            for (int64_t group = 0; group < job.n_groups; ++group) {
                Ints sums[kPositions][kVectors];
                for (int t = 0; t < kPositions; ++t) memcpy(sums[t], record.start + group * kTileRows, sizeof(sums[t]));
                const int64_t last = job.group_units[group + 1];
                const uint8_t* weights = record.weights + job.group_units[group] * kQuadBytes * sizeof(Element);
                for (int64_t unit = job.group_units[group]; unit < last; ++unit) {
                    add_unit(weights, x, gathered ? unit * kPositions * 4 : job.offsets[unit], sums);
                    weights += kQuadBytes * sizeof(Element);
                }
                for (int v = 0; v < kVectors; ++v) {
                    const Lanes scales = load_vector<Lanes>(record.scales + group * kTileRows + v * kVectorRows);
                    for (int t = 0; t < kPositions; ++t)
                        totals[t][v] += __builtin_convertvector(sums[t][v] << shift, Lanes) * scales;
                }
            }
            for (int v = 0; v < kVectors; ++v) {
                const Lanes bias = load_vector<Lanes>(record.bias + v * kVectorRows);
                for (int t = 0; t < kPositions; ++t) {
                    totals[t][v] = half_scale * totals[t][v];
                    if (job.bias) totals[t][v] += bias;
                }
            }
            store_block(job, tile, position, n, totals);
        });
}

// Floats to int8 codes: in int16, or + kPlus in a byte.
struct Quantize {
    InputGrid grid;

    __attribute__((always_inline)) Ints codes(Lanes x, int32_t plus) const {
        return quantized_bits(x, grid) - (kCodeBits - plus);
    }
    __attribute__((always_inline)) Ints byte(Lanes x) const { return codes(x, kPlus) & 0xff; }
    template <class Element>
    __attribute__((always_inline)) void vector(Lanes x, Element* to) const {
        typedef Element Elements __attribute__((vector_size(kVectorRows * sizeof(Element))));
        const Elements elements = __builtin_convertvector(codes(x, sizeof(Element) == 1 ? kPlus : 0), Elements);
        memcpy(to, &elements, sizeof(elements));
    }
    __attribute__((always_inline)) void quads(const Lanes (&x)[4], uint8_t (*to)[4]) const {
        const Ints low = byte(x[0]) | byte(x[1]) << 8;
        const Ints words = low | byte(x[2]) << 16 | byte(x[3]) << 24;
        memcpy(to, &words, sizeof(words));
    }
    __attribute__((always_inline)) void quads(const Lanes (&x)[4], int16_t (*to)[4]) const {
        const Ints low = (codes(x[0], 0) & 0xffff) | codes(x[1], 0) << 16;
        const Ints high = (codes(x[2], 0) & 0xffff) | codes(x[3], 0) << 16;
        for (int i = 0; i < kVectorRows; ++i) {
            const int32_t words[2] = {low[i], high[i]};
            memcpy(to[i], words, sizeof(words));
        }
    }
};

static void stage(const ConvJob& job, int64_t begin, int64_t end) {
    const Quantize quantize{job.input};
    if (takes_bytes(job))
        stage_map<uint8_t>(job, begin, end, quantize);
    else
        stage_map<int16_t>(job, begin, end, quantize);
}

static void clear(const ConvJob& job) {
    if (takes_bytes(job))
        clear_map<uint8_t>(job, static_cast<uint8_t>(kPlus + job.input.shift));
    else
        clear_map<int16_t>(job, static_cast<int16_t>(job.input.shift));
}

constexpr int32_t kSign = INT32_MIN;

// The bits of floats above 0 are ordered as they are, also as signed integers; those of floats below 0 are negative there.
static void range(const float* x, int64_t n, uint32_t (&ends)[2]) {
    Ints below[2] = {}, above[2] = {};
    for (int64_t i = 0; i < n; i += 2 * kVectorRows) {
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) {
            const int64_t left = n - i - j * kVectorRows;
            if (left <= 0) break;
            const Ints bits = (Ints)load_lanes(x + i + j * kVectorRows, left), turned = bits ^ kSign;
            below[j] = turned > below[j] ? turned : below[j];
            above[j] = bits > above[j] ? bits : above[j];
        }
    }
    int32_t most[2] = {};
    for (int j = 0; j < 2; ++j)
        for (int i = 0; i < kVectorRows; ++i) {
            most[0] = below[j][i] > most[0] ? below[j][i] : most[0];
            most[1] = above[j][i] > most[1] ? above[j][i] : most[1];
        }
    for (int end = 0; end < 2; ++end) ends[end] = static_cast<uint32_t>(most[end]);
}

static void multiply(const ConvJob& job, int64_t begin, int64_t end) {
#if MPSEARCH_QUADS
    if (takes_bytes(job)) return multiply_as<uint8_t>(job, begin, end);
#endif
    multiply_as<int16_t>(job, begin, end);
}

const ConvKernels conv_int8 = {
    .element_bytes = element_bytes,
    .record_bytes = record_bytes,
    .decode = decode,
    .range = range,
    .clear = clear,
    .stage = stage,
    .chunk = chunk,
    .multiply = multiply,
};

}  // namespace mpsearch::MPSEARCH_ISA
