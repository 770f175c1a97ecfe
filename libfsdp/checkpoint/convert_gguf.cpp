#include "libfsdp/checkpoint/convert_gguf.h"

#include <filesystem>
#include <system_error>

#include "libfsdp/base/error.h"
#include "libfsdp/checkpoint/slice_io.h"

namespace fsdp::checkpoint {

void convert_gguf(const io::GgufLlama& model, const std::string& out_directory, DType dtype) {
  namespace fs = std::filesystem;
  std::error_code error;
  fs::create_directories(out_directory, error);
  if (error)
    throw ConfigError(cat(out_directory, ": cannot make the directory: ", error.message()));
  const auto tensors = model.config().expected_tensors();
  HfSave save(out_directory, tensors, dtype);
  save.create();
  for (const io::NamedShape& tensor : tensors) {
    model.read(tensor.name, [&](int64_t at, std::span<const float> values) {
      save.write({tensor.name, at, static_cast<int64_t>(values.size()), 0}, values);
    });
  }
  check(save.written_numel() == save.total_numel(), "convert_gguf: not every element was written");
  save.commit();
  const fs::path directory = out_directory;
  io::write_text_atomic((directory / "generation_config.json").string(),
                        model.generation_config().dump(2) + "\n");
  io::write_text_atomic((directory / "config.json").string(),
                        model.config().to_json(dtype).dump(2) + "\n");
}

}  // namespace fsdp::checkpoint
