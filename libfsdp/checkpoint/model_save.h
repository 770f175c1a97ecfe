// Writes the files of a model, or of an adapter, by all ranks at once.
#pragma once

#include <string>
#include <vector>

#include "libfsdp/checkpoint/save_plan.h"
#include "libfsdp/checkpoint/state_dict.h"
#include "libfsdp/comm/communicator.h"

namespace fsdp::checkpoint {

/// A small file beside the tensors.
struct TextFile {
  std::string name;
  std::string content;
};

/// Writes `state` in the full form, and rank 0's `texts`, into `directory`, which is made when
/// missing: a StagedDirectory that all ranks fill and rank 0 publishes.
///
/// Collective. Memory: as write_state(). Throws, on all ranks alike unless one is gone:
/// HostResourceError, ConfigError, what `read` throws; then no file of the directory has changed.
void save_model(comm::Communicator& comm, const std::string& directory, const StateDict& state,
                const FullForm& form, const std::vector<TextFile>& texts = {});

}  // namespace fsdp::checkpoint
