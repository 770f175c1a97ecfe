// Ranks that are threads of one process, and a world of one rank.
#pragma once

#include <memory>

#include "libfsdp/comm/communicator.h"
#include "libfsdp/comm/options.h"

namespace fsdp::comm {

/// A world whose ranks are threads of this process. Several worlds may exist at once.
///
/// Thread safety: communicator() may be called from any thread; each communicator is used by one
/// thread at a time. Lifetime: the communicators may outlive the world. A communicator that is
/// destroyed while a peer still waits for it is that peer's CommError.
class ThreadWorld {
 public:
  /// 1 <= size <= 128. Memory: 0.5 MiB a rank.
  explicit ThreadWorld(int size, const CommOptions& options = {});
  ~ThreadWorld();

  int size() const;
  /// The end of `rank`; once a rank. Throws InternalError on a second call for the same rank.
  std::unique_ptr<Communicator> communicator(int rank);

 private:
  struct State;
  class Rank;
  std::shared_ptr<State> state_;
};

/// A world of one rank: nothing waits, gather is a copy (nothing if in place), fold widens or adds.
std::unique_ptr<Communicator> make_single();

}  // namespace fsdp::comm
