// The worker pool behind `run_chunks`; threads.h says what it promises.
#include "threads.h"

#include <atomic>
#include <chrono>
#include <mutex>
#include <system_error>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace mpsearch {
namespace {

constexpr int kSpins = 2000;  // looks at the next job before sleeping: about 20 us

// A worker whose core another process takes in the middle of a chunk keeps the caller waiting for milliseconds. After a wait
// that no chunk is long enough for, callers work alone for a while, so that few of their calls meet with one.
using Clock = std::chrono::steady_clock;
constexpr auto kStall = std::chrono::microseconds(500);
constexpr auto kAlone = std::chrono::milliseconds(100);

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

struct Pool {
    std::mutex owner;  // held by the caller whose job this is
    Clock::time_point alone_until{};
    int n_workers = 0;
    std::atomic<uint32_t> job{0};  // counts jobs; workers sleep on it
    std::atomic<uint64_t> claims{
        0};  // next chunk << 32 | number of chunks: a late worker cannot claim from a finished job
    std::atomic<int64_t> done{0};  // chunks finished
    std::atomic<int> helpers{0};   // workers that this job may use
    void (*run)(void*, int64_t) = nullptr;
    void* context = nullptr;

    void claim_all() {
        for (;;) {
            uint64_t claim = claims.load(std::memory_order_acquire);
            if (claim >> 32 >= (claim & 0xffffffffu)) return;
            claim = claims.fetch_add(uint64_t{1} << 32, std::memory_order_acq_rel);
            const uint64_t chunk = claim >> 32, total = claim & 0xffffffffu;
            if (chunk >= total) return;
            // `run` and `context` stand until `done` says that this chunk, too, is finished.
            run(context, static_cast<int64_t>(chunk));
            if (done.fetch_add(1, std::memory_order_acq_rel) + 1 == static_cast<int64_t>(total)) done.notify_all();
        }
    }

    void work(int id) {
        uint32_t seen = 0;
        for (;;) {
            for (int spin = 0; job.load(std::memory_order_acquire) == seen; ++spin) {
                if (spin < kSpins)
                    relax();
                else
                    job.wait(seen, std::memory_order_acquire);
            }
            seen = job.load(std::memory_order_acquire);
            if (id < helpers.load(std::memory_order_relaxed)) claim_all();
        }
    }

    void grow(int wanted) {
        try {
            for (; n_workers < wanted; ++n_workers) std::thread([this, id = n_workers] { work(id); }).detach();
        } catch (const std::system_error&) {
            // No more threads to be had: those that there are do the work.
        }
    }
};

std::atomic<Pool*> shared_pool{nullptr};

// Never destroyed: workers may still sleep in it when the process ends. A forked child has no workers, so it starts
// anew.
Pool& pool() {
    Pool* current = shared_pool.load(std::memory_order_acquire);
    if (current) return *current;
#if defined(__unix__) || defined(__APPLE__)
    static const int registered = pthread_atfork(nullptr, nullptr, [] { shared_pool.store(nullptr); });
    (void)registered;
#endif
    Pool* fresh = new Pool;
    if (shared_pool.compare_exchange_strong(current, fresh)) return *fresh;
    delete fresh;
    return *current;
}

}  // namespace

void run_chunks(int n_threads, int64_t n_chunks, void (*run)(void*, int64_t), void* context) {
    Pool& shared = pool();
    std::unique_lock<std::mutex> owner(shared.owner, std::try_to_lock);
    const bool alone = !owner.owns_lock() || Clock::now() < shared.alone_until;
    if (!alone) shared.grow(n_threads - 1);
    if (alone || shared.n_workers == 0) {
        for (int64_t chunk = 0; chunk < n_chunks; ++chunk) run(context, chunk);
        return;
    }
    shared.run = run;
    shared.context = context;
    shared.done.store(0, std::memory_order_relaxed);
    shared.helpers.store(n_threads - 1, std::memory_order_relaxed);
    shared.claims.store(static_cast<uint64_t>(n_chunks), std::memory_order_release);
    shared.job.fetch_add(1, std::memory_order_release);
    shared.job.notify_all();
    const auto begin = Clock::now();
    shared.claim_all();
    const auto finished = Clock::now();  // but for the chunks that workers have begun
    for (int64_t done = shared.done.load(std::memory_order_acquire); done < n_chunks;
         done = shared.done.load(std::memory_order_acquire))
        shared.done.wait(done, std::memory_order_acquire);
    const auto end = Clock::now();
    if (end - finished > kStall && end - finished > finished - begin) shared.alone_until = end + kAlone;
}

}  // namespace mpsearch
