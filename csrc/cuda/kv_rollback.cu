#include "cuda/kv_rollback.cuh"

namespace lk::cuda {

cudaError_t kv_rollback(const KvRollbackArgs& args, cudaStream_t stream) {
  if (args.b == 0) return cudaSuccess;
  if ((args.path || args.scrub) && args.layers > 0 && args.g > 0) {
    if (args.path && args.window > kRollbackMaxWindow) return cudaErrorInvalidValue;
    const dim3 grid(unsigned(2 * args.g), unsigned(args.b), unsigned(args.layers));
    const size_t shared = args.path ? size_t(kRollbackShared) : 0;
    auto* kernel = args.dtype == DType::f32 ? move_rows_kernel<uint32_t> : move_rows_kernel<uint16_t>;
    const cudaError_t error = launch(kernel, grid, kRollbackThreads, shared, stream, args);
    if (error != cudaSuccess) return error;
  }
  return launch(add_lengths_kernel, dim3(unsigned(divide_up(args.b, kRollbackThreads))), kRollbackThreads, 0, stream, args);
}

}  // namespace lk::cuda
