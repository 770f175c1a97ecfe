#include "libfsdp/trainer/convert.h"

#include <algorithm>
#include <array>
#include <cstdio>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <optional>

#include "libfsdp/base/error.h"
#include "libfsdp/base/log.h"
#include "libfsdp/checkpoint/convert_gguf.h"
#include "libfsdp/checkpoint/convert_state.h"
#include "libfsdp/checkpoint/llama_pth.h"
#include "libfsdp/checkpoint/staged_directory.h"
#include "libfsdp/checkpoint/torch_files.h"
#include "libfsdp/text/gguf_tokenizer.h"
#include "libfsdp/text/tokenizer.h"
#include "libfsdp/trainer/model_files.h"

namespace fsdp::trainer {
namespace {

text::GgufVocabulary vocabulary_of(const io::Json& metadata) {
  const std::string group = "tokenizer.ggml.";
  text::GgufVocabulary vocabulary;
  vocabulary.model = metadata.get<std::string>(group + "model");
  vocabulary.pre = metadata.get(group + "pre", "default");
  vocabulary.chat_template = metadata.get("tokenizer.chat_template", "");
  vocabulary.tokens = metadata.get<std::vector<std::string>>(group + "tokens");
  vocabulary.merges = metadata.get<std::vector<std::string>>(group + "merges", {});
  vocabulary.token_types = metadata.get<std::vector<int32_t>>(group + "token_type", {});
  vocabulary.bos = metadata.get<int64_t>(group + "bos_token_id", -1);
  vocabulary.eos = metadata.get<int64_t>(group + "eos_token_id", -1);
  vocabulary.pad = metadata.get<int64_t>(group + "padding_token_id", -1);
  vocabulary.unk = metadata.get<int64_t>(group + "unknown_token_id", -1);
  vocabulary.add_bos = metadata.get<bool>(group + "add_bos_token", false);
  return vocabulary;
}

namespace fs = std::filesystem;

/// What is to be converted.
struct Source {
  checkpoint::StateDict state;
  std::optional<io::HfModelConfig> config;
  std::string stem = "model";        // Of the full form's files.
  std::vector<std::string> skipped;  // Values that are no tensors.
  std::function<void(const fs::path& to)> write_companions = {};
};

/// Files beside the weights that belong to a model, in a folder.
void copy_companions(const fs::path& from, const fs::path& to) {
  constexpr std::array<std::string_view, 13> kNames = {
      "generation_config.json", "tokenizer.json",     "tokenizer_config.json",
      "tokenizer.model",        "tekken.json",        "special_tokens_map.json",
      "added_tokens.json",      "vocab.json",         "merges.txt",
      "chat_template.jinja",    "chat_template.json", "LICENSE",
      "USE_POLICY.md"};
  for (const std::string_view name : kNames) {
    std::error_code problem;
    if (!fs::is_regular_file(from / name, problem)) continue;
    fs::copy_file(from / name, to / name, problem);
    if (problem)
      throw HostResourceError(cat("cannot copy ", (from / name).string(), ": ", problem.message()));
  }
}

/// Type that config.json names: that of most of the written elements.
DType main_dtype(const checkpoint::StateDict& state, std::optional<DType> dtype) {
  if (dtype) return *dtype;
  std::map<DType, int64_t> elements;
  for (const checkpoint::TensorPart& part : state.tensors) {
    if (part.dtype <= DType::kBF16) elements[part.dtype] += part.numel;
  }
  const auto most =
      std::max_element(elements.begin(), elements.end(),
                       [](const auto& a, const auto& b) { return a.second < b.second; });
  return most == elements.end() ? DType::kF32 : most->first;
}

std::vector<std::string> tensor_order(const std::optional<io::HfModelConfig>& config) {
  std::vector<std::string> order;
  if (!config) return order;
  for (const io::NamedShape& tensor : config->expected_tensors()) order.push_back(tensor.name);
  return order;
}

void keep_prefix(checkpoint::StateDict& state, const std::string& prefix, const fs::path& from) {
  std::erase_if(state.tensors, [&](const auto& part) { return !part.name.starts_with(prefix); });
  for (auto& part : state.tensors) part.name.erase(0, prefix.size());
  if (state.tensors.empty())
    throw ConfigError(cat("[convert] ", from.string(), ": ",
                          prefix.empty() ? "there are no tensors."
                                         : cat("no tensor's name begins with '", prefix, "'.")));
}

/// Files of PyTorch do not tell shapes: without its last shard a tensor would just be smaller.
void check_shapes(const Source& source, const fs::path& from) {
  if (!source.config) return;
  std::map<std::string, std::vector<int64_t>> expected;
  for (io::NamedShape& tensor : source.config->expected_tensors())
    expected[tensor.name] = std::move(tensor.shape);
  for (const checkpoint::TensorPart& part : source.state.tensors) {
    const auto found = expected.find(part.name);
    if (found != expected.end() && found->second != part.shape)
      throw ModelError(cat("[convert] ", from.string(), ": '", part.name, "' is ",
                           io::shape_text(part.shape), ", by config.json it should be ",
                           io::shape_text(found->second), ". Hint: is a file missing?"));
  }
}

/// Tensors of the stored files, in the order of the configuration if there is one.
void describe(Source& source, checkpoint::StoredTensors stored) {
  const auto reader = std::make_shared<checkpoint::StoredReader>(std::move(stored));
  source.state = checkpoint::stored_state(reader, tensor_order(source.config));
}

void describe(Source& source, checkpoint::FoundTensors found, const fs::path& directory) {
  source.skipped = found.skipped;
  describe(source, checkpoint::as_stored(found, directory.string()));
}

/// Pickled weights of transformers: pytorch_model.bin, or several that share the tensors.
std::vector<fs::path> pickle_files(const fs::path& directory) {
  std::vector<fs::path> files;
  std::error_code ignored;
  for (const auto& entry : fs::directory_iterator(directory, ignored)) {
    const std::string name = entry.path().filename().string();
    if (name.starts_with("pytorch_model") && name.ends_with(".bin")) files.push_back(entry.path());
  }
  std::sort(files.begin(), files.end());
  return files;
}

checkpoint::FoundTensors find_in_all(const std::vector<fs::path>& files) {
  checkpoint::FoundTensors all;
  for (const fs::path& file : files) {
    checkpoint::FoundTensors found = checkpoint::find_in_pth(file.string());
    for (auto& tensor : found.tensors) {
      tensor.file = all.files.size();
      all.tensors.push_back(std::move(tensor));
    }
    all.skipped.insert(all.skipped.end(), found.skipped.begin(), found.skipped.end());
    all.files.push_back(file.string());
  }
  return all;
}

Source open_folder(const fs::path& folder) {
  Source source;
  if (checkpoint::is_llama_pth(folder.string())) {
    auto model = checkpoint::open_llama_pth(folder.string());
    return {.state = std::move(model.state), .config = std::move(model.config)};
  }
  if (fs::exists(folder / "config.json")) source.config = io::HfModelConfig::read(folder.string());
  if (source.config && source.config->quantization) {
    throw ModelError(cat("[convert] ", folder.string(), ": its weights are in ",
                         io::quant_kind_name(source.config->quantization->kind),
                         ", which is not converted. Hint: finetune train, eval, generate and merge "
                         "read such a folder as it is."));
  }
  const auto has = [&](const char* name) { return fs::exists(folder / name); };
  if (has(".metadata")) {
    describe(source, checkpoint::find_in_dcp(folder.string()), folder);
  } else if (const auto pickles = pickle_files(folder); !pickles.empty() &&
                                                        !has("model.safetensors") &&
                                                        !has("model.safetensors.index.json")) {
    describe(source, find_in_all(pickles), folder);
  } else {
    const bool is_model = has("model.safetensors") || has("model.safetensors.index.json");
    if (!is_model && (has("optimizer.safetensors") || has("optimizer.safetensors.index.json")))
      source.stem = "optimizer";
    describe(source, checkpoint::StoredTensors::open(folder.string(), source.stem));
  }
  return source;
}

/// Torch's files are zip archives; whatever else is one file is taken for GGUF, which names what is
/// wrong with it.
bool is_torch_file(const fs::path& from) {
  const std::string extension = from.extension().string();
  return extension == ".pth" || extension == ".pt" || extension == ".bin";
}

Source open_gguf(const fs::path& from) {
  const auto model = std::make_shared<const io::GgufLlama>(io::GgufLlama::open(from.string()));
  const auto tokenizer = text::Tokenizer::from_gguf(vocabulary_of(model->file().metadata()));
  return {.state = checkpoint::gguf_state(model),
          .config = model->config(),
          .write_companions = [model, tokenizer](const fs::path& to) {
            tokenizer.save(to);
            io::write_text_atomic((to / "generation_config.json").string(),
                                  model->generation_config().dump(2) + "\n");
          }};
}

Source open_source(const fs::path& from) {
  if (fs::is_directory(from)) {
    Source source = open_folder(from);
    source.write_companions = [from](const fs::path& to) { copy_companions(from, to); };
    return source;
  }
  if (!is_torch_file(from)) return open_gguf(from);
  Source source;
  describe(source, checkpoint::find_in_pth(from.string()), from.parent_path());
  return source;
}

void write(const ConvertOptions& options, const Source& source, std::optional<DType> dtype) {
  prepare_output_dir(options.to, false, checkpoint::file_bytes(source.state, dtype));
  checkpoint::StagedDirectory staged(options.to.string());
  const int64_t bytes = checkpoint::write_converted(
      source.state,
      {.num_shards = options.format == "sharded" ? options.num_shards : 0,
       .dtype = dtype,
       .stem = source.stem,
       .max_file_bytes = io::parse_bytes(options.max_shard_size)},
      staged.path());
  if (source.write_companions) source.write_companions(staged.path());
  if (source.config)
    io::write_text_atomic((fs::path(staged.path()) / "config.json").string(),
                          source.config->to_json(main_dtype(source.state, dtype)).dump(2) + "\n");
  staged.publish();
  std::printf("converted: %s, %lld bytes in %zu tensors\n", options.to.c_str(),
              static_cast<long long>(bytes), source.state.tensors.size());
}

}  // namespace

void run_convert(const ConvertOptions& options) {
  std::optional<DType> dtype;
  if (options.dtype != "auto") dtype = dtype_from_name(options.dtype);
  Source source = open_source(options.from);
  keep_prefix(source.state, options.prefix, options.from);
  check_shapes(source, options.from);
  if (!source.skipped.empty())
    log::warning(cat(options.from.string(), ": ", source.skipped.size(),
                     " values are no tensors and stay behind: ", source.skipped.front(),
                     source.skipped.size() > 1 ? ", ..." : ""));
  write(options, source, dtype);
}

}  // namespace fsdp::trainer
