#include "libfsdp/comm/control/report.h"

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "libfsdp/comm/control/control.h"
#include "libfsdp/comm/os/unix_socket.h"

namespace fsdp::comm {
namespace {

struct ReportHeader {
  uint32_t magic = 0x72707274;
  int32_t code = 1;
  int32_t consequence = 0;
  int64_t at_ns = 0;
};

}  // namespace

bool send_report(int socket, const FailureReport& report) noexcept {
  // No heap: this also runs when memory is exhausted.
  char message[sizeof(ReportHeader) + 4000];
  ReportHeader header;
  header.code = report.code;
  header.consequence = report.consequence ? 1 : 0;
  header.at_ns = monotonic_ns();
  const size_t length = std::min(report.text.size(), sizeof(message) - sizeof(header));
  std::memcpy(message, &header, sizeof(header));
  std::memcpy(message + sizeof(header), report.text.data(), length);
  try {
    return send_message(socket, {message, sizeof(header) + length});
  } catch (...) {
    return false;
  }
}

std::optional<FailureReport> parse_report(std::string_view message) {
  ReportHeader header;
  const uint32_t magic = header.magic;
  if (message.size() < sizeof(header)) return std::nullopt;
  std::memcpy(&header, message.data(), sizeof(header));
  if (header.magic != magic) return std::nullopt;
  return FailureReport{.code = header.code,
                       .consequence = header.consequence != 0,
                       .at_ns = header.at_ns,
                       .text = std::string(message.substr(sizeof(header)))};
}

}  // namespace fsdp::comm
