# The pybind11 modules: integers and pointers in, no torch.
set(Python_EXECUTABLE ${Python3_EXECUTABLE})
set(PYBIND11_FINDPYTHON ON)
find_package(pybind11 CONFIG REQUIRED)

string(REPLACE ";" "," LAYERSKIP_CUDA_ARCHS_TEXT "${CMAKE_CUDA_ARCHITECTURES}")
string(REPLACE ";" " " LAYERSKIP_CPU_FLAGS_TEXT "${CMAKE_CXX_FLAGS} ${CMAKE_CXX_FLAGS_RELEASE} ${LAYERSKIP_CPU_FLAGS}")
string(STRIP "${LAYERSKIP_CPU_FLAGS_TEXT}" LAYERSKIP_CPU_FLAGS_TEXT)
configure_file(python/build_info.h.in generated/build_info.h @ONLY)

function(layerskip_python_module name)
    pybind11_add_module(${name} NO_EXTRAS ${ARGN})
    target_include_directories(${name} PRIVATE ${CMAKE_BINARY_DIR}/generated python)
    set_target_properties(${name} PROPERTIES
        LIBRARY_OUTPUT_DIRECTORY ${LAYERSKIP_PRODUCTS} PREFIX "" SUFFIX ${LAYERSKIP_EXT_SUFFIX})
    # The modules are loaded into processes with other C++ in them: nothing of ours may stand in for theirs.
    target_link_options(${name} PRIVATE $<$<PLATFORM_ID:Linux>:-Wl,--exclude-libs,ALL> $<$<PLATFORM_ID:Linux>:-Wl,-s>)
endfunction()

layerskip_python_module(_cpu python/cpu_cache.cpp python/cpu_module.cpp python/cpu_tokens.cpp)
target_link_libraries(_cpu PRIVATE layerskip_cpu)
if(LAYERSKIP_CUDA)
    layerskip_python_module(_cuda python/cuda_cache.cpp python/cuda_module.cpp python/cuda_round.cpp python/cuda_tokens.cpp)
    target_link_libraries(_cuda PRIVATE layerskip_cuda)
endif()
