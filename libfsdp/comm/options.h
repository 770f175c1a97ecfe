// Choices that all ranks of a world share.
#pragma once

namespace fsdp::comm {

struct CommOptions {
  /// A peer process whose sign of life stands still that long is taken for stopped. Not used
  /// between threads.
  double peer_timeout_s = 10;
  /// The longest wait of one collective for its peers, whatever they do.
  double timeout_s = 1800;
};

/// Defaults, overridden by FSDP_PEER_TIMEOUT and FSDP_COMM_TIMEOUT (seconds). Throws ConfigError
/// for other text.
CommOptions comm_options_from_environment();

}  // namespace fsdp::comm
