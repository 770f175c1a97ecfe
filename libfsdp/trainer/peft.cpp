#include "libfsdp/trainer/peft.h"

#include <algorithm>
#include <iomanip>
#include <sstream>

#include "libfsdp/base/error.h"
#include "libfsdp/lora/adapters.h"
#include "libfsdp/lora/peft_files.h"
#include "libfsdp/lora/prompts.h"
#include "libfsdp/lora/trainable.h"

namespace fsdp::trainer {
namespace {

template <class Enum>
Enum enum_of(const std::string& name) {
  for (const auto& [value, known] : names_of(Enum{}))
    if (name == known) return value;
  throw InternalError(cat("no value is called '", name, "'"));
}

bool is_plain_name(const std::string& text) {
  return text.find_first_not_of(
             "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.") ==
         std::string::npos;
}

// One text that is no name is a pattern; PEFT's targets for these models are the default.
void set_targets(const std::vector<std::string>& targets, lora::LoraConfig& config) {
  const bool pattern =
      targets.size() == 1 && (targets[0] == lora::kAllLinear || !is_plain_name(targets[0]));
  if (targets.empty()) {
    config.target_modules = {"q_proj", "v_proj"};
  } else if (pattern) {
    config.target_pattern = targets[0];
  } else {
    config.target_modules = targets;
  }
}

std::string with_commas(int64_t number) {
  const std::string digits = std::to_string(number);
  std::string text;
  for (size_t i = 0; i < digits.size(); ++i) {
    if (i > 0 && (digits.size() - i) % 3 == 0) text += ',';
    text += digits[i];
  }
  return text;
}

int64_t numel_of(const std::vector<int64_t>& shape) {
  int64_t numel = 1;
  for (const int64_t size : shape) numel *= size;
  return numel;
}

lora::LoraConfig lora_config(const PeftOptions& options) {
  if (!options.adapter_name_or_path.empty())
    return lora::read_adapter_config(options.adapter_name_or_path.string());
  lora::LoraConfig config;
  config.r = options.lora_r;
  config.alpha = options.lora_alpha;
  config.dropout = options.lora_dropout;
  config.use_rslora = options.use_rslora;
  config.use_dora = options.use_dora;
  config.bias = enum_of<lora::BiasMode>(options.lora_bias);
  config.init = enum_of<lora::Init>(options.init_lora_weights);
  config.modules_to_save = options.lora_modules_to_save;
  set_targets(options.lora_target_modules, config);
  config.validate();
  return config;
}

lora::PeftType peft_type_of(const std::string& method) {
  if (method == "prefix") return lora::PeftType::kPrefixTuning;
  return method == "llama_adapter" ? lora::PeftType::kAdaptionPrompt : lora::PeftType::kLora;
}

// What cannot be trained, whatever the model is.
struct Checker {
  void operator()(const lora::LoraConfig&) const {}
  void operator()(const lora::LlamaAdapterConfig&) const {}
  void operator()(const lora::PrefixConfig& config) const {
    if (!config.projected) return;
    throw ConfigError(
        "[adapter] the adapter's prefix was made by a projection, which PEFT's files do not hold: "
        "it can be used, and not trained on. Hint: --resume_from_checkpoint goes on with a run.");
  }
};

// With each kind of adapter: use(config) of the kind that the options, or the folder, ask for.
template <class Use>
auto with_config(const PeftOptions& options, const std::string& base, Use use) {
  const std::string folder = options.adapter_name_or_path.string();
  const lora::PeftType type =
      folder.empty() ? peft_type_of(options.peft_method) : lora::read_peft_type(folder);
  if (type == lora::PeftType::kPrefixTuning) {
    lora::PrefixConfig config{.num_virtual_tokens = options.num_virtual_tokens,
                              .prefix_projection = options.prefix_projection};
    if (!folder.empty()) config = lora::read_prefix_config(folder);
    config.notes.base_model_name_or_path = base;
    return use(config);
  }
  if (type == lora::PeftType::kAdaptionPrompt) {
    lora::LlamaAdapterConfig config{.adapter_len = options.adapter_len,
                                    .adapter_layers = options.adapter_layers};
    if (!folder.empty()) config = lora::read_llama_adapter_config(folder);
    config.notes.base_model_name_or_path = base;
    return use(config);
  }
  lora::LoraConfig config = lora_config(options);
  config.base_model_name_or_path = base;
  return use(config);
}

class Builder {
 public:
  Builder(models::LlamaForCausalLMImpl& model, bool from_folder)
      : model_(model), from_folder_(from_folder) {}

  std::shared_ptr<lora::Tuner> operator()(const lora::LoraConfig& config) const {
    auto adapters = std::make_shared<lora::Adapters>(model_, config);
    for (const std::string& target : config.target_modules) check_target(target, *adapters);
    return adapters;
  }
  std::shared_ptr<lora::Tuner> operator()(const lora::PrefixConfig& config) const {
    return std::make_shared<lora::PrefixTuning>(model_, config);
  }
  std::shared_ptr<lora::Tuner> operator()(const lora::LlamaAdapterConfig& config) const {
    const std::string& type = model_.config().model_type;
    if (type != "llama" && type != "mistral") {
      throw ConfigError(cat("[adapter] llama_adapter for a model of type ", type,
                            ": PEFT has it for llama and mistral. Hint: lora or prefix."));
    }
    return std::make_shared<lora::LlamaAdapter>(model_, config);
  }

 private:
  // A name that chooses nothing beside others that do. PEFT's folders may have such.
  void check_target(const std::string& target, const lora::Adapters& adapters) const {
    const auto& all = adapters.parameters();
    const bool chosen = std::any_of(all.begin(), all.end(), [&](const auto& adapter) {
      return adapter.module == target || adapter.module.ends_with("." + target);
    });
    if (chosen) return;
    if (target == "lm_head" && !model_.lm_head) {
      throw ConfigError(
          "[adapter] lm_head shares its weight with the embedding in this model: it cannot have an "
          "adapter of its own. Hint: target embed_tokens.");
    }
    if (!from_folder_) throw ConfigError(cat("[adapter] no module is targeted by ", target));
  }

  models::LlamaForCausalLMImpl& model_;
  bool from_folder_;
};

}  // namespace

void check_adapter(const PeftOptions& options) {
  if (options.adapts()) with_config(options, "", Checker());
}

int64_t prefix_tokens(const std::filesystem::path& adapter) {
  if (adapter.empty() || lora::read_peft_type(adapter.string()) != lora::PeftType::kPrefixTuning)
    return 0;
  return lora::read_prefix_config(adapter.string()).num_virtual_tokens;
}

void check_base(const ModelFiles& files, const PeftOptions& options, bool trains) {
  if (files.quantized.empty()) return;
  const io::QuantizationConfig& stored = *files.config.quantization;
  const QuantizationOptions& asked = options.quantization;
  const bool is_int8 = stored.kind == io::QuantKind::kInt8;
  const std::string what =
      cat(files.directory.string(), ", whose weights are in ", io::quant_kind_name(stored.kind),
          is_int8               ? ""
          : stored.double_quant ? " with nested scales"
                                : " with plain scales");
  const auto refuse = [&](const char* option) {
    throw ConfigError(cat("[quantization] --", option, " contradicts ", what,
                          ". Hint: leave it out, the folder is read as it is; or start from the "
                          "model's 16-bit files."));
  };
  if (asked.load_in_8bit && !is_int8) refuse("load_in_8bit");
  if (asked.load_in_4bit && is_int8) refuse("load_in_4bit");
  const std::string& type = asked.bnb_4bit_quant_type;
  if (!type.empty() && type != io::quant_kind_name(stored.kind)) refuse("bnb_4bit_quant_type");
  if (asked.use_bnb_nested_quant && !stored.double_quant) refuse("use_bnb_nested_quant");
  if (!trains || options.adapts()) return;
  throw ConfigError(cat("[quantization] ", what,
                        ", cannot be trained: a step of the optimizer is "
                        "smaller than the distance between two codes. Hint: --use_peft trains "
                        "adapters beside them; to train all weights, start from 16-bit files."));
}

ModelParts add_parts(models::LlamaForCausalLMImpl& model, const PeftOptions& options,
                     const ModelFiles& files, bool trained) {
  ModelParts parts;
  if (trained) check_adapter(options);
  if (options.adapts())
    parts.adapters = with_config(options, files.directory.string(),
                                 Builder(model, !options.adapter_name_or_path.empty()));
  const QuantizationOptions& asked = options.quantization;
  if (!files.quantized.empty()) {
    parts.quantized.emplace(model, files.quantized);
  } else if (asked.quantizes()) {
    lora::QuantizationOptions made;
    if (asked.load_in_8bit) {
      made.format = lora::PackedFormat::kInt8;
    } else if (!asked.bnb_4bit_quant_type.empty()) {
      made.format = enum_of<lora::PackedFormat>(asked.bnb_4bit_quant_type);
    }
    made.double_quant = asked.use_bnb_nested_quant;
    for (const std::string& saved : options.lora_modules_to_save)
      made.skip_modules.push_back(saved);
    parts.quantized.emplace(model, made);
  }
  if (parts.adapters && parts.quantized && parts.adapters->changes_base()) {
    throw ConfigError(
        "[quantization] an init that changes the weights (pissa, olora) with weights in 4 or 8 "
        "bits: they cannot be changed");
  }
  return parts;
}

void freeze_parts(models::LlamaForCausalLMImpl& model, const FreezeOptions& options) {
  if (!options.freezes()) return;
  const bool these_alone = !options.freeze_layers && options.freeze_modules.empty();
  if (these_alone) lora::freeze(model, {".*"});
  if (options.freeze_layers) lora::freeze_layers(model, options.num_freeze_layers);
  lora::freeze(model, options.freeze_modules);
  lora::unfreeze(model, options.unfreeze_modules);
  const auto parameters = model.parameters();
  const bool any = std::any_of(parameters.begin(), parameters.end(),
                               [](const at::Tensor& tensor) { return tensor.requires_grad(); });
  if (!any) throw ConfigError("[options] all of the model is frozen: there is nothing to train");
}

void fill_adapters(ShardedCore& core, ModelParts& parts, const PeftOptions& options,
                   uint64_t seed) {
  if (!parts.adapters) return;
  const bool from_folder = !options.adapter_name_or_path.empty();
  if (parts.adapters->changes_base() || !from_folder) parts.adapters->initialize(core, seed);
  if (from_folder) lora::load_adapter(core, *parts.adapters, options.adapter_name_or_path.string());
}

std::string trainable_line(const ShardedCore& core, const ModelParts& parts) {
  int64_t trainable = 0;
  int64_t all = 0;
  for (const ParameterInfo& info : core.parameters()) {
    all += numel_of(info.shape);
    if (info.trainable) trainable += numel_of(info.shape);
  }
  if (parts.quantized) all += parts.quantized->numel() - parts.quantized->bytes();
  std::ostringstream share;
  share << std::fixed << std::setprecision(4)
        << 100.0 * static_cast<double>(trainable) / static_cast<double>(all);
  return cat("trainable params: ", with_commas(trainable), " || all params: ", with_commas(all),
             " || trainable%: ", share.str());
}

}  // namespace fsdp::trainer
