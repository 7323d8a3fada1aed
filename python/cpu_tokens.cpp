// Bindings of the ops that choose tokens.
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

// penalty: factor, first_seen, its stride, position, share; empty: none.
// sampling: temperature, seed, position, stream, top_k, top_p, min_p; empty: greedy.
// screen: address of the weight, its stride, error; empty: none.
void exit_head(Address hidden, int64_t hidden_stride, Address norm_weight, float eps, Address lm_head,
               int64_t lm_head_stride, Address bias, float logit_scale, float softcap, const std::vector<int64_t>& penalty,
               const std::vector<Address>& sampling, Address logits_out, int64_t logits_stride, Address token, Address logprob, Address confidence, int64_t n,
               int64_t c, int64_t v, int dtype, int num_threads, const py::tuple& quantization,
               const std::vector<int64_t>& screen, const py::tuple& screen_quantization) {
  const lk::Quantization lm_head_quantization = quantization_of(quantization);
  lk::ScreenArgs screened{};
  if (!screen.empty())
    screened = {pointer(screen.at(0)), screen.at(1), quantization_of(screen_quantization), pointer<float>(screen.at(2))};
  if (PyErr_Occurred()) throw py::error_already_set();
  lk::PenaltyArgs p{};
  if (!penalty.empty())
    p = {pointer<float>(penalty.at(0)), pointer<uint8_t>(penalty.at(1)), penalty.at(2), pointer<uint8_t>(penalty.at(3)),
         penalty.at(4)};
  lk::SamplingArgs s{};
  if (!sampling.empty())
    s = {pointer<float>(sampling.at(0)),   pointer<int64_t>(sampling.at(1)), pointer<int64_t>(sampling.at(2)),
         pointer<int64_t>(sampling.at(3)), pointer<int64_t>(sampling.at(4)), pointer<float>(sampling.at(5)),
         pointer<float>(sampling.at(6))};
  py::gil_scoped_release release;
  lk::exit_head({pointer(hidden), hidden_stride, pointer(norm_weight), eps, pointer(lm_head), lm_head_stride, pointer(bias),
                 logit_scale, softcap, p, s, pointer<float>(logits_out), logits_stride, pointer<int64_t>(token),
                 pointer<float>(logprob), pointer<float>(confidence), n, c, v, lk::DType(dtype), num_threads,
                 lm_head_quantization, screened});
}

}  // namespace

void bind_tokens(py::module_& module) {
  module.def("exit_head", &exit_head);
  module.def("verify_tokens", &verify_tokens);
  module.def("verify_rejection", &verify_rejection);
}
