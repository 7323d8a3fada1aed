// swiglu: out = round(gate / (1 + exp(-gate)) * up), float32 in between (Shazeer, arXiv 2002.05202).
#pragma once

#include <cstdint>

#include "common/dtypes.h"

namespace lk {

struct SwigluArgs {
  const void* gate;  // [m, n], rows `gate_stride` elements apart
  int64_t gate_stride;
  const void* up;  // [m, n]
  int64_t up_stride;
  void* out;  // [m, n], may be gate or up
  int64_t out_stride;
  int64_t m, n;
  DType dtype;  // of all three
  int num_threads;
};

}  // namespace lk
