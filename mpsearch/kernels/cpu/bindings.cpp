// The shell: takes a struct of addresses and sizes (the face has checked the tensors), lets go of the GIL, shares the work
// among threads.
//
// Addresses are `data_ptr()` integers, because a typed array argument costs more than a small layer's work.
#include "bindings.h"

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <atomic>
#include <memory>
#include <string>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "threads.h"

namespace mpsearch {

// A fresh tensor of 100 MB costs more in page faults, 4 KB each, than its values cost to compute: ask for 2 MB pages.
// (With them, stores past the caches were measured slower: a page that was just cleared is still cached when it is
// written.)
constexpr int64_t kHugePageBytes = int64_t{2} << 20;

void use_huge_pages(const void* memory, int64_t bytes) {
#if defined(__linux__)
    const auto address = reinterpret_cast<uintptr_t>(memory);
    const uintptr_t begin = (address + kHugePageBytes - 1) / kHugePageBytes * kHugePageBytes;
    const uintptr_t end = (address + bytes) / kHugePageBytes * kHugePageBytes;
    if (address && begin < end)
        madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a wish: may fail
#else
    (void)memory, (void)bytes;
#endif
}

uint8_t* scratch(Slot slot, size_t bytes) {
    struct Piece {
        std::unique_ptr<uint8_t[]> memory;
        size_t size = 0;
    };
    static thread_local Piece pieces[kSlots];
    Piece& piece = pieces[slot];
    if (bytes + 63 > piece.size) {
        piece.memory.reset();  // before the new piece is asked for
        piece.size = 0;
        piece.memory.reset(new uint8_t[bytes + 63]);
        piece.size = bytes + 63;
    }
    return reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(piece.memory.get()) + 63) / 64 * 64);
}

namespace {

// What an item costs on one thread, for deciding how many threads are worth waking (measured, rounded).
constexpr double kNsPerWeight = 0.25;          // one pass over a weight
constexpr double kNsPerWeightAndRatio = 0.12;  // one clip ratio tried on a weight
constexpr double kNsPerBlock = 0.35;           // 8 codes packed or unpacked

void quantize(const Kernels& kernels, const QuantizeArguments& job, int n_threads) {
    const double group_ns = static_cast<double>(std::min(job.group_size, job.columns)) *
                            (kNsPerWeight + kNsPerWeightAndRatio * static_cast<double>(job.n_ratios));
    use_huge_pages(job.codes, job.rows * job.columns);
    std::atomic<bool> finite{true};
    parallel_for(n_threads, job.rows * job.n_groups, group_ns, [&](int64_t begin, int64_t end) {
        if (!kernels.quantize(job, begin, end)) finite.store(false, std::memory_order_relaxed);
    });
    if (!finite.load()) *job.not_finite = 1;
}

void dequantize(const Kernels& kernels, const DequantizeArguments& job, int n_threads) {
    use_huge_pages(job.weight, job.rows * job.columns * 4);
    const double group_ns = kNsPerWeight * static_cast<double>(std::min(job.group_size, job.columns));
    parallel_for(n_threads, job.rows * job.n_groups, group_ns,
                 [&](int64_t begin, int64_t end) { kernels.dequantize(job, begin, end); });
}

void pack(const Kernels& kernels, const PackArguments& job, int n_threads) {
    use_huge_pages(job.target, ceil_div(job.numel * job.bits, 8));
    std::atomic<int> seen{0};
    parallel_for(n_threads, ceil_div(job.numel, 8), kNsPerBlock,
                 [&](int64_t begin, int64_t end) { seen.fetch_or(kernels.pack(job, begin, end)); });
    *job.seen = seen.load();
}

void unpack(const Kernels& kernels, const PackArguments& job, int n_threads) {
    use_huge_pages(job.target, job.numel);
    parallel_for(n_threads, ceil_div(job.numel, 8), kNsPerBlock,
                 [&](int64_t begin, int64_t end) { kernels.unpack(job, begin, end); });
}

std::vector<std::string> backend_names() {
    std::vector<std::string> names;
    for (const Backend& backend : backends()) names.push_back(backend.name);
    return names;
}

int64_t arguments_bytes() {
    return kArgumentsBytes;
}

}  // namespace
}  // namespace mpsearch

NB_MODULE(_cpu, module) {
    using namespace mpsearch;
    module.doc() = "The compiled kernels; called through mpsearch.kernels only.";
    module.def("backends", &backend_names, "Instruction sets that this machine runs, slowest first.");
    module.def("arguments_bytes", &arguments_bytes, "Size of all structs of arguments together.");
    define<QuantizeArguments, quantize>(module, "quantize", "Codes, scales and zero points of [rows, columns].");
    define<DequantizeArguments, dequantize>(module, "dequantize", "Packed codes to floats.");
    define<PackArguments, pack>(module, "pack", "Codes of one byte each to a stream of bits.");
    define<PackArguments, unpack>(module, "unpack", "A stream of bits to codes of one byte each.");
    bind_products(module);
    bind_conv(module);
    bind_feedback(module);
    bind_joint(module);
}
