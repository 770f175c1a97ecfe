#include "libfsdp/checkpoint/stored_tensors.h"

#include <sys/stat.h>

#include <algorithm>
#include <cctype>
#include <cerrno>
#include <filesystem>
#include <system_error>

#include "libfsdp/base/checked.h"
#include "libfsdp/checkpoint/rectangles.h"
#include "libfsdp/io/json.h"

namespace fsdp::checkpoint {
namespace {

namespace fs = std::filesystem;

constexpr std::string_view kShardingInfo = "DCP_SHARDING_INFO";

std::string box_text(const StoredChunk& chunk) {
  return cat("offsets ", io::shape_text(chunk.offsets), " sizes ", io::shape_text(chunk.sizes));
}

/// A chunk by its place in the flattened tensor.
struct Placed {
  const StoredChunk* chunk;
  int64_t first;
  int64_t last;
};

std::vector<Placed> by_place(const StoredTensor& tensor) {
  std::vector<Placed> placed;
  for (const StoredChunk& chunk : tensor.chunks) {
    const StoredRectangle rectangle(tensor.shape, chunk.offsets, chunk.sizes);
    placed.push_back(
        {&chunk, rectangle.run_at(0).flat, rectangle.run_at(rectangle.numel() - 1).flat});
  }
  std::sort(placed.begin(), placed.end(),
            [](const Placed& a, const Placed& b) { return a.first < b.first; });
  return placed;
}

bool overlap(const StoredChunk& a, const StoredChunk& b) {
  for (size_t d = 0; d < a.sizes.size(); ++d) {
    if (a.offsets[d] + a.sizes[d] <= b.offsets[d] || b.offsets[d] + b.sizes[d] <= a.offsets[d])
      return false;
  }
  return true;
}

/// Names of shard files of the directory, sorted.
std::vector<std::string> shard_files(const std::string& directory) {
  std::vector<std::string> names;
  std::error_code ignored;
  for (const auto& entry : fs::directory_iterator(directory, ignored)) {
    const std::string name = entry.path().filename().string();
    if (is_shard_file(name)) names.push_back(name);
  }
  std::sort(names.begin(), names.end());
  return names;
}

/// Where the parts lie, by name, as the file's metadata has it.
std::map<std::string, StoredTensors::Place> sharding_info(const io::SafetensorsFile& file) {
  const auto text = file.metadata().find(std::string(kShardingInfo));
  if (text == file.metadata().end())
    throw ModelError(cat(file.path(), ": the metadata has no ", kShardingInfo));
  const auto where = cat(file.path(), ": ", kShardingInfo);
  const io::Json json =
      io::Json::parse(text->second, where, {.max_depth = 4, .max_values = 16'000'000});
  std::map<std::string, StoredTensors::Place> info;
  for (const auto& [name, value] : json.items()) {
    try {
      StoredTensors::Place& place = info[name];
      place.offsets = value.get<std::vector<int64_t>>("saved_offsets");
      if (value.contains("shape")) place.whole_shape = value.get<std::vector<int64_t>>("shape");
    } catch (const ModelError& error) {
      throw ModelError(cat(where, ": '", name, "': ", error.what()));
    }
  }
  return info;
}

/// Makes the shape hold the chunk, unless it is known; checks that all numbers are small enough.
void grow(StoredTensor& tensor, const StoredChunk& chunk, const std::string& where) {
  int64_t numel = 1;
  for (size_t d = 0; d < chunk.sizes.size(); ++d) {
    if (chunk.offsets[d] < 0 || tensor.shape[d] < 0)
      throw ModelError(cat(where, ": a negative offset or dim"));
    const auto end = checked_add<ModelError>(chunk.offsets[d], chunk.sizes[d], where);
    if (end > tensor.shape[d] && tensor.shape_is_known)
      throw ModelError(cat(where, ": ", box_text(chunk), " lies outside the tensor ",
                           io::shape_text(tensor.shape)));
    tensor.shape[d] = std::max(tensor.shape[d], end);
    numel = checked_mul<ModelError>(numel, tensor.shape[d], where);
  }
}

}  // namespace

StoredFile::Identity StoredFile::identity(const io::File& file) {
  struct stat status;
  if (::fstat(file.descriptor(), &status) != 0)
    throw ModelError(cat(file.path(), ": fstat: ", std::generic_category().message(errno)));
  return {status.st_dev, status.st_ino, status.st_size,
          status.st_mtim.tv_sec * 1'000'000'000 + status.st_mtim.tv_nsec};
}

StoredFile::StoredFile(const io::File& file) : path_(file.path()), identity_(identity(file)) {}

io::File StoredFile::open() const {
  io::File file = io::File::open_read(path_);
  if (identity(file) == identity_) return file;
  throw ModelError(cat(path_, ": the file changed while it was being read"));
}

size_t StoredTensors::add_file(const io::File& file) {
  files_.emplace_back(file);
  return files_.size() - 1;
}

void StoredTensors::add(const io::TensorEntry& part, size_t file, std::optional<Place> place) {
  StoredChunk chunk{file, part.begin, std::vector<int64_t>(part.shape.size()), part.shape};
  if (place) chunk.offsets = place->offsets;
  const bool is_known = !place || place->whole_shape.has_value();
  const std::vector<int64_t>& shape = place && is_known ? *place->whole_shape : part.shape;
  const auto where = cat(files_[file].path(), ": '", part.name, "'");
  if (chunk.offsets.size() != chunk.sizes.size() || shape.size() != chunk.sizes.size())
    throw ModelError(cat(where, ": offsets or shape of another number of dims"));
  const auto [at, is_new] = tensors_.try_emplace(part.name);
  StoredTensor& tensor = at->second;
  if (is_new) {
    tensor = {part.name, part.dtype_name, part.dtype, shape, place.has_value(), is_known, {}};
  } else if (!tensor.in_rectangles || !place) {
    throw ModelError(cat(where, " is in two files"));
  } else if (tensor.dtype_name != part.dtype_name || tensor.shape.size() != shape.size() ||
             tensor.shape_is_known != is_known || (is_known && tensor.shape != shape)) {
    throw ModelError(cat(where, " is ", part.dtype_name, " ", io::shape_text(shape),
                         ", in another file ", tensor.dtype_name, " ",
                         io::shape_text(tensor.shape)));
  }
  grow(tensor, chunk, where);
  if (part.numel != 0) tensor.chunks.push_back(std::move(chunk));
}

void StoredTensors::finish() const {
  for (const auto& [name, tensor] : tensors_) {
    std::vector<Placed> open;
    for (const Placed& next : by_place(tensor)) {
      std::erase_if(open, [&](const Placed& before) { return before.last < next.first; });
      for (const Placed& before : open) {
        if (!overlap(*before.chunk, *next.chunk)) continue;
        throw ModelError(cat("tensor '", name,
                             "' has parts that overlap: ", box_text(*before.chunk), " in ",
                             files_[before.chunk->file].path(), " and ", box_text(*next.chunk),
                             " in ", files_[next.chunk->file].path(),
                             ". Hint: does the directory hold files of two checkpoints?"));
      }
      open.push_back(next);
    }
  }
}

void StoredTensors::add_safetensors(const io::SafetensorsFile& file, bool sharded) {
  const size_t index = add_file(file.file());
  const auto info = sharded ? sharding_info(file) : decltype(sharding_info(file)){};
  for (const io::TensorEntry& entry : file.entries()) {
    if (!sharded) {
      add(entry, index);
      continue;
    }
    const auto offsets = info.find(entry.name);
    if (offsets == info.end())
      throw ModelError(cat(file.path(), ": ", kShardingInfo, " lacks '", entry.name, "'"));
    add(entry, index, offsets->second);
  }
  if (sharded) return;
  for (const auto& [alias, name] : file.metadata()) {
    if (file.find(name) != nullptr) add_alias(alias, name);
  }
}

StoredTensors StoredTensors::open(const std::string& directory, const std::string& stem) {
  const std::vector<std::string> shards = shard_files(directory);
  if (!shards.empty()) return open_sharded(directory, shards);
  return of(io::HfWeights::open(directory, stem));
}

StoredTensors StoredTensors::open_sharded(const std::string& directory,
                                          const std::vector<std::string>& names) {
  StoredTensors stored(directory);
  for (const std::string& name : names)
    stored.add_safetensors(io::SafetensorsFile::open((fs::path(directory) / name).string()), true);
  stored.finish();
  return stored;
}

StoredTensors StoredTensors::of(const io::HfWeights& weights) {
  StoredTensors stored(weights.directory());
  for (const io::SafetensorsFile& file : weights.files()) stored.add_safetensors(file, false);
  return stored;
}

const StoredTensor* StoredTensors::find(std::string_view name) const {
  const auto found = tensors_.find(name);
  return found == tensors_.end() ? nullptr : &found->second;
}

std::optional<std::pair<int64_t, int64_t>> uncovered_range(const StoredTensor& stored,
                                                           std::span<const int64_t> shape) {
  int64_t numel = 1, held = 0;
  for (const int64_t dim : shape) numel = checked_mul<ModelError>(numel, dim, stored.name);
  std::vector<StoredRectangle> rectangles;
  for (const StoredChunk& chunk : stored.chunks) {
    rectangles.emplace_back(shape, chunk.offsets, chunk.sizes);
    held += rectangles.back().numel();
  }
  if (held == numel) return std::nullopt;  // Without overlaps, that is all.
  int64_t begin = 0, end = numel;
  for (bool found = true; found;) {
    found = false;
    end = numel;
    for (const StoredRectangle& rectangle : rectangles) {
      const int64_t index = rectangle.count_before(begin);
      if (index == rectangle.numel()) continue;
      const StoredRectangle::Run run = rectangle.run_at(index);
      found = run.flat == begin;
      if (found) begin += run.numel;
      if (found) break;
      end = std::min(end, run.flat);
    }
  }
  return std::pair(begin, end);
}

bool is_shard_file(std::string_view name) {
  constexpr std::string_view kPattern = "shard-#####-model-#####-of-#####.safetensors";
  return std::equal(name.begin(), name.end(), kPattern.begin(), kPattern.end(), [](char c, char p) {
    return p == '#' ? std::isdigit(static_cast<unsigned char>(c)) != 0 : c == p;
  });
}

}  // namespace fsdp::checkpoint
