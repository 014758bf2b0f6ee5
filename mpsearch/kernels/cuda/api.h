// What the library offers: C functions, which Python calls (cuda_backend.py) after checking tensors. Their arguments are those of
// the CPU's kernels (../cpu/arguments.h), addresses being of the GPU's memory; the struct itself lies in the host's.
//
// Work is put on `stream`. Each function returns 0 or the number of a CUDA error, which `mpsearch_error` puts into words.
#pragma once

#include <cstdint>

#include "../cpu/arguments.h"

#define MPSEARCH_API extern "C" __attribute__((visibility("default")))

MPSEARCH_API const char* mpsearch_error(int error);
MPSEARCH_API int mpsearch_count_devices(int* count);
MPSEARCH_API int mpsearch_use_device(int device);
MPSEARCH_API int64_t mpsearch_arguments_bytes();  // kArgumentsBytes

MPSEARCH_API int mpsearch_quantize(const mpsearch::QuantizeArguments* arguments, uintptr_t stream);
MPSEARCH_API int mpsearch_pack(const mpsearch::PackArguments* arguments, uintptr_t stream);
MPSEARCH_API int mpsearch_unpack(const mpsearch::PackArguments* arguments, uintptr_t stream);
MPSEARCH_API int mpsearch_dequantize(const mpsearch::DequantizeArguments* arguments, uintptr_t stream);
MPSEARCH_API int mpsearch_dequantize_stream(const mpsearch::StreamArguments* arguments, uintptr_t stream);
MPSEARCH_API int mpsearch_rotate(const mpsearch::RotateArguments* arguments,
                                 uintptr_t stream);                                        // blocks of <= 8192 columns
MPSEARCH_API int64_t mpsearch_linear_scratch(const mpsearch::LinearArguments* arguments);  // bytes
MPSEARCH_API int mpsearch_linear(const mpsearch::LinearArguments* arguments, uintptr_t stream);
