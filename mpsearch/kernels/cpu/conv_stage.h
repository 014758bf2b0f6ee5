// Staging for a convolution: x as a padded channels-last map [padded_height, padded_width, staged_channels].
//
// The channels of each group of the convolution are padded to a multiple of 4, so that 4 of one pixel are one broadcast. A
// `Convert` makes floats elements of the map: `vector` a vector of them, `quads` four vectors, of 4 channels, [pixel][channel].
// One thread handles blocks of pixels. Bytes moved per value: 4 read, 1 to 4 written. Bound: the first cache.
#pragma once

#include "conv_tile.h"

namespace mpsearch::MPSEARCH_ISA {

MPSEARCH_INLINE Lanes load_lanes(const float* from, int64_t n) {
    Lanes lanes = {};
    if (n >= kVectorRows)
        memcpy(&lanes, from, sizeof(lanes));
    else
        memcpy(&lanes, from, n * sizeof(float));
    return lanes;
}

template <class Element>
static void clear_map(const ConvJob& job, Element value) {
    const int64_t n = job.padded_height * job.padded_width * job.staged_channels;
    Element* staged = static_cast<Element*>(job.staged);
    for (int64_t i = 0; i < n; ++i) staged[i] = value;
}

// n pixels from [channels][height][width], `apart` pixels a channel, to staged + at[i].
template <class Element, class Convert>
MPSEARCH_INLINE void stage_planes(const ConvJob& job, const float* x, int64_t n, const int64_t* at, Convert convert) {
    const int64_t apart = job.height * job.width;
    for (int64_t group = 0; group < job.groups; ++group) {
        for (int64_t c = 0; c < job.group_channels; c += 4) {
            const int64_t left = job.group_channels - c;
            Element* to = static_cast<Element*>(job.staged) + group * job.group_staged + c;
            const float* from = x + (group * job.group_channels + c) * apart;
            for (int64_t i = 0; i < n; i += kVectorRows) {
                const int64_t here = n - i < kVectorRows ? n - i : kVectorRows;
                Lanes values[4];
                for (int k = 0; k < 4; ++k) values[k] = load_lanes(from + k * apart + i, k < left ? here : 0);
                Element quads[kVectorRows][4];
                convert.quads(values, quads);
                if (here == kVectorRows) {
#pragma GCC unroll 16
                    for (int j = 0; j < kVectorRows; ++j) memcpy(to + at[i + j], quads[j], sizeof(quads[j]));
                } else {
                    for (int64_t j = 0; j < here; ++j) memcpy(to + at[i + j], quads[j], sizeof(quads[j]));
                }
            }
        }
    }
}

// n values that lie together.
template <class Element, class Convert>
MPSEARCH_INLINE void stage_run(const float* x, int64_t n, Element* to, Convert convert) {
    int64_t i = 0;
    for (; i + kVectorRows <= n; i += kVectorRows) convert.vector(load_lanes(x + i, kVectorRows), to + i);
    if (i < n) {
        Element last[kVectorRows];
        convert.vector(load_lanes(x + i, n - i), last);
        memcpy(to + i, last, (n - i) * sizeof(Element));
    }
}

template <class Element, class Convert>
MPSEARCH_INLINE void stage_map(const ConvJob& job, int64_t begin, int64_t end, Convert convert) {
    const int64_t n_pixels = job.height * job.width;
    for (int64_t block = begin; block < end; ++block) {
        const int64_t from = block * kPixelBlock;
        const int64_t n = n_pixels - from < kPixelBlock ? n_pixels - from : kPixelBlock;
        int64_t at[kPixelBlock];
        for (int64_t i = 0, row = from / job.width, column = from % job.width; i < n; ++i) {
            at[i] = ((row + job.padding_h) * job.padded_width + column + job.padding_w) * job.staged_channels;
            if (++column == job.width) column = 0, ++row;
        }
        if (!job.channels_last) {
            stage_planes<Element>(job, job.x + from, n, at, convert);
            continue;
        }
        Element* staged = static_cast<Element*>(job.staged);
        const float* x = job.x + from * job.channels;
        if (job.staged_channels == job.channels) {  // whole rows lie together
            for (int64_t i = 0, stop; i < n; i = stop) {
                for (stop = i + 1; stop < n && at[stop] == at[stop - 1] + job.channels;) ++stop;
                stage_run<Element>(x + i * job.channels, (stop - i) * job.channels, staged + at[i], convert);
            }
            continue;
        }
        for (int64_t i = 0; i < n; ++i)
            for (int64_t group = 0; group < job.groups; ++group)
                stage_run<Element>(x + i * job.channels + group * job.group_channels, job.group_channels,
                                   staged + at[i] + group * job.group_staged, convert);
    }
}

}  // namespace mpsearch::MPSEARCH_ISA
