// The progress bar on a terminal, and lines that do not collide with it.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>
#include <string_view>

namespace fsdp::trainer {

/// What the bar shows.
struct ProgressState {
  int64_t done = 0;
  int64_t total = 0;
  double seconds = 0;            ///< Since the first step began; for the remaining time.
  double tokens_per_second = 0;  ///< 0 = unknown.
  double loss = 0;
  double learning_rate = 0;
};

/// The bar as text of at most `columns` characters; narrow terminals lose the bar first, then the
/// details.
std::string render_progress(const ProgressState& state, int columns);

/// "1:05", "2:03:04"; "?" when unknown.
std::string clock_text(double seconds);

/// The terminal of rank 0. On a terminal the bar is redrawn at most 10 times a second and wiped by
/// the destructor; elsewhere only the lines appear. Lines go to stdout, the bar to stderr. One
/// thread.
class Console {
 public:
  /// `quiet`: nothing at all appears (other ranks).
  explicit Console(bool quiet);
  ~Console();
  Console(const Console&) = delete;
  Console& operator=(const Console&) = delete;

  /// One line for people or for grep, above the bar.
  void line(std::string_view text);
  /// Shows the state; `force` draws even when the last drawing is younger than 100 ms.
  void progress(const ProgressState& state, bool force = false);
  /// Takes the bar away.
  void wipe();

 private:
  bool quiet_;
  bool terminal_;
  bool drawn_ = false;
  std::string last_;
  std::chrono::steady_clock::time_point last_draw_{};
};

/// Wipes a bar that any Console has drawn. For signal handlers: one write at most.
void wipe_bar_from_signal() noexcept;

/// Columns of the terminal behind `descriptor`, 80 when unknown.
int terminal_columns(int descriptor);

}  // namespace fsdp::trainer
