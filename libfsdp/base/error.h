// Errors of the whole library, and the exit code that each kind maps to in programs.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>

namespace fsdp {

/// Exit codes of programs (documented in docs/errors.md).
enum class ExitCode : int {
  kOk = 0,
  kInternal = 1,
  kConfig = 2,
  kData = 3,
  kModel = 4,
  kDoesNotFit = 5,
  kDeviceMemory = 6,
  kHostResource = 7,
  kComm = 8,
  kNumerics = 9,
  kStoppedWithCheckpoint = 75,
  kInterrupted = 130,
};

/// Base of every exception that libfsdp throws on purpose.
///
/// The text says where, what was got and what was expected, and gives a hint. It does not name the
/// rank: whoever prints it adds that.
class Error : public std::runtime_error {
 public:
  Error(ExitCode code, const std::string& text) : std::runtime_error(text), code_(code) {}
  ExitCode code() const { return code_; }

 private:
  ExitCode code_;
};

#define FSDP_DEFINE_ERROR(Name, kCode)                                       \
  class Name : public Error {                                                \
   public:                                                                   \
    explicit Name(const std::string& text) : Error(ExitCode::kCode, text) {} \
  }
FSDP_DEFINE_ERROR(ConfigError, kConfig);  ///< The user can fix it before the run.
FSDP_DEFINE_ERROR(DataError, kData);      ///< Training or evaluation data is unusable.
FSDP_DEFINE_ERROR(ModelError, kModel);    ///< Model, tokenizer or checkpoint files are unusable.
FSDP_DEFINE_ERROR(DoesNotFitError, kDoesNotFit);      ///< The plan needs more memory than there is.
FSDP_DEFINE_ERROR(DeviceMemoryError, kDeviceMemory);  ///< The device ran out of memory.
FSDP_DEFINE_ERROR(HostResourceError, kHostResource);  ///< Host memory or disk is exhausted.
FSDP_DEFINE_ERROR(CommError, kComm);  ///< A peer or the network failed; the group is unusable.
FSDP_DEFINE_ERROR(NumericsError, kNumerics);  ///< NaN or infinity where a number is needed.
FSDP_DEFINE_ERROR(InternalError, kInternal);  ///< A bug of libfsdp.
#undef FSDP_DEFINE_ERROR

/// Concatenates its arguments as `operator<<` prints them. Throws std::bad_alloc when there is no
/// memory for the text (a stream left to itself would cut it short and say nothing).
template <class... Args>
std::string cat(const Args&... args) {
  std::ostringstream out;
  out.exceptions(std::ios::badbit);
  (out << ... << args);
  return std::move(out).str();
}

/// Throws InternalError unless `condition` holds. For broken invariants only, never for user input.
inline void check(bool condition, std::string_view what) {
  if (!condition) throw InternalError(cat("internal error: ", what));
}

}  // namespace fsdp
