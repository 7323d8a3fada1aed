# tests/native: a program that runs every CPU op, for sanitizers and for processors without Python.
file(GLOB LAYERSKIP_DRIVER_SOURCES CONFIGURE_DEPENDS tests/native/*.cpp)
add_executable(layerskip_driver ${LAYERSKIP_DRIVER_SOURCES})
target_compile_options(layerskip_driver PRIVATE -Wall -Wextra)
target_link_libraries(layerskip_driver PRIVATE layerskip_cpu)
