// Which weights get an adapter, and of what kind: the part of PEFT's LoraConfig that changes the
// mathematics, with its names, defaults and rules of matching.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace fsdp::lora {

/// Which biases are trained besides.
enum class BiasMode { kNone, kAll, kLoraOnly };
constexpr std::array<std::pair<BiasMode, std::string_view>, 3> names_of(BiasMode) {
  return {{{BiasMode::kNone, "none"}, {BiasMode::kAll, "all"}, {BiasMode::kLoraOnly, "lora_only"}}};
}

/// First values of A and B.
enum class Init {
  kDefault,     ///< A uniform within +-1 / sqrt(fan_in), B zero.
  kGaussian,    ///< A normal with deviation 1 / r, B zero.
  kPissa,       ///< The principal singular directions of the weight, which keeps the rest.
  kOlora,       ///< The first columns of its QR decomposition; the weight keeps the rest.
  kOrthogonal,  ///< From the halves of one random orthogonal matrix, so that B A is zero.
};
constexpr std::array<std::pair<Init, std::string_view>, 5> names_of(Init) {
  return {{{Init::kDefault, "default"},
           {Init::kGaussian, "gaussian"},
           {Init::kPissa, "pissa"},
           {Init::kOlora, "olora"},
           {Init::kOrthogonal, "orthogonal"}}};
}

/// `target_modules` that stands for every Linear but the output head.
inline constexpr std::string_view kAllLinear = "all-linear";

struct LoraConfig {
  int64_t r = 8;
  double alpha = 8;
  double dropout = 0;
  bool use_rslora = false;  ///< Scale by alpha / sqrt(r) instead of alpha / r.
  bool use_dora = false;
  BiasMode bias = BiasMode::kNone;
  Init init = Init::kDefault;

  /// A module is meant when its full name is one of these or ends with ".<one of these>".
  std::vector<std::string> target_modules;
  /// In place of the list: a regular expression for the full name, or kAllLinear.
  std::string target_pattern;
  std::vector<std::string> exclude_modules;
  std::string exclude_pattern;  ///< In place of that list.
  /// Only layers of these numbers; with a list of target_modules only.
  std::vector<int64_t> layers_to_transform;
  /// What stands before the number of a layer; empty = anything.
  std::vector<std::string> layers_pattern;
  /// Trained and saved whole: modules whose names end so, without regard to dots, as PEFT has it.
  std::vector<std::string> modules_to_save;
  /// Other ranks and alphas: the key is a regular expression for the end of a module's name; the
  /// first that fits counts.
  std::vector<std::pair<std::string, int64_t>> rank_pattern;
  std::vector<std::pair<std::string, double>> alpha_pattern;

  /// Of the files only.
  std::string base_model_name_or_path;
  std::string task_type = "CAUSAL_LM";

  /// Whether the module `name` gets an adapter; `is_head`: the output layer, `is_linear`: a Linear.
  bool targets(std::string_view name, bool is_linear = true, bool is_head = false) const;
  /// Whether it is trained and saved whole.
  bool saves(std::string_view name) const;
  int64_t rank_of(std::string_view name) const;
  double alpha_of(std::string_view name) const;
  /// What B A x is multiplied by.
  double scaling_of(std::string_view name) const;

  /// Throws ConfigError for values and combinations that cannot work.
  void validate() const;
};

/// "adapter_config.json" of a PEFT directory. Throws ModelError for what is no LoRA, and for fields
/// with a value that changes the mathematics and is not supported, by name.
LoraConfig read_adapter_config(const std::string& directory);
/// The text of that file, with the fields that every version of PEFT knows, sorted.
std::string adapter_config_text(const LoraConfig& config);

}  // namespace fsdp::lora
