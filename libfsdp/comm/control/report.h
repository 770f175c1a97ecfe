// What a failing rank tells the launcher before it ends.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace fsdp::comm {

struct FailureReport {
  int code = 1;              ///< Exit code that the rank is about to use.
  bool consequence = false;  ///< A CommError: another rank's failure may be the cause.
  int64_t at_ns = 0;         ///< When, of the monotonic clock; send_report fills it in.
  std::string text;
};

/// Sends the report; false if nobody listens any more. Never throws; the text is cut at 4000
/// characters.
bool send_report(int socket, const FailureReport& report) noexcept;
/// The report in a message, if it is one.
std::optional<FailureReport> parse_report(std::string_view message);

}  // namespace fsdp::comm
