// finetune: fine-tunes, evaluates and runs Llama-family models in Hugging Face format.
#include <cstdio>
#include <exception>
#include <new>
#include <string>
#include <vector>

#include "apps/finetune/program.h"
#include "libfsdp/base/error.h"
#include "libfsdp/device/host_allocator.h"

namespace {

int fail(fsdp::ExitCode code, const std::string& text) {
  std::fflush(stdout);
  std::fprintf(stderr, "finetune: %s\n", text.c_str());
  return static_cast<int>(code);
}

/// Errors of LibTorch carry a stack trace behind their first line; people get that line only.
std::string first_line(const std::string& text) { return text.substr(0, text.find('\n')); }

}  // namespace

int main(int argc, char** argv) {
  fsdp::device::tune_host_allocator();  // Before any allocation that is worth keeping.
  try {
    return fsdp::app::run_program({argv, argv + argc});
  } catch (const fsdp::Error& error) {
    return fail(error.code(), error.what());
  } catch (const std::bad_alloc&) {
    return fail(fsdp::ExitCode::kHostResource, "out of host memory.");
  } catch (const std::exception& error) {
    return fail(fsdp::ExitCode::kInternal, "internal error: " + first_line(error.what()));
  }
}
