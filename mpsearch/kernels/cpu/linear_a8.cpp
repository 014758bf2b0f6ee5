// y = x W^T + bias with packed weights and x quantized to int8 (stage.cpp).
//
//     D[m, r, g] = sum over the columns c of group g of (2 * code[r, c] - 2 * zero[r, g]) * x8[m, c]       exact, int32
//     y[m, r]    = (token_scale[m] * 0.5) * (sum over g, ascending, of float(D[m, r, g]) * scale[r, g]) + bias[r]
//
// every operation on floats rounded by itself, so that all instruction sets, thread counts and numbers of tokens give
// the same bits. D is 2 * S - 2 * zero * X: S, the sum of code * x8, is what the inner loop makes; X, the sum of x8, was
// made in staging. The face keeps groups narrow enough for int32.
//
// With AVX-512-VNNI one instruction multiplies and adds a quad. AVX2 and AVX-512 have one that adds pairs of products in
// int16, which holds kRun quads before it must be widened; 8-bit codes go there as two planes of 4 bits. NEON multiplies
// signed bytes only, so that codes of 8 bits go there as code - 128 and their zero points likewise; with dotprod one
// instruction multiplies and adds a quad, without it products are summed in int16, as with AVX2.
//
// One thread handles a range of tiles (16 rows) for all tokens. One token: the codes are unpacked in registers, and four
// tiles are read in lock-step, because a core draws more from memory in four streams than in one. More tokens: a strip of
// the tile is unpacked into the first cache and multiplied by every block of tokens. Bytes moved per weight: bits / 8,
// and for each 16 groups a header of 64 or 128. Bound: memory for one token, from about 8 tokens arithmetic.
#include "tile.h"

MPSEARCH_DECLARE_KERNELS(MPSEARCH_ISA)

namespace mpsearch::MPSEARCH_ISA {

constexpr int kStripBlocks = 8;       // unpacked at a time: 4 KB
constexpr int kPrefetchBytes = 4096;  // how far ahead weights are asked for while a strip is multiplied

MPSEARCH_INLINE uint32_t load_quad(const uint32_t* x) {
    uint32_t value;
    memcpy(&value, x, sizeof(value));
    return value;
}

// Adds the products of a block: sums[t][v] += codes of vector v * x of token t. `codes` are [8 quads][n_vectors], x is
// [8 quads][tokens], four int8 each.
#if defined(__AVX512VNNI__)

template <int bits, int tokens, int n_vectors>
MPSEARCH_INLINE void add_products(const Bytes* codes, const uint32_t* x, Ints (&sums)[tokens][n_vectors]) {
    static_assert(n_vectors == 1);
#pragma GCC unroll 8
    for (int q = 0; q < kQuads; ++q) {
#pragma GCC unroll 8
        for (int t = 0; t < tokens; ++t) {
            const __m512i values = _mm512_set1_epi32(static_cast<int>(load_quad(x + q * tokens + t)));
            sums[t][0] = (Ints)_mm512_dpbusd_epi32((__m512i)sums[t][0], (__m512i)codes[q], values);
        }
    }
}

#elif defined(__AVX2__)

#if defined(__AVX512BW__)
MPSEARCH_INLINE Bytes broadcast_quad(uint32_t x) {
    return (Bytes)_mm512_set1_epi32(static_cast<int>(x));
}
MPSEARCH_INLINE Shorts multiply_pairs(Bytes codes, Bytes x) {
    return (Shorts)_mm512_maddubs_epi16((__m512i)codes, (__m512i)x);
}
MPSEARCH_INLINE Ints widen(Shorts sums, int16_t factor) {
    return (Ints)_mm512_madd_epi16((__m512i)sums, _mm512_set1_epi16(factor));
}
#else
MPSEARCH_INLINE Bytes broadcast_quad(uint32_t x) {
    return (Bytes)_mm256_set1_epi32(static_cast<int>(x));
}
MPSEARCH_INLINE Shorts multiply_pairs(Bytes codes, Bytes x) {
    return (Shorts)_mm256_maddubs_epi16((__m256i)codes, (__m256i)x);
}
MPSEARCH_INLINE Ints widen(Shorts sums, int16_t factor) {
    return (Ints)_mm256_madd_epi16((__m256i)sums, _mm256_set1_epi16(factor));
}
#endif

template <int bits, int tokens, int n_vectors>
MPSEARCH_INLINE void add_products(const Bytes* codes, const uint32_t* x, Ints (&sums)[tokens][n_vectors]) {
    constexpr int n_planes = bits == 8 ? 2 : 1, plane_bits = bits / n_planes;
    // kRun * 2 * (2^plane_bits - 1) * 127 is below 2^15.
    constexpr int kRun = plane_bits <= 4 ? 8 : plane_bits == 5 ? 4 : plane_bits == 6 ? 2 : 1;
#pragma GCC unroll 2
    for (int plane = 0; plane < n_planes; ++plane) {
#pragma GCC unroll 8
        for (int begin = 0; begin < kQuads; begin += kRun) {
            Shorts narrow[tokens][n_vectors] = {};
#pragma GCC unroll 8
            for (int q = begin; q < begin + kRun; ++q) {
                Bytes code[n_vectors];
#pragma GCC unroll 2
                for (int v = 0; v < n_vectors; ++v) {
                    code[v] = codes[q * n_vectors + v];
                    if (n_planes == 2) code[v] = move_bits(code[v], 4 * plane, 0, 4);
                }
#pragma GCC unroll 8
                for (int t = 0; t < tokens; ++t) {
                    const Bytes values = broadcast_quad(load_quad(x + q * tokens + t));
#pragma GCC unroll 2
                    for (int v = 0; v < n_vectors; ++v) narrow[t][v] += multiply_pairs(code[v], values);
                }
            }
#pragma GCC unroll 8
            for (int t = 0; t < tokens; ++t)
#pragma GCC unroll 2
                for (int v = 0; v < n_vectors; ++v) sums[t][v] += widen(narrow[t][v], plane == 0 ? 1 : 16);
        }
    }
}

#elif defined(__aarch64__)

// Codes as signed bytes; those of 8 bits less 128.
template <int bits>
MPSEARCH_INLINE int8x16_t signed_codes(Bytes codes) {
    return (int8x16_t)(bits == 8 ? codes ^ 0x80 : codes);
}
MPSEARCH_INLINE int8x16_t broadcast_quad(uint32_t x) {
    return vreinterpretq_s8_u32(vdupq_n_u32(x));
}

#if defined(__ARM_FEATURE_DOTPROD)

template <int bits, int tokens, int n_vectors>
MPSEARCH_INLINE void add_products(const Bytes* codes, const uint32_t* x, Ints (&sums)[tokens][n_vectors]) {
#pragma GCC unroll 8
    for (int q = 0; q < kQuads; ++q) {
        int8x16_t code[n_vectors];
#pragma GCC unroll 4
        for (int v = 0; v < n_vectors; ++v) code[v] = signed_codes<bits>(codes[q * n_vectors + v]);
#pragma GCC unroll 8
        for (int t = 0; t < tokens; ++t) {
            const int8x16_t values = broadcast_quad(load_quad(x + q * tokens + t));
#pragma GCC unroll 4
            for (int v = 0; v < n_vectors; ++v) sums[t][v] = (Ints)vdotq_s32((int32x4_t)sums[t][v], code[v], values);
        }
    }
}

#else

template <int bits, int tokens, int n_vectors>
MPSEARCH_INLINE void add_products(const Bytes* codes, const uint32_t* x, Ints (&sums)[tokens][n_vectors]) {
    // kRun * 2 * max|signed code| * 127 is below 2^15.
    constexpr int kRun = bits <= 4 ? 8 : bits == 5 ? 4 : bits == 6 ? 2 : 1;
#pragma GCC unroll 4
    for (int v = 0; v < n_vectors; ++v) {
#pragma GCC unroll 8
        for (int begin = 0; begin < kQuads; begin += kRun) {
            int16x8_t low[tokens] = {}, high[tokens] = {};
#pragma GCC unroll 8
            for (int q = begin; q < begin + kRun; ++q) {
                const int8x16_t code = signed_codes<bits>(codes[q * n_vectors + v]);
#pragma GCC unroll 8
                for (int t = 0; t < tokens; ++t) {
                    const int8x16_t values = broadcast_quad(load_quad(x + q * tokens + t));
                    low[t] = vmlal_s8(low[t], vget_low_s8(code), vget_low_s8(values));
                    high[t] = vmlal_high_s8(high[t], code, values);
                }
            }
#pragma GCC unroll 8
            for (int t = 0; t < tokens; ++t)
                sums[t][v] = (Ints)vpadalq_s16((int32x4_t)sums[t][v], vpaddq_s16(low[t], high[t]));
        }
    }
}

#endif

#else

// The products of int16 lanes, neighbours added. Codes times int8 values stay below 2^15.
MPSEARCH_INLINE Ints multiply_add_pairs(Shorts codes, Shorts x) {
#if defined(__SSE2__)
    return (Ints)_mm_madd_epi16((__m128i)codes, (__m128i)x);
#else
    const Ints products = (Ints)(codes * x);
    return (products << 16 >> 16) + (products >> 16);
#endif
}

template <int bits, int tokens, int n_vectors>
MPSEARCH_INLINE void add_products(const Bytes* codes, const uint32_t* x, Ints (&sums)[tokens][n_vectors]) {
    for (int q = 0; q < kQuads; ++q) {
        for (int t = 0; t < tokens; ++t) {
            const Shorts values = (Shorts)(Ints{} + static_cast<int32_t>(load_quad(x + q * tokens + t)));
            const Shorts even = values << 8 >> 8, odd = values >> 8;
            for (int v = 0; v < n_vectors; ++v) {
                const Pairs pairs = (Pairs)codes[q * n_vectors + v];
                sums[t][v] += multiply_add_pairs((Shorts)(pairs & 0x00ff), even);
                sums[t][v] += multiply_add_pairs((Shorts)(pairs >> 8), odd);
            }
        }
    }
}

#endif

// Doubled zero points, less what `add_products` takes off the codes.
template <int bits>
MPSEARCH_INLINE Ints load_code_zeros(const uint8_t* record, bool half_scales, int part) {
    const Ints doubled = load_doubled_zeros(record, half_scales, part);
#if defined(__aarch64__)
    if (bits == 8) return doubled - 256;
#endif
    return doubled;
}

// What a group adds to the result: float(2 * sum - 2 * zero * sum of x) * scale.
MPSEARCH_INLINE Lanes group_result(Ints sum, int32_t sum_of_x, Lanes scales, Ints doubled_zeros) {
    return __builtin_convertvector(sum + sum - doubled_zeros * sum_of_x, Lanes) * scales;
}

template <int bits>
static void add_group(const LinearJob& job, int64_t tile, int64_t group, Lanes (&totals)[kVectors]) {
    const uint8_t* record = job.packed + (tile * job.n_groups + group) * record_bytes(job);
    const uint8_t* blocks = record + header_bytes(job.half_scales);
    const uint32_t* x = static_cast<const uint32_t*>(job.staged) + group * job.group_blocks * kQuads;
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
        Ints sums[1][1] = {};
        for (int64_t b = 0; b < job.group_blocks; ++b) {
            Bytes codes[kQuads];
            unpack_quads<bits>(blocks + b * bits * kQuadBytes, v, codes);
            add_products<bits>(codes, x + b * kQuads, sums);
        }
        totals[v] += group_result(sums[0][0], job.token_sums[group], load_scales(record, job.half_scales, v),
                                  load_code_zeros<bits>(record, job.half_scales, v));
    }
}

struct Int8Product {
    // One token; `n` tiles from `begin`, `apart` tiles apart.
    template <int bits, int n>
    static void multiply_token(const LinearJob& job, int64_t begin, int64_t apart) {
        Lanes totals[n][kVectors] = {};
        for (int64_t group = 0; group < job.n_groups; ++group)
            for (int i = 0; i < n; ++i) add_group<bits>(job, begin + i * apart, group, totals[i]);
        for (int i = 0; i < n; ++i) {
            for (int v = 0; v < kVectors; ++v) totals[i][v] = (job.token_scales[0] * 0.5f) * totals[i][v];
            store_rows(job, 0, begin + i * apart, totals[i]);
        }
    }

    template <int bits, int tokens>
    static void multiply_tokens(const LinearJob& job, int64_t tile) {
        Bytes codes[kStripBlocks * kQuads * kVectors];
        Ints sums[kMostTokens / tokens][tokens][kVectors];
        Lanes totals[kMostTokens][kVectors];
        memset(totals, 0, job.n_token_blocks * tokens * sizeof(totals[0]));
        for (int64_t group = 0; group < job.n_groups; ++group) {
            const uint8_t* record = job.packed + (tile * job.n_groups + group) * record_bytes(job);
            const uint8_t* blocks = record + header_bytes(job.half_scales);
            Lanes scales[kVectors];
            Ints doubled_zeros[kVectors];
            for (int v = 0; v < kVectors; ++v) {
                scales[v] = load_scales(record, job.half_scales, v);
                doubled_zeros[v] = load_code_zeros<bits>(record, job.half_scales, v);
            }
            for (int64_t begin = 0; begin < job.group_blocks; begin += kStripBlocks) {
                const int64_t left = job.group_blocks - begin, n_blocks = left < kStripBlocks ? left : kStripBlocks;
                for (int64_t b = 0; b < n_blocks; ++b) {
                    const uint8_t* ahead = blocks + (begin + b) * bits * kQuadBytes + kPrefetchBytes;
                    for (int i = 0; i < bits; ++i) __builtin_prefetch(ahead + i * kQuadBytes);
                    for (int v = 0; v < kVectors; ++v) {
                        Bytes quads[kQuads];
                        unpack_quads<bits>(blocks + (begin + b) * bits * kQuadBytes, v, quads);
                        for (int q = 0; q < kQuads; ++q) codes[(b * kQuads + q) * kVectors + v] = quads[q];
                    }
                }
                for (int64_t block = 0; block < job.n_token_blocks; ++block) {
                    const int64_t at = group * job.n_token_blocks + block;
                    const uint32_t* x =
                        static_cast<const uint32_t*>(job.staged) + (at * job.group_blocks + begin) * kQuads * tokens;
                    Ints sum[tokens][kVectors] = {};
                    if (begin > 0) memcpy(sum, sums[block], sizeof(sum));
                    for (int64_t b = 0; b < n_blocks; ++b)
                        add_products<bits>(codes + b * kQuads * kVectors, x + b * kQuads * tokens, sum);
                    if (n_blocks < left) {
                        memcpy(sums[block], sum, sizeof(sum));
                        continue;
                    }
                    for (int t = 0; t < tokens; ++t)
                        for (int v = 0; v < kVectors; ++v)
                            totals[block * tokens + t][v] +=
                                group_result(sum[t][v], job.token_sums[at * tokens + t], scales[v], doubled_zeros[v]);
                }
            }
        }
        for (int64_t token = 0; token < job.n_tokens; ++token) {
            for (int v = 0; v < kVectors; ++v) totals[token][v] = (job.token_scales[token] * 0.5f) * totals[token][v];
            store_rows(job, token, tile, totals[token]);
        }
    }
};

void linear_a8(const LinearJob& job, int64_t begin, int64_t end) {
    walk_tiles<Int8Product>(job, begin, end);
}

}  // namespace mpsearch::MPSEARCH_ISA
