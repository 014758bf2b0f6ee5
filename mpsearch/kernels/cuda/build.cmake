# The library _cuda: plain C functions, for one GPU, linked with neither PyTorch nor the driver.
#
# It is built where nvcc is and a GPU answers, for that GPU alone, or for what MPSEARCH_CUDA_ARCHITECTURES names (environment
# or -D): "90", "80;90", or "all" for a release. Elsewhere it could not run, and would cost every install a minute. nvcc is
# called as a plain command and not through CMake's CUDA language, whose compiler check alone takes longer than a file, and
# a file that fails to compile leaves an install without _cuda and never one without _cpu.
set(architectures "$ENV{MPSEARCH_CUDA_ARCHITECTURES}")
if(MPSEARCH_CUDA_ARCHITECTURES)
  set(architectures "${MPSEARCH_CUDA_ARCHITECTURES}")
endif()
find_program(MPSEARCH_NVCC nvcc HINTS "$ENV{CUDA_HOME}/bin" /usr/local/cuda/bin)
if(MPSEARCH_NVCC AND NOT architectures)
  execute_process(COMMAND nvidia-smi --query-gpu=compute_cap --format=csv,noheader
                  OUTPUT_VARIABLE capability RESULT_VARIABLE failed ERROR_QUIET)
  if(NOT failed AND capability MATCHES "^([0-9]+)\\.([0-9])")
    set(architectures "${CMAKE_MATCH_1}${CMAKE_MATCH_2}")
  endif()
endif()
if(NOT MPSEARCH_NVCC OR NOT architectures)
  message(STATUS "No CUDA kernels: nvcc is ${MPSEARCH_NVCC}, architectures are '${architectures}'")
  return()
endif()

execute_process(COMMAND ${MPSEARCH_NVCC} --list-gpu-code OUTPUT_VARIABLE known)
if(architectures STREQUAL "all")
  set(architectures 80 86 89 90 100 120)
endif()
set(targets)
foreach(architecture IN LISTS architectures)
  if(known MATCHES "sm_${architecture}[^0-9]")
    list(APPEND targets -gencode arch=compute_${architecture},code=sm_${architecture})
  endif()
endforeach()
message(STATUS "CUDA kernels: ${MPSEARCH_NVCC} ${targets}")

# --fmad=false: the specification rounds multiply and add separately; where fusing is allowed the sources say so.
set(flags -std=c++20 -O3 --fmad=false --threads 2 -ccbin ${CMAKE_CXX_COMPILER} -Xcompiler=-fPIC,-fvisibility=hidden,-Wall
    ${targets})
set(folder ${CMAKE_CURRENT_SOURCE_DIR}/cuda)
file(GLOB headers CONFIGURE_DEPENDS ${folder}/*.cuh ${folder}/*.h ${folder}/../cpu/arguments.h ${folder}/../cpu/input.h)
set(objects)

# add_object(NAME SOURCE FLAG...): one object file; an empty one where it does not compile, which then does not link.
function(add_object name source)
  set(object ${CMAKE_CURRENT_BINARY_DIR}/cuda_${name}.o)
  add_custom_command(
    OUTPUT ${object}
    COMMAND sh -c "\"$@\" || : > '${object}'" sh ${MPSEARCH_NVCC} ${flags} ${ARGN} -c ${folder}/${source} -o ${object}
    DEPENDS ${folder}/${source} ${headers}
    COMMENT "CUDA ${name}"
    VERBATIM)
  set(objects ${objects} ${object} PARENT_SCOPE)
endfunction()

foreach(bits RANGE 1 8)
  add_object(product_float${bits} product_float.cu -DMPSEARCH_BITS=${bits})
  add_object(product_int8${bits} product_int8.cu -DMPSEARCH_BITS=${bits})
endforeach()
foreach(name quantize pack dequantize stage linear rotate device)
  add_object(${name} ${name}.cu)
endforeach()

set(library ${CMAKE_CURRENT_BINARY_DIR}/_cuda.so)
add_custom_command(
  OUTPUT ${library}
  COMMAND sh -c "rm -f '${library}'; \"$@\" || echo 'mpsearch: the CUDA kernels were not built (see above)' >&2" sh
          ${MPSEARCH_NVCC} -shared -cudart static -ccbin ${CMAKE_CXX_COMPILER} ${objects} -o ${library}
  DEPENDS ${objects}
  COMMENT "CUDA library"
  VERBATIM)
add_custom_target(_cuda ALL DEPENDS ${library})
install(FILES ${library} DESTINATION mpsearch/kernels OPTIONAL)
