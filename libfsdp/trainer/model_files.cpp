#include "libfsdp/trainer/model_files.h"

#include <system_error>

#include "libfsdp/base/checked.h"
#include "libfsdp/base/error.h"
#include "libfsdp/io/file.h"
#include "libfsdp/text/tokenizer_files.h"

namespace fsdp::trainer {
namespace {

namespace fs = std::filesystem;

/// The quantised weights of the files, which must be what config.json says.
checkpoint::QuantizedWeights find_quantized(const io::HfModelConfig& config,
                                            const io::HfWeights& weights) {
  checkpoint::StoredReader reader(checkpoint::StoredTensors::of(weights));
  auto found = checkpoint::find_quantized_weights(reader);
  const auto fail = [&](const std::string& text) {
    throw ModelError(cat("[model] ", weights.directory(), ": ", text));
  };
  if (config.quantization && found.empty())
    fail(cat("config.json says that the weights are ",
             io::quant_kind_name(config.quantization->kind),
             ", but the files hold none that is. Hint: remove quantization_config to read them as "
             "they are, and give --load_in_4bit or --load_in_8bit."));
  for (const auto& [name, weight] : found) {
    if (config.quantization && config.quantization->kind == weight.kind) continue;
    fail(cat("tensor '", name, "' is ", io::quant_kind_name(weight.kind), ", and config.json ",
             config.quantization ? cat("says ", io::quant_kind_name(config.quantization->kind))
                                 : "has no quantization_config",
             "."));
  }
  return found;
}

/// Compares the files' tensors with what config.json asks for; returns their elements.
int64_t check_tensors(const ModelFiles& model, const io::HfWeights& weights) {
  int64_t elements = 0;
  const auto expected = model.config.expected_tensors();
  for (const auto& tensor : expected) {
    const auto packed = model.quantized.find(tensor.name);
    if (packed != model.quantized.end() && packed->second.shape == tensor.shape) {
      elements = checked_add<ModelError>(elements, packed->second.numel, "elements of the model");
      continue;
    }
    const auto found = weights.find(tensor.name);
    if (!found) {
      throw ModelError(cat("[model] ", weights.directory(), ": tensor '", tensor.name,
                           "' is missing from the weights files; config.json asks for it."));
    }
    if (found->entry->shape != tensor.shape) {
      throw ModelError(cat("[model] ", found->file->path(), ": tensor '", tensor.name,
                           "' has shape ",
                           io::shape_text(packed != model.quantized.end() ? packed->second.shape
                                                                          : found->entry->shape),
                           ", config.json asks for ", io::shape_text(tensor.shape), "."));
    }
    if (!found->entry->dtype) {
      throw ModelError(cat("[model] ", found->file->path(), ": tensor '", tensor.name,
                           "' has type ", found->entry->dtype_name,
                           ", which is not computed with."));
    }
    elements = checked_add<ModelError>(elements, found->entry->numel, "elements of the model");
  }
  return elements;
}

void check_tokenizer(const ModelFiles& model) {
  if (model.tokenizer.id_limit() > model.config.vocab_size) {
    throw ModelError(cat("[model] ", model.directory.string(),
                         ": the tokenizer does not fit the model: its largest id is ",
                         model.tokenizer.id_limit() - 1, ", the model has rows for ",
                         model.config.vocab_size,
                         " ids. Hint: the files of two models may be mixed."));
  }
}

}  // namespace

ModelFiles open_model(const fs::path& directory) {
  std::error_code problem;
  if (!fs::is_directory(directory, problem)) {
    throw ModelError(cat("[model] ", directory.string(), " is not a folder",
                         fs::exists(directory, problem) ? "." : "; there is nothing at that path.",
                         " Hint: model_name_or_path is a folder on this machine."));
  }
  const auto weights = io::HfWeights::open(directory.string());
  ModelFiles model{directory,
                   io::HfModelConfig::read(directory.string()),
                   text::Tokenizer::from_directory(directory),
                   DType::kF32,
                   0,
                   {}};
  model.quantized = find_quantized(model.config, weights);
  model.parameters = check_tensors(model, weights);
  model.dtype = *weights.find(model.config.expected_tensors().front().name)->entry->dtype;
  check_tokenizer(model);
  return model;
}

void save_model_files(const ModelFiles& model, DType dtype, const fs::path& directory) {
  io::write_text_atomic((directory / "config.json").string(),
                        model.config.to_json(dtype).dump(2) + "\n");
  const auto generation = model.directory / "generation_config.json";
  if (fs::exists(generation)) {
    io::write_text_atomic((directory / generation.filename()).string(),
                          io::read_text(generation.string()));
  }
  model.tokenizer.save(directory);
}

std::vector<std::pair<std::string, std::string>> model_texts(const ModelFiles& model, DType dtype) {
  std::vector<std::pair<std::string, std::string>> texts = {
      {"config.json", model.config.to_json(dtype).dump(2) + "\n"}};
  const auto generation = model.directory / "generation_config.json";
  if (fs::exists(generation))
    texts.emplace_back("generation_config.json", io::read_text(generation.string()));
  for (const text::TokenizerFile& file : text::list_tokenizer_files(model.directory))
    texts.emplace_back(file.name, text::read_tokenizer_file(file.path));
  return texts;
}

void prepare_output_dir(const fs::path& directory, bool overwrite, int64_t needed_bytes) {
  std::error_code problem;
  fs::create_directories(directory, problem);
  if (problem || !fs::is_directory(directory)) {
    throw ConfigError(cat("[output] cannot make the folder ", directory.string(), ": ",
                          problem ? problem.message() : "something else is there", "."));
  }
  if (!overwrite && !fs::is_empty(directory)) {
    throw ConfigError(
        cat("[output] ", directory.string(),
            " is not empty, and nothing of it is overwritten unasked. Hint: another folder, or "
            "--overwrite_output_dir."));
  }
  const auto space = fs::space(directory, problem);
  if (!problem && static_cast<int64_t>(space.available) < needed_bytes) {
    throw HostResourceError(cat("[output] the disk of ", directory.string(), " has ",
                                space.available, " bytes free, the model needs ", needed_bytes,
                                "."));
  }
}

}  // namespace fsdp::trainer
