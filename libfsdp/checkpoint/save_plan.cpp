#include "libfsdp/checkpoint/save_plan.h"

#include <algorithm>
#include <array>
#include <cstdio>
#include <set>
#include <tuple>

#include "libfsdp/base/error.h"
#include "libfsdp/checkpoint/rectangles.h"
#include "libfsdp/io/json.h"

namespace fsdp::checkpoint {
namespace {

constexpr int64_t kBufferBytes = 2 << 20;

bool is_floating(DType dtype) {
  return dtype == DType::kF32 || dtype == DType::kF16 || dtype == DType::kBF16 ||
         dtype == DType::kF64;
}

DType file_type(DType dtype, std::optional<DType> wanted) {
  return wanted && is_floating(dtype) ? *wanted : dtype;
}

int64_t width_of(DType dtype) { return static_cast<int64_t>(dtype_bytes(dtype)); }

void sort_pieces(SavePlan& plan) {
  std::sort(plan.pieces.begin(), plan.pieces.end(),
            [](const SavePlan::Piece& a, const SavePlan::Piece& b) {
              return std::tuple(a.file, a.file_at) < std::tuple(b.file, b.file_at);
            });
}

std::string shard_file_name(int64_t rank, size_t i, size_t n) {
  std::array<char, 96> name;
  std::snprintf(name.data(), name.size(), "shard-%05lld-model-%05zu-of-%05zu.safetensors",
                static_cast<long long>(rank + 1), i + 1, n);
  return name.data();
}

/// A rectangle of tensors[tensor] that is to be in a file.
struct ShardEntry {
  size_t tensor;
  Rectangle rectangle;
};

/// The entries of each file of a rank: the k-th rectangle of a tensor is in file k.
std::vector<std::vector<ShardEntry>> shard_entries(const StateDict& state, int64_t rank) {
  std::vector<std::vector<ShardEntry>> files;
  for (size_t t = 0; t < state.tensors.size(); ++t) {
    const TensorPart& part = state.tensors[t];
    std::vector<Rectangle> rectangles;
    if (part.saved) rectangles = cut_into_rectangles(part.shape, part.at, part.numel);
    const bool is_empty = std::count(part.shape.begin(), part.shape.end(), 0) > 0;
    if (is_empty && rank == 0)
      rectangles = {{.offsets = std::vector<int64_t>(part.shape.size()), .sizes = part.shape}};
    if (files.size() < rectangles.size()) files.resize(rectangles.size());
    for (size_t k = 0; k < rectangles.size(); ++k)
      files[k].push_back({t, std::move(rectangles[k])});
  }
  return files;
}

std::string sharding_info(const StateDict& state, const std::vector<ShardEntry>& entries) {
  std::string text = "{";
  for (const ShardEntry& entry : entries) {
    text += cat(text.size() > 1 ? ", " : "", io::json_quote(state.tensors[entry.tensor].name),
                ": {\"saved_offsets\": ", io::shape_text(entry.rectangle.offsets),
                ", \"shape\": ", io::shape_text(state.tensors[entry.tensor].shape), "}");
  }
  return text + "}";
}

/// Writes pieces from where they lie, or through two buffers.
class PieceWriter {
 public:
  PieceWriter(const StateDict& state, RangeWriter& writer) : state_(state), writer_(writer) {}

  void write(const SavePlan::Piece& piece, DType to, const std::string& file) {
    const TensorPart& part = state_.tensors[piece.tensor];
    const int64_t width = width_of(part.dtype);
    const int64_t most = kBufferBytes / std::max(width, width_of(to));
    writer_.begin(file, part.name, piece.file_at);
    if (part.dtype == to && !part.source.empty()) {
      writer_.append(part.source.subspan(static_cast<size_t>(piece.part_at * width),
                                         static_cast<size_t>(piece.numel * width)));
      return writer_.end();
    }
    for (int64_t done = 0; done < piece.numel; done += most) {
      const int64_t numel = std::min(most, piece.numel - done);
      raw_.resize(static_cast<size_t>(numel * width));
      part.read(piece.part_at + done, raw_);
      writer_.append(part.dtype == to ? raw_ : converted(part.dtype, to, numel));
    }
    writer_.end();
  }

 private:
  const std::vector<std::byte>& converted(DType from, DType to, int64_t numel) {
    converted_.resize(static_cast<size_t>(numel * width_of(to)));
    convert_floats(raw_.data(), from, converted_.data(), to, static_cast<size_t>(numel));
    return converted_;
  }

  const StateDict& state_;
  RangeWriter& writer_;
  std::vector<std::byte> raw_, converted_;
};

}  // namespace

SavePlan plan_full(const StateDict& state, const FullForm& form) {
  std::vector<io::TensorSpec> specs;
  for (const TensorPart& part : state.tensors)
    specs.push_back({part.name, file_type(part.dtype, form.dtype), part.shape});
  io::HfWritePlan files = io::plan_hf_files(specs, form.max_file_bytes, form.stem);
  SavePlan plan{.files = std::move(files.files), .shared = true};
  if (!files.index_json.empty()) {
    plan.index_name = form.stem + ".safetensors.index.json";
    plan.index_json = std::move(files.index_json);
  }
  for (size_t t = 0; t < state.tensors.size(); ++t) {
    const TensorPart& part = state.tensors[t];
    if (!part.saved || part.numel == 0) continue;
    const auto [file, entry] = files.places[t];
    const int64_t begin = plan.files[file].layout.entries[entry].begin;
    plan.pieces.push_back(
        {t, 0, part.numel, file, entry, begin + part.at * width_of(specs[t].dtype)});
  }
  sort_pieces(plan);
  return plan;
}

SavePlan plan_sharded(const StateDict& state, int64_t rank, std::optional<DType> dtype) {
  SavePlan plan;
  const auto files = shard_entries(state, rank);
  for (size_t f = 0; f < files.size(); ++f) {
    std::vector<io::TensorSpec> specs;
    for (const auto& [tensor, rectangle] : files[f]) {
      const TensorPart& part = state.tensors[tensor];
      specs.push_back({part.name, file_type(part.dtype, dtype), rectangle.sizes});
    }
    plan.files.push_back({shard_file_name(rank, f, files.size()),
                          io::SafetensorsLayout::plan(
                              specs, {{"format", "pt"},
                                      {"DCP_VERSION", "1.0"},
                                      {"DCP_SHARDING_INFO", sharding_info(state, files[f])}})});
    for (size_t e = 0; e < files[f].size(); ++e) {
      const auto& [tensor, rectangle] = files[f][e];
      if (rectangle.numel == 0) continue;
      plan.pieces.push_back({tensor, rectangle.at - state.tensors[tensor].at, rectangle.numel, f, e,
                             plan.files[f].layout.entries[e].begin});
    }
  }
  sort_pieces(plan);
  return plan;
}

void write_state(const SavePlan& plan, const StateDict& state, int64_t rank, RangeWriter& writer,
                 const std::string& folder) {
  const std::string prefix = folder.empty() ? "" : folder + "/";
  const bool writes_headers = !plan.shared || rank == 0;
  std::set<size_t> touched;
  for (const SavePlan::Piece& piece : plan.pieces) touched.insert(piece.file);
  for (size_t f = 0; f < plan.files.size(); ++f) {
    const auto& [name, layout] = plan.files[f];
    if (!writes_headers && !touched.contains(f)) continue;
    if (plan.shared) {
      writer.share(prefix + name, layout.file_bytes);
    } else {
      writer.create(prefix + name, layout.file_bytes);
    }
    if (writes_headers)
      writer.write(prefix + name, "", 0,
                   std::as_bytes(std::span(layout.header.data(), layout.header.size())));
  }
  PieceWriter pieces(state, writer);
  for (const SavePlan::Piece& piece : plan.pieces) {
    const SavePlan::File& file = plan.files[piece.file];
    pieces.write(piece, *file.layout.entries[piece.entry].dtype, prefix + file.name);
  }
  if (writes_headers && !plan.index_json.empty())
    writer.write_file(prefix + plan.index_name, plan.index_json);
}

}  // namespace fsdp::checkpoint
