// What is trained beside a frozen model and kept in PEFT's folders, of whatever kind: low-rank
// adapters, a prefix, adaption prompts.
#pragma once

#include <map>
#include <string>

#include "libfsdp/checkpoint/state_dict.h"
#include "libfsdp/shard/sharded_core.h"

namespace fsdp::lora {

class Tuner {
 public:
  virtual ~Tuner() = default;

  /// `options` with all that is trained as one bucket of the root.
  virtual ShardOptions shard_options(ShardOptions options) const = 0;
  /// First values, equal at any number of ranks; after the model's weights. Collective.
  virtual void initialize(ShardedCore& core, uint64_t seed) = 0;
  /// Whether initialize() changes the model's weights too: then it comes before load_adapter().
  virtual bool changes_base() const { return false; }

  /// Text of adapter_config.json.
  virtual std::string config_text() const = 0;
  /// All that is trained, for checkpoints. As model_state(). Not collective.
  virtual checkpoint::StateDict state(ShardedCore& core) const = 0;
  /// The tensors of adapter_model.safetensors, by their names there. Collective.
  virtual checkpoint::StateDict files(ShardedCore& core) const { return state(core); }
};

/// The parameters that `names` has, by the names that these have there. As model_state().
checkpoint::StateDict renamed_state(ShardedCore& core,
                                    const std::map<std::string, std::string>& names);

}  // namespace fsdp::lora
