// Bindings of the ops that choose tokens.
#include "cuda_bindings.h"

namespace {

// draft, draft_stride, num_draft, batch, drafts, eos_ids, num_eos, remaining, finished; then the outputs tokens,
// tokens_stride, num_emitted, num_accepted, finished.
lk::cuda::VerifyRound verify_round(const Ints<14>& f) {
  return {pointer<int64_t>(f[0]), f[1], pointer<int32_t>(f[2]), f[3], f[4], pointer<int64_t>(f[5]), f[6],
          pointer<int32_t>(f[7]), pointer<bool>(f[8]), pointer<int64_t>(f[9]), f[10], pointer<int32_t>(f[11]),
          pointer<int32_t>(f[12]), pointer<bool>(f[13])};
}

Error verify_tokens(const Ints<14>& round, Address target, int64_t target_stride, Address stream) {
  const lk::cuda::VerifyTokensArgs args{verify_round(round), pointer<int64_t>(target), target_stride};
  py::gil_scoped_release release;
  return error_text(lk::cuda::verify_tokens(args, stream_of(stream)));
}

Error verify_rejection(const Ints<14>& round, Address draft_probs, const Ints<2>& draft_probs_stride,
                       Address target_probs, const Ints<2>& target_probs_stride, Address uniforms,
                       const Ints<2>& uniforms_stride, int64_t vocab, bool block, Address stream) {
  const lk::cuda::VerifyRejectionArgs args{verify_round(round),
                                           pointer<float>(draft_probs),
                                           {draft_probs_stride[0], draft_probs_stride[1]},
                                           pointer<float>(target_probs),
                                           {target_probs_stride[0], target_probs_stride[1]},
                                           pointer<float>(uniforms),
                                           {uniforms_stride[0], uniforms_stride[1]},
                                           vocab,
                                           block};
  py::gil_scoped_release release;
  return error_text(lk::cuda::verify_rejection(args, stream_of(stream)));
}

// penalty: factor, first_seen, its stride, position, share.
// sampling: temperature, seed, position, stream, top_k, top_p, min_p.
Error exit_head(Address hidden, int64_t hidden_stride, Address norm_weight, float eps, Address lm_head,
                int64_t lm_head_stride, Address bias, float logit_scale, float softcap, const Ints<5>& penalty,
                const Ints<7>& sampling, Address logits, int64_t logits_stride, bool keep_logits,
                Address partials, Address token, Address logprob, Address confidence, int64_t n, int64_t c, int64_t v,
                int dtype, Address stream) {
  const lk::cuda::PenaltyArgs p{pointer<float>(penalty[0]), pointer<uint8_t>(penalty[1]), penalty[2],
                                pointer<uint8_t>(penalty[3]), penalty[4]};
  const lk::cuda::SamplingArgs s{pointer<float>(sampling[0]),   pointer<int64_t>(sampling[1]),
                                 pointer<int64_t>(sampling[2]), pointer<int64_t>(sampling[3]),
                                 pointer<int64_t>(sampling[4]), pointer<float>(sampling[5]),
                                 pointer<float>(sampling[6])};
  py::gil_scoped_release release;
  return error_text(lk::cuda::exit_head(
      {pointer(hidden), hidden_stride, pointer(norm_weight), eps, pointer(lm_head), lm_head_stride, pointer(bias),
       logit_scale, softcap, p, s, pointer<float>(logits), logits_stride, keep_logits, pointer(partials),
       pointer<int64_t>(token), pointer<float>(logprob), pointer<float>(confidence), n, c, v, lk::DType(dtype)},
      stream_of(stream)));
}

}  // namespace

void bind_tokens(py::module_& module) {
  module.def("exit_head", &exit_head);
  module.attr("PARTIAL_BYTES") = lk::cuda::kPartialBytes;
  module.attr("TILE_ROWS") = lk::cuda::kTileRows;
  module.def("verify_tokens", &verify_tokens);
  module.def("verify_rejection", &verify_rejection);
}
