// What an instruction of PTX does to one thread, for the C++ that ptx_to_cpp.py makes of kernels: names and meanings as in
// the PTX ISA. Registers are unsigned integers, float, double or bool; values pass between them bit by bit.
#pragma once

#include <cfenv>
#include <cmath>
#include <type_traits>

#include "cuda/intrinsics.cuh"
#include "memory_counts.h"

namespace ptx {

template <class To, class From>
inline To as(From value) {
  if constexpr (sizeof(To) == sizeof(From)) {
    To result;
    std::memcpy(&result, &value, sizeof result);
    return result;
  } else {  // a wide register holds a narrow value; sign or zeros above it
    static_assert(std::is_integral_v<To> && std::is_integral_v<From>);
    return To(value);
  }
}

// A kernel's argument. Of more than 16 bytes it is passed in memory, whatever it is made of.
template <int kBytes>
struct alignas(8) Bytes {
  unsigned char at[kBytes];
};

inline void check(bool holds, const char* what) {
  if (!holds) shim::fail(what);
}

// Shared memory is addressed with 32 bits: what a launch asks for from 0 on, a kernel's own variables from kOwn on.
constexpr uint32_t kOwn = 1u << 20;
struct Shared {
  unsigned char* own;
  uint32_t own_bytes;

  void* at(uint32_t address, uint32_t bytes, const char* kernel = __builtin_FUNCTION(), int line = __builtin_LINE()) const {
    memory_counts::access(true, address, bytes, kernel, line);
    check(address % bytes == 0, "an access to shared memory is not aligned");
    const bool is_own = address >= kOwn;
    const uint32_t offset = is_own ? address - kOwn : address;
    check(offset + bytes <= (is_own ? own_bytes : uint32_t(shim::state.dynamic_shared.size() - 128)),
          "an access to shared memory is out of bounds");
    return (is_own ? own : shim::dynamic_shared()) + offset;
  }
};

// `filled`: how many of the bytes an asynchronous copy reads, the rest are zeros; none of which may be where nothing is.
inline void* source(uint64_t address, uint32_t bytes, uint32_t filled, const char* kernel = __builtin_FUNCTION(),
                    int line = __builtin_LINE()) {
  check(address % bytes == 0, "an access to global memory is not aligned");
  memory_counts::access(false, address, filled, kernel, line);
  return reinterpret_cast<void*>(address);
}
inline void* global(uint64_t address, uint32_t bytes, const char* kernel = __builtin_FUNCTION(),
                    int line = __builtin_LINE()) {
  return source(address, bytes, bytes, kernel, line);
}

template <class T>
inline T load(const void* address) {
  T value;
  std::memcpy(&value, address, sizeof value);
  return value;
}
template <class T>
inline void store(void* address, T value) {
  std::memcpy(address, &value, sizeof value);
}

template <class T>
inline T mul_hi(T a, T b) {
  using Wide = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
  return T(Wide(a) * Wide(b) >> 8 * sizeof(T));
}
// Shifts by the width and more leave nothing but the sign.
template <class T>
inline T shl(T a, uint32_t n) {
  return n >= 8 * sizeof(T) ? T(0) : T(a << n);
}
template <class T>
inline T shr(T a, uint32_t n) {
  return T(a >> (n >= 8 * sizeof(T) ? 8 * sizeof(T) - 1 : n) >> (n >= 8 * sizeof(T)));
}
inline uint32_t brev(uint32_t a) {
  uint32_t result = 0;
  for (int i = 0; i < 32; ++i) result |= (a >> i & 1) << (31 - i);
  return result;
}
inline uint32_t bfind_shiftamt(uint32_t a) { return a ? uint32_t(__builtin_clz(a)) : 0xffffffffu; }
inline uint32_t bfi(uint32_t a, uint32_t b, uint32_t position, uint32_t length) {
  position &= 255, length &= 255;
  const uint32_t mask = shl(length >= 32 ? 0xffffffffu : (1u << length) - 1, position);
  return (shl(a, position) & mask) | (b & ~mask);
}
template <class T>
inline T bfe(T a, uint32_t position, uint32_t length) {
  position &= 255, length &= 255;
  if (length == 0) return 0;
  if (position + length >= 32) return shr(a, position);
  return shr(T(uint32_t(a) << (32 - position - length)), 32 - length);
}
inline uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = uint64_t(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t pick = selector >> 4 * i & 15;
    uint32_t byte = uint32_t(bytes >> 8 * (pick & 7)) & 255;
    if (pick & 8) byte = byte & 128 ? 255 : 0;  // the sign alone
    result |= byte << 8 * i;
  }
  return result;
}
inline uint32_t shf_l_wrap(uint32_t a, uint32_t b, uint32_t n) { return uint32_t((uint64_t(b) << 32 | a) << (n & 31) >> 32); }

// Rounded towards minus infinity, and towards zero.
inline float fma_rm(float a, float b, float c) {
  std::fesetround(FE_DOWNWARD);
  volatile float x = a, y = b, z = c;
  volatile float result = std::fma(x, y, z);
  std::fesetround(FE_TONEAREST);
  return result;
}
inline float add_rz(float a, float b) {
  std::fesetround(FE_TOWARDZERO);
  volatile float x = a, y = b;
  volatile float result = x + y;
  std::fesetround(FE_TONEAREST);
  return result;
}
// On the two floats of every register.
template <class Function, class... Registers>
inline uint64_t both(Function function, Registers... registers) {
  const float low = function(as<float>(uint32_t(registers))...), high = function(as<float>(uint32_t(registers >> 32))...);
  return uint64_t(as<uint32_t>(high)) << 32 | as<uint32_t>(low);
}
// Of one or two elements T.
template <class T, class Bits>
inline Bits add_halves(Bits a, Bits b) {
  Bits result = 0;
  for (unsigned shift = 0; shift < 8 * sizeof(Bits); shift += 16) {
    const float sum = lk::to_float(T{uint16_t(a >> shift)}) + lk::to_float(T{uint16_t(b >> shift)});
    result = Bits(result | Bits(Bits(lk::from_float<T>(sum).bits) << shift));
  }
  return result;
}
inline float flush(float a) { return std::fabs(a) < 1.17549435e-38f ? std::copysign(0.0f, a) : a; }
inline float saturate(float a) { return a > 0 ? (a < 1 ? a : 1.0f) : 0.0f; }

enum class Lane { up, down, bfly, idx };
template <Lane kMode>
inline uint32_t shfl(uint32_t value, uint32_t b, uint32_t c, uint32_t members, bool* in_range = nullptr) {
  check(members == 0xffffffffu, "a shuffle without all lanes");
  const int lane = shim::current->number & 31, segment = int(c >> 8 & 31), clamp = int(c & 31), by = int(b & 31);
  const int last = (lane & segment) | (clamp & ~segment), first = lane & segment;
  int from = kMode == Lane::up     ? lane - by
             : kMode == Lane::down ? lane + by
             : kMode == Lane::bfly ? lane ^ by
                                   : first | (by & ~segment);
  const bool fits = kMode == Lane::up ? from >= last : from <= last;
  if (!fits) from = lane;
  if (in_range) *in_range = fits;
  return __shfl_sync(members, value, from);
}
inline uint32_t ballot(bool value, uint32_t members) {
  check(members == 0xffffffffu, "a ballot without all lanes");
  return __ballot_sync(members, value);
}
enum class Fold { add, min, max };
template <Fold kFold, class T>
inline T redux(T value, uint32_t members) {
  check(members == 0xffffffffu, "a reduction without all lanes");
  const shim::Slot* slots = shim::exchange(&value, sizeof value);
  T result = load<T>(slots[0].bytes);
  for (int lane = 1; lane < 32; ++lane) {
    const T other = load<T>(slots[lane].bytes);
    result = kFold == Fold::add ? T(uint32_t(result) + uint32_t(other)) : (kFold == Fold::min) == (other < result) ? other : result;
  }
  return result;
}
inline void bar_sync(uint32_t barrier) {
  check(barrier == 0, "a named barrier");
  __syncthreads();
}
inline void bar_warp_sync(uint32_t members) {
  check(members == 0xffffffffu, "a warp's barrier without all lanes");
  __syncwarp();
}

// What ldmatrix reads, written: lane 8 i + r names row r of matrix i.
template <int kMatrices>
inline void stmatrix(void* row, const uint32_t (&a)[kMatrices]) {
  const shim::Slot* slots = shim::exchange(&row, sizeof row);
  const int lane = shim::current->number & 31;
  for (int i = 0; i < kMatrices; ++i) store(load<char*>(slots[8 * i + lane / 4].bytes) + lane % 4 * 4, a[i]);
}

template <class T>
inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4]) {
  std::memcpy(d, c, sizeof c);
  lk::cuda::mma<T>(d, a, b);
}

template <int kBytes>
inline void launch(void (*kernel)(Bytes<kBytes>), const void* argument, dim3 grid, unsigned threads, size_t shared_bytes) {
  Bytes<kBytes> copy;
  std::memcpy(&copy, argument, kBytes);
  shim::run({grid, dim3(threads), shared_bytes, [=] { kernel(copy); }});
}

}  // namespace ptx
