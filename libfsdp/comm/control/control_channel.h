// A rank's connection to the world's ControlHub.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "libfsdp/comm/control/control_hub.h"
#include "libfsdp/comm/options.h"

namespace fsdp::comm {

/// What the channel's thread tells. Must not ask the channel anything.
struct ControlEvents {
  std::function<void(const std::string& text)> aborted;  ///< "rank 1 failed: ..."
  std::function<void(int rank, const std::string& why)> lost;
  /// `rank` has begun `begun` collectives and will begin no more.
  std::function<void(int rank, uint64_t begun)> left;
  std::function<void()> tick;  ///< About 20 times a second.
};

/// Thread safety: all of it, except the destructor.
class ControlChannel {
 public:
  /// Comes to the hub as `rank` and returns when all ranks are there.
  /// Throws CommError: no hub, another token or size, ranks that did not come.
  ControlChannel(const std::string& host, int port, int rank, int size, const std::string& token,
                 double join_timeout_s, const CommOptions& options, ControlEvents events);
  ~ControlChannel();

  /// Events come from here on, until stop() has returned.
  void start();
  void stop();

  /// The numeric address of this end: where the other hosts reach this one.
  std::string address() const;

  /// The world's store. get waits until somebody has set the key. Throw CommError.
  void set(const std::string& key, const std::string& value);
  std::string get(const std::string& key, double timeout_s);
  int64_t add(const std::string& key, int64_t value);
  bool has(const std::string& key);

  /// What the next sign of life says; all but whom this rank waits for. Cheap.
  void report(const SignOfLife& sign);
  /// -1 = it does not wait. Cheap; `tick` may call it.
  void report_waiting(int member, const Tag& what, double waited_s);
  /// What all ranks said last; empty if the hub does not answer within `timeout_s`.
  std::vector<SignOfLife> signs_of_life(double timeout_s);

  /// Tells all others that this rank has failed. The first abort of a world wins.
  void abort(const std::string& text) noexcept;
  /// Says that this rank begins nothing more after `begun` collectives, and waits until the others
  /// have finished those, are gone, or `timeout_s` is over.
  void leave(uint64_t begun, double timeout_s);

 private:
  class Client;
  std::unique_ptr<Client> client_;
};

}  // namespace fsdp::comm
