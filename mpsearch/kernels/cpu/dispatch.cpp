// Which of the instruction sets that were built this machine runs; `__builtin_cpu_supports` also asks the operating
// system.
#include "dispatch.h"

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#define MPSEARCH_BACKEND(isa)                                                                                  \
    Backend {                                                                                                  \
        #isa, Kernels {                                                                                        \
            isa::quantize, isa::dequantize, isa::pack, isa::unpack, isa::pack_weight, isa::unpack_weight,      \
                isa::tokens_per_block, isa::stage, isa::stage_int8, isa::linear, isa::linear_a8, isa::embed,   \
                isa::round_with_feedback, isa::half_quadratic, isa::rotate, &isa::conv_float, &isa::conv_int8, \
                &isa::conv_lanes                                                                               \
        }                                                                                                      \
    }

#if defined(MPSEARCH_HAS_baseline)
MPSEARCH_DECLARE_KERNELS(baseline)
MPSEARCH_DECLARE_CONV(baseline)
#endif
#if defined(MPSEARCH_HAS_avx2)
MPSEARCH_DECLARE_KERNELS(avx2)
MPSEARCH_DECLARE_CONV(avx2)
#endif
#if defined(MPSEARCH_HAS_avx512)
MPSEARCH_DECLARE_KERNELS(avx512)
MPSEARCH_DECLARE_CONV(avx512)
#endif
#if defined(MPSEARCH_HAS_avx512vnni)
MPSEARCH_DECLARE_KERNELS(avx512vnni)
MPSEARCH_DECLARE_CONV(avx512vnni)
#endif
#if defined(MPSEARCH_HAS_neon)
MPSEARCH_DECLARE_KERNELS(neon)
MPSEARCH_DECLARE_CONV(neon)
#endif
#if defined(MPSEARCH_HAS_neondotprod)
MPSEARCH_DECLARE_KERNELS(neondotprod)
MPSEARCH_DECLARE_CONV(neondotprod)
#endif

namespace mpsearch {

static std::vector<Backend> find_backends() {
    std::vector<Backend> found;
#if defined(MPSEARCH_HAS_baseline)
    found.push_back(MPSEARCH_BACKEND(baseline));
#endif
#if defined(__x86_64__)
    [[maybe_unused]] const bool avx2 =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    [[maybe_unused]] const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                                         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                                         __builtin_cpu_supports("avx512vl");
#endif
#if defined(MPSEARCH_HAS_avx2)
    if (avx2) found.push_back(MPSEARCH_BACKEND(avx2));
#endif
#if defined(MPSEARCH_HAS_avx512)
    if (avx512) found.push_back(MPSEARCH_BACKEND(avx512));
#endif
#if defined(MPSEARCH_HAS_avx512vnni)
    if (avx512 && __builtin_cpu_supports("avx512vnni")) found.push_back(MPSEARCH_BACKEND(avx512vnni));
#endif
#if defined(MPSEARCH_HAS_neon)
    found.push_back(MPSEARCH_BACKEND(neon));
#endif
#if defined(MPSEARCH_HAS_neondotprod) && defined(__linux__)
    if (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) found.push_back(MPSEARCH_BACKEND(neondotprod));
#endif
    return found;
}

const std::vector<Backend>& backends() {
    static const std::vector<Backend> found = find_backends();
    return found;
}

}  // namespace mpsearch
