// The whole of CUDA is in the one header here.
#pragma once
#include "cuda_runtime.h"
