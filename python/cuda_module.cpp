// layerskip_kernels.native._cuda: addresses, sizes, strides and a stream in, no tensor type. 0 stands for "no tensor".
#include <pybind11/pybind11.h>

#include "build_info.h"
#include "cuda/device_query.h"

namespace py = pybind11;

namespace {

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

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  module.def("device_report", &device_report);
  module.def("build_info", &build_info);
}
