// What every transport must do. Each case runs as every rank of a world; a rank that finds
// something wrong throws.
#pragma once

#include <ostream>
#include <string>
#include <vector>

#include "libfsdp/comm/communicator.h"
#include "libfsdp/comm/options.h"

namespace fsdp::comm {

struct ConformanceCase {
  std::string name;
  void (*run)(Communicator&);
  int smallest_world = 1;
  CommOptions options = {};

  friend void PrintTo(const ConformanceCase& one, std::ostream* out) { *out << one.name; }
};

/// Data arrives, in the right place and order.
const std::vector<ConformanceCase>& data_cases();
/// Memory that a group holds once, and fences.
const std::vector<ConformanceCase>& shared_cases();
/// What goes wrong is an error on every rank.
const std::vector<ConformanceCase>& failure_cases();

/// A rank that skips, repeats, reorders, resizes or retypes a collective, for each collective.
const std::vector<ConformanceCase>& divergence_cases();
/// The cases of all lists.
std::vector<ConformanceCase> all_cases();

/// Throws with `what` unless true.
void expect(bool condition, const std::string& what);

}  // namespace fsdp::comm
