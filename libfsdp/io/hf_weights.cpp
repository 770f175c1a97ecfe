#include "libfsdp/io/hf_weights.h"

#include <algorithm>
#include <array>
#include <cctype>
#include <charconv>
#include <cstdio>
#include <filesystem>
#include <set>

#include "libfsdp/base/checked.h"
#include "libfsdp/io/json.h"

namespace fsdp::io {
namespace {

namespace fs = std::filesystem;

constexpr std::string_view kSuffix = ".safetensors";
constexpr std::string_view kIndexSuffix = ".safetensors.index.json";

/// A weight_map may name files of its own directory only. (The file itself may be a symbolic link:
/// the hub's cache keeps its blobs elsewhere.)
void check_shard_name(const std::string& name, const std::string& index_path) {
  const bool plain = name.size() > kSuffix.size() && name.ends_with(kSuffix) &&
                     name.front() != '.' &&
                     name.find_first_of(std::string_view("/\\\0", 3)) == std::string::npos;
  if (plain) return;
  throw ModelError(cat(index_path, ": weight_map names the file ", json_quote(name),
                       ", expected a plain file name that ends in .safetensors"));
}

[[noreturn]] void throw_no_weights(const std::string& directory, const std::string& stem) {
  std::error_code ignored;
  for (const auto& entry : fs::directory_iterator(directory, ignored)) {
    const std::string extension = entry.path().extension().string();
    if (extension != ".bin" && extension != ".pt" && extension != ".pth") continue;
    throw ModelError(
        cat(directory, ": ", entry.path().filename().string(),
            " is a pickle, which can run code when it is read, and is not accepted. Hint: convert "
            "the model once "
            "with Python: AutoModelForCausalLM.from_pretrained(dir).save_pretrained(new_dir)"));
  }
  throw ModelError(cat(directory, ": neither ", stem, kSuffix, " nor ", stem, kIndexSuffix,
                       " is there",
                       fs::is_directory(directory, ignored) ? "" : " (no such directory)"));
}

std::string join(const std::string& directory, std::string_view name) {
  return (fs::path(directory) / name).string();
}

/// weight_map of the index: tensor -> file, every file present.
std::map<std::string, std::string> read_weight_map(const std::string& directory,
                                                   const std::string& path) {
  std::map<std::string, std::string> weight_map;
  try {
    const Json map = Json::read(path)["weight_map"];
    for (const auto& [tensor, file] : map.items()) {
      weight_map[tensor] = file.as_string();
    }
  } catch (const JsonError& error) {
    const std::string text = error.what();
    throw ModelError(text.starts_with(path) ? text : cat(path, ": ", text));
  }
  std::set<std::string> missing;
  for (const auto& [tensor, file] : weight_map) {
    check_shard_name(file, path);
    if (!fs::exists(join(directory, file))) missing.insert(file);
  }
  if (missing.empty()) return weight_map;
  std::string list;
  for (const std::string& file : missing) list += cat(list.empty() ? "" : ", ", file);
  throw ModelError(cat(path, ": ", missing.size(), " listed files are missing: ", list,
                       ". Hint: an incomplete download? Fetch the model again."));
}

}  // namespace

HfWeights HfWeights::open(const std::string& directory, const std::string& stem) {
  const std::string single = join(directory, stem + std::string(kSuffix));
  const std::string index = join(directory, stem + std::string(kIndexSuffix));
  HfWeights weights;
  weights.directory_ = directory;
  std::map<std::string, std::string> weight_map;
  if (fs::exists(single)) {
    weights.files_.push_back(SafetensorsFile::open(single));
  } else if (fs::exists(index)) {
    weight_map = read_weight_map(directory, index);
    std::set<std::string> names;
    for (const auto& [tensor, file] : weight_map) names.insert(file);
    for (const std::string& name : names) {
      weights.files_.push_back(SafetensorsFile::open(join(directory, name)));
    }
  } else {
    throw_no_weights(directory, stem);
  }
  for (size_t f = 0; f < weights.files_.size(); ++f) {
    const auto& entries = weights.files_[f].entries();
    for (size_t e = 0; e < entries.size(); ++e) {
      const auto [at, is_new] = weights.by_name_.emplace(entries[e].name, std::pair(f, e));
      if (is_new) continue;
      throw ModelError(cat(directory, ": tensor '", entries[e].name,
                           "' is in two files: ", weights.files_[at->second.first].path(), " and ",
                           weights.files_[f].path()));
    }
  }
  for (const auto& [tensor, file] : weight_map) {
    const auto found = weights.find(tensor);
    if (found && found->file->path() == join(directory, file)) continue;
    throw ModelError(
        cat(index, ": tensor '", tensor, "' is not in ", file, ", where the index puts it"));
  }
  return weights;
}

std::optional<HfWeights::Location> HfWeights::find(std::string_view name) const {
  const auto found = by_name_.find(name);
  if (found == by_name_.end()) return std::nullopt;
  const SafetensorsFile& file = files_[found->second.first];
  return Location{&file, &file.entries()[found->second.second]};
}

std::vector<std::string> HfWeights::names() const {
  std::vector<std::string> names;
  for (const auto& [name, place] : by_name_) names.push_back(name);
  return names;
}

namespace {

int64_t spec_bytes(const TensorSpec& spec) {
  auto bytes = static_cast<int64_t>(dtype_bytes(spec.dtype));
  for (const int64_t dim : spec.shape) {
    if (dim < 0) throw ConfigError(cat("tensor '", spec.name, "' has a negative dimension"));
    bytes = checked_mul<ConfigError>(bytes, dim, "bytes of the tensor");
  }
  return bytes;
}

/// Indices of the specs file by file.
std::vector<std::vector<size_t>> split_into_files(std::span<const TensorSpec> specs,
                                                  int64_t max_shard_bytes) {
  std::vector<std::vector<size_t>> files;
  std::vector<size_t> current;
  int64_t current_bytes = 0;
  for (size_t i = 0; i < specs.size(); ++i) {
    const int64_t bytes = spec_bytes(specs[i]);
    if (bytes > max_shard_bytes) {
      files.push_back({i});
      continue;
    }
    if (current_bytes + bytes > max_shard_bytes) {
      files.push_back(std::exchange(current, {}));
      current_bytes = 0;
    }
    current.push_back(i);
    current_bytes += bytes;
  }
  if (!current.empty() || files.empty()) files.push_back(std::move(current));
  return files;
}

std::string shard_name(const std::string& stem, size_t i, size_t n) {
  if (n == 1) return stem + std::string(kSuffix);
  std::array<char, 64> number;
  std::snprintf(number.data(), number.size(), "-%05zu-of-%05zu", i + 1, n);
  return stem + number.data() + std::string(kSuffix);
}

/// Keys sorted and a final newline, as transformers writes it.
std::string index_text(std::span<const TensorSpec> specs, const HfWritePlan& plan) {
  int64_t total_numel = 0;
  std::map<std::string, std::string> weight_map;
  for (size_t i = 0; i < specs.size(); ++i) {
    const auto& file = plan.files[plan.places[i].file];
    weight_map[specs[i].name] = file.name;
    total_numel += file.layout.entries[plan.places[i].entry].numel;
  }
  Json::Object members;
  for (const auto& [tensor, file] : weight_map) members.push_back({tensor, file});
  const Json index = Json::object({{"metadata", Json::object({{"total_parameters", total_numel},
                                                              {"total_size", plan.total_bytes}})},
                                   {"weight_map", std::move(members)}});
  return index.dump(2) + "\n";
}

}  // namespace

HfWritePlan plan_hf_files(std::span<const TensorSpec> specs, int64_t max_shard_bytes,
                          const std::string& stem) {
  if (max_shard_bytes < 1) throw ConfigError("the largest file size must be at least 1 byte");
  HfWritePlan plan;
  plan.places.resize(specs.size());
  const auto groups = split_into_files(specs, max_shard_bytes);
  for (size_t f = 0; f < groups.size(); ++f) {
    std::vector<TensorSpec> members;
    for (size_t i : groups[f]) {
      plan.places[i] = {f, members.size()};
      members.push_back(specs[i]);
    }
    plan.files.push_back({shard_name(stem, f, groups.size()), SafetensorsLayout::plan(members)});
    for (const TensorEntry& entry : plan.files.back().layout.entries)
      plan.total_bytes += entry.bytes;
  }
  if (groups.size() > 1) plan.index_json = index_text(specs, plan);
  return plan;
}

int64_t parse_bytes(std::string_view text) {
  double number = 0;
  const auto [rest, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  std::string unit(rest, text.data() + text.size());
  for (char& c : unit) c = static_cast<char>(std::toupper(static_cast<unsigned char>(c)));
  constexpr std::array<std::pair<std::string_view, double>, 6> kUnits = {
      {{"", 1}, {"B", 1}, {"KB", 1e3}, {"MB", 1e6}, {"GB", 1e9}, {"TB", 1e12}}};
  for (const auto& [name, factor] : kUnits) {
    const double bytes = number * factor;
    if (error == std::errc() && unit == name && bytes >= 1 && bytes < 9e18) {
      return static_cast<int64_t>(bytes);
    }
  }
  throw ConfigError(cat("size '", text,
                        "' is not understood, expected a number and B, KB, MB, GB or TB, as 5GB"));
}

bool is_hf_weights_file(std::string_view name, std::string_view stem) {
  if (!name.starts_with(stem)) return false;
  name.remove_prefix(stem.size());
  if (name == kSuffix || name == kIndexSuffix) return true;
  constexpr std::string_view kPattern = "-#####-of-#####.safetensors";
  return std::equal(name.begin(), name.end(), kPattern.begin(), kPattern.end(), [](char c, char p) {
    return p == '#' ? std::isdigit(static_cast<unsigned char>(c)) != 0 : c == p;
  });
}

}  // namespace fsdp::io
