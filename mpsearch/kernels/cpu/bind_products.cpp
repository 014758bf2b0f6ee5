// The shell of the matrix products and embeddings: packing a weight for them, rotating their input, and multiplying.
#include <algorithm>
#include <atomic>

#include "bindings.h"
#include "threads.h"

namespace mpsearch {
namespace {

// What an item costs on one thread, for deciding how many threads are worth waking (measured, rounded).
constexpr double kNsPerRepackedCode = 0.2;
constexpr double kNsPerStagedValue = 0.5;      // of x
constexpr double kNsPerStreamedWeight = 0.03;  // read and unpacked
constexpr double kNsPerProduct = 0.008;        // a weight times a token
constexpr double kNsPerRotatedValue = 0.3;
constexpr double kNsPerEmbeddedValue = 0.5;

WeightJob weight_job(const WeightArguments& arguments) {
    const WeightFormat& format = arguments.format;
    return {
        .codes = arguments.codes,
        .scales = arguments.scales,
        .zero_points = arguments.zero_points,
        .packed = arguments.packed,
        .rows = format.rows,
        .columns = format.columns,
        .group_size = format.group_size,
        .n_groups = ceil_div(format.columns, format.group_size),
        .group_blocks = ceil_div(format.group_size, 32),
        .bits = format.bits,
        .half_scales = format.half_scales,
    };
}

double tile_ns(const WeightJob& job) {
    return 16 * kNsPerRepackedCode * static_cast<double>(job.columns);
}

void pack_weight(const Kernels& kernels, const WeightArguments& arguments, int n_threads) {
    const WeightJob job = weight_job(arguments);
    use_huge_pages(job.packed, arguments.packed_bytes);
    std::atomic<int> seen{0};
    parallel_for(n_threads, ceil_div(job.rows, 16), tile_ns(job),
                 [&](int64_t begin, int64_t end) { seen.fetch_or(kernels.pack_weight(job, begin, end)); });
    *arguments.seen = seen.load();
}

void unpack_weight(const Kernels& kernels, const WeightArguments& arguments, int n_threads) {
    const WeightJob job = weight_job(arguments);
    use_huge_pages(job.codes, job.rows * job.columns);
    parallel_for(n_threads, ceil_div(job.rows, 16), tile_ns(job),
                 [&](int64_t begin, int64_t end) { kernels.unpack_weight(job, begin, end); });
}

// A job without x and without tokens.
LinearJob linear_job(const uint8_t* packed, const WeightFormat& format) {
    LinearJob job{};
    job.packed = packed;
    job.rows = format.rows;
    job.columns = format.columns;
    job.group_size = format.group_size;
    job.n_groups = ceil_div(format.columns, format.group_size);
    job.group_blocks = ceil_div(format.group_size, 32);
    job.bits = format.bits;
    job.half_scales = format.half_scales;
    return job;
}

void linear(const Kernels& kernels, const LinearArguments& arguments, int n_threads) {
    const bool int8_input = arguments.int8_input;
    LinearJob job = linear_job(arguments.packed, arguments.format);
    job.bias = arguments.bias;
    job.input = arguments.input;
    const int64_t n_tiles = ceil_div(job.rows, 16), padded_columns = job.n_groups * job.group_blocks * 32;
    for (int64_t done = 0; done < arguments.n_tokens; done += kMostTokens) {
        job.x = static_cast<const float*>(arguments.x) + done * job.columns;
        job.y = static_cast<float*>(arguments.y) + done * job.rows;
        job.n_tokens = std::min(arguments.n_tokens - done, kMostTokens);
        job.tokens_per_block = kernels.tokens_per_block(job.n_tokens, int8_input);
        job.n_token_blocks = ceil_div(job.n_tokens, job.tokens_per_block);
        const int64_t padded_tokens = job.n_token_blocks * job.tokens_per_block;
        const int64_t value_bytes = int8_input ? 1 : 4;
        uint8_t* memory = scratch(kLinearSlot, padded_tokens * (padded_columns * value_bytes + 4 + job.n_groups * 4));
        job.staged = memory;
        memory += padded_tokens * padded_columns * value_bytes;
        job.token_scales = reinterpret_cast<float*>(memory);
        job.token_sums = reinterpret_cast<int32_t*>(memory + padded_tokens * 4);
        const double stage_ns = kNsPerStagedValue * static_cast<double>(padded_columns * job.tokens_per_block);
        const double weight_ns = kNsPerStreamedWeight + kNsPerProduct * static_cast<double>(job.n_tokens);
        parallel_for(n_threads, job.n_token_blocks, stage_ns, [&](int64_t begin, int64_t end) {
            (int8_input ? kernels.stage_int8 : kernels.stage)(job, begin, end);
        });
        parallel_for(
            n_threads, n_tiles, weight_ns * 16 * static_cast<double>(padded_columns),
            [&](int64_t begin, int64_t end) { (int8_input ? kernels.linear_a8 : kernels.linear)(job, begin, end); });
    }
}

void embedding(const Kernels& kernels, const EmbeddingArguments& arguments, int n_threads) {
    const auto index = [&](int64_t i) {
        return arguments.wide_indices ? static_cast<const int64_t*>(arguments.indices)[i]
                                      : int64_t{static_cast<const int32_t*>(arguments.indices)[i]};
    };
    for (int64_t i = 0; i < arguments.n_indices; ++i) {
        if (index(i) >= 0 && index(i) < arguments.format.rows) continue;
        *arguments.bad_place = i;
        return;
    }
    const LinearJob job = linear_job(arguments.packed, arguments.format);
    const double row_ns = kNsPerEmbeddedValue * static_cast<double>(job.columns);
    parallel_for(n_threads, arguments.n_indices, row_ns, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) kernels.embed(job, index(i), arguments.y + i * job.columns);
    });
}

void rotate(const Kernels& kernels, const RotateArguments& job, int n_threads) {
    parallel_for(n_threads, job.rows, kNsPerRotatedValue * static_cast<double>(job.columns),
                 [&](int64_t begin, int64_t end) { kernels.rotate(job, begin, end); });
}

}  // namespace

void bind_products(nanobind::module_& module) {
    define<WeightArguments, pack_weight>(module, "pack_weight", "To the products' streaming layout.");
    define<WeightArguments, unpack_weight>(module, "unpack_weight", "From the products' streaming layout.");
    define<LinearArguments, linear>(module, "linear", "y = x W^T + bias with W in the products' streaming layout.");
    define<EmbeddingArguments, embedding>(module, "embedding", "Rows of a weight in the products' streaming layout.");
    define<RotateArguments, rotate>(module, "rotate", "Each row times a Hadamard matrix of signs, or its inverse.");
}

}  // namespace mpsearch
