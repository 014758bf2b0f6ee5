// The instruction sets that this machine runs.
#pragma once

#include <vector>

#include "kernels.h"

namespace mpsearch {

struct Backend {
    const char* name;
    const Kernels* kernels;
};

// Slowest first.
const std::vector<Backend>& backends();

}  // namespace mpsearch
