#include "cuda/verify_rejection.cuh"

namespace lk::cuda {

cudaError_t verify_rejection(const VerifyRejectionArgs& args, cudaStream_t stream) {
  if (args.round.batch == 0) return cudaSuccess;
  return launch(verify_rejection_kernel, dim3(unsigned(args.round.batch)), kRejectionThreads, 0, stream, args);
}

}  // namespace lk::cuda
