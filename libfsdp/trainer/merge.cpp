#include "libfsdp/trainer/merge.h"

#include <cstdio>

#include "libfsdp/base/error.h"
#include "libfsdp/checkpoint/convert_state.h"
#include "libfsdp/checkpoint/staged_directory.h"
#include "libfsdp/io/file.h"
#include "libfsdp/lora/config_fields.h"
#include "libfsdp/lora/merge.h"
#include "libfsdp/trainer/model_files.h"

namespace fsdp::trainer {

void run_merge(const MergeOptions& options) {
  ModelFiles files = open_model(options.model_name_or_path);
  const std::string adapter = options.adapter_name_or_path.string();
  if (lora::read_peft_type(adapter) != lora::PeftType::kLora) {
    throw ConfigError(cat("[merge] ", adapter,
                          " holds tokens that attention sees, no change of weights: there is no "
                          "merged model of them. Hint: --adapter_name_or_path of eval and "
                          "generate."));
  }
  std::optional<DType> dtype;
  if (!options.dequantize.empty()) {
    if (files.quantized.empty()) {
      throw ConfigError(cat("[merge] --dequantize: the weights of ",
                            options.model_name_or_path.string(), " are not quantised."));
    }
    dtype = dtype_from_name(options.dequantize);
    files.config = files.config.dequantized();
  }
  const checkpoint::StateDict merged =
      lora::merged_state(options.model_name_or_path.string(), adapter,
                         dtype ? lora::MergedForm::kDequantized : lora::MergedForm::kAsBase);
  prepare_output_dir(options.output_dir, /*overwrite=*/false,
                     checkpoint::file_bytes(merged, dtype));
  checkpoint::StagedDirectory staged(options.output_dir.string());
  const int64_t bytes = checkpoint::write_converted(
      merged, {.dtype = dtype, .max_file_bytes = io::parse_bytes(options.max_shard_size)},
      staged.path());
  for (const auto& [name, text] : model_texts(files, dtype.value_or(files.dtype)))
    io::write_text_atomic((std::filesystem::path(staged.path()) / name).string(), text);
  staged.publish();
  std::printf("merged: %s, %lld bytes of weights\n", options.output_dir.c_str(),
              static_cast<long long>(bytes));
}

}  // namespace fsdp::trainer
