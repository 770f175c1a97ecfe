#include "libfsdp/checkpoint/verdict.h"

#include <algorithm>
#include <cstring>
#include <exception>
#include <new>

#include "libfsdp/base/error.h"

namespace fsdp::checkpoint {
namespace {

[[noreturn]] void throw_error(ExitCode code, const std::string& text) {
  switch (code) {
    case ExitCode::kConfig:
      throw ConfigError(text);
    case ExitCode::kData:
      throw DataError(text);
    case ExitCode::kModel:
      throw ModelError(text);
    case ExitCode::kDeviceMemory:
      throw DeviceMemoryError(text);
    case ExitCode::kHostResource:
      throw HostResourceError(text);
    case ExitCode::kComm:
      throw CommError(text);
    case ExitCode::kNumerics:
      throw NumericsError(text);
    case ExitCode::kInternal:
      throw InternalError(text);
    default:
      throw Error(code, text);
  }
}

}  // namespace

void Outcome::set_text(std::string_view value) noexcept {
  const size_t bytes = std::min(value.size(), sizeof(text) - 1);
  std::memcpy(text, value.data(), bytes);
  std::memset(text + bytes, 0, sizeof(text) - bytes);
}

void Outcome::take_current_exception() noexcept {
  try {
    throw;
  } catch (const Error& error) {
    code = static_cast<int64_t>(error.code());
    set_text(error.what());
  } catch (const std::bad_alloc&) {
    code = static_cast<int64_t>(ExitCode::kHostResource);
    set_text("[checkpoint] out of host memory");
  } catch (const std::exception& error) {
    code = static_cast<int64_t>(ExitCode::kInternal);
    set_text(error.what());
  } catch (...) {
    code = static_cast<int64_t>(ExitCode::kInternal);
    set_text("[checkpoint] an exception of an unknown kind");
  }
}

std::span<const Outcome> Verdict::exchange(const Outcome& mine, std::string_view what) {
  comm_.exchange(&mine, sizeof mine, all_.data(), comm::make_tag(what));
  return all_;
}

void Verdict::throw_if_failed(std::span<const Outcome> outcomes) const {
  for (size_t rank = 0; rank < outcomes.size(); ++rank) {
    if (outcomes[rank].failed()) throw_error_of(rank, outcomes[rank]);
  }
}

void Verdict::agree(const Outcome& mine, std::string_view what) const {
  const int64_t size = comm_.size();
  const int64_t first = size - comm_.maximum(mine.failed() ? size - comm_.rank() : 0, what);
  if (first == size) return;
  Outcome shared = mine;
  comm_.broadcast(&shared, sizeof shared, static_cast<int>(first), comm::make_tag(what));
  throw_error_of(static_cast<size_t>(first), shared);
}

void Verdict::throw_error_of(size_t rank, const Outcome& outcome) const {
  throw_error(static_cast<ExitCode>(outcome.code), comm_.size() == 1
                                                       ? std::string(outcome.text)
                                                       : cat("rank ", rank, ": ", outcome.text));
}

}  // namespace fsdp::checkpoint
