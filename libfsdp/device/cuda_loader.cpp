#include "libfsdp/device/cuda_loader.h"

#include <dlfcn.h>

#include <cstdlib>
#include <filesystem>
#include <vector>

#include "libfsdp/base/error.h"

namespace fsdp::device {
namespace {

namespace fs = std::filesystem;
constexpr const char* kLibraryName = "libfsdp_cuda.so";

struct CudaLibrary {
  void* handle = nullptr;  // never closed: CUDA does not survive that
  const CudaRuntimeTable* runtime = nullptr;
  CudaStatus status;
};

std::vector<std::string> candidates() {
  if (const char* path = std::getenv("FSDP_CUDA_LIBRARY"); path != nullptr && *path != '\0')
    return {path};
  std::vector<std::string> paths;
  std::error_code ignored;
  const fs::path program = fs::read_symlink("/proc/self/exe", ignored);
  if (!program.empty()) {
    paths.push_back((program.parent_path() / kLibraryName).string());
    paths.push_back((program.parent_path() / ".." / "lib" / kLibraryName).string());
  }
  paths.emplace_back(kLibraryName);
  return paths;
}

bool open_library(CudaLibrary& library) {
  std::string tried;
  for (const std::string& path : candidates()) {
    library.handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library.handle != nullptr) return true;
    tried += cat(tried.empty() ? "" : "; ", dlerror());
  }
  library.status.reason = cat("the CUDA part of the library could not be opened (", tried,
                              "). Hint: it is built when nvcc is found, see FSDP_WITH_CUDA");
  return false;
}

bool read_table(CudaLibrary& library) {
  using GetTable = const CudaRuntimeTable* (*)();
  const auto get_table = reinterpret_cast<GetTable>(dlsym(library.handle, kCudaRuntimeTableSymbol));
  const CudaRuntimeTable* table = get_table != nullptr ? get_table() : nullptr;
  if (table != nullptr && table->version == kCudaTableVersion) {
    library.runtime = table;
    return true;
  }
  library.status.reason =
      cat(kLibraryName, " is of version ", table != nullptr ? table->version : 0,
          " and the program needs ", kCudaTableVersion, ". Hint: build both together");
  return false;
}

void count_devices(CudaLibrary& library) {
  int count = 0;
  const int code = library.runtime->device_count(&count);
  if (code != 0) {
    library.status.reason = cat("no CUDA device: ", library.runtime->error_name(code), ", ",
                                library.runtime->error_text(code));
  } else if (count == 0) {
    library.status.reason = "no CUDA device: the driver reports 0 devices";
  } else {
    library.status.usable = true;
    library.status.num_devices = count;
  }
}

const CudaLibrary& library() {
  static const CudaLibrary opened = [] {
    CudaLibrary made;
    if (open_library(made) && read_table(made)) count_devices(made);
    return made;
  }();
  return opened;
}

}  // namespace

const CudaStatus& cuda_status() { return library().status; }

const CudaRuntimeTable& cuda_runtime() {
  if (library().runtime == nullptr) throw ConfigError(library().status.reason);
  return *library().runtime;
}

void* cuda_symbol(const char* name) {
  cuda_runtime();
  void* symbol = dlsym(library().handle, name);
  check(symbol != nullptr, cat(kLibraryName, " has no function ", name));
  return symbol;
}

void check_cuda(int code, const char* what) {
  if (code == 0) return;
  const CudaRuntimeTable& cuda = cuda_runtime();
  const std::string text =
      cat(what, " failed: ", cuda.error_name(code), " (", code, "), ", cuda.error_text(code));
  if (cuda.is_out_of_memory(code) != 0) throw DeviceMemoryError(text);
  throw InternalError(text);
}

}  // namespace fsdp::device
