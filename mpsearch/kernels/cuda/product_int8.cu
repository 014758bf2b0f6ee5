// y = x W^T on tensor cores, x quantized to int8 for each token (stage.cu); compiled once per width, MPSEARCH_BITS.
//
//     D[m, r, g] = sum over the columns c of group g of (2 * code[r, c] - 2 * zero[r, g]) * x8[m, c]       exact, int32
//     y[m, r]    = (token_scale[m] * 0.5) * (sum over g, ascending, of float(D[m, r, g]) * scale[r, g])
//
// every operation on floats rounded by itself, so that the bits are those of every other backend. D is 2 * S - 2 * zero * X:
// S, the sum of code * x8, is what the tensor cores make of codes as they come from the stream; X, the sum of x8, was made in
// staging.
//
// A block handles a strip of 32 rows for all tokens, in rounds. In a round each warp takes a group (or a step, where that
// holds several groups) and leaves its sums in shared memory; then each thread adds what the round's groups give to its
// rows and tokens, in order. Few long groups are shared by all warps instead, whose exact sums are added first. Weights come
// through the same ring as in the float product and are fetched across rounds.
//
// Bytes moved per weight: bits / 8, and a header of 64 or 128 for each 16 groups. Bound: memory, then the rounds' barriers.
#include "product.cuh"

namespace mpsearch::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarp;

// Which step a warp takes as its k-th; -1: none.
struct Rounds {
    int n_units, unit_steps;  // groups, or steps of several groups; steps of one
    int steps;                // of a warp in a round
    int n_rounds;
    bool shared;  // all warps take the same unit

    MPSEARCH_DEVICE explicit Rounds(const Stream& stream) {
        n_units = stream.classes == 1 ? stream.n_groups : stream.n_steps;
        unit_steps = stream.classes == 1 ? stream.group_steps : 1;
        shared = unit_steps >= 2 * kWarps;
        steps = shared ? (unit_steps + kWarps - 1) / kWarps : unit_steps;
        n_rounds = shared ? n_units : (n_units + kWarps - 1) / kWarps;
    }

    MPSEARCH_DEVICE int step(int k, int warp) const {
        const int round = k / steps, i = k - round * steps;
        const int unit = shared ? round : round * kWarps + warp, in_unit = shared ? i * kWarps + warp : i;
        return unit < n_units && in_unit < unit_steps ? unit * unit_steps + in_unit : -1;
    }
};

// sums += the products of one step.
template <int bits, int n_tiles>
MPSEARCH_DEVICE void add_step(
    const ProductJob& job, const uint8_t* slot, int step, int lane, int32_t (&sums)[n_tiles][2][4]) {
    uint32_t packed[4][bits], quads[4][kQuads];
#pragma unroll
    for (int i = 0; i < bits; ++i) {
        const Bytes16 vector = *reinterpret_cast<const Bytes16*>(slot + (i * kWarp + lane) * 16);
#pragma unroll
        for (int r = 0; r < 4; ++r) packed[r][i] = vector.word[r];
    }
#pragma unroll
    for (int r = 0; r < 4; ++r) unpack_words<bits, false>(packed[r], quads[r]);
#pragma unroll
    for (int tile = 0; tile < n_tiles; ++tile) {
        const uint8_t* from = job.x + ((int64_t{step} * n_tiles + tile) * 2 * kWarp + lane) * 16;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const Bytes16 x = *reinterpret_cast<const Bytes16*>(from + i * kWarp * 16);
#pragma unroll
            for (int q = 0; q < 4; q += 2)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int at = 4 * i + q, r = 2 * half;
                    const uint32_t weights[4] = {quads[r][at], quads[r + 1][at], quads[r][at + 1],
                                                 quads[r + 1][at + 1]};
                    multiply_bytes(sums[tile][half], weights, x.word[q], x.word[q + 1]);
                }
        }
    }
}

// total + what a group gives to one token and row, of which `sum` is S.
MPSEARCH_DEVICE float add_group(const ProductJob& job, float total, int32_t sum, int64_t row, int token, int group) {
    const Stream& stream = job.stream;
    const uint8_t* record = record_of(stream, row / kTileRows, group);
    const int64_t at = row % kTileRows;
    const float scale = stream.half_scales ? float_from_half(reinterpret_cast<const uint16_t*>(record)[at])
                                           : reinterpret_cast<const float*>(record)[at];
    const int32_t doubled_zero = reinterpret_cast<const int16_t*>(record + stream.header_bytes / 2)[at];
    const int32_t exact = 2 * sum - doubled_zero * job.token_sums[int64_t{token} * stream.n_groups + group];
    return total + static_cast<float>(exact) * scale;
}

template <int bits, int n_tiles>
__global__ void __launch_bounds__(kThreads) multiply(const ProductJob job) {
    constexpr int ahead = ring_steps(bits) - 1, n_columns = n_tiles * kTileColumns;
    const Stream& stream = job.stream;
    const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
    const int slot_bytes = step_bytes(bits, false, false), classes = stream.classes;
    uint8_t* ring = shared_memory() + warp * ring_steps(bits) * slot_bytes;
    int32_t* two_sums = reinterpret_cast<int32_t*>(shared_memory() + kWarps * ring_steps(bits) * slot_bytes);
    const int64_t strip = blockIdx.x, row = strip * kStripRows + lane;  // the row that this thread adds up
    const Rounds rounds(stream);
    const int n_steps = rounds.n_rounds * rounds.steps;

    int fetched = 0;
    const auto fetch_next = [&](int place) {
        const int step = fetched < n_steps ? rounds.step(fetched, warp) : -1;
        if (step >= 0) fetch<bits, false>(stream, ring + place * slot_bytes, strip, step, lane);
        ++fetched;
        end_copy_group();
    };
    for (int i = 0; i < ahead; ++i) fetch_next(i);
    constexpr int tokens_each = n_columns / kWarps;
    float totals[tokens_each] = {};  // of tokens warp, warp + kWarps, ...
    int place = 0;
    for (int round = 0; round < rounds.n_rounds; ++round) {
        // Rounds take turns in shared memory, so that one barrier each is enough.
        int32_t* shared_sums = two_sums + round % 2 * (kWarps * n_columns * kSumStride);
        int32_t sums[n_tiles][2][4] = {};
        for (int i = 0; i < rounds.steps; ++i) {
            fetch_next(place == 0 ? ahead : place - 1);
            wait_for_copies<ahead>();
            const int step = rounds.step(round * rounds.steps + i, warp);
            if (step >= 0) add_step<bits, n_tiles>(job, ring + place * slot_bytes, step, lane, sums);
            place = place == ahead ? 0 : place + 1;
        }
        const int g = lane / 4, t = lane % 4;
#pragma unroll
        for (int tile = 0; tile < n_tiles; ++tile)
#pragma unroll
            for (int half = 0; half < 2; ++half)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int column = (warp * n_tiles + tile) * kTileColumns + 2 * t + i % 2;
                    shared_sums[column * kSumStride + 4 * g + 2 * half + i / 2] = sums[tile][half][i];
                }
        sync_block();
#pragma unroll
        for (int i = 0; i < tokens_each; ++i) {
            const int token = warp + i * kWarps;
            if (token >= job.n_tokens || row >= stream.rows) continue;
            const int32_t* from = shared_sums + token * classes * kSumStride + lane;
            if (rounds.shared) {
                int32_t sum = 0;
                for (int w = 0; w < kWarps; ++w) sum += from[w * n_columns * kSumStride];
                totals[i] = add_group(job, totals[i], sum, row, token, round);
                continue;
            }
            for (int first = 0; first < kWarps * classes; first += kWarps) {  // some at a time, whose loads overlap
#pragma unroll
                for (int k = 0; k < kWarps; ++k) {
                    const int at = first + k, group = round * kWarps * classes + at;
                    const int32_t sum = from[(at / classes * n_columns + at % classes) * kSumStride];
                    if (group < stream.n_groups) totals[i] = add_group(job, totals[i], sum, row, token, group);
                }
            }
        }
    }
    wait_for_copies<0>();
#pragma unroll
    for (int i = 0; i < tokens_each; ++i) {
        const int token = warp + i * kWarps;
        if (token < job.n_tokens && row < stream.rows)
            store_value(job, token, row, (job.token_scales[token] * 0.5f) * totals[i]);
    }
}

template <int bits, int n_tiles>
int launch_multiply(const ProductJob& job, uintptr_t stream) {
    const int64_t ring = int64_t{ring_steps(bits)} * step_bytes(bits, false, false);
    const int64_t shared = kWarps * (ring + 2 * n_tiles * kTileColumns * kSumBytes);
    return launch(multiply<bits, n_tiles>, job.stream.n_strips, kThreads, shared, stream, job);
}

}  // namespace

template <int bits>
int multiply_int8(const ProductJob& job, int n_tiles, uintptr_t stream) {
    return n_tiles == 1 ? launch_multiply<bits, 1>(job, stream) : launch_multiply<bits, 4>(job, stream);
}

template int multiply_int8<MPSEARCH_BITS>(const ProductJob& job, int n_tiles, uintptr_t stream);

}  // namespace mpsearch::cuda
