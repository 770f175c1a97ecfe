# The module libfsdp_cuda.so: the CUDA runtime and kernels behind C function tables. Programs open it at run time
# (device/cuda_loader.h), so nothing links it and nothing else needs a toolkit.
if(NOT FSDP_WITH_CUDA MATCHES "^(ON|OFF|AUTO)$")
  message(FATAL_ERROR "FSDP_WITH_CUDA is '${FSDP_WITH_CUDA}'; expected ON, OFF or AUTO")
endif()
if(FSDP_WITH_CUDA STREQUAL "OFF")
  return()
endif()
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES "80;90a")
endif()
if(NOT DEFINED CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
  find_program(FSDP_NVCC nvcc HINTS $ENV{CUDA_HOME}/bin /usr/local/cuda/bin)
  mark_as_advanced(FSDP_NVCC)
  if(FSDP_NVCC)
    set(CMAKE_CUDA_COMPILER ${FSDP_NVCC})
  endif()
endif()
include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  if(FSDP_WITH_CUDA STREQUAL "ON")
    message(FATAL_ERROR "FSDP_WITH_CUDA=ON, but nvcc was not found. Put it on PATH or set CUDACXX.")
  endif()
  message(STATUS "nvcc not found: building without CUDA kernels")
  return()
endif()
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)

add_library(fsdp_cuda MODULE cuda_kernels.cu cuda_elements.cu cuda_quantized.cu cuda_sums.cu
  cuda_updates.cu
  ${PROJECT_SOURCE_DIR}/libfsdp/device/cuda_runtime_table.cpp)

# NCCL: the copy that LibTorch uses, one in a process.
get_filename_component(_site_packages "${LibTorch_LIBRARY_DIR}/../.." ABSOLUTE)
find_path(NCCL_INCLUDE_DIR nccl.h HINTS ${_site_packages}/nvidia/nccl/include ${CUDAToolkit_INCLUDE_DIRS})
find_library(NCCL_LIBRARY NAMES libnccl.so.2 nccl HINTS ${_site_packages}/nvidia/nccl/lib)
mark_as_advanced(NCCL_INCLUDE_DIR NCCL_LIBRARY)
if(NCCL_INCLUDE_DIR AND NCCL_LIBRARY)
  target_sources(fsdp_cuda PRIVATE ${PROJECT_SOURCE_DIR}/libfsdp/comm/device/nccl_table.cpp)
  target_include_directories(fsdp_cuda SYSTEM PRIVATE ${NCCL_INCLUDE_DIR})
  target_link_libraries(fsdp_cuda PRIVATE ${NCCL_LIBRARY})
  get_filename_component(_nccl_dir "${NCCL_LIBRARY}" DIRECTORY)
else()
  message(STATUS "NCCL not found: building without its transport")
endif()
add_library(fsdp::cuda ALIAS fsdp_cuda)
target_include_directories(fsdp_cuda PRIVATE ${PROJECT_SOURCE_DIR})
# --fmad=false: the same bits as the CPU twins. Debian's CMake 3.25 knows CUDA up to C++17.
target_compile_options(fsdp_cuda PRIVATE
  $<$<COMPILE_LANGUAGE:CUDA>:--fmad=false -Werror=all-warnings -Xcompiler=-Wall,-Wextra>)
target_link_libraries(fsdp_cuda PRIVATE CUDA::cudart $<BUILD_INTERFACE:fsdp_build_flags>)
get_filename_component(_cudart_dir "${CUDA_cudart_LIBRARY}" DIRECTORY)
set_target_properties(fsdp_cuda PROPERTIES
  CUDA_STANDARD 17 CUDA_STANDARD_REQUIRED ON CUDA_RUNTIME_LIBRARY Shared
  CXX_VISIBILITY_PRESET hidden CUDA_VISIBILITY_PRESET hidden
  LIBRARY_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/lib BUILD_RPATH "${_cudart_dir};${_nccl_dir}")
include(GNUInstallDirs)
install(TARGETS fsdp_cuda LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR})
