# cmake -DNM=nm -P check_weak_symbols.cmake OBJECT...: fails when an object holds a weak symbol outside the kernels' own
# per-variant namespaces (lk::avx2:: and so on).
math(EXPR last "${CMAKE_ARGC} - 1")
set(objects "")
foreach(index RANGE ${last})
    if(CMAKE_ARGV${index} MATCHES "\\.o(bj)?$")
        list(APPEND objects "${CMAKE_ARGV${index}}")
    endif()
endforeach()
foreach(object IN LISTS objects)
    execute_process(COMMAND ${NM} -C --defined-only ${object} OUTPUT_VARIABLE symbols COMMAND_ERROR_IS_FATAL ANY)
    string(REGEX MATCHALL "[^\n]* [WVu] [^\n]*" weak "${symbols}")
    foreach(symbol IN LISTS weak)
        if(NOT symbol MATCHES "lk::(avx2|avx512|avx512_bf16|avx512_amx|neon|neon_bf16)::")
            message(FATAL_ERROR "${object} shares the symbol '${symbol}' with other variants: "
                                "make it static, always_inline, or a member of the variant's namespace")
        endif()
    endforeach()
endforeach()
