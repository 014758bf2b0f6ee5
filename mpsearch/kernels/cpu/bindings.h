// What the files of the shell share.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>

#include "dispatch.h"

namespace mpsearch {

inline int64_t ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

// Asks for large pages where a tensor that is about to be written lies; does nothing for null.
void use_huge_pages(const void* memory, int64_t bytes);

// Scratch memory of the calling thread, 64 bytes aligned, valid until it asks for the slot again: a fresh piece costs page
// faults each time.
enum Slot { kLinearSlot, kConvSlot, kKernelSlot, kSampleSlot, kSlots };
uint8_t* scratch(Slot slot, size_t bytes);

// A function of the module as Python calls it, `arguments` being the address of its struct.
template <class Arguments, void (*run)(const Kernels&, const Arguments&, int n_threads)>
void call(int backend, uintptr_t arguments, int n_threads) {
    run(*backends().at(backend).kernels, *reinterpret_cast<const Arguments*>(arguments), n_threads);
}

template <class Arguments, void (*run)(const Kernels&, const Arguments&, int n_threads)>
void define(nanobind::module_& module, const char* name, const char* doc) {
    using namespace nanobind::literals;
    module.def(name, &call<Arguments, run>, nanobind::call_guard<nanobind::gil_scoped_release>(), "backend"_a,
               "arguments"_a, "n_threads"_a, doc);
}

void bind_products(nanobind::module_& module);  // and embeddings
void bind_conv(nanobind::module_& module);
void bind_feedback(nanobind::module_& module);
void bind_joint(nanobind::module_& module);

}  // namespace mpsearch
