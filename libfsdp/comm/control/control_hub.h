// The world's switchboard across hosts: who is there, who lives, why it ended; and a small store.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "libfsdp/comm/communicator.h"
#include "libfsdp/comm/control/control.h"
#include "libfsdp/comm/options.h"

namespace fsdp::comm {

/// What a rank says of itself, over and over.
struct SignOfLife {
  uint64_t begun = 0;     ///< Place of the last collective begun.
  uint64_t finished = 0;  ///< ... finished.
  Tag last;               ///< The last collective begun.
  int64_t step = -1;
  char phase[16] = {};
  int32_t unit = -1;       ///< That it computes.
  int32_t waits_for = -1;  ///< A rank, -1 = it computes.
  Tag waits_in;
  double waited_s = 0;
  Presence presence = Presence::kAbsent;  ///< Filled in by the hub.
};

/// Rank 0's side. Serves the ranks' ControlChannels (its own, too) from a thread.
///
/// Note [Token] A caller must send the world's token first, and a wrong one is cut off without a
/// word. It keeps strangers and other runs out; it crosses the network in the clear, so it protects
/// against neither who can listen there nor who can listen at rank 0's port before rank 0 does.
///
/// Note [Signs of life] Every rank sends one each 250 ms from a thread of its own, also while it
/// computes. A rank that sends none for the peer time-out, or whose connection ends before it said
/// goodbye, is announced as lost to all others.
class ControlHub {
 public:
  /// Listens on `host` (its address only) and `port`, 0 = any, until all ranks have come.
  ///
  /// If they have not within `join_timeout_s`, those that came are told who is missing. Throws
  /// CommError when the port cannot be had, ConfigError for a token of more than 120 characters.
  ControlHub(const std::string& host, int port, int size, const std::string& token,
             double join_timeout_s, const CommOptions& options);
  /// Waits, at most some seconds, for the ranks to go first.
  ~ControlHub();
  int port() const;

 private:
  class Server;
  std::unique_ptr<Server> server_;
};

}  // namespace fsdp::comm
