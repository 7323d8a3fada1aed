#include <algorithm>

#include "cuda/verify_attention.cuh"

namespace lk::cuda {
namespace {

constexpr int64_t kScratchBytes = 64 << 20;  // unless one row of one sequence needs more

// How the work is cut into launches that share the scratch memory; moves no bit.
struct Plan {
  int slots, slots_held;
  int64_t rows, sequences, row_floats;
};

Plan plan_of(int64_t b, int64_t t, int64_t h, int64_t g, int64_t d, int64_t capacity) {
  int slots = 16;  // with one sequence, about 256 blocks
  while (slots < 128 && slots * g < 256) slots *= 2;
  const int slots_held = int(std::min<int64_t>(slots, divide_up(capacity, kMinChunk)));
  const int64_t row_floats = h * slots_held * (d + 2);
  const int64_t fitting = std::max<int64_t>(1, kScratchBytes / 4 / row_floats);
  return {slots, slots_held, std::min(fitting, t), std::max<int64_t>(1, std::min({fitting / t, b, int64_t(65535)})),
          row_floats};
}

template <class T, int kMaxDim, int kRowTiles>
cudaError_t launch_split(AttentionLaunch& a, int64_t sequences, cudaStream_t stream) {
  using Block = AttentionBlock<T, kMaxDim, kRowTiles>;
  constexpr auto* kKernel = verify_attention_kernel<T, kMaxDim, kRowTiles>;
  constexpr size_t kBytes = sizeof(typename Block::Shared);
  // Per device and cheap; not recorded by a capture.
  const cudaError_t error = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(kBytes));
  if (error != cudaSuccess) return error;
  a.row_blocks = int(divide_up(a.rows * (a.args.h / a.args.g), Block::kRows));
  const dim3 grid(unsigned(a.slots_held * a.row_blocks), unsigned(a.args.g), unsigned(sequences));
  return launch(kKernel, grid, Block::kThreads, kBytes, stream, a);
}

// Twice the rows share what a block loads, where there are that many.
template <class T, int kMaxDim>
cudaError_t launch_rows(AttentionLaunch& a, int64_t sequences, cudaStream_t stream) {
  if constexpr (!std::is_same_v<T, float> && kMaxDim <= 128)
    if (a.rows * (a.args.h / a.args.g) > kQueryRows) return launch_split<T, kMaxDim, 2>(a, sequences, stream);
  return launch_split<T, kMaxDim, 1>(a, sequences, stream);
}

}  // namespace

int64_t verify_attention_scratch(int64_t b, int64_t t, int64_t h, int64_t g, int64_t d, int64_t capacity) {
  const Plan plan = plan_of(b, t, h, g, d, capacity);
  return plan.rows * plan.sequences * plan.row_floats * 4;
}

cudaError_t verify_attention(const VerifyAttentionArgs& args, cudaStream_t stream) {
  if (args.b == 0 || args.t == 0 || args.h == 0) return cudaSuccess;
  if (args.d > 256 || args.d % 8 || args.h % args.g) return cudaErrorInvalidValue;
  const Plan plan = plan_of(args.b, args.t, args.h, args.g, args.d, args.capacity);
  AttentionLaunch a{args};
  a.slots = plan.slots;
  a.slots_held = plan.slots_held;
  a.sliding_window = int(args.sliding_window > 0 ? std::min<int64_t>(args.sliding_window, kNoWindow) : kNoWindow);
  a.slack = args.tree_mask ? int(divide_up(args.t, 64) * 64) : 0;
  a.wide = a.wide_q = true;
  for (int i = 0; i < 3; ++i) {
    a.wide = a.wide && is_wide(args.k_cache, args.k_cache_stride[i], args.dtype) &&
             is_wide(args.v_cache, args.v_cache_stride[i], args.dtype);
    a.wide_q = a.wide_q && is_wide(args.q, args.q_stride[i], args.dtype);
  }
  a.sums = args.scratch;
  a.stats = args.scratch + plan.rows * plan.sequences * args.h * plan.slots_held * args.d;
  for (a.first_batch = 0; a.first_batch < args.b; a.first_batch += plan.sequences)
    for (a.first_row = 0; a.first_row < args.t; a.first_row += plan.rows) {
      const int64_t sequences = std::min(plan.sequences, args.b - a.first_batch);
      a.rows = std::min(plan.rows, args.t - a.first_row);
      const cudaError_t error = for_dtype(args.dtype, [&](auto type) {
        using T = decltype(type);
        cudaError_t error = cudaSuccess;
        if constexpr (!std::is_same_v<T, float>)
          if (args.d <= 64) error = launch_rows<T, 64>(a, sequences, stream);
        if (args.d > 128) error = launch_rows<T, 256>(a, sequences, stream);
        else if (args.d > 64 || std::is_same_v<T, float>) error = launch_rows<T, 128>(a, sequences, stream);
        if (error != cudaSuccess) return error;
        return launch(merge_attention_kernel<T>, dim3(unsigned(a.rows * args.h), unsigned(sequences)), kMergeThreads, 0,
                      stream, a);
      });
      if (error != cudaSuccess) return error;
    }
  return cudaSuccess;
}

}  // namespace lk::cuda
