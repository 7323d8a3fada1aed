#include <cuda_runtime.h>

#include "cuda/device_query.h"

namespace lk::cuda {
namespace {

std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

__global__ void any_kernel() {}

}  // namespace

bool can_overlap() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, any_kernel);
  cudaGetLastError();
  return error == cudaSuccess && attributes.ptxVersion >= 90;  // what its code was compiled for, not what runs it
}

Report query_devices() {
  Report report{CUDART_VERSION, 0, {}, ""};
  cudaError_t error = cudaDriverGetVersion(&report.driver_version);
  if (error == cudaSuccess && report.driver_version == 0) {
    report.reason = "no CUDA device (no NVIDIA driver is installed)";
    return report;
  }
  int count = 0;
  error = cudaGetDeviceCount(&count);
  if (error == cudaErrorInsufficientDriver) {
    // Within a major version an older driver runs newer code, so the first release of the major version is the minimum.
    report.reason = "driver too old: it supports CUDA " + version_text(report.driver_version) + ", this build needs " +
                    std::to_string(CUDART_VERSION / 1000) + ".0 or newer";
  } else if (error == cudaErrorNoDevice || (error == cudaSuccess && count == 0)) {
    report.reason = "no CUDA device (the driver reports none)";
  } else if (error != cudaSuccess) {
    report.reason = std::string("no usable CUDA device (") + cudaGetErrorString(error) + ")";
  }
  for (int i = 0; report.reason.empty() && i < count; ++i) {
    cudaDeviceProp properties;
    error = cudaGetDeviceProperties(&properties, i);
    if (error != cudaSuccess) {
      report.reason = "CUDA device " + std::to_string(i) + " does not answer (" + cudaGetErrorString(error) + ")";
      report.devices.clear();
      break;
    }
    report.devices.push_back({properties.name, properties.major, properties.minor, properties.multiProcessorCount,
                              properties.totalGlobalMem});
  }
  cudaGetLastError();  // the query must not leave an error for torch to find
  return report;
}

}  // namespace lk::cuda
