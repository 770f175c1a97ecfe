// Low-rank adapters in a module: LoRA, rsLoRA, DoRA, several by name, for LibTorch's Linear,
// Embedding and Conv1d to Conv3d, and every module that computes with fsdp::linear or
// fsdp::embedding.
//
//   fsdp::lora::Adapters adapters(*model, {.r = 8, .target_modules = {"q_proj", "v_proj"}});
//   auto sharded = fsdp::fully_shard(model, comm, adapters.shard_options(options));
//   ... load the model's weights ...
//   adapters.initialize(sharded.core(), seed);
#pragma once

#include <torch/nn/module.h>

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "libfsdp/lora/config.h"
#include "libfsdp/lora/functions.h"
#include "libfsdp/lora/target.h"
#include "libfsdp/lora/tuner.h"

namespace fsdp::lora {

inline constexpr const char* kDefaultName = "default";

/// One adapter of one module.
struct AdapterParameters {
  std::string module;  ///< Full name of the module.
  TargetKind kind = TargetKind::kLinear;
  LowRank low_rank;
  at::Tensor magnitude;  ///< DoRA only: [out]; of a convolution [1, out, 1...].
  double dropout = 0;
};

/// All adapters of a model. A cheap handle; the modules keep what they compute with.
class Adapters : public Tuner {
 public:
  /// Freezes `model` (but for modules_to_save and the biases that the config names), and gives the
  /// modules that `config` targets an adapter of that name: parameters
  /// `<module>.lora_A.<name>.weight` and `.lora_B.` (embeddings `.lora_embedding_A.<name>`), DoRA's
  /// `.lora_magnitude_vector.`, like the weight in dtype and device, on meta without values. Before
  /// fully_shard().
  ///
  /// Throws ConfigError when nothing is targeted (with names that there are), a target is no module
  /// that can have one, or its name is unknown.
  Adapters(torch::nn::Module& model, LoraConfig config, const std::string& name = kDefaultName);

  /// Another adapter beside, switched off at first. Before fully_shard(), too.
  void add(LoraConfig config, const std::string& name);

  /// `options` with adapters, biases and modules to save as one bucket of the root.
  ShardOptions shard_options(ShardOptions options) const override;
  /// Whether a parameter of that name belongs to an adapter, of any name and kind (see Tuner).
  static bool is_adapter(const std::string& parameter);

  /// First values of the adapters `name`, equal at any number of ranks; inits that take their
  /// values from the weights change these (see Init), so they must have been loaded. Collective.
  void initialize(ShardedCore& core, uint64_t seed, const std::string& name);
  void initialize(ShardedCore& core, uint64_t seed) override {
    initialize(core, seed, kDefaultName);
  }
  bool changes_base() const override;

  /// Those of kDefaultName.
  std::string config_text() const override { return adapter_config_text(config()); }
  checkpoint::StateDict state(ShardedCore& core) const override;

  /// Which adapters compute; all others are switched off. Empty = the base model alone. The
  /// parameters of those that do are trained. Not inside a step. Throws ConfigError (unknown name).
  void activate(const std::vector<std::string>& names);
  const std::vector<std::string>& active() const;
  std::vector<std::string> names() const;
  const LoraConfig& config(const std::string& name = kDefaultName) const;

  /// Whether that module has an adapter, of any name.
  bool adapts(const std::string& module) const;
  /// Names of parameters that are trained and are not of adapters: biases, modules to save.
  std::vector<std::string> trained_besides() const;

  /// The adapters of that name in the order of the modules.
  const std::vector<AdapterParameters>& parameters(const std::string& name = kDefaultName) const;

 private:
  struct State;
  std::shared_ptr<State> state_;
};

/// LoRA+: `options` in which the Bs are groups of their own, with `b_rate_scale` times the rate.
ShardOptions with_b_rate(ShardOptions options, double b_rate_scale);

}  // namespace fsdp::lora
