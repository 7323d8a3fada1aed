// Bindings of the ops on tokens.
#include <pybind11/stl.h>

#include "cpu/ops.h"
#include "cpu_bindings.h"

namespace {

// draft, draft_stride, num_draft, batch, drafts, eos_ids, num_eos, remaining, finished; then the outputs tokens,
// tokens_stride, num_emitted, num_accepted, finished.
lk::VerifyRound verify_round(const py::tuple& fields) {
  constexpr size_t kFields = 14;
  if (fields.size() != kFields) throw py::value_error("round: expected 14 fields");
  int64_t f[kFields];
  for (size_t i = 0; i < kFields; ++i) f[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(fields.ptr(), i));
  if (PyErr_Occurred()) throw py::error_already_set();
  return {pointer<int64_t>(f[0]), f[1], pointer<int32_t>(f[2]), f[3], f[4], pointer<int64_t>(f[5]), f[6],
          pointer<int32_t>(f[7]), pointer<bool>(f[8]), pointer<int64_t>(f[9]), f[10], pointer<int32_t>(f[11]),
          pointer<int32_t>(f[12]), pointer<bool>(f[13])};
}

void verify_tokens(const py::tuple& round, Address target, int64_t target_stride) {
  const lk::VerifyTokensArgs args{verify_round(round), pointer<int64_t>(target), target_stride};
  py::gil_scoped_release release;
  lk::verify_tokens(args);
}

using Strides = std::pair<int64_t, int64_t>;

void verify_rejection(const py::tuple& round, Address draft_probs, Strides draft_probs_stride, Address target_probs,
                      Strides target_probs_stride, Address uniforms, Strides uniforms_stride, int64_t vocab, bool block,
                      int num_threads) {
  const lk::VerifyRejectionArgs args{verify_round(round),
                                     pointer<float>(draft_probs),
                                     {draft_probs_stride.first, draft_probs_stride.second},
                                     pointer<float>(target_probs),
                                     {target_probs_stride.first, target_probs_stride.second},
                                     pointer<float>(uniforms),
                                     {uniforms_stride.first, uniforms_stride.second},
                                     vocab,
                                     block,
                                     num_threads};
  py::gil_scoped_release release;
  lk::verify_rejection(args);
}

}  // namespace

void bind_tokens(py::module_& module) {
  module.def("verify_tokens", &verify_tokens);
  module.def("verify_rejection", &verify_rejection);
}
