#include <unistd.h>

#include <algorithm>
#include <exception>
#include <filesystem>
#include <set>
#include <system_error>

#include "libfsdp/base/error.h"
#include "libfsdp/base/log.h"
#include "libfsdp/checkpoint/slice_io.h"

namespace fsdp::checkpoint {
namespace {

namespace fs = std::filesystem;

constexpr std::string_view kIndexFile = "model.safetensors.index.json";

std::vector<io::TensorSpec> with_dtype(std::span<const io::NamedShape> tensors, DType dtype) {
  std::vector<io::TensorSpec> specs;
  for (const io::NamedShape& tensor : tensors) specs.push_back({tensor.name, dtype, tensor.shape});
  return specs;
}

}  // namespace

HfSave::HfSave(std::string directory, std::span<const io::NamedShape> tensors, DType dtype,
               int64_t max_shard_bytes)
    : directory_(std::move(directory)),
      dtype_(dtype),
      plan_(io::plan_hf_files(with_dtype(tensors, dtype), max_shard_bytes)),
      files_(plan_.files.size()),
      exceptions_before_(std::uncaught_exceptions()) {
  for (size_t i = 0; i < tensors.size(); ++i) {
    places_.emplace(tensors[i].name, plan_.places[i]);
    total_numel_ += plan_.files[plan_.places[i].file].layout.entries[plan_.places[i].entry].numel;
  }
}

HfSave::~HfSave() {
  if (owns_temporaries_ || std::uncaught_exceptions() > exceptions_before_) abort();
}

std::string HfSave::final_path(std::string_view file_name) const {
  return (fs::path(directory_) / file_name).string();
}

// The name must be the same on every rank, so it holds no nonce; two saves into one directory at
// once are a mistake anyway.
std::string HfSave::temporary_path(size_t file) const {
  return final_path(plan_.files[file].name) + ".tmp-save";
}

void HfSave::create() {
  owns_temporaries_ = true;
  for (size_t i = 0; i < plan_.files.size(); ++i) {
    ::unlink(temporary_path(i).c_str());
    const io::File file = io::File::create(temporary_path(i));
    const io::SafetensorsLayout& layout = plan_.files[i].layout;
    file.allocate(layout.file_bytes);
    file.write_at(0, std::as_bytes(std::span(layout.header.data(), layout.header.size())));
  }
}

const io::File& HfSave::temporary_file(size_t file) {
  if (!files_[file].is_open()) files_[file] = io::File::open_write(temporary_path(file));
  return files_[file];
}

void HfSave::write(const TensorSlice& slice, std::span<const float> values) {
  const auto place = places_.find(slice.name);
  check(place != places_.end(), cat("save: no tensor is named '", slice.name, "'"));
  const io::TensorEntry& entry =
      plan_.files[place->second.file].layout.entries[place->second.entry];
  check(slice.param_at >= 0 && slice.param_at <= entry.numel &&
            slice.numel <= entry.numel - slice.param_at &&
            static_cast<int64_t>(values.size()) == slice.numel,
        cat("save: slice of '", slice.name,
            "' lies outside the tensor or has another size than its values"));
  const io::File& file = temporary_file(place->second.file);
  const auto width = dtype_bytes(dtype_);
  int64_t file_at = entry.begin + slice.param_at * static_cast<int64_t>(width);
  const size_t most = static_cast<size_t>(kDefaultChunkBytes) / width;
  for (size_t at = 0; at < values.size(); at += most) {
    const auto part = values.subspan(at, std::min(most, values.size() - at));
    buffer_.resize(part.size() * width);
    convert_floats(part.data(), DType::kF32, buffer_.data(), dtype_, part.size());
    file.write_at(file_at, buffer_);
    file_at += static_cast<int64_t>(buffer_.size());
  }
  written_numel_ += slice.numel;
}

void HfSave::commit() {
  for (size_t i = 0; i < plan_.files.size(); ++i) temporary_file(i).sync();
  // Files of an older index under the same names: without an index a reader stops instead of mixing
  // old and new.
  const bool replaces = std::any_of(plan_.files.begin(), plan_.files.end(), [&](const auto& file) {
    return fs::exists(final_path(file.name));
  });
  if (replaces && plan_.files.size() > 1) {
    ::unlink(final_path(kIndexFile).c_str());
    io::sync_directory(directory_);
  }
  for (size_t i = 0; i < plan_.files.size(); ++i) {
    io::rename_file(temporary_path(i), final_path(plan_.files[i].name));
  }
  owns_temporaries_ = false;
  io::sync_directory(directory_);
  if (!plan_.index_json.empty()) io::write_text_atomic(final_path(kIndexFile), plan_.index_json);
  remove_stale_files();
  for (io::File& file : files_) file = io::File();
}

void HfSave::remove_stale_files() const {
  std::set<std::string> current;
  for (const auto& file : plan_.files) current.insert(file.name);
  if (!plan_.index_json.empty()) current.emplace(kIndexFile);
  for (const auto& entry : fs::directory_iterator(directory_)) {
    const std::string name = entry.path().filename().string();
    if (!io::is_hf_weights_file(name) || current.contains(name)) continue;
    std::error_code error;
    fs::remove(entry.path(), error);
    if (error)
      log::warning(cat(entry.path().string(), ": stale weights file stays: ", error.message()));
  }
}

void HfSave::abort() noexcept {
  for (size_t i = 0; i < plan_.files.size(); ++i) ::unlink(temporary_path(i).c_str());
  owns_temporaries_ = false;
}

}  // namespace fsdp::checkpoint
