// Choices that all ranks of a world share.
#pragma once

namespace fsdp::comm {

struct CommOptions {
  /// A peer process that is stopped, or whose sign of life stands still, for that long is taken for
  /// lost. Not used between threads. With the launcher's grace all is over within 10 s.
  double peer_timeout_s = 8;
  /// The longest wait of one collective for its peers, whatever they do. The only limit for a rank
  /// that runs but never comes, for example in an endless loop of the user's code.
  double timeout_s = 1800;
  /// The longest wait for a peer process that was started and has not joined.
  double join_timeout_s = 60;
};

/// Defaults, overridden by FSDP_PEER_TIMEOUT, FSDP_COMM_TIMEOUT and FSDP_JOIN_TIMEOUT (seconds).
/// Throws ConfigError for other text.
CommOptions comm_options_from_environment();

}  // namespace fsdp::comm
