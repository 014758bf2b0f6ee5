// The shell of rounding with feedback: scratch memory for each part of the work, and its sharing among threads.
#include <memory>

#include "bindings.h"
#include "dispatch.h"
#include "threads.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace mpsearch {
namespace {

constexpr double kNsPerRowAndPair = 0.05;  // measured, rounded

void round_with_feedback(int backend,
                         uintptr_t weight,
                         uintptr_t feedback,
                         uintptr_t scales,
                         uintptr_t zero_points,
                         uintptr_t column_groups,
                         uintptr_t errors,
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

}  // namespace

void bind_feedback(nb::module_& module) {
    module.def("round_with_feedback", &round_with_feedback, nb::call_guard<nb::gil_scoped_release>(), "backend"_a,
               "weight"_a, "feedback"_a, "scales"_a, "zero_points"_a, "column_groups"_a, "errors"_a, "codes"_a,
               "rows"_a, "columns"_a, "n_groups"_a, "n_matrices"_a, "bits"_a, "n_threads"_a,
               "Codes of [rows, columns], each column rounded with the errors of the others.");
}

}  // namespace mpsearch
