// AVX-512 and AVX-512-VNNI on a processor with AVX2: included ahead of a kernel source, this makes their intrinsics SIMDe's
// and then says that both are there. (With -mavx512vnni the sources would be told the same, but run on no other processor.)
#pragma once

#include <immintrin.h>

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

// SIMDe 0.7.4 gives this alias the arguments of another function, and lacks the conversion of float16.
#undef _mm512_madd_epi16
#define _mm512_madd_epi16(a, b) simde_mm512_madd_epi16(a, b)
#undef _mm512_maskz_cvtph_ps
#define _mm512_maskz_cvtph_ps(mask, halves) cvtph_all(halves)

static inline simde__m512 cvtph_all(__m256i halves) {
    simde__m512_private floats;
    floats.m256[0] = simde__m256_from_private(simde__m256_to_private(_mm256_cvtph_ps(_mm256_castsi256_si128(halves))));
    floats.m256[1] = _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1));
    return simde__m512_from_private(floats);
}

// Called, because inlined everywhere it would keep the compiler busy for half a minute.
__attribute__((noinline, unused)) static simde__m512i call_dpbusd(simde__m512i sums, simde__m512i a, simde__m512i b) {
    return simde_mm512_dpbusd_epi32(sums, a, b);
}
#undef _mm512_dpbusd_epi32
#define _mm512_dpbusd_epi32(sums, a, b) call_dpbusd(sums, a, b)

#define __AVX512BW__ 1
#if defined(EMULATE_AVX512VNNI)
#define __AVX512VNNI__ 1
#endif
