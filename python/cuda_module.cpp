// layerskip_kernels.native._cuda: addresses, sizes, strides and a stream in, no tensor type. 0 stands for "no tensor".
#include "build_info.h"
#include "cuda/device_query.h"
#include "cuda_bindings.h"

namespace {

Error rms_norm(Address x, int64_t x_stride, Address weight, Address residual, int64_t residual_stride, Address out,
               int64_t out_stride, int64_t m, int64_t c, float eps, int dtype, Address stream) {
  py::gil_scoped_release release;
  return error_text(lk::cuda::rms_norm({pointer(x), x_stride, pointer(weight), pointer(residual), residual_stride,
                                        pointer(out), out_stride, m, c, eps, lk::DType(dtype)},
                                       stream_of(stream)));
}

// weights: data, stride, n, bias, out, out_stride of each. swiglu: they are gate and up, and share the first one's out.
Error small_linear(Address x, int64_t x_stride, int64_t m, int64_t c, const std::vector<Ints<6>>& weights,
                   Address norm_weight, float norm_eps, Address residual, int64_t residual_stride, bool swiglu,
                   int dtype, Address stream) {
  std::vector<lk::cuda::LinearWeight> list;
  list.reserve(weights.size());
  for (const Ints<6>& w : weights) list.push_back({pointer(w[0]), w[1], w[2], pointer(w[3]), pointer(w[4]), w[5]});
  py::gil_scoped_release release;
  return error_text(lk::cuda::small_linear({pointer(x), x_stride, m, c, list.data(), int64_t(list.size()),
                                            pointer(norm_weight), norm_eps, pointer(residual), residual_stride,
                                            swiglu, lk::DType(dtype)},
                                           stream_of(stream)));
}

Error swiglu(Address gate, int64_t gate_stride, Address up, int64_t up_stride, Address out, int64_t out_stride, int64_t m,
             int64_t n, int dtype, Address stream) {
  py::gil_scoped_release release;
  return error_text(lk::cuda::swiglu(
      {pointer(gate), gate_stride, pointer(up), up_stride, pointer(out), out_stride, m, n, lk::DType(dtype)},
      stream_of(stream)));
}

py::dict device_report() {
  const lk::cuda::Report report = [] {
    py::gil_scoped_release release;
    return lk::cuda::query_devices();
  }();
  py::list devices;
  for (const lk::cuda::Device& device : report.devices)
    devices.append(py::dict(py::arg("name") = device.name, py::arg("capability") = py::make_tuple(device.major, device.minor),
                            py::arg("multiprocessors") = device.multiprocessors,
                            py::arg("memory_bytes") = device.memory_bytes));
  py::dict result;
  result["runtime_version"] = report.runtime_version;
  result["driver_version"] = report.driver_version;
  result["devices"] = devices;
  result["reason"] = report.reason.empty() ? py::object(py::none()) : py::str(report.reason);
  return result;
}

py::dict build_info() {
  py::dict info;
  info["version"] = LK_BUILD_VERSION;
  info["compiler"] = LK_BUILD_CUDA_COMPILER;
  info["archs"] = LK_BUILD_CUDA_ARCHS;
  return info;
}

bool overlap_launches(bool overlap) {
  const bool before = lk::cuda::overlap_launches;
  lk::cuda::overlap_launches = overlap && lk::cuda::can_overlap();
  return before;
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  module.def("rms_norm", &rms_norm);
  module.def("small_linear", &small_linear);
  module.def("swiglu", &swiglu);
  module.attr("FUSED_NORM_ROWS") = lk::cuda::kFusedNormRows;
  bind_cache(module);
  bind_tokens(module);
  bind_round(module);

  module.def("overlap_launches", &overlap_launches);
  module.def("device_report", &device_report);
  module.def("build_info", &build_info);
}
