#include "cuda/verify_tokens.cuh"

namespace lk::cuda {

cudaError_t verify_tokens(const VerifyTokensArgs& args, cudaStream_t stream) {
  if (args.round.batch == 0) return cudaSuccess;
  return launch(verify_tokens_kernel, dim3(unsigned(args.round.batch)), kVerifyThreads, 0, stream, args);
}

}  // namespace lk::cuda
