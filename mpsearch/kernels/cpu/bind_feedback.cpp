// The shell of rounding with feedback and of half-quadratic fitting: scratch memory for each part of the work, and its sharing among threads.
#include <memory>

#include "bindings.h"
#include "dispatch.h"
#include "threads.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace mpsearch {
namespace {

constexpr double kNsPerRowAndPair = 0.05;    // measured, rounded
constexpr double kNsPerWeightAndStep = 1.0;  // likewise

void round_with_feedback(int backend,
                         uintptr_t weight,
                         uintptr_t feedback,
                         uintptr_t scales,
                         uintptr_t zero_points,
                         uintptr_t column_groups,
                         uintptr_t errors,
                         uintptr_t fixed,
                         uintptr_t codes,
                         int64_t rows,
                         int64_t columns,
                         int64_t n_groups,
                         int64_t n_matrices,
                         int bits,
                         int n_threads) {
    const int64_t rows_per_matrix = rows / n_matrices;
    const int64_t tiles_per_matrix = (rows_per_matrix + kFeedbackRows - 1) / kFeedbackRows;
    const FeedbackJob job{at<const float>(weight),
                          at<const float>(feedback),
                          at<const float>(scales),
                          at<const float>(zero_points),
                          at<const int32_t>(column_groups),
                          at<const float>(errors),
                          at<const uint8_t>(fixed),
                          at<uint8_t>(codes),
                          columns,
                          n_groups,
                          rows_per_matrix,
                          tiles_per_matrix,
                          bits};
    const Kernels& kernels = backends().at(backend).kernels;
    const double tile_ns = kNsPerRowAndPair * static_cast<double>(kFeedbackRows) * static_cast<double>(columns) *
                           static_cast<double>(columns);
    parallel_for(n_threads, n_matrices * tiles_per_matrix, tile_ns, [&](int64_t begin, int64_t end) {
        const std::unique_ptr<float[]> scratch(new float[(columns + 128) * kFeedbackRows + 128 * 128]);
        kernels.round_with_feedback(job, begin, end, scratch.get());
    });
}

void half_quadratic(int backend,
                    uintptr_t weight,
                    uintptr_t betas,
                    uintptr_t scales,
                    uintptr_t zero_points,
                    uintptr_t codes,
                    int64_t rows,
                    int64_t columns,
                    int64_t group_size,
                    int64_t n_betas,
                    int bits,
                    bool fit_zeros,
                    bool half_scales,
                    int n_threads) {
    const int64_t n_groups = (columns + group_size - 1) / group_size;
    const HalfQuadraticJob job{at<const float>(weight),
                               at<const float>(betas),
                               at<float>(scales),
                               at<float>(zero_points),
                               at<uint8_t>(codes),
                               columns,
                               group_size,
                               n_groups,
                               n_betas,
                               bits,
                               fit_zeros,
                               half_scales};
    const Kernels& kernels = backends().at(backend).kernels;
    const double group_ns = kNsPerWeightAndStep * static_cast<double>(group_size) * static_cast<double>(n_betas);
    parallel_for(n_threads, rows * n_groups, group_ns,
                 [&](int64_t begin, int64_t end) { kernels.half_quadratic(job, begin, end); });
}

}  // namespace

void bind_feedback(nb::module_& module) {
    module.def("round_with_feedback", &round_with_feedback, nb::call_guard<nb::gil_scoped_release>(), "backend"_a,
               "weight"_a, "feedback"_a, "scales"_a, "zero_points"_a, "column_groups"_a, "errors"_a, "fixed"_a,
               "codes"_a, "rows"_a, "columns"_a, "n_groups"_a, "n_matrices"_a, "bits"_a, "n_threads"_a,
               "Codes of [rows, columns], each column rounded with the errors of the others.");
    module.def("half_quadratic", &half_quadratic, nb::call_guard<nb::gil_scoped_release>(), "backend"_a, "weight"_a,
               "betas"_a, "scales"_a, "zero_points"_a, "codes"_a, "rows"_a, "columns"_a, "group_size"_a, "n_betas"_a,
               "bits"_a, "fit_zeros"_a, "half_scales"_a, "n_threads"_a,
               "Fits scales and zero points in place; codes of [rows, columns].");
}

}  // namespace mpsearch
