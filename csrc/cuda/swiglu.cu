#include "cuda/swiglu.cuh"

namespace lk::cuda {

cudaError_t swiglu(const SwigluArgs& args, cudaStream_t stream) {
  if (args.m == 0 || args.n == 0) return cudaSuccess;
  const bool wide = is_wide(args.gate, args.gate_stride, args.dtype) && is_wide(args.up, args.up_stride, args.dtype) &&
                    is_wide(args.out, args.out_stride, args.dtype);
  return for_dtype(args.dtype, [&](auto type) {
    using T = decltype(type);
    const dim3 grid(unsigned(args.m), unsigned(divide_up(args.n, kSwigluThreads * kVector<T>)));
    return launch(swiglu_kernel<T>, grid, kSwigluThreads, 0, stream, SwigluLaunch{args, wide});
  });
}

}  // namespace lk::cuda
