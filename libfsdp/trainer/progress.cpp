#include "libfsdp/trainer/progress.h"

#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>

#include "libfsdp/base/error.h"

namespace fsdp::trainer {
namespace {

using Clock = std::chrono::steady_clock;
constexpr auto kRedrawEvery = std::chrono::milliseconds(100);
constexpr int kMinBar = 10;
constexpr int kMaxBar = 40;
constexpr std::string_view kWipe = "\r\x1b[K";

std::atomic<bool> bar_on_screen{false};  // For signal handlers, which find no Console.
static_assert(std::atomic<bool>::is_always_lock_free);

void write_all(int descriptor, std::string_view text) {
  while (!text.empty()) {
    const auto written = ::write(descriptor, text.data(), text.size());
    if (written <= 0) return;  // a closed pipe is not worth a failed run
    text.remove_prefix(static_cast<size_t>(written));
  }
}

std::string formatted(const char* format, double value) {
  char buffer[64];
  std::snprintf(buffer, sizeof(buffer), format, value);
  return buffer;
}

double remaining_seconds(const ProgressState& state) {
  if (state.done == 0) return -1;
  return state.seconds / static_cast<double>(state.done) *
         static_cast<double>(state.total - state.done);
}

std::string bar(const ProgressState& state, int width) {
  const auto filled = static_cast<int>(state.done * width / std::max<int64_t>(state.total, 1));
  std::string text(static_cast<size_t>(width), ' ');
  std::fill_n(text.begin(), filled, '=');
  if (filled < width) text[static_cast<size_t>(filled)] = '>';
  return text;
}

}  // namespace

std::string clock_text(double seconds) {
  if (!(seconds >= 0) || seconds > 1e9) return "?";
  const auto total = static_cast<int64_t>(std::llround(seconds));
  char buffer[64];
  if (total >= 3600) {
    std::snprintf(buffer, sizeof(buffer), "%ld:%02ld:%02ld", static_cast<long>(total / 3600),
                  static_cast<long>(total / 60 % 60), static_cast<long>(total % 60));
  } else {
    std::snprintf(buffer, sizeof(buffer), "%ld:%02ld", static_cast<long>(total / 60),
                  static_cast<long>(total % 60));
  }
  return buffer;
}

std::string render_progress(const ProgressState& state, int columns) {
  const auto percent = 100 * state.done / std::max<int64_t>(state.total, 1);
  const auto head = cat(state.done, "/", state.total, " ", percent, "%");
  std::string details;
  if (state.done > 0) {
    details = cat("  loss ", formatted("%.4f", state.loss), "  lr ",
                  formatted("%.2e", state.learning_rate), "  ",
                  formatted("%.0f", state.tokens_per_second), " tok/s");
  }
  const auto eta = cat("  eta ", clock_text(remaining_seconds(state)));
  const auto room = columns - static_cast<int>(head.size() + details.size() + eta.size()) - 3;
  std::string text = head;
  if (room >= kMinBar) text = cat(head, " [", bar(state, std::min(room, kMaxBar)), "]");
  text += details + eta;
  if (static_cast<int>(text.size()) > columns) text = head + eta;
  return text.substr(0, static_cast<size_t>(std::max(columns, 0)));
}

int terminal_columns(int descriptor) {
  winsize size{};
  return ::ioctl(descriptor, TIOCGWINSZ, &size) == 0 && size.ws_col > 0 ? size.ws_col : 80;
}

Console::Console(bool quiet) : quiet_(quiet), terminal_(!quiet && ::isatty(STDERR_FILENO) == 1) {}

Console::~Console() { wipe(); }

void Console::line(std::string_view text) {
  if (quiet_) return;
  const bool redraw = drawn_;
  wipe();
  write_all(STDOUT_FILENO, cat(text, "\n"));
  if (redraw) {
    write_all(STDERR_FILENO, last_);
    drawn_ = bar_on_screen = true;
  }
}

void Console::progress(const ProgressState& state, bool force) {
  if (!terminal_) return;
  const auto now = Clock::now();
  if (!force && drawn_ && now - last_draw_ < kRedrawEvery) return;
  last_draw_ = now;
  // One column stays free: a full line would wrap on some terminals.
  last_ = "\r" + render_progress(state, terminal_columns(STDERR_FILENO) - 1) + "\x1b[K";
  bar_on_screen = true;  // Before it is drawn, so that no signal comes in between.
  write_all(STDERR_FILENO, last_);
  drawn_ = true;
}

void Console::wipe() {
  if (!drawn_) return;
  write_all(STDERR_FILENO, kWipe);
  drawn_ = bar_on_screen = false;
}

void wipe_bar_from_signal() noexcept {
  if (bar_on_screen.exchange(false)) write_all(STDERR_FILENO, kWipe);
}

}  // namespace fsdp::trainer
