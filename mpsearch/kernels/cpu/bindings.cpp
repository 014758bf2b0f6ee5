// The shell: takes addresses and sizes (the face has checked the tensors), lets go of the GIL, shares the work among
// threads.
//
// Arguments are `data_ptr()` integers, because a typed array argument costs more than a small layer's work; 0 is "not
// there".
#include "bindings.h"

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <atomic>
#include <string>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "dispatch.h"
#include "threads.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace mpsearch {

// A fresh tensor of 100 MB costs more in page faults, 4 KB each, than its values cost to compute: ask for 2 MB pages.
// (With them, stores past the caches were measured slower: a page that was just cleared is still cached when it is
// written.)
constexpr int64_t kHugePageBytes = int64_t{2} << 20;

void use_huge_pages(uintptr_t address, int64_t bytes) {
#if defined(__linux__)
    const uintptr_t begin = (address + kHugePageBytes - 1) / kHugePageBytes * kHugePageBytes;
    const uintptr_t end = (address + bytes) / kHugePageBytes * kHugePageBytes;
    if (address && begin < end)
        madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a wish: may fail
#else
    (void)address, (void)bytes;
#endif
}

namespace {

// What an item costs on one thread, for deciding how many threads are worth waking (measured, rounded).
constexpr double kNsPerWeight = 0.25;          // one pass over a weight
constexpr double kNsPerWeightAndRatio = 0.12;  // one clip ratio tried on a weight
constexpr double kNsPerBlock = 0.35;           // 8 codes packed or unpacked

bool quantize(int backend,
              uintptr_t weight,
              uintptr_t importance,
              uintptr_t ratios,
              uintptr_t codes,
              uintptr_t scales,
              uintptr_t zero_points,
              int64_t rows,
              int64_t columns,
              int64_t group_size,
              int64_t rows_per_importance,
              int64_t n_ratios,
              int bits,
              bool symmetric,
              bool half_scales,
              int n_threads) {
    const int64_t n_groups = (columns + group_size - 1) / group_size;
    const QuantizeJob job{at<const float>(weight),
                          at<const float>(importance),
                          at<const float>(ratios),
                          at<uint8_t>(codes),
                          at<void>(scales),
                          at<uint8_t>(zero_points),
                          columns,
                          group_size,
                          n_groups,
                          rows_per_importance,
                          n_ratios,
                          bits,
                          symmetric,
                          half_scales};
    const double group_ns = static_cast<double>(std::min(group_size, columns)) *
                            (kNsPerWeight + kNsPerWeightAndRatio * static_cast<double>(n_ratios));
    const Kernels& kernels = backends().at(backend).kernels;
    use_huge_pages(codes, rows * columns);
    std::atomic<bool> finite{true};
    parallel_for(n_threads, rows * n_groups, group_ns, [&](int64_t begin, int64_t end) {
        if (!kernels.quantize(job, begin, end)) finite.store(false, std::memory_order_relaxed);
    });
    return finite.load();
}

void dequantize(int backend,
                uintptr_t packed,
                uintptr_t scales,
                uintptr_t zero_points,
                uintptr_t weight,
                int64_t rows,
                int64_t columns,
                int64_t group_size,
                int bits,
                bool half_scales,
                int n_threads) {
    const int64_t n_groups = (columns + group_size - 1) / group_size;
    const DequantizeJob job{at<const uint8_t>(packed),
                            at<const void>(scales),
                            at<const uint8_t>(zero_points),
                            at<float>(weight),
                            rows,
                            columns,
                            group_size,
                            n_groups,
                            bits,
                            half_scales};
    const Kernels& kernels = backends().at(backend).kernels;
    use_huge_pages(weight, rows * columns * 4);
    parallel_for(n_threads, rows * n_groups, kNsPerWeight * static_cast<double>(std::min(group_size, columns)),
                 [&](int64_t begin, int64_t end) { kernels.dequantize(job, begin, end); });
}

int pack(int backend, uintptr_t codes, uintptr_t packed, int64_t numel, int bits, int n_threads) {
    const Kernels& kernels = backends().at(backend).kernels;
    use_huge_pages(packed, (numel * bits + 7) / 8);
    std::atomic<int> seen{0};
    parallel_for(n_threads, (numel + 7) / 8, kNsPerBlock, [&](int64_t begin, int64_t end) {
        seen.fetch_or(kernels.pack(at<const uint8_t>(codes), at<uint8_t>(packed), numel, bits, begin, end));
    });
    return seen.load();
}

void unpack(int backend, uintptr_t packed, uintptr_t codes, int64_t numel, int bits, int n_threads) {
    const Kernels& kernels = backends().at(backend).kernels;
    use_huge_pages(codes, numel);
    parallel_for(n_threads, (numel + 7) / 8, kNsPerBlock, [&](int64_t begin, int64_t end) {
        kernels.unpack(at<const uint8_t>(packed), at<uint8_t>(codes), numel, bits, begin, end);
    });
}

std::vector<std::string> names() {
    std::vector<std::string> all;
    for (const Backend& backend : backends()) all.push_back(backend.name);
    return all;
}

}  // namespace
}  // namespace mpsearch

NB_MODULE(_cpu, module) {
    using no_gil = nb::call_guard<nb::gil_scoped_release>;
    module.doc() = "The compiled kernels; called through mpsearch.kernels only.";
    module.def("backends", &mpsearch::names, "Instruction sets that this machine runs, slowest first.");
    module.def("quantize", &mpsearch::quantize, no_gil(), "backend"_a, "weight"_a, "importance"_a, "ratios"_a,
               "codes"_a, "scales"_a, "zero_points"_a, "rows"_a, "columns"_a, "group_size"_a, "rows_per_importance"_a,
               "n_ratios"_a, "bits"_a, "symmetric"_a, "half_scales"_a, "n_threads"_a,
               "Quantizes [rows, columns]; False where a weight or a scale is not finite.");
    module.def("dequantize", &mpsearch::dequantize, no_gil(), "backend"_a, "packed"_a, "scales"_a, "zero_points"_a,
               "weight"_a, "rows"_a, "columns"_a, "group_size"_a, "bits"_a, "half_scales"_a, "n_threads"_a,
               "Packed codes to floats.");
    module.def("pack", &mpsearch::pack, no_gil(), "backend"_a, "codes"_a, "packed"_a, "numel"_a, "bits"_a,
               "n_threads"_a, "Packs codes; returns them or-ed together.");
    module.def("unpack", &mpsearch::unpack, no_gil(), "backend"_a, "packed"_a, "codes"_a, "numel"_a, "bits"_a,
               "n_threads"_a, "Packed codes to one byte each.");
    mpsearch::bind_products(module);
    mpsearch::bind_conv(module);
    mpsearch::bind_feedback(module);
    module.def("use_huge_pages", &mpsearch::use_huge_pages, "address"_a, "bytes"_a,
               "Asks for large pages where a tensor that is about to be written lies.");
}
