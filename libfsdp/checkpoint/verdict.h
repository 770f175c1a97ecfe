// How ranks learn that one of them failed: each says how it fared, and all throw the same error.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "libfsdp/comm/communicator.h"

namespace fsdp::checkpoint {

/// How one rank fared. Of fixed size, so that telling it needs no memory.
struct Outcome {
  int64_t code = 0;  ///< 0 = well, else the ExitCode of its error.
  char text[1008] = {};
  int64_t values[4] = {};  ///< What the caller wants to tell the others.

  /// Calls `work`; its exception becomes code and text.
  template <class Work>
  void run(Work&& work) noexcept {
    if (code != 0) return;
    try {
      work();
    } catch (...) {
      take_current_exception();
    }
  }
  bool failed() const { return code != 0; }
  void set_text(std::string_view value) noexcept;

 private:
  void take_current_exception() noexcept;
};

/// Brings the ranks' outcomes together.
class Verdict {
 public:
  explicit Verdict(comm::Communicator& comm) : comm_(comm) {}

  /// Makes room for exchange(). Not collective.
  void reserve() { all_.resize(static_cast<size_t>(comm_.size())); }

  /// Everybody's outcome on every rank, after reserve(). Collective: one small exchange, which
  /// needs no heap.
  std::span<const Outcome> exchange(const Outcome& mine, std::string_view what);

  /// Throws the error of the first rank that failed, if one did: the same kind and text on every
  /// rank, "rank 2: ..." (no rank in a world of one).
  void throw_if_failed(std::span<const Outcome> outcomes) const;

  /// Throws the same, without need of reserve(). Collective; cheap while nobody has failed.
  void agree(const Outcome& mine, std::string_view what) const;

 private:
  void throw_error_of(size_t rank, const Outcome& outcome) const;

  comm::Communicator& comm_;
  std::vector<Outcome> all_;
};

}  // namespace fsdp::checkpoint
