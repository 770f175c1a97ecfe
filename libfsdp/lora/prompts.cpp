#include "libfsdp/lora/prompts.h"

#include <ATen/ATen.h>

#include <cmath>
#include <cstring>
#include <utility>

#include "libfsdp/base/error.h"
#include "libfsdp/lora/adapters.h"
#include "libfsdp/lora/fills.h"
#include "libfsdp/shard/functions.h"
#include "libfsdp/shard/random.h"
#include "libfsdp/shard/shell.h"
#include "libfsdp/shard/tensors.h"

namespace fsdp::lora {
namespace {

using at::Tensor;

constexpr const char* kEncoder = "prompt_encoder";
constexpr const char* kPrefixTensor = "prompt_embeddings";  // In PEFT's files.

void freeze(torch::nn::Module& model) {
  for (Tensor& parameter : model.parameters()) parameter.set_requires_grad(false);
}

void expect_positive(int64_t value, const char* name) {
  if (value < 1) throw ConfigError(cat("[adapter] ", name, " ", value, ": expected at least 1"));
}

// What is said of the model, against what it is.
void expect_fit(int64_t said, int64_t is, const char* name) {
  if (said == 0 || said == is) return;
  throw ConfigError(cat("[adapter] ", name, " is ", said, ", and the model's is ", is,
                        ". Hint: was the adapter made for another model?"));
}

PrefixTarget& find_target(torch::nn::Module& model) {
  for (const auto& module : model.modules())
    if (auto* target = dynamic_cast<PrefixTarget*>(module.get())) return *target;
  throw ConfigError("[adapter] no module of the model can have a prefix (see lora::PrefixTarget)");
}

// What the two layers of a projection make of the embeddings.
Tensor project(const Tensor& embedding, const std::vector<Tensor>& layers) {
  const Tensor inner = at::tanh(fsdp::linear(embedding, layers[0], layers[1]));
  return fsdp::linear(inner, layers[2], layers[3]);
}

// A tensor that rank 0 has whole.
checkpoint::TensorPart whole_tensor(const std::string& name, const Tensor& value, DType dtype,
                                    bool is_here) {
  checkpoint::TensorPart part{.name = name, .dtype = dtype, .shape = value.sizes().vec()};
  part.numel = is_here ? value.numel() : 0;
  part.saved = is_here;
  part.read = [value, size = value.element_size()](int64_t at, std::span<std::byte> to) {
    std::memcpy(to.data(), static_cast<const std::byte*>(value.const_data_ptr()) + at * size,
                to.size());
  };
  part.write = [](int64_t, std::span<const std::byte>) {
    throw ConfigError(
        "[adapter] the files hold the prefix that a projection made, not the projection: it "
        "cannot be trained on. Hint: read_prefix_config() gives a config to use it with.");
  };
  return part;
}

}  // namespace

PrefixTuning::PrefixTuning(torch::nn::Module& model, PrefixConfig config)
    : target_(&find_target(model)), config_(std::move(config)), shape_(target_->prefix_shape()) {
  const int64_t width = shape_.kv_heads * shape_.head_dim, tokens = config_.num_virtual_tokens;
  expect_positive(tokens, "num_virtual_tokens");
  expect_fit(config_.num_layers, shape_.layers, "num_layers");
  expect_fit(config_.num_attention_heads, shape_.kv_heads, "num_attention_heads");
  expect_fit(config_.token_dim, width, "token_dim");
  if (config_.encoder_hidden_size == 0) config_.encoder_hidden_size = width;
  const int64_t inner = config_.encoder_hidden_size;
  expect_positive(inner, "encoder_hidden_size");
  if (model.named_children().contains(kEncoder))
    throw ConfigError("[adapter] the model has a prefix already");
  freeze(model);
  const at::TensorOptions options = model.parameters().front().options().requires_grad(false);
  const auto make = [&](torch::nn::Module& module, const std::string& path, const std::string& name,
                        at::IntArrayRef shape, int64_t inputs) {
    parameters_.emplace_back(cat(kEncoder, ".", path, ".", name), inputs);
    return module.register_parameter(name, at::empty(shape, options));
  };
  const auto add = [](torch::nn::Module& to, const std::string& name) {
    return to.register_module(name, std::make_shared<torch::nn::Module>(name));
  };
  const auto encoder = add(model, kEncoder);
  const auto embedding = add(*encoder, "embedding");
  prefix_.tokens = tokens;
  if (!config_.prefix_projection) {
    const Tensor weight = make(*embedding, "embedding", "weight", {tokens, shape_.width()}, 0);
    prefix_.make = [weight] { return weight; };
  } else {
    const Tensor weight = make(*embedding, "embedding", "weight", {tokens, width}, 0);
    const auto transform = add(*encoder, "transform");
    const auto first = add(*transform, "0"), second = add(*transform, "2");
    const std::vector<Tensor> layers = {
        make(*first, "transform.0", "weight", {inner, width}, width),
        make(*first, "transform.0", "bias", {inner}, width),
        make(*second, "transform.2", "weight", {shape_.width(), inner}, inner),
        make(*second, "transform.2", "bias", {shape_.width()}, inner)};
    prefix_.make = [weight, layers] { return project(weight, layers); };
  }
  set_active(true);
}

void PrefixTuning::set_active(bool active) { target_->set_prefix(active ? prefix_ : Prefix{}); }

void PrefixTuning::initialize(ShardedCore& core, uint64_t seed) {
  Fills fills;
  for (const auto& [name, inputs] : parameters_) {
    const uint64_t key = stream_key(seed, name);
    fills[name] =
        inputs == 0 ? normal(key, 1) : uniform(key, 1 / std::sqrt(static_cast<double>(inputs)));
  }
  store_fills(core, fills);
}

std::string PrefixTuning::config_text() const {
  const int64_t width = shape_.kv_heads * shape_.head_dim;
  return peft_config_text(PeftType::kPrefixTuning, config_.notes,
                          io::Json::object({{"encoder_hidden_size", config_.encoder_hidden_size},
                                            {"num_attention_heads", shape_.kv_heads},
                                            {"num_layers", shape_.layers},
                                            {"num_transformer_submodules", 1},
                                            {"num_virtual_tokens", config_.num_virtual_tokens},
                                            {"prefix_projection", config_.prefix_projection},
                                            {"token_dim", width}}));
}

checkpoint::StateDict PrefixTuning::state(ShardedCore& core) const {
  std::map<std::string, std::string> names;
  for (const auto& [name, inputs] : parameters_)
    names[name] = config_.prefix_projection ? name : kPrefixTensor;
  return renamed_state(core, names);
}

checkpoint::StateDict PrefixTuning::files(ShardedCore& core) const {
  const checkpoint::StateDict own = state(core);
  if (!config_.prefix_projection) return own;
  const DType dtype = own.tensors.front().dtype;
  std::vector<Tensor> values;  // As the model computes with them.
  for (const auto& [name, inputs] : parameters_)
    values.push_back(full_parameter(core, name).to(to_scalar_type(dtype)));
  const at::NoGradGuard no_graph;
  const Tensor prefix = project(values[0], {values.begin() + 1, values.end()}).contiguous();
  return {{whole_tensor(kPrefixTensor, prefix, dtype, core.comm().rank() == 0)}};
}

LlamaAdapter::LlamaAdapter(torch::nn::Module& model, LlamaAdapterConfig config)
    : config_(std::move(config)) {
  expect_positive(config_.adapter_len, "adapter_len");
  expect_positive(config_.adapter_layers, "adapter_layers");
  const auto modules = model.named_modules();
  for (const auto& entry : modules) {
    if (auto* target = dynamic_cast<AdaptionTarget*>(entry.value().get()))
      layers_.push_back({.module = entry.key(), .target = target});
  }
  const auto count = static_cast<int64_t>(layers_.size());
  if (count < config_.adapter_layers) {
    throw ConfigError(cat("[adapter] adapter_layers is ", config_.adapter_layers,
                          ", and the model has ", count,
                          " layers that can have adaption prompts. Hint: adapter_layers ", count));
  }
  layers_.erase(layers_.begin(), layers_.end() - config_.adapter_layers);
  freeze(model);
  for (Layer& layer : layers_) {
    torch::nn::Module& module = *modules[layer.module];
    if (module.named_parameters(/*recurse=*/false).contains("adaption_gate"))
      throw ConfigError(cat("[adapter] ", layer.module, " has adaption prompts already"));
    const at::TensorOptions options = module.parameters().front().options().requires_grad(false);
    const auto make = [&](const char* name, at::IntArrayRef shape) {
      return module.register_parameter(name, at::empty(shape, options));
    };
    layer.prompt = {make("adaption_prompt", {1, config_.adapter_len, layer.target->hidden_size()}),
                    make("adaption_gate", {1})};
  }
  set_active(true);
}

void LlamaAdapter::set_active(bool active) {
  for (Layer& layer : layers_) layer.target->set_adaption(active ? layer.prompt : AdaptionPrompt{});
}

ShardOptions LlamaAdapter::shard_options(ShardOptions options) const {
  options.in_root = Adapters::is_adapter;
  return options;
}

void LlamaAdapter::initialize(ShardedCore& core, uint64_t seed) {
  Fills fills;
  for (const Layer& layer : layers_) {
    const std::string prompt = layer.module + ".adaption_prompt";
    fills[prompt] = normal(stream_key(seed, prompt), 1);
    fills[layer.module + ".adaption_gate"] = zeros();
  }
  store_fills(core, fills);
}

std::string LlamaAdapter::config_text() const {
  return peft_config_text(PeftType::kAdaptionPrompt, config_.notes,
                          io::Json::object({{"adapter_layers", config_.adapter_layers},
                                            {"adapter_len", config_.adapter_len},
                                            {"target_modules", "self_attn"}}));
}

checkpoint::StateDict LlamaAdapter::state(ShardedCore& core) const {
  std::map<std::string, std::string> names;
  for (const Layer& layer : layers_) {
    for (const char* end : {".adaption_prompt", ".adaption_gate"})
      names[layer.module + end] = cat("base_model.model.", layer.module, end);
  }
  return renamed_state(core, names);
}

PrefixConfig read_prefix_config(const std::string& directory) {
  PrefixConfig config{.num_virtual_tokens = 0};
  const std::map<std::string, int64_t*> sizes = {
      {"num_virtual_tokens", &config.num_virtual_tokens},
      {"encoder_hidden_size", &config.encoder_hidden_size},
      {"num_layers", &config.num_layers},
      {"num_attention_heads", &config.num_attention_heads},
      {"token_dim", &config.token_dim}};
  config.notes = read_peft_fields(
      directory, PeftType::kPrefixTuning,
      [&](const std::string& name, const io::Json& value, const std::string&) {
        if (const auto size = sizes.find(name); size != sizes.end()) {
          *size->second = value.as_int();
        } else if (name == "prefix_projection") {
          config.projected = value.as_bool();
        } else if (name == "num_transformer_submodules") {
          return value.as_int() == 1;
        } else {
          return name == "init_weights";  // First values, which the file's replace.
        }
        return true;
      });
  return config;
}

LlamaAdapterConfig read_llama_adapter_config(const std::string& directory) {
  LlamaAdapterConfig config{.adapter_len = 0, .adapter_layers = 0};
  config.notes = read_peft_fields(
      directory, PeftType::kAdaptionPrompt,
      [&](const std::string& name, const io::Json& value, const std::string&) {
        if (name == "adapter_len") {
          config.adapter_len = value.as_int();
        } else if (name == "adapter_layers") {
          config.adapter_layers = value.as_int();
        } else {
          return name == "target_modules" && value.is_string() && value.as_string() == "self_attn";
        }
        return true;
      });
  return config;
}

}  // namespace fsdp::lora
