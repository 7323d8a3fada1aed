// What the files of layerskip_kernels.native._cuda share. Every op ends with the stream, and returns None or what CUDA says
// went wrong.
#pragma once

#include "bindings.h"
#include "cuda/ops.h"

using Error = const char*;

inline Error error_text(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }
inline cudaStream_t stream_of(Address stream) { return pointer<CUstream_st>(stream); }

void bind_cache(py::module_& module);   // rope_append, kv_rollback, verify_attention
void bind_tokens(py::module_& module);  // exit_head, verify_tokens, verify_rejection
void bind_round(py::module_& module);   // embed, begin_round, end_round
