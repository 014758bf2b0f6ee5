// The shell of rounding with feedback and of half-quadratic fitting: scratch memory for each part of the work, and its sharing
// among threads.
#include <memory>

#include "bindings.h"
#include "threads.h"

namespace mpsearch {
namespace {

constexpr double kNsPerRowAndPair = 0.05;    // measured, rounded
constexpr double kNsPerWeightAndStep = 1.0;  // likewise

void round_with_feedback(const Kernels& kernels, const FeedbackArguments& job, int n_threads) {
    const auto columns = static_cast<double>(job.columns);
    const double tile_ns = kNsPerRowAndPair * static_cast<double>(kFeedbackRows) * columns * columns;
    const int64_t n_tiles = job.n_matrices * ceil_div(job.rows_per_matrix, kFeedbackRows);
    parallel_for(n_threads, n_tiles, tile_ns, [&](int64_t begin, int64_t end) {
        const std::unique_ptr<float[]> scratch(new float[(job.columns + 128) * kFeedbackRows + 128 * 128]);
        kernels.round_with_feedback(job, begin, end, scratch.get());
    });
}

void half_quadratic(const Kernels& kernels, const HalfQuadraticArguments& job, int n_threads) {
    const double group_ns = kNsPerWeightAndStep * static_cast<double>(job.group_size * job.n_betas);
    parallel_for(n_threads, job.rows * job.n_groups, group_ns,
                 [&](int64_t begin, int64_t end) { kernels.half_quadratic(job, begin, end); });
}

}  // namespace

void bind_feedback(nanobind::module_& module) {
    define<FeedbackArguments, round_with_feedback>(
        module, "round_with_feedback", "Codes of [rows, columns], each column rounded with the errors of the others.");
    define<HalfQuadraticArguments, half_quadratic>(module, "half_quadratic",
                                                   "Fits scales and zero points in place; codes of [rows, columns].");
}

}  // namespace mpsearch
