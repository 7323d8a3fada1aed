# The CUDA library. CMAKE_CUDA_ARCHITECTURES comes from setup.py; the runtime is linked statically, so the module loads
# on a machine without a driver.
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
enable_language(CUDA)

# One line per op, compiled as csrc/cuda/<op>.cu.
set(LAYERSKIP_CUDA_OPS
    exit_head
    kv_rollback
    rms_norm
    rope_append
    round
    small_linear
    swiglu
    verify_attention
    verify_rejection
    verify_tokens
)
list(TRANSFORM LAYERSKIP_CUDA_OPS PREPEND csrc/cuda/)
list(TRANSFORM LAYERSKIP_CUDA_OPS APPEND .cu)

add_library(layerskip_cuda STATIC csrc/cuda/device_query.cu ${LAYERSKIP_CUDA_OPS})
target_include_directories(layerskip_cuda PUBLIC csrc)
target_include_directories(layerskip_cuda SYSTEM PUBLIC ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
# Contracting a*b+c would let two instances of one template round differently. The kernels ask for FMA where they want it.
target_compile_options(layerskip_cuda PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall --fmad=false>)
