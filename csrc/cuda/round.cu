#include "cuda/round.cuh"

namespace lk::cuda {

cudaError_t embed(const EmbedArgs& args, cudaStream_t stream) {
  if (args.n == 0) return cudaSuccess;
  const EmbedLaunch a{args, is_wide(args.table, args.table_stride, args.dtype) &&
                                is_wide(args.out, args.out_stride, args.dtype)};
  return for_dtype(args.dtype, [&](auto type) {
    using T = decltype(type);
    const dim3 grid(unsigned(args.n), unsigned(divide_up(args.c, kRoundThreads * kVector<T>)));
    return launch(embed_kernel<T>, grid, kRoundThreads, 0, stream, a);
  });
}

cudaError_t begin_round(const BeginRoundArgs& args, cudaStream_t stream) {
  if (args.b == 0) return cudaSuccess;
  const dim3 grid(unsigned(divide_up(args.b * args.t, kRoundThreads)));
  return launch(begin_round_kernel, grid, kRoundThreads, 0, stream, args);
}

cudaError_t end_round(const EndRoundArgs& args, cudaStream_t stream) {
  if (args.b == 0) return cudaSuccess;
  return launch(end_round_kernel, dim3(unsigned(divide_up(args.b, kRoundThreads))), kRoundThreads, 0, stream, args);
}

}  // namespace lk::cuda
