#include "libfsdp/checkpoint/convert_gguf.h"

#include <filesystem>
#include <system_error>
#include <vector>

#include "libfsdp/base/error.h"
#include "libfsdp/checkpoint/save_plan.h"

namespace fsdp::checkpoint {
namespace {

namespace fs = std::filesystem;

/// Tensors come from front to back, so each is written as it is decoded.
void write_tensor(const io::GgufLlama& model, const std::string& name, DType dtype,
                  RangeWriter& writer) {
  std::vector<std::byte> buffer;
  model.read(name, [&](int64_t, std::span<const float> values) {
    buffer.resize(values.size() * dtype_bytes(dtype));
    convert_floats(values.data(), DType::kF32, buffer.data(), dtype, values.size());
    writer.append(buffer);
  });
}

void write_weights(const io::GgufLlama& model, const std::string& directory, DType dtype,
                   int64_t max_file_bytes) {
  std::vector<io::TensorSpec> specs;
  for (const io::NamedShape& tensor : model.config().expected_tensors())
    specs.push_back({tensor.name, dtype, tensor.shape});
  const io::HfWritePlan plan = io::plan_hf_files(specs, max_file_bytes);
  RangeWriter writer(directory);
  for (const auto& [name, layout] : plan.files) {
    writer.create(name, layout.file_bytes);
    writer.write(name, "", 0, std::as_bytes(std::span(layout.header.data(), layout.header.size())));
    for (const io::TensorEntry& entry : layout.entries) {
      writer.begin(name, entry.name, entry.begin);
      write_tensor(model, entry.name, dtype, writer);
      writer.end();
    }
  }
  if (!plan.index_json.empty()) writer.write_file("model.safetensors.index.json", plan.index_json);
  writer.finish();
}

}  // namespace

void convert_gguf(const io::GgufLlama& model, const std::string& out_directory, DType dtype,
                  int64_t max_file_bytes) {
  std::error_code error;
  fs::create_directories(out_directory, error);
  if (error)
    throw ConfigError(cat(out_directory, ": cannot make the directory: ", error.message()));
  write_weights(model, out_directory, dtype, max_file_bytes);
  const fs::path directory = out_directory;
  io::write_text_atomic((directory / "generation_config.json").string(),
                        model.generation_config().dump(2) + "\n");
  io::write_text_atomic((directory / "config.json").string(),
                        model.config().to_json(dtype).dump(2) + "\n");
}

}  // namespace fsdp::checkpoint
