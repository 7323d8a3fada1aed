// What the files of layerskip_kernels.native._cpu share.
#pragma once

#include "bindings.h"

void bind_cache(py::module_& module);  // rope_append, kv_rollback, verify_attention, decoder_stack
void bind_tokens(py::module_& module);  // exit_head, verify_tokens, verify_rejection
