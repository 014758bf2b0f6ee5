// The shell of the matrix products: packing a weight for them, rotating their input, and multiplying.
#include <algorithm>
#include <atomic>
#include <memory>

#include "bindings.h"
#include "dispatch.h"
#include "threads.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace mpsearch {

namespace {

// What an item costs on one thread, for deciding how many threads are worth waking (measured, rounded).
constexpr double kNsPerRepackedCode = 0.2;
constexpr double kNsPerStagedValue = 0.5;      // of x
constexpr double kNsPerStreamedWeight = 0.03;  // read and unpacked
constexpr double kNsPerProduct = 0.008;        // a weight times a token
constexpr double kNsPerRotatedValue = 0.3;

WeightJob weight_job(uintptr_t codes,
                     uintptr_t scales,
                     uintptr_t zero_points,
                     uintptr_t packed,
                     int64_t rows,
                     int64_t columns,
                     int64_t group_size,
                     int bits,
                     bool half_scales) {
    return {at<uint8_t>(codes),
            at<void>(scales),
            at<uint8_t>(zero_points),
            at<uint8_t>(packed),
            rows,
            columns,
            group_size,
            (columns + group_size - 1) / group_size,
            (group_size + 31) / 32,
            bits,
            half_scales};
}

int pack_weight(int backend,
                uintptr_t codes,
                uintptr_t scales,
                uintptr_t zero_points,
                uintptr_t packed,
                int64_t packed_bytes,
                int64_t rows,
                int64_t columns,
                int64_t group_size,
                int bits,
                bool half_scales,
                int n_threads) {
    const Kernels& kernels = backends().at(backend).kernels;
    const WeightJob job = weight_job(codes, scales, zero_points, packed, rows, columns, group_size, bits, half_scales);
    use_huge_pages(packed, packed_bytes);
    std::atomic<int> seen{0};
    parallel_for(n_threads, (rows + 15) / 16, 16 * kNsPerRepackedCode * static_cast<double>(columns),
                 [&](int64_t begin, int64_t end) { seen.fetch_or(kernels.pack_weight(job, begin, end)); });
    return seen.load();
}

void unpack_weight(int backend,
                   uintptr_t codes,
                   uintptr_t scales,
                   uintptr_t zero_points,
                   uintptr_t packed,
                   int64_t rows,
                   int64_t columns,
                   int64_t group_size,
                   int bits,
                   bool half_scales,
                   int n_threads) {
    const Kernels& kernels = backends().at(backend).kernels;
    const WeightJob job = weight_job(codes, scales, zero_points, packed, rows, columns, group_size, bits, half_scales);
    use_huge_pages(codes, rows * columns);
    parallel_for(n_threads, (rows + 15) / 16, 16 * kNsPerRepackedCode * static_cast<double>(columns),
                 [&](int64_t begin, int64_t end) { kernels.unpack_weight(job, begin, end); });
}

// Scratch of the calling thread, kept for the next call: a fresh piece costs page faults each time.
uint8_t* scratch(size_t bytes) {
    static thread_local std::unique_ptr<uint8_t[]> memory;
    static thread_local size_t size = 0;
    if (bytes + 63 > size) {
        memory.reset();  // before the new piece is asked for
        size = 0;
        memory.reset(new uint8_t[bytes + 63]);
        size = bytes + 63;
    }
    return at<uint8_t>((reinterpret_cast<uintptr_t>(memory.get()) + 63) / 64 * 64);
}

void linear(int backend,
            uintptr_t x,
            uintptr_t packed,
            uintptr_t bias,
            uintptr_t y,
            int64_t n_tokens,
            int64_t rows,
            int64_t columns,
            int64_t group_size,
            int bits,
            bool half_scales,
            bool int8_input,
            double input_scale,
            int largest_code,
            int zero_point,
            int n_threads) {
    const Kernels& kernels = backends().at(backend).kernels;
    LinearJob job{};
    job.packed = at<const uint8_t>(packed);
    job.bias = at<const float>(bias);
    job.rows = rows;
    job.columns = columns;
    job.group_size = group_size;
    job.n_groups = (columns + group_size - 1) / group_size;
    job.group_blocks = (group_size + 31) / 32;
    job.bits = bits;
    job.half_scales = half_scales;
    job.input = {static_cast<float>(input_scale), largest_code, zero_point};
    const int64_t n_tiles = (rows + 15) / 16, padded_columns = job.n_groups * job.group_blocks * 32;
    for (int64_t done = 0; done < n_tokens; done += kMostTokens) {
        job.x = at<const float>(x) + done * columns;
        job.y = at<float>(y) + done * rows;
        job.n_tokens = std::min(n_tokens - done, kMostTokens);
        job.tokens_per_block = kernels.tokens_per_block(job.n_tokens, int8_input);
        job.n_token_blocks = (job.n_tokens + job.tokens_per_block - 1) / job.tokens_per_block;
        const int64_t padded_tokens = job.n_token_blocks * job.tokens_per_block;
        const int64_t value_bytes = int8_input ? 1 : 4;
        uint8_t* memory = scratch(padded_tokens * (padded_columns * value_bytes + 4 + job.n_groups * 4));
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

void rotate(
    int backend, uintptr_t x, uintptr_t factors, uintptr_t y, int64_t rows, int64_t columns, bool back, int n_threads) {
    const Kernels& kernels = backends().at(backend).kernels;
    const RotateJob job{at<const float>(x), at<const float>(factors), at<float>(y), columns, back};
    parallel_for(n_threads, rows, kNsPerRotatedValue * static_cast<double>(columns),
                 [&](int64_t begin, int64_t end) { kernels.rotate(job, begin, end); });
}

}  // namespace

void bind_products(nb::module_& module) {
    using no_gil = nb::call_guard<nb::gil_scoped_release>;
    module.def(
        "pack_weight", &pack_weight, no_gil(), "backend"_a, "codes"_a, "scales"_a, "zero_points"_a, "packed"_a,
        "packed_bytes"_a, "rows"_a, "columns"_a, "group_size"_a, "bits"_a, "half_scales"_a, "n_threads"_a,
        "To the products' streaming layout; returns the codes or-ed together, and 256 where a scale is not finite.");
    module.def("unpack_weight", &unpack_weight, no_gil(), "backend"_a, "codes"_a, "scales"_a, "zero_points"_a,
               "packed"_a, "rows"_a, "columns"_a, "group_size"_a, "bits"_a, "half_scales"_a, "n_threads"_a,
               "From the products' streaming layout.");
    module.def("linear", &linear, no_gil(), "backend"_a, "x"_a, "packed"_a, "bias"_a, "y"_a, "n_tokens"_a, "rows"_a,
               "columns"_a, "group_size"_a, "bits"_a, "half_scales"_a, "int8_input"_a, "input_scale"_a,
               "largest_code"_a, "zero_point"_a, "n_threads"_a,
               "y = x W^T + bias with W in the products' streaming layout.");
    module.def("rotate", &rotate, no_gil(), "backend"_a, "x"_a, "factors"_a, "y"_a, "rows"_a, "columns"_a, "back"_a,
               "n_threads"_a, "Each row times a Hadamard matrix of signs, or its inverse.");
}

}  // namespace mpsearch
