// The shell of the convolutions: tables, scratch memory and the sharing of work among threads.
#include <atomic>
#include <bit>
#include <vector>

#include "bindings.h"
#include "threads.h"

namespace mpsearch {
namespace {

// What an item costs on one thread, for deciding how many threads are worth waking (measured, rounded).
constexpr double kNsPerDecoded = 0.1;         // weight
constexpr double kNsPerStaged = 0.3;          // value of x
constexpr double kNsPerRanged = 0.03;         // value of x
constexpr double kNsPerInt8Product = 0.0065;  // of a tile of 16 rows
constexpr double kNsPerFloatProduct = 0.025;

int64_t round_up(int64_t a, int64_t to) {
    return ceil_div(a, to) * to;
}

uint8_t* kernel_scratch(size_t bytes) {
    return scratch(kKernelSlot, bytes);
}

ConvJob conv_job(const ConvArguments& arguments) {
    const ConvShape& shape = arguments.shape;
    const uint8_t* data = arguments.packed;
    ConvJob job{};
    job.rows = shape.rows;
    job.groups = shape.groups;
    job.group_rows = shape.rows / shape.groups;
    job.group_channels = shape.channels / shape.groups;
    job.columns = job.group_channels * shape.kernel_h * shape.kernel_w;
    job.group_size = shape.group_size;
    job.n_groups = ceil_div(job.columns, job.group_size);
    job.bits = shape.bits;
    job.half_scales = shape.half_scales;
    job.order = static_cast<Order>(shape.order);
    job.scales = data;
    const int64_t n_scales = job.rows * job.n_groups;
    job.zero_points = shape.symmetric ? nullptr : data + n_scales * (job.half_scales ? 2 : 4);
    job.codes = data + n_scales * ((job.half_scales ? 2 : 4) + (shape.symmetric ? 0 : 1));
    job.bias = arguments.bias;
    job.channels = shape.channels;
    job.height = shape.height, job.width = shape.width;
    job.out_height = shape.out_height, job.out_width = shape.out_width;
    job.kernel_h = shape.kernel_h, job.kernel_w = shape.kernel_w;
    job.stride_h = shape.stride_h, job.stride_w = shape.stride_w;
    job.padding_h = shape.padding_h, job.padding_w = shape.padding_w;
    job.dilation_h = shape.dilation_h, job.dilation_w = shape.dilation_w;
    job.channels_last = shape.channels_last;
    job.tiled_rows = job.order == Order::kLanes ? job.rows : job.group_rows;
    job.tiles_per_run = ceil_div(job.tiled_rows, kConvTileRows);
    job.n_tiles = job.tiles_per_run * (job.rows / job.tiled_rows);
    job.padded_height = job.height + 2 * job.padding_h;
    job.padded_width = job.width + 2 * job.padding_w;
    job.group_staged = round_up(job.group_channels, 4);
    job.staged_channels = job.groups * job.group_staged;
    job.scratch = kernel_scratch;
    job.int8_input = arguments.int8_input;
    return job;
}

// Where the units of a row begin, what they hold, and where their values of x lie.
struct Units {
    std::vector<int64_t> group_units, offsets;
    std::vector<uint8_t> columns;

    explicit Units(const ConvJob& job) {
        const int64_t taps = job.kernel_h * job.kernel_w;
        const int64_t pixel = job.order == Order::kLanes ? job.group_channels * kConvTileRows : job.staged_channels;
        const int64_t channel = job.order == Order::kLanes ? kConvTileRows : 1;
        const auto offset = [&](int64_t c, int64_t tap) {
            const int64_t ky = tap / job.kernel_w, kx = tap % job.kernel_w;
            return (ky * job.dilation_h * job.padded_width + kx * job.dilation_w) * pixel + c * channel;
        };
        for (int64_t begin = 0; begin < job.columns; begin += job.group_size) {
            const int64_t end = std::min(begin + job.group_size, job.columns);
            group_units.push_back(static_cast<int64_t>(columns.size()));
            if (job.order == Order::kWhole) {
                for (int64_t tap = 0; tap < taps; ++tap)
                    for (int64_t c = begin / taps; c < end / taps; c += 4) {
                        offsets.push_back(offset(c, tap));
                        columns.push_back(static_cast<uint8_t>(std::min(end / taps - c, int64_t{4})));
                    }
                continue;
            }
            const int64_t each = job.order == Order::kLanes ? 1 : 4;
            for (int64_t from = begin; from < end; from += each) {
                for (int64_t c = from; c < from + each; ++c)
                    offsets.push_back(c < end ? offset(c / taps, c % taps) : -1);
                columns.push_back(static_cast<uint8_t>(std::min(end - from, each)));
            }
        }
        group_units.push_back(static_cast<int64_t>(columns.size()));
    }
};

// One sample, its range, staging and products each shared among threads.
void run_sample(
    const ConvKernels& kernels, const ConvKernels& int8, const InputFormat& format, ConvJob& job, int n_threads) {
    const int64_t n_pixels = job.height * job.width, n_values = n_pixels * job.channels;
    if (job.int8_input) {
        constexpr int64_t kPiece = 1 << 14;
        std::atomic<uint32_t> most[2] = {};
        parallel_for(n_threads, ceil_div(n_values, kPiece), kNsPerRanged * kPiece, [&](int64_t begin, int64_t end) {
            uint32_t ends[2];
            int8.range(job.x + begin * kPiece, std::min(end * kPiece, n_values) - begin * kPiece, ends);
            for (int i = 0; i < 2; ++i)
                for (uint32_t seen = most[i].load(); ends[i] > seen && !most[i].compare_exchange_weak(seen, ends[i]);) {
                }
        });
        job.input = input_grid(format, -std::bit_cast<float>(most[0].load()), std::bit_cast<float>(most[1].load()));
    }
    if (kernels.stage) {
        kernels.clear(job);
        parallel_for(n_threads, ceil_div(n_pixels, kPixelBlock),
                     kNsPerStaged * static_cast<double>(kPixelBlock * job.channels),
                     [&](int64_t begin, int64_t end) { kernels.stage(job, begin, end); });
    }
    const int64_t n_positions = job.out_height * job.out_width, chunk = kernels.chunk(job);
    const double product_ns = job.int8_input && job.order != Order::kLanes ? kNsPerInt8Product : kNsPerFloatProduct;
    parallel_for(n_threads, job.n_tiles * ceil_div(n_positions, chunk),
                 product_ns * static_cast<double>(16 * job.columns * std::min(chunk, n_positions)),
                 [&](int64_t begin, int64_t end) { kernels.multiply(job, begin, end); });
}

void conv(const Kernels& all, const ConvArguments& arguments, int n_threads) {
    const ConvShape& shape = arguments.shape;
    const bool int8_input = arguments.int8_input;
    ConvJob whole = conv_job(arguments);
    const ConvKernels& kernels = *(whole.order == Order::kLanes ? all.conv_lanes
                                   : int8_input                 ? all.conv_int8
                                                                : all.conv_float);
    const Units units(whole);
    whole.group_units = units.group_units.data();
    whole.offsets = units.offsets.data();
    whole.unit_columns = units.columns.data();
    whole.n_units = static_cast<int64_t>(units.columns.size());
    whole.record_bytes = round_up(kernels.record_bytes(whole), 64);
    const int64_t staged_bytes =
        whole.padded_height * whole.padded_width * whole.staged_channels * kernels.element_bytes(whole);
    whole.records = scratch(kConvSlot, whole.n_tiles * whole.record_bytes + staged_bytes);
    whole.staged = whole.records + whole.n_tiles * whole.record_bytes;
    parallel_for(n_threads, whole.n_tiles, kNsPerDecoded * static_cast<double>(16 * whole.columns),
                 [&](int64_t begin, int64_t end) { kernels.decode(whole, begin, end); });

    const int64_t x_each = shape.channels * shape.height * shape.width;
    const int64_t y_each = shape.rows * shape.out_height * shape.out_width;
    const auto run = [&](int64_t sample, uint8_t* staged, int threads) {
        ConvJob job = whole;
        job.x = arguments.x + sample * x_each;
        job.y = arguments.y + sample * y_each;
        job.staged = staged;
        run_sample(kernels, *all.conv_int8, arguments.input, job, threads);
    };
    if (shape.n_samples < 2 * n_threads) {
        for (int64_t sample = 0; sample < shape.n_samples; ++sample)
            run(sample, static_cast<uint8_t*>(whole.staged), n_threads);
        return;
    }
    const double sample_ns = kNsPerStaged * static_cast<double>(x_each) +
                             (int8_input ? kNsPerInt8Product : kNsPerFloatProduct) *
                                 static_cast<double>(16 * whole.n_tiles * whole.columns * shape.out_height) *
                                 static_cast<double>(shape.out_width);
    parallel_for(n_threads, shape.n_samples, sample_ns, [&](int64_t begin, int64_t end) {
        uint8_t* staged = scratch(kSampleSlot, staged_bytes);
        for (int64_t sample = begin; sample < end; ++sample) run(sample, staged, 1);
    });
}

}  // namespace

void bind_conv(nanobind::module_& module) {
    define<ConvArguments, conv>(module, "conv", "x convolved with a packed weight, plus the bias.");
}

}  // namespace mpsearch
