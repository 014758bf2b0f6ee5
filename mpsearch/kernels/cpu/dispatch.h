// The instruction sets that this machine runs.
#pragma once

#include <vector>

#include "kernels.h"

namespace mpsearch {

struct Backend {
    const char* name;
    Kernels kernels;
};

// Slowest first; found once.
const std::vector<Backend>& backends();

}  // namespace mpsearch
