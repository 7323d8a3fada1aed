// What the files of layerskip_kernels.native._cpu share.
#pragma once

#include "bindings.h"
#include "cpu/quantization.h"

// Of the i-th weight: seven fields in the struct's order; none: not quantized.
inline lk::Quantization quantization_of(const py::tuple& fields, size_t i = 0) {
  constexpr size_t kFields = 7;
  if (fields.size() == 0) return {};
  if (fields.size() < (i + 1) * kFields) throw py::value_error("quantization: expected 7 fields of each weight");
  int64_t f[kFields];
  for (size_t j = 0; j < kFields; ++j) f[j] = PyLong_AsLongLong(PyTuple_GET_ITEM(fields.ptr(), i * kFields + j));
  return {f[0], f[1], pointer(Address(f[2])), f[3], f[4], pointer<float>(Address(f[5])), f[6]};
}

void bind_cache(py::module_& module);  // rope_append, kv_rollback, verify_attention, decoder_stack
void bind_tokens(py::module_& module);  // exit_head, verify_tokens, verify_rejection
