// The calls of units in the forward of the micro-batch that is under way.
#pragma once

#include <vector>

#include "libfsdp/plan/schedule.h"

namespace fsdp::engine {

class CallRecord {
 public:
  void enter(int unit, bool graph) {
    calls_.push_back({.unit = unit, .parent = open_.empty() ? -1 : open_.back(), .graph = graph});
    open_.push_back(static_cast<int>(calls_.size()) - 1);
  }
  void leave() { open_.pop_back(); }
  void clear() {
    calls_.clear();
    open_.clear();
  }

  const std::vector<plan::Call>& calls() const { return calls_; }
  /// Calls that have been entered and not left, the outermost first, as indices into calls().
  const std::vector<int>& open() const { return open_; }
  bool is_open(int unit) const {
    for (const int call : open_) {
      if (calls_[static_cast<size_t>(call)].unit == unit) return true;
    }
    return false;
  }
  /// Unit of the innermost open call; -1 = none.
  int innermost() const {
    return open_.empty() ? -1 : calls_[static_cast<size_t>(open_.back())].unit;
  }

 private:
  std::vector<plan::Call> calls_;
  std::vector<int> open_;
};

}  // namespace fsdp::engine
