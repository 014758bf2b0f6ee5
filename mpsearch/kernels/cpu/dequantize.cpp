// Dequantization of packed codes: weight = (code - zero_point) * scale, one rounding.
//
// A range of groups is a range of consecutive codes. One thread unpacks them a window of 2 KB at a time (it stays in
// the first cache) and scales them group by group. Symmetric codes have the implied zero point 2^(bits - 1), at 1 bit
// 0.5. Bytes moved per weight: bits / 8 read, 4 written. Bound: memory, the writes.
#include "codes.h"
#include "half.h"
#include "kernels.h"

namespace mpsearch::MPSEARCH_ISA {

constexpr int64_t kWindow = 2048;  // codes unpacked at a time

static void scale_codes(const uint8_t* codes, float* weight, int64_t n, F8 zero_point, F8 scale) {
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) store((load_codes(codes + i) - zero_point) * scale, weight + i);
    if (i < n) store_first((load_codes(codes + i) - zero_point) * scale, weight + i, n - i);
}

void dequantize(const DequantizeArguments& job, int64_t begin, int64_t end) {
    const int64_t numel = job.rows * job.columns;
    const float implied = job.bits == 1 ? 0.5f : static_cast<float>(1 << (job.bits - 1));
    alignas(32) uint8_t window[kWindow + 8];  // `load_codes` may read 7 beyond
    int64_t window_begin = 0, window_end = 0;
    for (int64_t group = begin; group < end; ++group) {
        const int64_t row = group / job.n_groups, column = group % job.n_groups * job.group_size;
        const int64_t n = job.columns - column < job.group_size ? job.columns - column : job.group_size;
        const float scale = job.half_scales ? float_from_half(static_cast<const uint16_t*>(job.scales)[group])
                                            : static_cast<const float*>(job.scales)[group];
        const float zero_point = job.zero_points ? static_cast<float>(job.zero_points[group]) : implied;
        int64_t at = row * job.columns + column;
        for (const int64_t stop = at + n; at < stop;) {
            if (at < window_begin || at >= window_end) {
                window_begin = at & ~int64_t{7};
                window_end = numel - window_begin < kWindow ? numel : window_begin + kWindow;
                const PackArguments part{
                    .source = job.packed + window_begin / 8 * job.bits,
                    .target = window,
                    .seen = nullptr,
                    .numel = numel - window_begin,
                    .bits = job.bits,
                };
                unpack(part, 0, (window_end - window_begin + 7) / 8);
            }
            const int64_t here = (stop < window_end ? stop : window_end) - at;
            scale_codes(window + (at - window_begin), job.weight + at, here, broadcast(zero_point), broadcast(scale));
            at += here;
        }
    }
}

}  // namespace mpsearch::MPSEARCH_ISA
