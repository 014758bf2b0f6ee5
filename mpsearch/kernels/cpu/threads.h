// Sharing a range of work among threads.
//
// Chunks are claimed from one 64-bit atomic, (next, total). The caller claims too and waits only for chunks that a
// worker has begun, so a worker that the system has not scheduled costs nothing. Workers sleep between jobs; they are
// created when first asked for, and anew in a forked child. Where one was stalled in the middle of a chunk, callers work
// alone for a tenth of a second. A second caller that finds the workers taken does its own
// work alone.
#pragma once

#include <algorithm>
#include <cstdint>

namespace mpsearch {

constexpr double kWorthSharing_ns = 20e3;  // waking a sleeping thread costs about this much
constexpr int64_t kChunksPerThread = 8;    // what one thread may have to wait for at the end: 1/8 of its share

// Calls run(context, chunk) for each chunk in [0, n_chunks), on the caller and up to n_threads - 1 workers.
void run_chunks(int n_threads, int64_t n_chunks, void (*run)(void*, int64_t), void* context);

// Calls body(begin, end) on parts of [0, count), each item taking about `item_ns` on one thread.
template <class Body>
void parallel_for(int n_threads, int64_t count, double item_ns, Body&& body) {
    const double total_ns = item_ns * static_cast<double>(count);
    const auto worthwhile = static_cast<int64_t>(total_ns / (kWorthSharing_ns / 2));
    const int64_t n_chunks = std::min({worthwhile, n_threads * kChunksPerThread, count});
    if (n_threads <= 1 || n_chunks < 3) {
        if (count > 0) body(int64_t{0}, count);
        return;
    }
    const int64_t size = (count + n_chunks - 1) / n_chunks;
    auto run = [&](int64_t chunk) {
        const int64_t begin = chunk * size, end = std::min(begin + size, count);
        if (begin < end) body(begin, end);
    };
    run_chunks(
        n_threads, n_chunks, [](void* context, int64_t chunk) { (*static_cast<decltype(run)*>(context))(chunk); },
        &run);
}

}  // namespace mpsearch
