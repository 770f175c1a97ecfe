#include "libfsdp/trainer/convert.h"

#include <cstdio>

#include "libfsdp/base/error.h"
#include "libfsdp/checkpoint/convert_gguf.h"
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

int64_t weight_bytes(const io::HfModelConfig& config, DType dtype) {
  int64_t bytes = 0;
  for (const auto& tensor : config.expected_tensors()) {
    int64_t numel = 1;
    for (const auto size : tensor.shape) numel *= size;
    bytes += numel * static_cast<int64_t>(dtype_bytes(dtype));
  }
  return bytes;
}

}  // namespace

void run_convert(const ConvertOptions& options) {
  const auto dtype = dtype_from_name(options.dtype);
  const auto model = io::GgufLlama::open(options.from.string());
  const auto tokenizer = text::Tokenizer::from_gguf(vocabulary_of(model.file().metadata()));
  const auto bytes = weight_bytes(model.config(), dtype);
  prepare_output_dir(options.to, false, bytes);
  tokenizer.save(options.to);
  checkpoint::convert_gguf(model, options.to.string(), dtype);
  std::printf("converted: %s, %lld bytes of %s weights, %zu tokens\n", options.to.c_str(),
              static_cast<long long>(bytes), options.dtype.c_str(), tokenizer.vocab_size());
}

}  // namespace fsdp::trainer
