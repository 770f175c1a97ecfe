#include "libfsdp/trainer/new_model.h"

#include <cstdio>
#include <optional>
#include <span>
#include <vector>

#include "libfsdp/base/error.h"
#include "libfsdp/io/file.h"
#include "libfsdp/io/hf_config.h"
#include "libfsdp/models/init.h"
#include "libfsdp/text/tokenizer.h"
#include "libfsdp/trainer/model_files.h"

namespace fsdp::trainer {
namespace {

constexpr int64_t kBlockElements = 1 << 20;

std::vector<io::TensorSpec> specs_of(const io::HfModelConfig& config, DType dtype) {
  std::vector<io::TensorSpec> specs;
  for (const auto& tensor : config.expected_tensors())
    specs.push_back({tensor.name, dtype, tensor.shape});
  return specs;
}

/// Fills one tensor block by block; a block's numbers do not depend on where blocks begin.
void write_tensor(const io::File& file, const io::TensorEntry& entry, DType dtype,
                  const NewModelOptions& options, double deviation) {
  std::vector<float> values(static_cast<size_t>(std::min(entry.numel, kBlockElements)));
  std::vector<std::byte> bytes(values.size() * dtype_bytes(dtype));
  for (int64_t begin = 0; begin < entry.numel; begin += kBlockElements) {
    const auto count = static_cast<size_t>(std::min(entry.numel - begin, kBlockElements));
    models::random_init(entry.name, begin, std::span(values).first(count),
                        static_cast<uint64_t>(options.seed), deviation);
    convert_floats(values.data(), DType::kF32, bytes.data(), dtype, count);
    file.write_at(entry.begin + begin * static_cast<int64_t>(dtype_bytes(dtype)),
                  std::span(bytes).first(count * dtype_bytes(dtype)));
  }
}

void write_weights(const io::HfModelConfig& config, DType dtype, const NewModelOptions& options) {
  const auto layout = io::SafetensorsLayout::plan(specs_of(config, dtype));
  io::AtomicFile out((options.output_dir / "model.safetensors").string());
  out.file().allocate(layout.file_bytes);
  out.file().write_at(0, std::as_bytes(std::span(layout.header)));
  for (const auto& entry : layout.entries)
    write_tensor(out.file(), entry, dtype, options, config.initializer_range);
  out.commit();
}

}  // namespace

void run_new_model(const NewModelOptions& options) {
  const auto dtype = dtype_from_name(options.dtype);
  const auto config = io::HfModelConfig::from_json(io::Json::read(options.model_config.string()),
                                                   options.model_config.string());
  if (config.quantization) {
    throw ModelError(cat("[new-model] ", options.model_config.string(),
                         ": random weights are not quantised. Hint: remove its "
                         "quantization_config."));
  }
  std::optional<text::Tokenizer> tokenizer;
  if (!options.tokenizer.empty()) tokenizer = text::Tokenizer::from_directory(options.tokenizer);
  if (tokenizer && tokenizer->id_limit() > config.vocab_size) {
    throw ModelError(cat("[new-model] the tokenizer's largest id is ", tokenizer->id_limit() - 1,
                         ", config.json has a vocab_size of ", config.vocab_size, "."));
  }
  int64_t elements = 0;
  for (const auto& tensor : specs_of(config, dtype)) {
    int64_t numel = 1;
    for (const auto size : tensor.shape) numel *= size;
    elements += numel;
  }
  prepare_output_dir(options.output_dir, false,
                     elements * static_cast<int64_t>(dtype_bytes(dtype)));
  write_weights(config, dtype, options);
  if (tokenizer) tokenizer->save(options.output_dir);
  io::write_text_atomic((options.output_dir / "config.json").string(),
                        config.to_json(dtype).dump(2) + "\n");
  std::printf("new model: %s, %lld parameters, %s\n", options.output_dir.c_str(),
              static_cast<long long>(elements), options.dtype.c_str());
}

}  // namespace fsdp::trainer
