# The CPU library: every op compiled once per instruction set, plus the parts that are compiled once.

include(CheckCXXCompilerFlag)

# One line per op (and quantized_pack and quantized_panel, which two of them share). Each csrc/cpu/<op>.cpp is compiled
# for every variant.
set(LAYERSKIP_CPU_OPS
    decoder_stack
    exit_head
    kv_rollback
    quantize
    quantized_pack
    quantized_panel
    rms_norm
    rope_append
    small_linear
    swiglu
    verify_attention
    verify_rejection
    verify_tokens
)
list(TRANSFORM LAYERSKIP_CPU_OPS PREPEND csrc/cpu/)
list(TRANSFORM LAYERSKIP_CPU_OPS APPEND .cpp)

# Contracting a*b+c would let two instances of one template round differently. The kernels ask for FMA where they want it.
set(LAYERSKIP_CPU_FLAGS -ffp-contract=off -Wall -Wextra)

set(LAYERSKIP_CPU_VARIANTS "auto" CACHE STRING "Instruction sets: auto, or a list out of scalar avx2 avx512 avx512_bf16 avx512_amx neon neon_bf16")
set(LAYERSKIP_FLAGS_scalar -Wno-psabi)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64|amd64")
    set(variants scalar avx2 avx512 avx512_bf16)
    set(LAYERSKIP_FLAGS_avx2 -mavx2 -mfma -mf16c)
    set(LAYERSKIP_FLAGS_avx512 ${LAYERSKIP_FLAGS_avx2} -mavx512f -mavx512bw -mavx512vl -mavx512dq -mprefer-vector-width=512)
    if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
        # GCC 12 takes the undefined pass-through operands of its own AVX-512 intrinsics for mistakes.
        list(APPEND LAYERSKIP_FLAGS_avx512 -Wno-maybe-uninitialized -Wno-uninitialized)
    endif()
    set(LAYERSKIP_FLAGS_avx512_bf16 ${LAYERSKIP_FLAGS_avx512} -mavx512bf16 -mavx512vnni)
    set(LAYERSKIP_FLAGS_avx512_amx ${LAYERSKIP_FLAGS_avx512_bf16} -mamx-tile -mamx-bf16 -mamx-int8)
    check_cxx_compiler_flag("-mamx-tile -mamx-bf16 -mamx-int8" LAYERSKIP_COMPILES_AMX)  # GCC 11, Clang 12
    if(LAYERSKIP_COMPILES_AMX AND CMAKE_SYSTEM_NAME STREQUAL "Linux")
        list(APPEND variants avx512_amx)
    endif()
    if(LAYERSKIP_EMULATE)
        set(LAYERSKIP_FLAGS_avx512 ${LAYERSKIP_FLAGS_avx2} -Wno-psabi -I${CMAKE_SOURCE_DIR}/tests/native/avx512_emulated)
        set(LAYERSKIP_FLAGS_avx512_bf16 ${LAYERSKIP_FLAGS_avx512})
        set(LAYERSKIP_FLAGS_avx512_amx ${LAYERSKIP_FLAGS_avx512})
        set(LAYERSKIP_FLAGS_neon ${LAYERSKIP_FLAGS_avx2} -Wno-psabi -I${CMAKE_SOURCE_DIR}/tests/native/neon_emulated)
        set(LAYERSKIP_FLAGS_neon_bf16 ${LAYERSKIP_FLAGS_neon})
    endif()
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "aarch64|arm64|ARM64")
    set(variants scalar neon neon_bf16)
    if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
        # On Arm GCC reorders before it assigns registers, and then has too few for the sums of a tile.
        set(LAYERSKIP_FLAGS_neon -fno-schedule-insns)
    endif()
    set(LAYERSKIP_FLAGS_neon_bf16 ${LAYERSKIP_FLAGS_neon} -march=armv8.2-a+dotprod+i8mm+bf16)
else()
    set(variants scalar)
endif()
if(NOT LAYERSKIP_CPU_VARIANTS STREQUAL "auto")
    set(variants ${LAYERSKIP_CPU_VARIANTS})
endif()

add_library(layerskip_cpu STATIC
    csrc/cpu/cpu_features.cpp
    csrc/cpu/dispatch.cpp
    csrc/cpu/thread_pool.cpp
    csrc/cpu/workspace.cpp
)
target_include_directories(layerskip_cpu PUBLIC csrc)
if(LAYERSKIP_EMULATE)
    target_compile_definitions(layerskip_cpu PRIVATE LK_EMULATED)
endif()
target_compile_options(layerskip_cpu PRIVATE ${LAYERSKIP_CPU_FLAGS})
target_link_libraries(layerskip_cpu PUBLIC Threads::Threads)

foreach(variant IN LISTS variants)
    set(objects layerskip_cpu_${variant})
    add_library(${objects} OBJECT ${LAYERSKIP_CPU_OPS})
    target_include_directories(${objects} PRIVATE csrc)
    string(TOUPPER ${variant} upper)
    target_compile_definitions(${objects} PRIVATE LK_VARIANT=${variant} LK_VARIANT_${upper}=1)
    target_compile_options(${objects} PRIVATE ${LAYERSKIP_CPU_FLAGS} ${LAYERSKIP_FLAGS_${variant}})
    target_sources(layerskip_cpu PRIVATE $<TARGET_OBJECTS:${objects}>)
    target_compile_definitions(layerskip_cpu PRIVATE LK_HAVE_${upper}=1)
    list(APPEND LAYERSKIP_INSTRUMENTED ${objects})
    if(NOT variant STREQUAL "scalar" AND NOT LAYERSKIP_SANITIZE)
        list(APPEND LAYERSKIP_CHECKED_OBJECTS $<TARGET_OBJECTS:${objects}>)
    endif()
endforeach()

# A weak symbol (an inline function of a standard header, say) compiled with AVX flags may be the copy the linker keeps for
# everybody, and then the scalar variant dies with SIGILL on an old processor. So such objects may share none.
if(LAYERSKIP_CHECKED_OBJECTS AND CMAKE_NM)
    add_custom_command(TARGET layerskip_cpu POST_BUILD VERBATIM COMMAND_EXPAND_LISTS
        COMMAND ${CMAKE_COMMAND} -DNM=${CMAKE_NM} -P ${CMAKE_SOURCE_DIR}/cmake/check_weak_symbols.cmake
                ${LAYERSKIP_CHECKED_OBJECTS})
endif()

if(LAYERSKIP_SANITIZE)
    foreach(target IN ITEMS layerskip_cpu ${LAYERSKIP_INSTRUMENTED})
        target_compile_options(${target} PRIVATE -fsanitize=${LAYERSKIP_SANITIZE} -fno-omit-frame-pointer -g)
    endforeach()
    target_compile_options(layerskip_cpu INTERFACE -fsanitize=${LAYERSKIP_SANITIZE})
    target_link_options(layerskip_cpu INTERFACE -fsanitize=${LAYERSKIP_SANITIZE})
endif()
