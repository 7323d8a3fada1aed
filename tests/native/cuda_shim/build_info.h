// What CMake writes for a real build.
#pragma once

#define LK_BUILD_VERSION "emulated"
#define LK_BUILD_CUDA_COMPILER "emulated"
#define LK_BUILD_CUDA_ARCHS "90"
