#include "libfsdp/lora/adapters.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <set>
#include <utility>

#include "libfsdp/base/error.h"
#include "libfsdp/lora/linear_base.h"
#include "libfsdp/lora/peft_files.h"
#include "libfsdp/shard/dropout.h"
#include "libfsdp/shard/functions.h"
#include "libfsdp/shard/init.h"
#include "libfsdp/shard/random.h"
#include "libfsdp/shard/tensors.h"
#include "libfsdp/shard/weight_adapter.h"

namespace fsdp::lora {

using at::Tensor;

struct Adapters::State {
  struct Named {
    LoraConfig config;
    std::vector<AdapterParameters> parameters;
    std::map<std::string, size_t> by_module;
  };
  torch::nn::Module* model = nullptr;
  std::map<std::string, Named> named;
  std::vector<std::string> active;
  std::set<std::string> trainable;  // Names of parameters that are not of adapters.

  Named& of(const std::string& name) {
    const auto found = named.find(name);
    if (found != named.end()) return found->second;
    std::string known;
    for (const auto& [other, adapter] : named) known += cat(known.empty() ? "" : ", ", other);
    throw ConfigError(cat("no adapter is named '", name, "'. There are: ", known));
  }
};

namespace {

/// What one module's weight computes with.
template <class Adapted>
class LayerAdapter : public LinearBase {
 public:
  LayerAdapter(std::string module, const torch::nn::Module* owner, std::shared_ptr<Adapted> state)
      : module_(std::move(module)), owner_(owner), state_(std::move(state)) {}

  Tensor linear(const Tensor& x, const Tensor& tensor, const Tensor& bias) override {
    Tensor y;
    const FrozenWeight weight{tensor, packed};
    for_each_active([&](const AdapterParameters& one) {
      const Tensor u = dropped(one, x);
      if (y.defined()) {
        const Tensor t = fsdp::linear(u.defined() ? u : x, one.low_rank.a);
        y = y + fsdp::linear(t, one.low_rank.b) * one.low_rank.scaling;
      } else if (one.magnitude.defined()) {
        y = dora_linear(x, u, weight, bias, one.low_rank, one.magnitude);
      } else {
        y = lora_linear(x, u, weight, bias, one.low_rank);
      }
    });
    return y.defined() ? y : frozen_linear(x, weight, bias);
  }

  std::optional<LowRank> plain_adapter() const override {
    std::optional<LowRank> plain = LowRank{};
    for_each_active([&](const AdapterParameters& one) {
      const bool drops = one.dropout > 0 && owner_->is_training();
      if (!plain || plain->a.defined() || one.magnitude.defined() || drops) {
        plain.reset();
      } else {
        plain = one.low_rank;
      }
    });
    return plain;
  }

  Tensor embedding(const Tensor& weight, const Tensor& ids, int64_t padding_idx,
                   bool scale_grad_by_freq) override {
    Tensor y = base_embedding(weight, ids);
    for_each_active([&](const AdapterParameters& one) {
      const Tensor rows =
          at::embedding(one.low_rank.a.t(), ids, padding_idx, scale_grad_by_freq, false);
      y = y + fsdp::linear(rows, one.low_rank.b) * one.low_rank.scaling;
      if (one.magnitude.defined())
        y = y * dora_scale(TargetKind::kEmbedding, weight, one.low_rank, one.magnitude);
    });
    return y;
  }

  Tensor convolve(const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t groups,
                  const Convolution& convolution) override {
    Tensor y;
    for_each_active([&](const AdapterParameters& one) {
      const Tensor u = dropped(one, x);
      if (one.magnitude.defined()) {
        y = dora_convolution(x, u, weight, bias, one.low_rank, one.magnitude, convolution);
        return;
      }
      if (!y.defined()) y = convolution(x, weight, bias, groups);
      y = y + convolved_low_rank(u.defined() ? u : x, one.low_rank, groups, convolution);
    });
    return y.defined() ? y : convolution(x, weight, bias, groups);
  }

  Tensor matrix(const Tensor& weight, const std::string& operation) override {
    const auto refuse = [&](const char* why) {
      throw ConfigError(cat("[lora] '", operation, "' reads the weight of '", module_, "', ", why,
                            ". Hint: target other modules, or call the layer itself."));
    };
    if (packed) refuse("which is quantised");
    Tensor whole = weight;
    for_each_active([&](const AdapterParameters& one) {
      if (one.dropout > 0 && owner_->is_training())
        refuse("whose adapter has dropout, which only a layer's own operation can have");
      const bool grouped =
          one.kind == TargetKind::kConvolution && one.low_rank.a.size(1) != weight.size(1);
      if (grouped) refuse("which has groups, so that no one weight computes the same");
      const Tensor base = whole;
      whole = adapted_weight(one.kind, base, one.low_rank);
      if (!one.magnitude.defined()) return;
      std::vector<int64_t> outputs(static_cast<size_t>(weight.dim()), 1);
      outputs[one.kind == TargetKind::kEmbedding ? 1 : 0] = -1;
      whole = whole * dora_scale(one.kind, base, one.low_rank, one.magnitude).view(outputs);
    });
    return whole;
  }

 private:
  // What dropout leaves of x; undefined = all.
  Tensor dropped(const AdapterParameters& one, const Tensor& x) const {
    return one.dropout > 0 && owner_->is_training() ? fsdp::dropout(x, one.dropout) : Tensor();
  }

  template <class Use>
  void for_each_active(Use use) const {
    for (const std::string& name : state_->active) {
      const auto& adapter = state_->of(name);
      const auto found = adapter.by_module.find(module_);
      if (found != adapter.by_module.end()) use(adapter.parameters[found->second]);
    }
  }

  std::string module_;
  const torch::nn::Module* owner_;
  std::shared_ptr<Adapted> state_;
};

// The child module of that name, made when there is none.
std::shared_ptr<torch::nn::Module> child(torch::nn::Module& module, const std::string& name) {
  const auto children = module.named_children();
  if (const auto* found = children.find(name)) return *found;
  return module.register_module(name, std::make_shared<torch::nn::Module>(name));
}

Tensor new_parameter(torch::nn::Module& module, const std::string& name, at::IntArrayRef shape,
                     const Tensor& like) {
  return module.register_parameter(name, at::empty(shape, like.options().requires_grad(false)));
}

// What PEFT refuses, and what cannot be computed.
void check_target(const std::string& module, const TargetLayer& target, const LoraConfig& config) {
  const auto refuse = [&](const std::string& why) {
    throw ConfigError(cat("[lora] '", module, "' cannot have an adapter: ", why));
  };
  if (!target.refusal.empty()) refuse(target.refusal);
  if (target.kind != TargetKind::kConvolution) return;
  if (config.init != Init::kDefault && config.init != Init::kGaussian)
    refuse("first values of convolutions are 'default' or 'gaussian'");
  const int64_t rank = config.rank_of(module);
  if (rank % target.groups != 0)
    refuse(cat("rank ", rank, " is no multiple of its ", target.groups, " groups"));
  if (config.use_dora && target.groups > 1) refuse("use_dora with groups");
}

AdapterParameters make_parameters(torch::nn::Module& module, const std::string& full_name,
                                  const TargetLayer& target, const LoraConfig& config,
                                  const std::string& name) {
  const Tensor& weight = target.weight;
  const int64_t rank = config.rank_of(full_name);
  AdapterParameters made{.module = full_name, .kind = target.kind};
  made.dropout = config.dropout;
  made.low_rank.scaling = config.scaling_of(full_name);
  const auto weight_of = [&](const char* kind, at::IntArrayRef shape) {
    return new_parameter(*child(*child(module, kind), name), "weight", shape, weight);
  };
  std::vector<int64_t> magnitudes;
  if (made.kind == TargetKind::kEmbedding) {
    made.low_rank.a =
        new_parameter(*child(module, "lora_embedding_A"), name, {rank, weight.size(0)}, weight);
    made.low_rank.b =
        new_parameter(*child(module, "lora_embedding_B"), name, {weight.size(1), rank}, weight);
    magnitudes = {weight.size(1)};
  } else {
    std::vector<int64_t> a = weight.sizes().vec();
    std::vector<int64_t> b(a.size(), 1);
    a[0] = rank;
    a[1] *= target.groups;
    b[0] = weight.size(0);
    b[1] = rank / target.groups;
    made.low_rank.a = weight_of("lora_A", a);
    made.low_rank.b = weight_of("lora_B", b);
    magnitudes = {weight.size(0)};
    if (made.kind == TargetKind::kConvolution) {
      magnitudes.assign(a.size(), 1);
      magnitudes[1] = weight.size(0);
    }
  }
  if (config.use_dora) made.magnitude = weight_of("lora_magnitude_vector", magnitudes);
  return made;
}

// The output layer, as Hugging Face's models name it.
bool is_head(const std::string& name) { return name == "lm_head" || name.ends_with(".lm_head"); }

std::vector<std::string> target_names(torch::nn::Module& model) {
  std::set<std::string> names;
  for (const auto& entry : model.named_modules()) {
    if (const auto target = find_target(*entry.value()); target && target->refusal.empty())
      names.insert(entry.key().substr(entry.key().rfind('.') + 1));
  }
  return {names.begin(), names.end()};
}

std::string joined(const std::vector<std::string>& names) {
  std::string text;
  for (const std::string& name : names) text += cat(text.empty() ? "" : ", ", name);
  return text;
}

}  // namespace

Adapters::Adapters(torch::nn::Module& model, LoraConfig config, const std::string& name)
    : state_(std::make_shared<State>()) {
  state_->model = &model;
  for (auto& parameter : model.parameters()) parameter.set_requires_grad(false);
  add(std::move(config), name);
  activate({name});
}

void Adapters::add(LoraConfig config, const std::string& name) {
  config.validate();
  if (name.empty() || name.find('.') != std::string::npos)
    throw ConfigError(cat("[lora] '", name, "' is no name for an adapter"));
  if (state_->named.count(name) != 0)
    throw ConfigError(cat("[lora] there is an adapter named '", name, "' already"));
  State::Named adapter{.config = std::move(config)};
  const LoraConfig& chosen = adapter.config;
  const auto modules = state_->model->named_modules();
  for (const auto& entry : modules) {
    const std::string& module_name = entry.key();
    torch::nn::Module& module = *entry.value();
    if (chosen.saves(module_name)) {
      for (auto& parameter : module.named_parameters()) {
        parameter.value().set_requires_grad(true);
        state_->trainable.insert(cat(module_name, ".", parameter.key()));
      }
    }
    const std::optional<TargetLayer> target = find_target(module);
    const bool linear = target && target->kind == TargetKind::kLinear;
    if (!chosen.targets(module_name, linear, is_head(module_name))) continue;
    if (!target) {
      // A pattern may well fit the modules around the layers too.
      if (chosen.target_modules.empty()) continue;
      throw ConfigError(cat("[lora] target module '", module_name,
                            "' is no layer that can have an adapter. Those that can: ",
                            joined(target_names(*state_->model))));
    }
    check_target(module_name, *target, chosen);
    adapter.by_module[module_name] = adapter.parameters.size();
    adapter.parameters.push_back(make_parameters(module, module_name, *target, chosen, name));
    set_weight_adapter(target->weight,
                       std::make_shared<LayerAdapter<State>>(module_name, &module, state_),
                       target->operations);
    if (chosen.bias != BiasMode::kLoraOnly) continue;
    for (auto& parameter : module.named_parameters(/*recurse=*/false)) {
      if (parameter.key() != "bias") continue;
      parameter.value().set_requires_grad(true);
      state_->trainable.insert(cat(module_name, ".bias"));
    }
  }
  if (adapter.parameters.empty()) {
    throw ConfigError(
        cat("[lora] no module is targeted by ",
            chosen.target_modules.empty() ? chosen.target_pattern : joined(chosen.target_modules),
            ". Those that could be: ", joined(target_names(*state_->model))));
  }
  if (chosen.bias == BiasMode::kAll) {
    for (auto& parameter : state_->model->named_parameters()) {
      const std::string& parameter_name = parameter.key();
      if (parameter_name != "bias" && !parameter_name.ends_with(".bias")) continue;
      parameter.value().set_requires_grad(true);
      state_->trainable.insert(parameter_name);
    }
  }
  for (AdapterParameters& made : adapter.parameters) {
    for (Tensor* tensor : {&made.low_rank.a, &made.low_rank.b, &made.magnitude})
      if (tensor->defined()) tensor->set_requires_grad(true);
  }
  state_->named.emplace(name, std::move(adapter));
}

bool Adapters::is_adapter(const std::string& parameter) {
  for (const char* part : {".lora_A.", ".lora_B.", ".lora_embedding_A.", ".lora_embedding_B.",
                           ".lora_magnitude_vector.", ".adaption_", "prompt_encoder."}) {
    if (parameter.find(part) != std::string::npos) return true;
  }
  return false;
}

ShardOptions Adapters::shard_options(ShardOptions options) const {
  options.in_root = [state = state_](const std::string& name) {
    return is_adapter(name) || state->trainable.count(name) != 0;
  };
  return options;
}

bool Adapters::changes_base() const {
  const Init init = config().init;
  return init == Init::kPissa || init == Init::kOlora;
}

checkpoint::StateDict Adapters::state(ShardedCore& core) const {
  return adapter_state(core, *this);
}

ShardOptions with_b_rate(ShardOptions options, double b_rate_scale) {
  if (b_rate_scale == 1) return options;
  const auto before = options.param_group;
  const auto groups = static_cast<int>(options.groups.size());
  for (int g = 0; g < groups; ++g) {
    optim::ParamGroup scaled = options.groups[static_cast<size_t>(g)];
    scaled.name += " of B";
    scaled.lr_scale *= b_rate_scale;
    options.groups.push_back(scaled);
  }
  options.param_group = [before, groups](const std::string& name, c10::IntArrayRef shape) {
    const bool is_b = name.find(".lora_B.") != std::string::npos ||
                      name.find(".lora_embedding_B.") != std::string::npos;
    return (before ? before(name, shape) : 0) + (is_b ? groups : 0);
  };
  return options;
}

void Adapters::activate(const std::vector<std::string>& names) {
  for (const std::string& name : names) {
    const State::Named& adapter = state_->of(name);
    if (names.size() > 1 && adapter.config.use_dora) {
      throw ConfigError(cat("[lora] adapter '", name,
                            "' is DoRA: it scales the whole result, and works alone only"));
    }
  }
  state_->active = names;
}

const std::vector<std::string>& Adapters::active() const { return state_->active; }

std::vector<std::string> Adapters::names() const {
  std::vector<std::string> names;
  for (const auto& [name, adapter] : state_->named) names.push_back(name);
  return names;
}

bool Adapters::adapts(const std::string& module) const {
  return std::any_of(state_->named.begin(), state_->named.end(),
                     [&](const auto& named) { return named.second.by_module.count(module) != 0; });
}

std::vector<std::string> Adapters::trained_besides() const {
  return {state_->trainable.begin(), state_->trainable.end()};
}

const LoraConfig& Adapters::config(const std::string& name) const {
  return state_->of(name).config;
}

const std::vector<AdapterParameters>& Adapters::parameters(const std::string& name) const {
  return state_->of(name).parameters;
}

}  // namespace fsdp::lora
