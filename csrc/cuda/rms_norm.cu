#include "cuda/rms_norm.cuh"

namespace lk::cuda {

cudaError_t rms_norm(const RmsNormArgs& args, cudaStream_t stream) {
  if (args.m == 0 || args.c == 0) return cudaSuccess;
  const bool wide = is_wide(args.x, args.x_stride, args.dtype) && is_wide(args.weight, 0, args.dtype) &&
                    is_wide(args.out, args.out_stride, args.dtype) &&
                    (!args.residual || is_wide(args.residual, args.residual_stride, args.dtype));
  const dim3 grid(unsigned(divide_up(args.m, kNormWarps)));
  return for_dtype(args.dtype, [&](auto type) {
    return launch(rms_norm_kernel<decltype(type)>, grid, 32 * kNormWarps, 0, stream, RmsNormLaunch{args, wide});
  });
}

}  // namespace lk::cuda
