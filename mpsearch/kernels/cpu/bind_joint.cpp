// The shell of rounding rows jointly: walks the passes and the tiles, and shares the columns of every product among threads. Each
// sum is made by one thread in the order of the specification, so that the number of threads shows in no result.
#include <cstring>
#include <memory>
#include <numeric>
#include <vector>

#include "bindings.h"
#include "threads.h"

namespace mpsearch {
namespace {

constexpr double kNsPerProduct = 0.05;  // a multiplication and an addition; measured, rounded
constexpr double kNsPerWeight = 2.0;    // loaded and transposed
constexpr int64_t kStep = 8;            // columns that a thread takes at least

struct Memory {
    std::unique_ptr<float[]> memory;
    float* next;
    explicit Memory(size_t n) : memory(new float[n + 16]) {
        next = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory.get()) + 63) / 64 * 64);
    }
    float* take(int64_t n) {  // a multiple of 16
        float* piece = next;
        next += n;
        return piece;
    }
};

class Descent {
  public:
    Descent(const Kernels& kernels, const JointArguments& job, int n_threads)
        : kernels_(kernels),
          job_(job),
          n_threads_(n_threads),
          padded_rows_(ceil_div(job.rows, kJointRows) * kJointRows),
          memory_(static_cast<size_t>(job.columns * padded_rows_ +
                                      (7 * job.columns + padded_rows_ + 3 * job.n_groups) * kJointRows)),
          fixed_(job.columns),
          moved_(job.columns),
          numbers_(std::max(job.rows, job.columns)),
          others_(job.rows) {
        std::iota(numbers_.begin(), numbers_.end(), 0);
        const int64_t tile = job.columns * kJointRows, groups = job.n_groups * kJointRows;
        tile_.job = &job;
        tile_.padded_rows = padded_rows_;
        tile_.sums = memory_.take(job.columns * padded_rows_);
        for (float** piece : {&tile_.weight, &tile_.codes, &tile_.values, &tile_.errors, &tile_.changes, &tile_.targets,
                              &tile_.products})
            *piece = memory_.take(tile);
        tile_.row_feedback = memory_.take(padded_rows_ * kJointRows);
        for (float** piece : {&tile_.scales, &tile_.inverses, &tile_.zeros}) *piece = memory_.take(groups);
        tile_.fixed = fixed_.data();
        tile_.moved = moved_.data();
        coupled_ = std::vector<float>(static_cast<size_t>(tile));
        std::memset(tile_.sums, 0, sizeof(float) * job.columns * padded_rows_);
    }

    void run() {
        if (!job_.begin)
            for (int64_t row = 0; row < job_.rows; row += kJointRows) {
                load(row);
                add(tile_.errors, job_.column_feedback, job_.columns, own_sums(), own_sums(), padded_rows_,
                    numbers_.data(), job_.columns, 0, job_.columns);
            }
        for (int64_t pass = 0; pass < job_.n_passes; ++pass) {
            bool fitted = false;
            int64_t n_changed = 0;
            for (int64_t row = 0; row < job_.rows; row += kJointRows) {
                load(row);
                couple();
                if (pass < job_.n_fits) fitted = fit() || fitted;
                n_changed += sweep();
                kernels_.joint_store(tile_);
            }
            job_.n_changed[pass] = n_changed;
            if (!n_changed && !fitted) break;
        }
    }

  private:
    float* own_sums() { return tile_.sums + tile_.row; }

    // out[j] = from[j] + the terms of lanes * factors[j], for columns j in [begin, end); `from` and `out` are of column 0.
    void add(const float* lanes,
             const float* factors,
             int64_t factors_stride,
             const float* from,
             float* out,
             int64_t stride,
             const int32_t* terms,
             int64_t n_terms,
             int64_t begin,
             int64_t end) {
        const JointProduct product{lanes, factors, from, out, terms, factors_stride, stride, stride, n_terms};
        parallel_columns(begin, end, kNsPerProduct * static_cast<double>(kJointRows * n_terms),
                         [&](int64_t j, int64_t last) { kernels_.joint_add(product, j, last); });
    }

    template <class Body>
    void parallel_columns(int64_t begin, int64_t end, double column_ns, Body&& body) {
        parallel_for(n_threads_, ceil_div(end - begin, kStep), column_ns * kStep, [&](int64_t first, int64_t last) {
            body(begin + first * kStep, std::min(begin + last * kStep, end));
        });
    }

    void load(int64_t row) {
        tile_.row = row;
        tile_.n_rows = std::min(kJointRows, job_.rows - row);
        tile_.n_moved = 0;
        kernels_.joint_load(tile_);
        parallel_columns(0, job_.columns, kNsPerWeight * kJointRows,
                         [&](int64_t j, int64_t last) { kernels_.joint_load_columns(tile_, j, last); });
    }

    // What the other rows' errors do to the tile. Before the first codes the later rows have none.
    void couple() {
        int64_t n = 0;
        for (int64_t s = 0; s < (job_.begin ? tile_.row : job_.rows); ++s)
            if (s < tile_.row || s >= tile_.row + kJointRows) others_[n++] = static_cast<int32_t>(s);
        add(tile_.row_feedback, tile_.sums, padded_rows_, nullptr, coupled_.data(), kJointRows, others_.data(), n, 0,
            job_.columns);
    }

    // The targets of columns [begin, end): what all rows' errors do.
    void target(int64_t begin, int64_t end) {
        add(tile_.row_feedback, tile_.sums, padded_rows_, coupled_.data(), tile_.targets, kJointRows,
            numbers_.data() + tile_.row, tile_.n_rows, begin, end);
    }

    bool fit() {
        bool any = false;
        for (int64_t begin = 0, end; begin < job_.columns; begin = end) {
            const int32_t group = job_.column_groups[begin];
            for (end = begin; end < job_.columns && job_.column_groups[end] == group;) ++end;
            const int32_t* columns = numbers_.data() + begin;
            target(begin, end);
            add(tile_.values, job_.column_feedback, job_.columns, nullptr, tile_.products, kJointRows, columns,
                end - begin, begin, end);
            if (!kernels_.joint_fit(tile_, group, begin, end)) continue;
            any = true;
            for (const auto& [from, to] : {std::pair{int64_t{0}, begin}, std::pair{end, job_.columns}})
                add(tile_.changes, job_.column_feedback, job_.columns, own_sums(), own_sums(), padded_rows_, columns,
                    end - begin, from, to);
        }
        return any;
    }

    int64_t sweep() {
        std::vector<int64_t> moved_before;
        int64_t n_changed = 0;
        for (int64_t begin = 0; begin < job_.columns; begin += kJointColumns) {
            const int64_t end = std::min(begin + kJointColumns, job_.columns);
            moved_before.push_back(tile_.n_moved);
            add(tile_.changes, job_.column_feedback, job_.columns, own_sums(), own_sums(), padded_rows_, tile_.moved,
                tile_.n_moved, begin, end);
            target(begin, end);
            n_changed += kernels_.joint_round(tile_, begin, end);
        }
        // The changes of a column's own block and of those behind it; of the latter none has a part where F is triangular.
        const double terms = 0.5 * static_cast<double>(tile_.n_moved);
        parallel_columns(0, job_.columns, kNsPerProduct * kJointRows * terms, [&](int64_t begin, int64_t end) {
            for (int64_t j = begin; j < end;) {
                const auto block = static_cast<size_t>(j / kJointColumns);
                const int64_t to = std::min((j / kJointColumns + 1) * kJointColumns, end), done = moved_before[block];
                const int64_t last =
                    job_.begin && block + 1 < moved_before.size() ? moved_before[block + 1] : tile_.n_moved;
                kernels_.joint_add({tile_.changes, job_.column_feedback, own_sums(), own_sums(), tile_.moved + done,
                                    job_.columns, padded_rows_, padded_rows_, last - done},
                                   j, to);
                j = to;
            }
        });
        return n_changed;
    }

    const Kernels& kernels_;
    const JointArguments& job_;
    int n_threads_;
    int64_t padded_rows_;
    Memory memory_;
    std::vector<uint32_t> fixed_;
    std::vector<int32_t> moved_, numbers_, others_;
    std::vector<float> coupled_;
    JointTile tile_{};
};

void round_jointly(const Kernels& kernels, const JointArguments& job, int n_threads) {
    if (job.rows && job.columns) Descent(kernels, job, n_threads).run();
}

int64_t joint_arguments_bytes() {
    return sizeof(JointArguments);
}

}  // namespace

void bind_joint(nanobind::module_& module) {
    define<JointArguments, round_jointly>(module, "round_jointly",
                                          "Codes and scales of [rows, columns] in place, with the errors of all rows.");
    module.def("joint_arguments_bytes", &joint_arguments_bytes, "Size of the struct of `round_jointly`.");
}

}  // namespace mpsearch
