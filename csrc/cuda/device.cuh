// What kernels and launchers share: vectors of a row, sums over a warp, the launch.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "cuda/intrinsics.cuh"
#include "cuda/ops.h"

namespace lk::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int64_t kWideBytes = 16;  // of the widest load

template <class T>
constexpr int kVector = int(kWideBytes / sizeof(T));  // elements of a 16-byte load

template <class T>
union Elements {  // what a 16-byte load brings; all compilers in question let one be written and the other be read
  uint4 wide;
  T at[kVector<T>];
};

template <class T>
struct Vector {
  static constexpr int size = kVector<T>;
  float at[size];
};

// The 16 bytes from element i on of a row of `count` that starts, and ends, at a multiple of 16 bytes; zeros behind its end.
// No branch, so that several are under way at once.
template <class T>
__device__ __forceinline__ uint4 load_whole(const T* row, int64_t i, int64_t count) {
  return i < count ? *reinterpret_cast<const uint4*>(row + i) : make_uint4(0, 0, 0, 0);
}

// Elements [i, i + size) of a row of `count`; zeros behind its end. `wide`: the row starts at a multiple of 16 bytes.
template <class T>
__device__ __forceinline__ Vector<T> load_vector(const T* row, int64_t i, int64_t count, bool wide) {
  Vector<T> v;
  if (wide && i + v.size <= count) {
    const Elements<T> elements{*reinterpret_cast<const uint4*>(row + i)};
#pragma unroll
    for (int j = 0; j < v.size; ++j) v.at[j] = widen(elements.at[j]);
  } else {
#pragma unroll
    for (int j = 0; j < v.size; ++j) v.at[j] = i + j < count ? widen(row[i + j]) : 0.0f;
  }
  return v;
}

template <class T>
__device__ __forceinline__ void store_vector(T* row, int64_t i, int64_t count, bool wide, const Vector<T>& v) {
  if (wide && i + v.size <= count) {
    Elements<T> elements;
#pragma unroll
    for (int j = 0; j < v.size; ++j) elements.at[j] = narrow<T>(v.at[j]);
    store_wide(row + i, elements.wide);
  } else {
#pragma unroll
    for (int j = 0; j < v.size; ++j)
      if (i + j < count) row[i + j] = narrow<T>(v.at[j]);
  }
}

// The same sum in every lane.
template <class T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(kAllLanes, value, distance);
  return value;
}

template <class T>
__device__ __forceinline__ T warp_max(T value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) value = max(value, __shfl_xor_sync(kAllLanes, value, distance));
  return value;
}

// Whether rows `stride` elements apart all start at multiples of 16 bytes. Decides how loads are made, never a sum.
inline bool is_wide(const void* address, int64_t stride, DType dtype) {
  return reinterpret_cast<uintptr_t>(address) % kWideBytes == 0 && stride * int64_t(size_of(dtype)) % kWideBytes == 0;
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What a kernel that reads no weights ahead begins with.
__device__ __forceinline__ void follow_previous_kernels() {
  allow_next_kernel();
  wait_for_previous_kernels();
}

// With `overlap_launches` the kernel may start as soon as all blocks of the one in front have: then its launch, and what it
// does before wait_for_previous_kernels(), cost no time. Every thread of every kernel waits before it ends, so that the end
// of one kernel is the end of all before it.
template <class Args>
cudaError_t launch(void (*kernel)(Args), dim3 grid, int threads, size_t shared_bytes, cudaStream_t stream,
                   const Args& args) {
  if (grid.y > 65535 || grid.z > 65535) return cudaErrorInvalidValue;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &overlap;
  config.numAttrs = overlap_launches ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, args);
}

// call(T{}) with T of the dtype.
template <class Call>
cudaError_t for_dtype(DType dtype, Call call) {
  switch (dtype) {
    case DType::f32: return call(float{});
    case DType::f16: return call(f16{});
    case DType::bf16: return call(bf16{});
  }
  return cudaErrorInvalidValue;
}

}  // namespace lk::cuda
