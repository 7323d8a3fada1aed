// What the bindings of both libraries share: addresses and strides as Python passes them.
#pragma once

#include <array>
#include <cstdint>

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

namespace py = pybind11;

using Address = uintptr_t;  // of a tensor's first element; 0: no tensor

template <class T = void>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

template <size_t n>
using Ints = std::array<int64_t, n>;

// All but the last stride: that dimension is contiguous.
template <size_t n, size_t m>
void copy_outer(const Ints<n>& strides, int64_t (&to)[m]) {
  static_assert(m == n - 1);
  for (size_t i = 0; i < m; ++i) to[i] = strides[i];
}
