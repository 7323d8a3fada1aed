#include "cuda/rope_append.cuh"

namespace lk::cuda {

cudaError_t rope_append(const RopeAppendArgs& args, cudaStream_t stream) {
  if (args.b == 0 || args.t == 0) return cudaSuccess;
  if (args.d > kRopeMaxDim) return cudaErrorInvalidValue;
  const int64_t heads = args.h + 2 * args.g, spread = args.t * args.b <= kFewRows ? divide_up(heads, kRopeWarps) : 1;
  const dim3 grid(unsigned(args.t), unsigned(args.b), unsigned(spread));
  return for_dtype(args.dtype, [&](auto type) {
    return launch(rope_append_kernel<decltype(type)>, grid, kRopeThreads, 0, stream, args);
  });
}

}  // namespace lk::cuda
