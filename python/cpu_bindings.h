// What the files of layerskip_kernels.native._cpu share.
#pragma once

#include <cstdint>

#include <pybind11/pybind11.h>

namespace py = pybind11;

using Address = uintptr_t;  // of a tensor's first element; 0: no tensor

template <class T = void>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

void bind_cache(py::module_& module);  // rope_append, kv_rollback, verify_attention, decoder_stack
void bind_tokens(py::module_& module);  // exit_head, verify_tokens, verify_rejection
