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
// One thread handles a range of tiles (16 rows) for all tokens. Few tokens (1; with VNNI up to 16): the codes are unpacked
// in registers and multiplied at once. For one token four tiles are read in lock-step, because a core draws more from
// memory in four streams than in one. Many tokens: a strip of the tile (with VNNI of two, which halves the loads of x) is
// unpacked into the first cache and multiplied by every block of tokens. Bytes moved per weight: bits / 8, and for each 16
// groups a header of 64 or 128. Bound: memory up to about 4 tokens, from about 8 arithmetic: 64 products a cycle with
// VNNI on Zen 4, of which 82 to 87% were measured in groups of 128.
#include "tile.h"

namespace mpsearch::MPSEARCH_ISA {

constexpr int kStripBlocks = 8;       // unpacked at a time: 4 KB for each tile
constexpr int kPrefetchBytes = 4096;  // how far ahead weights are asked for, with few tokens

MPSEARCH_INLINE uint32_t load_quad(const uint32_t* x) {
    uint32_t value;
    memcpy(&value, x, sizeof(value));
    return value;
}

// Adds the products of a block: sums[..][t][v] += codes of vector v * x of token t, in `parts` parts, so that additions to
// one need not wait for one another. `codes` are [8 quads][n_vectors], x is [8 quads][tokens], four int8 each.
#if defined(__AVX512VNNI__)

template <int bits, int tokens, int n_vectors, int parts>
MPSEARCH_INLINE void add_products(const Bytes* codes, const uint32_t* x, Ints (&sums)[parts][tokens][n_vectors]) {
#pragma GCC unroll 8
    for (int q = 0; q < kQuads; ++q) {
#pragma GCC unroll 16
        for (int t = 0; t < tokens; ++t) {
            const __m512i values = _mm512_set1_epi32(static_cast<int>(load_quad(x + q * tokens + t)));
#pragma GCC unroll 2
            for (int v = 0; v < n_vectors; ++v) {
                Ints& sum = sums[q % parts][t][v];
                sum = (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)codes[q * n_vectors + v], values);
            }
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

template <int bits, int tokens, int n_vectors, int parts>
MPSEARCH_INLINE void add_products(const Bytes* codes, const uint32_t* x, Ints (&sums)[parts][tokens][n_vectors]) {
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
                for (int v = 0; v < n_vectors; ++v) sums[0][t][v] += widen(narrow[t][v], plane == 0 ? 1 : 16);
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

template <int bits, int tokens, int n_vectors, int parts>
MPSEARCH_INLINE void add_products(const Bytes* codes, const uint32_t* x, Ints (&sums)[parts][tokens][n_vectors]) {
#pragma GCC unroll 8
    for (int q = 0; q < kQuads; ++q) {
        int8x16_t code[n_vectors];
#pragma GCC unroll 4
        for (int v = 0; v < n_vectors; ++v) code[v] = signed_codes<bits>(codes[q * n_vectors + v]);
#pragma GCC unroll 8
        for (int t = 0; t < tokens; ++t) {
            const int8x16_t values = broadcast_quad(load_quad(x + q * tokens + t));
#pragma GCC unroll 4
            for (int v = 0; v < n_vectors; ++v)
                sums[0][t][v] = (Ints)vdotq_s32((int32x4_t)sums[0][t][v], code[v], values);
        }
    }
}

#else

template <int bits, int tokens, int n_vectors, int parts>
MPSEARCH_INLINE void add_products(const Bytes* codes, const uint32_t* x, Ints (&sums)[parts][tokens][n_vectors]) {
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
                sums[0][t][v] = (Ints)vpadalq_s16((int32x4_t)sums[0][t][v], vpaddq_s16(low[t], high[t]));
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

template <int bits, int tokens, int n_vectors, int parts>
MPSEARCH_INLINE void add_products(const Bytes* codes, const uint32_t* x, Ints (&sums)[parts][tokens][n_vectors]) {
    for (int q = 0; q < kQuads; ++q) {
        for (int t = 0; t < tokens; ++t) {
            const Shorts values = (Shorts)(Ints{} + static_cast<int32_t>(load_quad(x + q * tokens + t)));
            const Shorts even = values << 8 >> 8, odd = values >> 8;
            for (int v = 0; v < n_vectors; ++v) {
                const Pairs pairs = (Pairs)codes[q * n_vectors + v];
                sums[0][t][v] += multiply_add_pairs((Shorts)(pairs & 0x00ff), even);
                sums[0][t][v] += multiply_add_pairs((Shorts)(pairs >> 8), odd);
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

// With VNNI sums can begin with -2 * zero * X and take doubled codes, if these fit a byte: they end as D.
template <int bits>
constexpr bool kSumsAreD = kFewTokens > 1 && bits < 8;

template <int bits>
MPSEARCH_INLINE Ints first_sum(int32_t sum_of_x, Ints doubled_zeros) {
    return kSumsAreD<bits> ? doubled_zeros * -sum_of_x : Ints{};
}

// What a group adds to the result: float(D) * scale.
template <int bits>
MPSEARCH_INLINE Lanes group_result(Ints sum, int32_t sum_of_x, Lanes scales, Ints doubled_zeros) {
    const Ints exact = kSumsAreD<bits> ? sum : sum + sum - doubled_zeros * sum_of_x;
    return __builtin_convertvector(exact, Lanes) * scales;
}

template <int bits, int tokens>
static void add_group(const LinearJob& job, int64_t tile, int64_t group, Lanes (&totals)[tokens][kVectors]) {
    // Asking ahead pays where arithmetic takes longer than reading; elsewhere it costs a third (measured).
    constexpr bool prefetch = tokens > bits || (tokens > 1 && bits <= 4);
    constexpr int parts = kFewTokens == 1 ? 1 : tokens == 1 ? 4 : tokens == 4 ? 2 : 1;
    const uint8_t* record = job.packed + (tile * job.n_groups + group) * record_bytes(job);
    const uint8_t* blocks = record + header_bytes(job.half_scales);
    const uint32_t* x = static_cast<const uint32_t*>(job.staged) + group * job.group_blocks * kQuads * tokens;
    const int32_t* sums_of_x = job.token_sums + group * tokens;
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
        const Ints doubled_zeros = load_code_zeros<bits>(record, job.half_scales, v);
        Ints sums[parts][tokens][1] = {};
#pragma GCC unroll 16
        for (int t = 0; t < tokens; ++t) sums[0][t][0] = first_sum<bits>(sums_of_x[t], doubled_zeros);
        for (int64_t b = 0; b < job.group_blocks; ++b) {
            const uint8_t* block = blocks + b * bits * kQuadBytes;
            if (prefetch)
                for (int i = 0; i < bits; ++i) __builtin_prefetch(block + i * kQuadBytes + kPrefetchBytes);
            Bytes codes[kQuads];
            unpack_quads<bits, kSumsAreD<bits>>(block, v, codes);
            add_products<bits>(codes, x + b * kQuads * tokens, sums);
        }
        const Lanes scales = load_scales(record, job.half_scales, v);
#pragma GCC unroll 16
        for (int t = 0; t < tokens; ++t) {
#pragma GCC unroll 4
            for (int part = 1; part < parts; ++part) sums[0][t][0] += sums[part][t][0];
            totals[t][v] += group_result<bits>(sums[0][t][0], sums_of_x[t], scales, doubled_zeros);
        }
    }
}

struct Int8Product {
    static constexpr int kFew = kFewTokens, kTiles = kFewTokens > 1 ? 2 : 1;

    template <int bits, int tokens, int n>
    static void multiply_few(const LinearJob& job, int64_t begin, int64_t apart) {
        Lanes totals[n][tokens][kVectors] = {};
        for (int64_t group = 0; group < job.n_groups; ++group)
            for (int i = 0; i < n; ++i) add_group<bits, tokens>(job, begin + i * apart, group, totals[i]);
        for (int i = 0; i < n; ++i)
            for (int t = 0; t < tokens && t < job.n_tokens; ++t) store_token(job, t, begin + i * apart, totals[i][t]);
    }

    template <int bits, int tokens, int n>
    static void multiply_many(const LinearJob& job, int64_t tile) {
        constexpr int n_vectors = n * kVectors;
        Bytes codes[kStripBlocks * kQuads * n_vectors];
        Ints sums[kMostTokens / tokens][1][tokens][n_vectors];
        Lanes totals[kMostTokens][n][kVectors];
        memset(totals, 0, job.n_token_blocks * tokens * sizeof(totals[0]));
        for (int64_t group = 0; group < job.n_groups; ++group) {
            const uint8_t* record = job.packed + (tile * job.n_groups + group) * record_bytes(job);
            const int64_t apart = job.n_groups * record_bytes(job);
            Lanes scales[n_vectors];
            Ints doubled_zeros[n_vectors];
            for (int v = 0; v < n_vectors; ++v) {
                const uint8_t* header = record + v / kVectors * apart;
                scales[v] = load_scales(header, job.half_scales, v % kVectors);
                doubled_zeros[v] = load_code_zeros<bits>(header, job.half_scales, v % kVectors);
            }
            for (int64_t begin = 0; begin < job.group_blocks; begin += kStripBlocks) {
                const int64_t left = job.group_blocks - begin, n_blocks = left < kStripBlocks ? left : kStripBlocks;
                for (int64_t b = 0; b < n_blocks; ++b) {
                    for (int v = 0; v < n_vectors; ++v) {
                        const uint8_t* block = record + v / kVectors * apart + header_bytes(job.half_scales) +
                                               (begin + b) * bits * kQuadBytes;
                        Bytes quads[kQuads];
                        unpack_quads<bits, kSumsAreD<bits>>(block, v % kVectors, quads);
                        for (int q = 0; q < kQuads; ++q) codes[(b * kQuads + q) * n_vectors + v] = quads[q];
                    }
                }
                // The next strip, a share of it for each block of tokens: all at once they would wait for one another.
                const uint8_t* ahead = record + header_bytes(job.half_scales) + (begin + n_blocks) * bits * kQuadBytes;
                const int64_t share = n_blocks * bits / job.n_token_blocks + 1;
                for (int64_t block = 0; block < job.n_token_blocks; ++block) {
                    for (int64_t line = block * share; line < (block + 1) * share; ++line)
                        for (int i = 0; i < n; ++i) __builtin_prefetch(ahead + i * apart + line * kQuadBytes);
                    const int64_t at = group * job.n_token_blocks + block;
                    const uint32_t* x =
                        static_cast<const uint32_t*>(job.staged) + (at * job.group_blocks + begin) * kQuads * tokens;
                    const int32_t* sums_of_x = job.token_sums + at * tokens;
                    Ints sum[1][tokens][n_vectors];
                    if (begin > 0)
                        memcpy(sum, sums[block], sizeof(sum));
                    else
#pragma GCC unroll 8
                        for (int t = 0; t < tokens; ++t)
#pragma GCC unroll 4
                            for (int v = 0; v < n_vectors; ++v)
                                sum[0][t][v] = first_sum<bits>(sums_of_x[t], doubled_zeros[v]);
                    for (int64_t b = 0; b < n_blocks; ++b)
                        add_products<bits>(codes + b * kQuads * n_vectors, x + b * kQuads * tokens, sum);
                    if (n_blocks < left) {
                        memcpy(sums[block], sum, sizeof(sum));
                        continue;
                    }
#pragma GCC unroll 8
                    for (int t = 0; t < tokens; ++t)
#pragma GCC unroll 4
                        for (int v = 0; v < n_vectors; ++v)
                            totals[block * tokens + t][v / kVectors][v % kVectors] +=
                                group_result<bits>(sum[0][t][v], sums_of_x[t], scales[v], doubled_zeros[v]);
                }
            }
        }
        for (int64_t token = 0; token < job.n_tokens; ++token)
            for (int i = 0; i < n; ++i) store_token(job, token, tile + i, totals[token][i]);
    }

    static void store_token(const LinearJob& job, int64_t token, int64_t tile, Lanes (&total)[kVectors]) {
        for (int v = 0; v < kVectors; ++v) total[v] = (job.token_scales[token] * 0.5f) * total[v];
        store_rows(job, token, tile, total);
    }
};

void linear_a8(const LinearJob& job, int64_t begin, int64_t end) {
    walk_tiles<Int8Product>(job, begin, end);
}

}  // namespace mpsearch::MPSEARCH_ISA
