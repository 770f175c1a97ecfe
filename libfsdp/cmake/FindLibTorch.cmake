# Finds LibTorch without TorchConfig.cmake (which would demand a CUDA toolkit and inject flags of its own).
#
# Looks in LIBTORCH_ROOT, then CMAKE_PREFIX_PATH, then the project's .venv, then the python3 on PATH.
# Targets: LibTorch::torch_cpu (all that programs link), LibTorch::nlohmann comes from the system package.
# Variables: LibTorch_FOUND, LibTorch_VERSION, LibTorch_ROOT_DIR.
set(_libtorch_hints ${LIBTORCH_ROOT} $ENV{LIBTORCH_ROOT})
if(NOT _libtorch_hints)
  foreach(_python ${CMAKE_CURRENT_LIST_DIR}/../../.venv/bin/python ${PROJECT_SOURCE_DIR}/.venv/bin/python python3)
    execute_process(COMMAND ${_python} -c
      "import importlib.util as u, os; print(os.path.dirname(u.find_spec('torch').origin))"
      OUTPUT_VARIABLE _libtorch_dir OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET RESULT_VARIABLE _libtorch_rc)
    if(_libtorch_rc EQUAL 0 AND _libtorch_dir)
      list(APPEND _libtorch_hints ${_libtorch_dir})
      break()
    endif()
  endforeach()
endif()
find_path(LibTorch_INCLUDE_DIR torch/csrc/api/include/torch/torch.h HINTS ${_libtorch_hints} PATH_SUFFIXES include)
find_library(LibTorch_CPU_LIBRARY torch_cpu HINTS ${_libtorch_hints} PATH_SUFFIXES lib)
find_library(LibTorch_C10_LIBRARY c10 HINTS ${_libtorch_hints} PATH_SUFFIXES lib)
foreach(_header headeronly/version.h version.h)
  if(NOT LibTorch_VERSION AND EXISTS ${LibTorch_INCLUDE_DIR}/torch/${_header})
    file(STRINGS ${LibTorch_INCLUDE_DIR}/torch/${_header} _libtorch_lines REGEX "TORCH_VERSION_(MAJOR|MINOR|PATCH) ")
    string(REGEX REPLACE "[^;]*TORCH_VERSION_[A-Z]+ ([0-9]+)" "\\1" _libtorch_numbers "${_libtorch_lines}")
    list(SUBLIST _libtorch_numbers 0 3 _libtorch_numbers)
    list(JOIN _libtorch_numbers "." LibTorch_VERSION)
  endif()
endforeach()
include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(LibTorch
  REQUIRED_VARS LibTorch_CPU_LIBRARY LibTorch_C10_LIBRARY LibTorch_INCLUDE_DIR VERSION_VAR LibTorch_VERSION
  REASON_FAILURE_MESSAGE "Run scripts/bootstrap.sh, or set LIBTORCH_ROOT to a LibTorch folder.")
if(LibTorch_FOUND AND NOT TARGET LibTorch::torch_cpu)
  if(NOT LibTorch_VERSION VERSION_GREATER_EQUAL 2.11 OR NOT LibTorch_VERSION VERSION_LESS 2.12)
    message(FATAL_ERROR "LibTorch ${LibTorch_VERSION} found; libfsdp relies on internals of 2.11")
  endif()
  get_filename_component(LibTorch_LIBRARY_DIR ${LibTorch_CPU_LIBRARY} DIRECTORY)
  add_library(LibTorch::c10 SHARED IMPORTED)
  set_target_properties(LibTorch::c10 PROPERTIES IMPORTED_LOCATION ${LibTorch_C10_LIBRARY})
  target_include_directories(LibTorch::c10 SYSTEM INTERFACE
    ${LibTorch_INCLUDE_DIR} ${LibTorch_INCLUDE_DIR}/torch/csrc/api/include)
  add_library(LibTorch::torch_cpu SHARED IMPORTED)
  set_target_properties(LibTorch::torch_cpu PROPERTIES
    IMPORTED_LOCATION ${LibTorch_CPU_LIBRARY} INTERFACE_LINK_LIBRARIES LibTorch::c10)
  list(APPEND CMAKE_BUILD_RPATH ${LibTorch_LIBRARY_DIR})
  set(CMAKE_BUILD_RPATH ${CMAKE_BUILD_RPATH} CACHE INTERNAL "")
endif()
mark_as_advanced(LibTorch_INCLUDE_DIR LibTorch_CPU_LIBRARY LibTorch_C10_LIBRARY)
