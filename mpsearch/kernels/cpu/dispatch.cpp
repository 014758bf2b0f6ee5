// Which of the instruction sets that were built this machine runs; `__builtin_cpu_supports` also asks the operating
// system.
#include "dispatch.h"

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#if defined(MPSEARCH_HAS_baseline)
namespace mpsearch::baseline {
extern const Kernels kernels;
}
#endif
#if defined(MPSEARCH_HAS_avx2)
namespace mpsearch::avx2 {
extern const Kernels kernels;
}
#endif
#if defined(MPSEARCH_HAS_avx512)
namespace mpsearch::avx512 {
extern const Kernels kernels;
}
#endif
#if defined(MPSEARCH_HAS_avx512vnni)
namespace mpsearch::avx512vnni {
extern const Kernels kernels;
}
#endif
#if defined(MPSEARCH_HAS_neon)
namespace mpsearch::neon {
extern const Kernels kernels;
}
#endif
#if defined(MPSEARCH_HAS_neondotprod)
namespace mpsearch::neondotprod {
extern const Kernels kernels;
}
#endif

namespace mpsearch {

static std::vector<Backend> available_backends() {
    std::vector<Backend> available;
#if defined(MPSEARCH_HAS_baseline)
    available.push_back({"baseline", &baseline::kernels});
#endif
#if defined(__x86_64__)
    [[maybe_unused]] const bool avx2 =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    [[maybe_unused]] const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                                         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                                         __builtin_cpu_supports("avx512vl");
#endif
#if defined(MPSEARCH_HAS_avx2)
    if (avx2) available.push_back({"avx2", &avx2::kernels});
#endif
#if defined(MPSEARCH_HAS_avx512)
    if (avx512) available.push_back({"avx512", &avx512::kernels});
#endif
#if defined(MPSEARCH_HAS_avx512vnni)
    if (avx512 && __builtin_cpu_supports("avx512vnni")) available.push_back({"avx512vnni", &avx512vnni::kernels});
#endif
#if defined(MPSEARCH_HAS_neon)
    available.push_back({"neon", &neon::kernels});
#endif
#if defined(MPSEARCH_HAS_neondotprod) && defined(__linux__)
    if (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) available.push_back({"neondotprod", &neondotprod::kernels});
#endif
    return available;
}

const std::vector<Backend>& backends() {
    static const std::vector<Backend> available = available_backends();
    return available;
}

}  // namespace mpsearch
