// The shell of the products: stages x where it must be, some tokens at a time, and multiplies.
//
// A pass handles as many tokens as fit in 64 columns of fragments (32 for int8): 64, fewer where a step holds several groups
// or x is float32 in three parts. x is used as it lies where it is float16 or bfloat16, whole in blocks, and few tokens;
// else it is staged first. The scratch holds the pass's staged x, then partial sums or the tokens' scales and sums.
#include <algorithm>

#include "api.h"
#include "product.cuh"
#include "stage.cuh"

namespace mpsearch::cuda {
namespace {

constexpr int kMostInt8Columns = 32;
constexpr int64_t kAlignment = 16;

struct Pass {
    int parts, tokens, n_tiles, n_ranges;
    int64_t staged_bytes, scratch_bytes;
};

int64_t aligned(int64_t bytes) {
    return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

// How steps are shared: a strip to a block, unless that leaves processors without work. Many tokens are bound by arithmetic,
// so there the last blocks' waiting counts, too.
int ranges_of(const Stream& stream, int n_tiles, int n_processors) {
    const int64_t strips = stream.n_strips, units = strips * stream.n_steps, slots = int64_t{2} * n_processors;
    const int64_t n_warps = n_tiles <= 2 ? 8 : 4;
    const int64_t waves = (strips + slots - 1) / slots;
    const bool even = n_tiles <= 2 ? 4 * strips >= 3 * n_processors : 20 * strips >= 17 * waves * slots;
    if (even) return static_cast<int>(strips);
    return static_cast<int>(std::max<int64_t>(1, std::min(n_tiles <= 2 ? n_processors : slots, units / n_warps)));
}

Pass pass_of(const Stream& stream, const LinearArguments& arguments) {
    const bool int8_input = arguments.int8_input;
    Pass pass{};
    pass.parts = !int8_input && arguments.dtype == kFloat32 ? 3 : 1;
    const int columns_each = pass.parts * stream.classes;
    const int most = int8_input ? kMostInt8Columns : kMostColumns;
    pass.tokens = static_cast<int>(std::min<int64_t>(arguments.n_tokens, most / columns_each));
    const int tiles = (pass.tokens * columns_each + kTileColumns - 1) / kTileColumns;
    pass.n_tiles = tiles <= 1 ? 1 : int8_input || (tiles > 2 && tiles <= 4) ? 4 : tiles == 2 ? 2 : 8;
    pass.n_ranges = int8_input ? 0 : ranges_of(stream, pass.n_tiles, arguments.n_processors);
    pass.staged_bytes = aligned(int64_t{stream.n_steps} * pass.n_tiles * (int8_input ? 2 : 4) * kWarp * 16);
    const int64_t rest = int8_input                         ? pass.tokens * (4 + 4 * int64_t{stream.n_groups})
                         : pass.n_ranges == stream.n_strips ? 0
                                                            : int64_t{pass.n_ranges} * 2 * pass.tokens * kStripRows * 4;
    pass.scratch_bytes = pass.staged_bytes + aligned(rest);
    return pass;
}

template <int bits>
int multiply(bool int8_input, const ProductJob& job, int n_tiles, uintptr_t stream) {
    return int8_input ? multiply_int8<bits>(job, n_tiles, stream) : multiply_float<bits>(job, n_tiles, stream);
}

}  // namespace
}  // namespace mpsearch::cuda

using namespace mpsearch::cuda;

int64_t mpsearch_linear_scratch(const mpsearch::LinearArguments* arguments) {
    return pass_of(make_stream(nullptr, arguments->format), *arguments).scratch_bytes;
}

int mpsearch_linear(const mpsearch::LinearArguments* arguments, uintptr_t stream) {
    const mpsearch::WeightFormat& format = arguments->format;
    const bool int8_input = arguments->int8_input;
    const int dtype = arguments->dtype;
    const int64_t n_tokens = arguments->n_tokens;
    ProductJob job{};
    job.stream = make_stream(arguments->packed, format);
    job.bias = arguments->bias;
    job.dtype = dtype;
    const Pass pass = pass_of(job.stream, *arguments);
    const int64_t value_bytes = dtype == mpsearch::kFloat32 ? 4 : 2;
    const bool whole = format.group_size % kBlockColumns == 0 && format.columns % format.group_size == 0;
    job.direct = !int8_input && dtype != mpsearch::kFloat32 && whole &&
                 reinterpret_cast<uintptr_t>(arguments->x) % 16 == 0 && n_tokens * job.stream.classes <= kTileColumns;
    job.parts = pass.parts;
    job.n_ranges = pass.n_ranges;
    for (int64_t done = 0; done < n_tokens; done += pass.tokens) {
        job.n_tokens = static_cast<int>(std::min<int64_t>(pass.tokens, n_tokens - done));
        job.x = static_cast<const uint8_t*>(arguments->x) + done * format.columns * value_bytes;
        job.y = static_cast<uint8_t*>(arguments->y) + done * format.rows * value_bytes;
        uint8_t* rest = arguments->scratch + pass.staged_bytes;
        if (!job.direct) {
            StageJob stage{};
            stage.stream = job.stream;
            stage.x = job.x;
            stage.staged = arguments->scratch;
            stage.input = arguments->input;
            stage.dtype = dtype;
            stage.parts = pass.parts;
            stage.n_tokens = job.n_tokens;
            stage.n_tiles = pass.n_tiles;
            if (int8_input) {
                stage.token_scales = reinterpret_cast<float*>(rest);
                stage.token_sums = reinterpret_cast<int32_t*>(rest) + pass.tokens;
            }
            const int error = int8_input ? stage_int8(stage, stream) : stage_floats(stage, stream);
            if (error) return error;
            job.x = arguments->scratch;
            job.token_scales = stage.token_scales;
            job.token_sums = stage.token_sums;
        }
        if (!int8_input) job.partial = reinterpret_cast<float*>(rest);
        constexpr decltype(&multiply<1>) widths[] = {multiply<1>, multiply<2>, multiply<3>, multiply<4>,
                                                     multiply<5>, multiply<6>, multiply<7>, multiply<8>};
        const int error = widths[format.bits - 1](int8_input, job, pass.n_tiles, stream);
        if (error) return error;
    }
    return 0;
}
