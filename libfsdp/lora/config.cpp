#include "libfsdp/lora/config.h"

#include <algorithm>
#include <cmath>
#include <set>

#include "libfsdp/base/error.h"
#include "libfsdp/io/json.h"
#include "libfsdp/lora/config_fields.h"
#include "libfsdp/lora/name_match.h"

namespace fsdp::lora {
namespace {

using io::Json;

// The number behind `pattern` ("layers"), or behind anything where it is empty; -1 = none.
int64_t layer_number(std::string_view name, const std::vector<std::string>& patterns) {
  std::vector<std::string> parts;
  for (size_t begin = 0; begin <= name.size();) {
    const size_t end = std::min(name.find('.', begin), name.size());
    parts.emplace_back(name.substr(begin, end - begin));
    begin = end + 1;
  }
  const auto is_number = [](const std::string& part) {
    return !part.empty() && part.size() < 10 &&
           part.find_first_not_of("0123456789") == std::string::npos;
  };
  for (size_t i = 1; i + 1 < parts.size(); ++i) {
    if (!is_number(parts[i])) continue;
    const bool fits = patterns.empty() ||
                      std::find(patterns.begin(), patterns.end(), parts[i - 1]) != patterns.end();
    if (fits) return std::stoll(parts[i]);
  }
  return -1;
}

template <class Value>
const Value* find_pattern(const std::vector<std::pair<std::string, Value>>& patterns,
                          std::string_view name) {
  for (const auto& [pattern, value] : patterns)
    if (matches_whole(cat("(?:.*\\.)?(?:", pattern, ")"), name)) return &value;
  return nullptr;
}

// ---------------------------------------------------------------------------------------------------------------------
// Files

// Settings of other programs, and of inits that a file's values replace.
bool is_ignored(const std::string& name) {
  static const std::set<std::string> fields = {"megatron_config",   "megatron_core",
                                               "qalora_group_size", "eva_config",
                                               "corda_config",      "loftq_config"};
  return fields.count(name) != 0;
}

std::vector<std::string> strings_of(const Json& value) {
  if (value.is_null()) return {};
  if (value.is_string()) return {value.as_string()};
  return value.as<std::vector<std::string>>();
}

Init init_of(const Json& value, const std::string& where) {
  if (value.is_bool()) return Init::kDefault;
  if (value.is_string()) {
    const std::string& name = value.as_string();
    // These choose first values of A and B alone, which a file replaces.
    if (name == "true" || name == "eva") return Init::kDefault;
    for (const auto& [init, known] : names_of(Init{}))
      if (name == known) return init;
    if (name.starts_with("pissa_niter_")) return Init::kPissa;
  }
  throw ModelError(cat(where, ": init_lora_weights ", value.dump(),
                       " is not supported. Known: true, gaussian, pissa, olora, orthogonal"));
}

bool read_field(const std::string& name, const Json& value, const std::string& where,
                LoraConfig& config) {
  if (name == "r") {
    config.r = value.as_int();
  } else if (name == "lora_alpha") {
    config.alpha = value.as_double();
  } else if (name == "lora_dropout") {
    config.dropout = value.as_double();
  } else if (name == "use_rslora") {
    config.use_rslora = value.as_bool();
  } else if (name == "use_dora") {
    config.use_dora = value.as_bool();
  } else if (name == "bias") {
    for (const auto& [mode, known] : names_of(BiasMode{}))
      if (value.as_string() == known) config.bias = mode;
  } else if (name == "target_modules") {
    if (value.is_string()) {
      config.target_pattern = value.as_string();
    } else {
      config.target_modules = strings_of(value);
    }
  } else if (name == "exclude_modules") {
    if (value.is_string()) {
      config.exclude_pattern = value.as_string();
    } else {
      config.exclude_modules = strings_of(value);
    }
  } else if (name == "layers_to_transform") {
    if (value.is_int()) config.layers_to_transform = {value.as_int()};
    if (value.is_array()) config.layers_to_transform = value.as<std::vector<int64_t>>();
  } else if (name == "layers_pattern") {
    config.layers_pattern = strings_of(value);
  } else if (name == "modules_to_save") {
    config.modules_to_save = strings_of(value);
  } else if (name == "rank_pattern") {
    for (const auto& [key, rank] : value.items())
      config.rank_pattern.emplace_back(key, rank.as_int());
  } else if (name == "alpha_pattern") {
    for (const auto& [key, alpha] : value.items())
      config.alpha_pattern.emplace_back(key, alpha.as_double());
  } else if (name == "init_lora_weights") {
    config.init = init_of(value, where);
  } else {
    return is_ignored(name);
  }
  return true;
}

Json strings_json(std::vector<std::string> values, const std::string& pattern) {
  if (!pattern.empty()) return pattern;
  if (values.empty()) return nullptr;
  std::sort(values.begin(), values.end());
  return values;
}

template <class Value>
Json pattern_json(const std::vector<std::pair<std::string, Value>>& patterns) {
  Json object = Json::object();
  for (const auto& [key, value] : patterns) object[key] = value;
  return object;
}

// PEFT writes whole numbers as such.
Json number_json(double value) {
  if (value == std::floor(value) && std::abs(value) < 1e15) return static_cast<int64_t>(value);
  return value;
}

std::string_view name_of(BiasMode mode) {
  for (const auto& [known, name] : names_of(BiasMode{}))
    if (known == mode) return name;
  throw InternalError("unknown bias mode");
}

}  // namespace

bool LoraConfig::targets(std::string_view name, bool is_linear, bool is_head) const {
  if (!exclude_pattern.empty() && matches_whole(exclude_pattern, name)) return false;
  if (names_one(exclude_modules, name) || saves(name)) return false;
  if (target_pattern == kAllLinear) return is_linear && !is_head;
  if (!target_pattern.empty()) return matches_whole(target_pattern, name);
  if (!names_one(target_modules, name)) return false;
  if (layers_to_transform.empty()) return true;
  const int64_t layer = layer_number(name, layers_pattern);
  return std::find(layers_to_transform.begin(), layers_to_transform.end(), layer) !=
         layers_to_transform.end();
}

bool LoraConfig::saves(std::string_view name) const {
  return std::any_of(modules_to_save.begin(), modules_to_save.end(),
                     [&](const std::string& end) { return name.ends_with(end); });
}

int64_t LoraConfig::rank_of(std::string_view name) const {
  const int64_t* other = find_pattern(rank_pattern, name);
  return other ? *other : r;
}

double LoraConfig::alpha_of(std::string_view name) const {
  const double* other = find_pattern(alpha_pattern, name);
  return other ? *other : alpha;
}

double LoraConfig::scaling_of(std::string_view name) const {
  const auto rank = static_cast<double>(rank_of(name));
  return alpha_of(name) / (use_rslora ? std::sqrt(rank) : rank);
}

void LoraConfig::validate() const {
  const auto refuse = [](const std::string& text) { throw ConfigError(cat("[lora] ", text)); };
  if (r < 1) refuse(cat("rank ", r, ": expected at least 1"));
  for (const auto& [pattern, rank] : rank_pattern)
    if (rank < 1) refuse(cat("rank ", rank, " of '", pattern, "': expected at least 1"));
  if (!(dropout >= 0 && dropout < 1)) refuse(cat("dropout ", dropout, ": expected [0, 1)"));
  if (!std::isfinite(alpha)) refuse("alpha must be a finite number");
  if (target_modules.empty() && target_pattern.empty())
    refuse("no target modules. Hint: q_proj,v_proj, or all-linear.");
  if (!target_modules.empty() && !target_pattern.empty())
    refuse("target modules as a list and as a pattern: choose one");
  if (!layers_to_transform.empty() && target_modules.empty())
    refuse("layers_to_transform needs target_modules as a list");
  if (!layers_pattern.empty() && layers_to_transform.empty())
    refuse("layers_pattern without layers_to_transform");
  const bool keeps_rest = init == Init::kPissa || init == Init::kOlora;
  if (use_dora && keeps_rest) refuse("use_dora with an init that changes the weight");
}

LoraConfig read_adapter_config(const std::string& directory) {
  LoraConfig config;
  const PeftNotes notes =
      read_peft_fields(directory, PeftType::kLora,
                       [&](const std::string& name, const Json& value, const std::string& where) {
                         return read_field(name, value, where, config);
                       });
  config.base_model_name_or_path = notes.base_model_name_or_path;
  config.task_type = notes.task_type;
  config.validate();
  return config;
}

std::string adapter_config_text(const LoraConfig& config) {
  Json init = true;
  for (const auto& [known, name] : names_of(Init{}))
    if (known == config.init && known != Init::kDefault) init = name;
  const Json fields = Json::object({
      {"alpha_pattern", pattern_json(config.alpha_pattern)},
      {"bias", name_of(config.bias)},
      {"exclude_modules", strings_json(config.exclude_modules, config.exclude_pattern)},
      {"fan_in_fan_out", false},
      {"init_lora_weights", init},
      {"layers_pattern", strings_json(config.layers_pattern, "")},
      {"layers_to_transform",
       config.layers_to_transform.empty() ? Json() : Json(config.layers_to_transform)},
      {"loftq_config", Json::object()},
      {"lora_alpha", number_json(config.alpha)},
      {"lora_dropout", config.dropout},
      {"megatron_config", nullptr},
      {"megatron_core", "megatron.core"},
      {"modules_to_save", strings_json(config.modules_to_save, "")},
      {"r", config.r},
      {"rank_pattern", pattern_json(config.rank_pattern)},
      {"target_modules", strings_json(config.target_modules, config.target_pattern)},
      {"use_dora", config.use_dora},
      {"use_rslora", config.use_rslora},
  });
  return peft_config_text(PeftType::kLora, {config.base_model_name_or_path, config.task_type},
                          fields);
}

}  // namespace fsdp::lora
