#include "libfsdp/base/log.h"

#include <unistd.h>

#include <atomic>
#include <new>
#include <string>

namespace fsdp::log {
namespace {

std::atomic<Level> minimum_level{Level::kInfo};
thread_local int thread_rank = -1;

}  // namespace

void set_level(Level level) { minimum_level = level; }

void set_rank(int rank) { thread_rank = rank; }

void write(Level level, std::string_view text) {
  if (level < minimum_level) return;
  std::string line;
  try {
    if (thread_rank >= 0) line += "[rank " + std::to_string(thread_rank) + "] ";
    if (level == Level::kWarning) line += "warning: ";
    if (level == Level::kError) line += "error: ";
    line.append(text);
    line += '\n';
    text = line;
  } catch (const std::bad_alloc&) {
    // The bare text, then, in the memory that it has.
  }
  [[maybe_unused]] const auto written = ::write(STDERR_FILENO, text.data(), text.size());
}

}  // namespace fsdp::log
