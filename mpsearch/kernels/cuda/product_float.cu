// y = x W^T on tensor cores, x in float16, bfloat16 or (as three parts) float32; compiled once per width, MPSEARCH_BITS.
//
//     y[m, r] = sum over groups g of scale[r, g] * (sum over the columns c of g of (code[r, c] - zero[r, g]) * x[m, c])
//
// code - zero is an integer below 256 in size, so exact in both 16-bit formats, and its products with x are exact in the
// fragment's float32 sums. (1 bit: 2 * code - 2 * zero with half the scale, as the implied zero point is 0.5.) A code c
// becomes a float by magic: as the last byte of 1024 (float16) or 128 (bfloat16) it makes 1024 + c, from which 1024 + zero
// is taken; 8-bit codes become bfloat16 through float32's 2^23. Sums of groups are scaled and added in float32.
//
// The same kernel serves one token and many: the tensor cores are idle otherwise, and spare a lane all multiplying, so that
// its work is to unpack. A warp takes every n-th step of a strip, multiplies it with all tokens (8 columns at a time), and
// the block adds its warps' sums in order. The steps of all strips are shared evenly among blocks (stream-K); where that
// cuts a strip, both write partial sums, which `add_partial` adds in order: the same bits in every run.
//
// Bytes moved per weight: bits / 8, and a header of 64 or 128 for each 16 groups. Bound: memory, for as many tokens as the
// multiplying stays hidden (about 40 at 4 bits); for 1 and 2 bits the unpacking, 1.5 to 2 instructions a weight.
#include "api.h"
#include "product.cuh"

namespace mpsearch::cuda {
namespace {

constexpr int kMostThreads = 256;

struct Half {
    static MPSEARCH_DEVICE void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
        multiply_half(c, a, b0, b1);
    }
    static MPSEARCH_DEVICE uint32_t offset_of(uint32_t zero) { return (0x6400u | zero) * 0x10001u; }
    // Two codes of a quad, from the third on where `high`, less the zero point.
    static MPSEARCH_DEVICE uint32_t centred(uint32_t quad, bool high, uint32_t offset) {
        return subtract_half2(select_bytes(quad, 0x64646464u, high ? 0x4342 : 0x4140), offset);
    }
};

// Codes of 8 bits: 2^23 + code less 2^23 + zero leaves a float32 whose upper half is all of it.
template <int bits>
struct Bfloat {
    static constexpr uint32_t kLarge = 0x4b000000u;

    static MPSEARCH_DEVICE void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
        multiply_bfloat(c, a, b0, b1);
    }
    static MPSEARCH_DEVICE uint32_t offset_of(uint32_t zero) {
        return bits == 8 ? kLarge | zero : (0xc300u | zero) * 0x10001u;
    }
    static MPSEARCH_DEVICE uint32_t centred(uint32_t quad, bool high, uint32_t offset) {
        if constexpr (bits == 8) {
            const float first = float_of(select_bytes(quad, kLarge, high ? 0x7442 : 0x7440)) - float_of(offset);
            const float second = float_of(select_bytes(quad, kLarge, high ? 0x7443 : 0x7441)) - float_of(offset);
            return select_bytes(bits_of(first), bits_of(second), 0x7632);
        } else {
            return add_bfloat2(select_bytes(quad, 0x43434343u, high ? 0x4342 : 0x4140), offset);
        }
    }
};

// Where lane reads its 32 columns of x (64 bytes) of a step, for the first tile.
template <int n_tiles>
struct InputView {
    const uint8_t* lane_begin;
    int64_t tile_bytes, chunk_bytes;
    int column;  // of the result, in the first tile; direct only

    MPSEARCH_DEVICE InputView(const ProductJob& job, int lane) {
        const int g = lane / 4, t = lane % 4, classes = job.stream.classes;
        const int64_t token_bytes = int64_t{job.stream.n_blocks} * kBlockColumns * 2;
        column = g;
        lane_begin = job.x + (job.direct ? g / classes * token_bytes + t * (kBlockColumns * 2) : lane * 16);
        tile_bytes = job.direct ? kTileColumns / classes * token_bytes : 4 * kWarp * 16;
        chunk_bytes = job.direct ? 16 : kWarp * 16;
    }

    MPSEARCH_DEVICE void load(const ProductJob& job, int step, int tile, int lane, uint32_t (&x)[16]) const {
        bool there = true;
        int64_t at = int64_t{step} * n_tiles * (4 * kWarp * 16);
        if (job.direct) {
            const int classes = job.stream.classes, t = lane % 4, n = tile * kTileColumns + column;
            const int step_class = classes == 1 ? 0 : t / job.stream.group_blocks;
            there = n < job.n_tokens * classes && step_class == n % classes && place_of(job.stream, step, t).there;
            at = int64_t{first_block(job.stream, step)} * (kBlockColumns * 2);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            Bytes16 chunk = {};
            if (there) chunk = *reinterpret_cast<const Bytes16*>(lane_begin + at + tile * tile_bytes + i * chunk_bytes);
#pragma unroll
            for (int k = 0; k < 4; ++k) x[4 * i + k] = chunk.word[k];
        }
    }
};

// totals += the products of one step.
template <class Format, int bits, int n_tiles>
MPSEARCH_DEVICE void add_step(const ProductJob& job,
                              const InputView<n_tiles>& input,
                              const uint8_t* slot,
                              int step,
                              int lane,
                              float (&totals)[n_tiles][2][4]) {
    uint32_t doubled_zeros[4], weights[kQuads][2][4];
    load_zeros(slot, bits, lane, doubled_zeros);
    uint32_t packed[4][bits];
#pragma unroll
    for (int i = 0; i < bits; ++i) {
        const Bytes16 vector = *reinterpret_cast<const Bytes16*>(slot + (i * kWarp + lane) * 16);
#pragma unroll
        for (int r = 0; r < 4; ++r) packed[r][i] = vector.word[r];
    }
#pragma unroll
    for (int r = 0; r < 4; ++r) {
        uint32_t quads[kQuads];
        unpack_words<bits, bits == 1>(packed[r], quads);
        const uint32_t offset = Format::offset_of(bits == 1 ? doubled_zeros[r] : doubled_zeros[r] / 2);
#pragma unroll
        for (int q = 0; q < kQuads; ++q) {
            weights[q][r / 2][r % 2] = Format::centred(quads[q], false, offset);
            weights[q][r / 2][r % 2 + 2] = Format::centred(quads[q], true, offset);
        }
    }

    // Scales of the classes of the result's columns 2t and 2t + 1, of the lane's own 4 rows.
    float even[4], odd[4];
    load_scales(slot, bits, lane, job.stream.half_scales, even);
#pragma unroll
    for (int r = 0; r < 4; ++r) {
        if (bits == 1) even[r] *= 0.5f;
        odd[r] = even[r];
    }
    const int classes = job.stream.classes;
    if (classes > 1) {
        // Class c lies in lane t = c * group_blocks of the same rows.
        const int t = lane % 4, base = lane - t, blocks = job.stream.group_blocks;
        const int of_even = base + 2 * t % classes * blocks, of_odd = base + (2 * t + 1) % classes * blocks;
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            const float own = even[r];
            even[r] = shuffle(own, of_even);
            odd[r] = shuffle(own, of_odd);
        }
    }

#pragma unroll
    for (int tile = 0; tile < n_tiles; ++tile) {
        uint32_t x[16];
        input.load(job, step, tile, lane, x);
        float sums[2][4] = {};
#pragma unroll
        for (int q = 0; q < kQuads; ++q)
#pragma unroll
            for (int half = 0; half < 2; ++half) Format::multiply(sums[half], weights[q][half], x[2 * q], x[2 * q + 1]);
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float scale = i % 2 == 0 ? even[2 * half + i / 2] : odd[2 * half + i / 2];
                totals[tile][half][i] = fmaf(sums[half][i], scale, totals[tile][half][i]);
            }
    }
}

// Adds the warps' sums, and of a token its classes and parts (the smallest part first): y of a whole strip, else partial.
template <int n_tiles>
MPSEARCH_DEVICE void add_warps(const ProductJob& job, const float* sums, int64_t strip, int slot, bool whole) {
    const int n_warps = static_cast<int>(blockDim.x) / kWarp, apart = job.parts * job.stream.classes;
    for (int i = static_cast<int>(threadIdx.x); i < job.n_tokens * kStripRows; i += static_cast<int>(blockDim.x)) {
        const int token = i / kStripRows, row = i % kStripRows;
        float total = 0;
        for (int k = apart - 1; k >= 0; --k) {
            float sum = 0;
            for (int w = 0; w < n_warps; ++w)
                sum += sums[(w * n_tiles * kTileColumns + token * apart + k) * kSumStride + row];
            total += sum;
        }
        if (!whole)
            job.partial[((blockIdx.x * 2 + slot) * int64_t{job.n_tokens} + token) * kStripRows + row] = total;
        else if (strip * kStripRows + row < job.stream.rows)
            store_value(job, token, strip * kStripRows + row, total);
    }
}

template <int bits, int n_tiles>
int64_t warp_bytes(const Stream& stream) {
    const int64_t ring = ring_steps(bits) * step_bytes(bits, true, stream.half_scales);
    const int64_t sums = n_tiles * kTileColumns * kSumBytes;
    return ring > sums ? ring : sums;  // the sums take the ring's place when the ring is empty
}

template <class Format, int bits, int n_tiles>
__global__ void __launch_bounds__(n_tiles <= 2 ? 256 : 128, 2) multiply(const ProductJob job) {
    constexpr int ahead = ring_steps(bits) - 1;
    const Stream& stream = job.stream;
    const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
    const int n_warps = static_cast<int>(blockDim.x) / kWarp;
    const int slot_bytes = step_bytes(bits, true, stream.half_scales);
    const InputView<n_tiles> input(job, lane);
    uint8_t* ring = shared_memory() + warp * ring_steps(bits) * slot_bytes;
    float* sums = reinterpret_cast<float*>(shared_memory());

    const int64_t begin = range_begin(job, blockIdx.x), end = range_begin(job, blockIdx.x + 1);
    for (int64_t unit = begin; unit < end;) {
        const int64_t strip = unit / stream.n_steps;
        const int first = static_cast<int>(unit - strip * stream.n_steps);
        const int last = end - unit < stream.n_steps - first ? first + static_cast<int>(end - unit) : stream.n_steps;
        float totals[n_tiles][2][4] = {};
        int fetched = first + warp;
        const auto fetch_next = [&](int place) {
            if (fetched < last) fetch<bits, true>(stream, ring + place * slot_bytes, strip, fetched, lane);
            fetched += n_warps;
            end_copy_group();
        };
        for (int i = 0; i < ahead; ++i) fetch_next(i);
        int place = 0;
        for (int step = first + warp; step < last; step += n_warps) {
            fetch_next(place == 0 ? ahead : place - 1);
            wait_for_copies<ahead>();
            add_step<Format, bits, n_tiles>(job, input, ring + place * slot_bytes, step, lane, totals);
            place = place == ahead ? 0 : place + 1;
        }
        wait_for_copies<0>();
        sync_block();  // rings are empty
        const int g = lane / 4, t = lane % 4;
#pragma unroll
        for (int tile = 0; tile < n_tiles; ++tile)
#pragma unroll
            for (int half = 0; half < 2; ++half)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int column = (warp * n_tiles + tile) * kTileColumns + 2 * t + i % 2;
                    sums[column * kSumStride + 4 * g + 2 * half + i / 2] = totals[tile][half][i];
                }
        sync_block();
        const bool whole = first == 0 && last == stream.n_steps;
        add_warps<n_tiles>(job, sums, strip, unit == begin ? 0 : 1, whole);
        sync_block();  // sums are read
        unit += last - first;
    }
}

// y of the strips that several ranges share; one block a strip.
__global__ void add_partial(const ProductJob job) {
    const int64_t strip = blockIdx.x, n_steps = job.stream.n_steps, units = job.stream.n_strips * n_steps;
    const int64_t begin = strip * n_steps, end = begin + n_steps;
    int64_t range = begin * job.n_ranges / units;  // at or just before the first that reaches into the strip
    while (range_begin(job, range + 1) <= begin) ++range;
    if (range_begin(job, range) <= begin && range_begin(job, range + 1) >= end) return;  // whole: written already
    for (int i = static_cast<int>(threadIdx.x); i < job.n_tokens * kStripRows; i += static_cast<int>(blockDim.x)) {
        const int token = i / kStripRows, row = i % kStripRows;
        float total = 0;
        for (int64_t r = range; r < job.n_ranges && range_begin(job, r) < end; ++r) {
            const int slot = range_begin(job, r) / n_steps == strip ? 0 : 1;  // a range's first strip, or its last
            total += job.partial[((r * 2 + slot) * job.n_tokens + token) * kStripRows + row];
        }
        if (strip * kStripRows + row < job.stream.rows) store_value(job, token, strip * kStripRows + row, total);
    }
}

template <class Format, int bits, int n_tiles>
int launch_multiply(const ProductJob& job, uintptr_t stream) {
    const int64_t each = warp_bytes<bits, n_tiles>(job.stream);
    const int n_warps = n_tiles <= 2 && 8 * each <= most_shared_bytes() ? 8 : 4;
    const int64_t shared = n_warps * each;
    const int error = launch(multiply<Format, bits, n_tiles>, job.n_ranges, n_warps * kWarp, shared, stream, job);
    if (error || job.n_ranges == job.stream.n_strips) return error;
    return launch(add_partial, job.stream.n_strips, kMostThreads, 0, stream, job);
}

template <class Format, int bits>
int launch_tiles(const ProductJob& job, int n_tiles, uintptr_t stream) {
    if (n_tiles == 1) return launch_multiply<Format, bits, 1>(job, stream);
    if (n_tiles == 2) return launch_multiply<Format, bits, 2>(job, stream);
    if (n_tiles == 4) return launch_multiply<Format, bits, 4>(job, stream);
    return launch_multiply<Format, bits, 8>(job, stream);
}

}  // namespace

template <int bits>
int multiply_float(const ProductJob& job, int n_tiles, uintptr_t stream) {
    if (job.dtype == kFloat16) return launch_tiles<Half, bits>(job, n_tiles, stream);
    return launch_tiles<Bfloat<bits>, bits>(job, n_tiles, stream);
}

template int multiply_float<MPSEARCH_BITS>(const ProductJob& job, int n_tiles, uintptr_t stream);

}  // namespace mpsearch::cuda
