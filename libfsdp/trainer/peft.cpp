#include "libfsdp/trainer/peft.h"

#include <iomanip>
#include <sstream>

#include "libfsdp/base/error.h"
#include "libfsdp/lora/peft_files.h"

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

}  // namespace

lora::LoraConfig lora_config(const PeftOptions& options, const std::string& base) {
  lora::LoraConfig config;
  if (!options.adapter_name_or_path.empty()) {
    config = lora::read_adapter_config(options.adapter_name_or_path.string());
  } else {
    config.r = options.lora_r;
    config.alpha = options.lora_alpha;
    config.dropout = options.lora_dropout;
    config.use_rslora = options.use_rslora;
    config.use_dora = options.use_dora;
    config.bias = enum_of<lora::BiasMode>(options.lora_bias);
    config.init = enum_of<lora::Init>(options.init_lora_weights);
    config.modules_to_save = options.lora_modules_to_save;
    set_targets(options.lora_target_modules, config);
  }
  config.base_model_name_or_path = base;
  config.validate();
  return config;
}

ModelParts add_parts(models::LlamaForCausalLMImpl& model, const PeftOptions& options,
                     const std::string& base) {
  ModelParts parts;
  if (options.adapts()) parts.adapters.emplace(model, lora_config(options, base));
  if (!options.quantizes()) return parts;
  lora::QuantizationOptions quantization;
  quantization.format = options.load_in_8bit
                            ? lora::PackedFormat::kInt8
                            : enum_of<lora::PackedFormat>(options.bnb_4bit_quant_type);
  quantization.double_quant = options.use_bnb_nested_quant;
  for (const std::string& saved : options.lora_modules_to_save)
    quantization.skip_modules.push_back(saved);
  parts.quantized.emplace(model, quantization);
  return parts;
}

void fill_adapters(ShardedCore& core, ModelParts& parts, const PeftOptions& options,
                   uint64_t seed) {
  if (!parts.adapters) return;
  const lora::Init init = parts.adapters->config().init;
  const bool changes_base = init == lora::Init::kPissa || init == lora::Init::kOlora;
  const bool from_folder = !options.adapter_name_or_path.empty();
  if (changes_base && parts.quantized) {
    throw ConfigError(
        "an init that changes the weights (pissa, olora) with weights in 4 or 8 bits: they cannot "
        "be changed");
  }
  if (changes_base || !from_folder) parts.adapters->initialize(core, seed);
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
