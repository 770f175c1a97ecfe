#include "libfsdp/checkpoint/stored_reader.h"

#include <algorithm>
#include <cstring>
#include <set>

#include "libfsdp/base/error.h"
#include "libfsdp/checkpoint/rectangles.h"

namespace fsdp::checkpoint {
namespace {

constexpr size_t kMaxOpenFiles = 16;

int64_t numel_of(std::span<const int64_t> shape) {
  int64_t numel = 1;
  for (const int64_t dim : shape) numel *= dim;
  return numel;
}

TensorPart part_of(const std::shared_ptr<StoredReader>& reader, const StoredTensor& tensor) {
  const std::string& directory = reader->stored().directory();
  if (!tensor.dtype)
    throw ModelError(cat(directory, ": tensor '", tensor.name, "' is ", tensor.dtype_name,
                         ", which cannot be converted"));
  if (const auto hole = uncovered_range(tensor, tensor.shape))
    throw ModelError(cat(directory, ": elements [", hole->first, ", ", hole->second,
                         ") of tensor '", tensor.name, "' ", io::shape_text(tensor.shape),
                         " are in no file. Hint: is a shard file missing?"));
  TensorPart part{.name = tensor.name,
                  .dtype = *tensor.dtype,
                  .shape = tensor.shape,
                  .numel = numel_of(tensor.shape)};
  part.read = [reader, &tensor](int64_t offset, std::span<std::byte> to) {
    reader->read(tensor, offset, to);
  };
  return part;
}

}  // namespace

const io::File& StoredReader::file(size_t index) {
  auto found = std::find_if(open_.begin(), open_.end(),
                            [index](const auto& open) { return open.first == index; });
  if (found == open_.end()) {
    if (open_.size() >= kMaxOpenFiles) open_.pop_back();
    open_.emplace_front(index, stored_.files()[index].open());
    found = open_.begin();
  }
  open_.splice(open_.begin(), open_, found);
  return open_.front().second;
}

void StoredReader::read(const StoredTensor& tensor, int64_t at, std::span<std::byte> out) {
  check(tensor.dtype.has_value(), "StoredReader: a tensor of an unknown type");
  const auto width = static_cast<int64_t>(dtype_bytes(*tensor.dtype));
  const int64_t numel = static_cast<int64_t>(out.size()) / width;
  for (const StoredChunk& chunk : tensor.chunks) {
    const StoredRectangle rectangle(tensor.shape, chunk.offsets, chunk.sizes);
    const int64_t begin = rectangle.count_before(at), end = rectangle.count_before(at + numel);
    if (begin == end) continue;
    const io::File& source = file(chunk.file);
    const StoredRectangle::Run first = rectangle.run_at(begin);
    const auto bytes = static_cast<size_t>((end - begin) * width);
    if (first.numel >= end - begin) {
      source.read_at(chunk.file_at + begin * width,
                     out.subspan(static_cast<size_t>((first.flat - at) * width), bytes));
      continue;
    }
    buffer_.resize(bytes);
    source.read_at(chunk.file_at + begin * width, buffer_);
    for (int64_t i = begin; i < end;) {
      const StoredRectangle::Run run = rectangle.run_at(i);
      const int64_t n = std::min(run.numel, end - i);
      std::memcpy(out.data() + (run.flat - at) * width, buffer_.data() + (i - begin) * width,
                  static_cast<size_t>(n * width));
      i += n;
    }
  }
}

StateDict stored_state(const std::shared_ptr<StoredReader>& reader,
                       std::span<const std::string> order) {
  StateDict state;
  std::set<std::string_view> done;
  for (const std::string& name : order) {
    const StoredTensor* tensor = reader->stored().find(name);
    if (tensor != nullptr && done.insert(tensor->name).second)
      state.tensors.push_back(part_of(reader, *tensor));
  }
  for (const auto& [name, tensor] : reader->stored().tensors()) {
    if (!done.contains(name)) state.tensors.push_back(part_of(reader, tensor));
  }
  return state;
}

}  // namespace fsdp::checkpoint
