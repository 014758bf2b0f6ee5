// What the shell hands to the convolutions, one sample at a time, and how a packed weight's codes lie.
//
// A weight [rows, channels of a group, kernel_h, kernel_w] is a matrix [rows, columns], column (c * kernel_h + ky) * kernel_w + kx.
// Packed it is scales [rows, n_groups], zero points [rows, n_groups] unless symmetric, then for each tile of up to 16 rows the
// dense stream (codes.h) of its codes, which ends with a whole byte. The stream goes unit by unit, in a unit row by row, in a
// row column by column. A unit is, as `Order` says,
//
//     kWhole      up to 4 channels of one kernel position. A scale covers whole channels; units of a group of columns go by kernel
//                 position, then channel. So a unit's values of x lie together in a channels-last map.
//     kGathered   up to 4 consecutive columns of a group of columns, gathered from x one by one.
//     kLanes      1 column: for convolutions with groups of fewer than 16 rows, where a tile spans several of them.
//
// Tiles of kWhole and kGathered begin anew in each group of a convolution. "Scale groups" below are groups of columns.
#pragma once

#include <cstddef>
#include <cstdint>

#include "input.h"

namespace mpsearch {

enum class Order : int { kWhole, kGathered, kLanes };

constexpr int64_t kConvTileRows = 16;
constexpr int64_t kPixelBlock = 64;  // pixels of an item of staging

struct ConvJob {
    // The packed weight.
    const void* scales;          // [rows, n_groups] float16 or float32
    const uint8_t* zero_points;  // [rows, n_groups], or null: symmetric
    const uint8_t* codes;        // tile streams
    const float* bias;           // [rows], or null
    int64_t rows, columns, group_size, n_groups;
    int bits;
    bool half_scales;
    Order order;

    // Geometry, in two dimensions. x and y are [channels][height][width], or [height][width][channels] where channels_last.
    int64_t channels, height, width, out_height, out_width;
    int64_t kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
    int64_t groups;  // of the convolution
    bool channels_last;

    // Derived (conv_job in bind_conv.cpp).
    int64_t group_rows, group_channels;   // of a group of the convolution
    int64_t tiled_rows, tiles_per_run;    // tiles begin anew after so many rows, or so many tiles
    int64_t n_tiles, n_units;             // n_units: of a row
    int64_t padded_height, padded_width;  // of the staged map
    int64_t group_staged;                 // its channels of a group, padded to a multiple of 4
    int64_t staged_channels;              // of all groups
    const int64_t* group_units;           // [n_groups + 1] the first unit of each scale group
    const int64_t* offsets;       // kGathered: [n_units, 4], else [n_units]: from a position's base to its values,
                                  // in elements of the staged map; -1: no column
    const uint8_t* unit_columns;  // [n_units] 1 to 4
    uint8_t* (*scratch)(size_t bytes);  // of the thread that calls, valid until it asks again; 64 bytes aligned

    // Made for all samples: a record of record_bytes for each tile.
    uint8_t* records;
    int64_t record_bytes;

    // One sample.
    bool int8_input;
    InputGrid input;  // int8 only: of this sample
    const float* x;
    float* y;
    void* staged;  // [padded_height, padded_width, staged_channels] float, or int8 as the kernels like it
};

// First row and number of rows of a tile.
static inline int64_t first_row(const ConvJob& job, int64_t tile) {
    return tile / job.tiles_per_run * job.tiled_rows + tile % job.tiles_per_run * kConvTileRows;
}
static inline int64_t tile_rows(const ConvJob& job, int64_t tile) {
    const int64_t left = job.tiled_rows - tile % job.tiles_per_run * kConvTileRows;
    return left < kConvTileRows ? left : kConvTileRows;
}

// Bytes of the codes of `rows` rows that begin a run of tiles; a whole tile fills whole bytes.
static inline int64_t stream_bytes(const ConvJob& job, int64_t rows) {
    return (rows * job.columns * job.bits + 7) / 8;
}

struct ConvKernels {
    // Bytes of one staged value, and of a tile's record.
    int64_t (*element_bytes)(const ConvJob& job);
    int64_t (*record_bytes)(const ConvJob& job);

    // Unpacks tiles [begin, end) into their records.
    void (*decode)(const ConvJob& job, int64_t begin, int64_t end);

    // The bits of max(-x, 0) and of max(x, 0) of n values; those of infinity and NaN are larger than all others.
    void (*range)(const float* x, int64_t n, uint32_t (&ends)[2]);

    // Fills the staged map with what 0 becomes; then its pixels of blocks [begin, end) of kPixelBlock with those of x.
    void (*clear)(const ConvJob& job);
    void (*stage)(const ConvJob& job, int64_t begin, int64_t end);

    // Output positions of an item of work: item i is tile i / n_chunks, chunk i % n_chunks of them.
    int64_t (*chunk)(const ConvJob& job);
    void (*multiply)(const ConvJob& job, int64_t begin, int64_t end);
};

}  // namespace mpsearch
