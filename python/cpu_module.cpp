// layerskip_kernels.native._cpu: addresses, sizes and strides in, no tensor type. 0 stands for "no tensor".
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "build_info.h"
#include "cpu/cpu_features.h"
#include "cpu/ops.h"
#include "cpu/thread_pool.h"
#include "cpu/workspace.h"
#include "cpu_bindings.h"

namespace {

void rms_norm(Address x, int64_t x_stride, Address weight, Address residual, int64_t residual_stride, Address out,
              int64_t out_stride, int64_t m, int64_t c, float eps, int dtype, int num_threads) {
  py::gil_scoped_release release;
  lk::rms_norm({pointer(x), x_stride, pointer(weight), pointer(residual), residual_stride, pointer(out), out_stride, m, c,
                eps, lk::DType(dtype), num_threads});
}

// weights: data, stride, n, bias, out, out_stride of each weight in turn. quantization: empty, or bits, group, scale,
// scale_stride, scale_dtype, offset, offset_stride of each.
void small_linear(Address x, int64_t x_stride, int64_t m, int64_t c, const py::tuple& weights, Address norm_weight,
                  float norm_eps, Address residual, int64_t residual_stride, int dtype, int num_threads,
                  const py::tuple& quantization) {
  constexpr size_t kFields = 6;
  lk::LinearWeight few[4];
  std::vector<lk::LinearWeight> many;
  const size_t count = weights.size() / kFields;
  lk::LinearWeight* list = few;
  if (count > 4) {
    many.resize(count);
    list = many.data();
  }
  for (size_t i = 0; i < count; ++i) {
    int64_t field[kFields];
    for (size_t j = 0; j < kFields; ++j) field[j] = PyLong_AsLongLong(PyTuple_GET_ITEM(weights.ptr(), i * kFields + j));
    list[i] = {pointer(field[0]), field[1], field[2], pointer(field[3]), pointer(field[4]), field[5],
               quantization_of(quantization, i)};
  }
  if (PyErr_Occurred()) throw py::error_already_set();
  py::gil_scoped_release release;
  lk::small_linear({pointer(x), x_stride, m, c, list, int64_t(count), pointer(norm_weight), norm_eps, pointer(residual),
                    residual_stride, lk::DType(dtype), num_threads});
}

void swiglu(Address gate, int64_t gate_stride, Address up, int64_t up_stride, Address out, int64_t out_stride, int64_t m,
            int64_t n, int dtype, int num_threads) {
  py::gil_scoped_release release;
  lk::swiglu({pointer(gate), gate_stride, pointer(up), up_stride, pointer(out), out_stride, m, n, lk::DType(dtype),
              num_threads});
}

// Returns the first row with NaN or infinity in it; n: there is none.
int64_t quantize(Address weight, int64_t weight_stride, int64_t bits, int64_t group, Address values, Address scale,
                 Address error, Address norm, int64_t n, int64_t c, int dtype, int num_threads) {
  int64_t bad_row;
  py::gil_scoped_release release;
  lk::quantize({pointer(weight), weight_stride, bits, group, pointer<uint8_t>(values), pointer<lk::bf16>(scale),
                pointer<float>(error), pointer<float>(norm), &bad_row, n, c, lk::DType(dtype), num_threads});
  return bad_row;
}

py::dict build_info() {
  py::dict info;
  info["version"] = LK_BUILD_VERSION;
  info["compiler"] = LK_BUILD_COMPILER;
  info["flags"] = LK_BUILD_CPU_FLAGS;
  info["variants"] = lk::built_variants();
  info["cuda"] = LK_BUILD_CUDA_NOTE;
  return info;
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
  module.def("quantize", &quantize);
  module.def("rms_norm", &rms_norm);
  module.def("small_linear", &small_linear);
  module.def("swiglu", &swiglu);
  bind_cache(module);
  bind_tokens(module);

  module.def("build_info", &build_info);
  module.def("active_variant", &lk::active_variant);
  module.def("set_variant", &lk::set_variant);
  module.def("why_variant_unsupported", &lk::why_variant_unsupported);
  module.def("pool_size", &lk::pool_size);
  module.def("workspace_bytes", &lk::workspace_bytes);
}
