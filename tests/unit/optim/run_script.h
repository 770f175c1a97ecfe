// Runs the oracles of this folder, in the project's Python.
#pragma once

#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

#include "libfsdp/base/error.h"

namespace fsdp::optim {

/// Runs a script of this folder with a file for its output first; returns the file's bytes, or
/// nothing when the script exits with `missing_code`: something that it needs is not installed.
inline std::string run_script(const std::string& script, const std::string& arguments,
                              int missing_code = -1) {
  const std::filesystem::path output =
      std::filesystem::temp_directory_path() / cat("fsdp_oracle_", getpid(), "_", script, ".out");
  const std::string command = cat("'", FSDP_TEST_PYTHON, "' '", FSDP_TEST_SCRIPTS, "/", script,
                                  "' '", output.string(), "' ", arguments);
  const int status = std::system(command.c_str());
  if (WIFEXITED(status) && WEXITSTATUS(status) == missing_code) return {};
  check(status == 0, cat(command, " failed with status ", status));
  std::ostringstream bytes;
  bytes << std::ifstream(output, std::ios::binary).rdbuf();
  std::filesystem::remove(output);
  return bytes.str();
}

/// Takes arrays off the front of an oracle's output.
class OracleReader {
 public:
  explicit OracleReader(std::string bytes) : bytes_(std::move(bytes)) {}

  template <class T>
  std::vector<T> take(int64_t n) {
    std::vector<T> values(static_cast<size_t>(n));
    const size_t bytes = values.size() * sizeof(T);
    check(at_ + bytes <= bytes_.size(), "the oracle wrote less than the test reads");
    std::memcpy(values.data(), bytes_.data() + at_, bytes);
    at_ += bytes;
    return values;
  }
  bool at_end() const { return at_ == bytes_.size(); }

 private:
  std::string bytes_;
  size_t at_ = 0;
};

}  // namespace fsdp::optim
