// What the files of the shell share.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>

namespace mpsearch {

// Asks for large pages where a tensor that is about to be written lies; 0 is "not there".
void use_huge_pages(uintptr_t address, int64_t bytes);

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

void bind_products(nanobind::module_& module);
void bind_conv(nanobind::module_& module);  // and embeddings
void bind_feedback(nanobind::module_& module);

}  // namespace mpsearch
