// What CUDA offers on this machine. Works without a driver.
#pragma once

#include <string>
#include <vector>

namespace lk::cuda {

struct Device {
  std::string name;
  int major, minor;
  int multiprocessors;
  size_t memory_bytes;
};

struct Report {
  int runtime_version;          // CUDA version this library was built with, 13000 for 13.0
  int driver_version;           // newest CUDA version the driver supports; 0 without a driver
  std::vector<Device> devices;  // empty when `reason` says why there are none
  std::string reason;
};

Report query_devices();

// Whether the kernels' code for the current device waits for the kernel in front by itself (`overlap_launches` of ops.h).
bool can_overlap();

}  // namespace lk::cuda
