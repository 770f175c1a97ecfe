#include "libfsdp/checkpoint/torch_files.h"

#include <algorithm>
#include <array>
#include <filesystem>
#include <map>
#include <set>
#include <utility>

#include "libfsdp/base/checked.h"
#include "libfsdp/checkpoint/isolated.h"
#include "libfsdp/checkpoint/range_writer.h"
#include "libfsdp/io/json.h"
#include "libfsdp/io/pickle.h"
#include "libfsdp/io/zip.h"

namespace fsdp::checkpoint {
namespace {

namespace fs = std::filesystem;
using io::Json;
using io::Pickle;

constexpr int64_t kMaxPickleBytes = 256 << 20;
constexpr int kMaxNesting = 16;

struct TorchType {
  std::string_view storage;      // Class of a storage, "torch <name>".
  std::string_view dtype;        // "torch <name>".
  std::string_view safetensors;  // Our files' name.
  int64_t bytes;
};
constexpr std::array<TorchType, 10> kTypes = {
    {{"torch FloatStorage", "torch float32", "F32", 4},
     {"torch BFloat16Storage", "torch bfloat16", "BF16", 2},
     {"torch HalfStorage", "torch float16", "F16", 2},
     {"torch DoubleStorage", "torch float64", "F64", 8},
     {"torch LongStorage", "torch int64", "I64", 8},
     {"torch IntStorage", "torch int32", "I32", 4},
     {"torch ShortStorage", "torch int16", "I16", 2},
     {"torch CharStorage", "torch int8", "I8", 1},
     {"torch ByteStorage", "torch uint8", "U8", 1},
     {"torch BoolStorage", "torch bool", "BOOL", 1}}};

bool is_allowed(const std::string& global) {
  static const std::set<std::string, std::less<>> kOthers = {
      "collections OrderedDict",
      "torch Size",
      "torch._utils _rebuild_tensor_v2",
      "torch._utils _rebuild_parameter",
      "torch.serialization _get_layout",
      "torch.distributed.checkpoint.metadata Metadata",
      "torch.distributed.checkpoint.metadata TensorStorageMetadata",
      "torch.distributed.checkpoint.metadata BytesStorageMetadata",
      "torch.distributed.checkpoint.metadata TensorProperties",
      "torch.distributed.checkpoint.metadata ChunkStorageMetadata",
      "torch.distributed.checkpoint.metadata MetadataIndex",
      "torch.distributed.checkpoint.metadata StorageMeta",
      "torch.distributed.checkpoint.metadata _MEM_FORMAT_ENCODING",
      "torch.distributed.checkpoint.filesystem _StorageInfo",
      "torch.distributed.checkpoint.filesystem _StoragePrefix",
      "pathlib PosixPath",
      "pathlib PurePosixPath"};
  const bool is_type = std::any_of(kTypes.begin(), kTypes.end(), [&](const TorchType& type) {
    return type.storage == global || type.dtype == global;
  });
  return is_type || kOthers.contains(global);
}

std::vector<std::byte> read_limited(const io::File& file, int64_t at, int64_t bytes) {
  if (bytes > kMaxPickleBytes)
    throw ModelError(cat("a pickle of ", bytes, " bytes, expected at most ", kMaxPickleBytes));
  std::vector<std::byte> data(static_cast<size_t>(bytes));
  file.read_at(at, data);
  return data;
}

/// An archive of torch.save in (a part of) a file.
class TorchArchive {
 public:
  TorchArchive(const io::File& file, int64_t at, int64_t bytes)
      : entries_(io::read_zip(file, at, bytes)) {
    const auto pickle = std::find_if(entries_.begin(), entries_.end(), [](const auto& entry) {
      return entry.first.ends_with("/data.pkl") &&
             std::count(entry.first.begin(), entry.first.end(), '/') == 1;
    });
    if (pickle == entries_.end()) throw ModelError("the zip archive is none of torch.save");
    folder_ = pickle->first.substr(0, pickle->first.find('/') + 1);
    check_byte_order(file);
    pickle_ =
        Pickle::parse(read_limited(file, pickle->second.at, pickle->second.bytes), is_allowed);
  }

  const Pickle& pickle() const { return pickle_; }

  static bool is_tensor(const Pickle& pickle, const Pickle::Node& node) {
    return pickle.is_call(node, "torch._utils _rebuild_tensor_v2") ||
           pickle.is_call(node, "torch._utils _rebuild_parameter");
  }

  /// The tensor that such a call would make.
  FoundTensor tensor(const Pickle::Node& node, const std::string& name) const {
    const Pickle::Node& arguments = pickle_.item(node, 1);
    if (pickle_.is_call(node, "torch._utils _rebuild_parameter")) {
      const Pickle::Node& data = pickle_.item(arguments, 0);
      if (!pickle_.is_call(data, "torch._utils _rebuild_tensor_v2"))
        throw ModelError(cat("'", name, "': a parameter without a tensor"));
      return tensor(data, name);
    }
    const Storage storage = storage_of(pickle_.item(arguments, 0), name);
    FoundTensor found{.name = name,
                      .dtype_name = std::string(storage.type->safetensors),
                      .shape = pickle_.integers(pickle_.item(arguments, 2))};
    const int64_t offset = pickle_.integer(pickle_.item(arguments, 1));
    const int64_t numel = checked_numel(found.shape, name);
    check_contiguous(found.shape, pickle_.integers(pickle_.item(arguments, 3)), name);
    if (offset < 0 || offset > storage.numel || numel > storage.numel - offset)
      throw ModelError(cat("'", name, "' reaches outside its storage"));
    found.at = storage.at + offset * storage.type->bytes;
    found.offsets.resize(found.shape.size());
    found.whole_shape = found.shape;
    return found;
  }

 private:
  struct Storage {
    const TorchType* type;
    int64_t at;
    int64_t numel;
  };

  void check_byte_order(const io::File& file) const {
    const auto order = entries_.find(folder_ + "byteorder");
    if (order == entries_.end()) return;
    const auto text = read_limited(file, order->second.at, order->second.bytes);
    const std::string_view name(reinterpret_cast<const char*>(text.data()), text.size());
    if (name != "little") throw ModelError("the tensors are not little-endian");
  }

  static int64_t checked_numel(const std::vector<int64_t>& shape, const std::string& name) {
    int64_t numel = 1;
    for (const int64_t dim : shape) {
      if (dim < 0) throw ModelError(cat("'", name, "' has a negative dim"));
      numel = checked_mul<ModelError>(numel, dim, name);
    }
    return numel;
  }

  static void check_contiguous(const std::vector<int64_t>& shape,
                               const std::vector<int64_t>& strides, const std::string& name) {
    if (strides.size() != shape.size())
      throw ModelError(cat("'", name, "' has another number of strides than of dims"));
    if (std::count(shape.begin(), shape.end(), 0) > 0) return;
    int64_t expected = 1;
    for (size_t d = shape.size(); d-- > 0;) {
      if (shape[d] != 1 && strides[d] != expected)
        throw ModelError(cat("'", name, "' is not contiguous (strides ", io::shape_text(strides),
                             "). Hint: save tensor.contiguous()."));
      expected *= shape[d];
    }
  }

  /// From ('storage', class, key, device, numel).
  Storage storage_of(const Pickle::Node& node, const std::string& name) const {
    if (node.kind != Pickle::Kind::kPersistent)
      throw ModelError(cat("'", name, "' has no storage"));
    const Pickle::Node& tuple = pickle_.item(node, 0);
    const std::string& type_name = pickle_.item(tuple, 1).text;
    const auto type = std::find_if(kTypes.begin(), kTypes.end(), [&](const TorchType& candidate) {
      return candidate.storage == type_name;
    });
    if (type == kTypes.end()) throw ModelError(cat("'", name, "' has storage of an unknown type"));
    const auto entry = entries_.find(folder_ + "data/" + pickle_.string(pickle_.item(tuple, 2)));
    if (entry == entries_.end()) throw ModelError(cat("'", name, "': its data is not in the file"));
    const int64_t numel = pickle_.integer(pickle_.item(tuple, 4));
    if (numel < 0 || checked_mul<ModelError>(numel, type->bytes, name) > entry->second.bytes)
      throw ModelError(cat("'", name, "': its data is shorter than it should be"));
    return {type, entry->second.at, numel};
  }

  std::map<std::string, io::ZipEntry> entries_;
  std::string folder_;
  Pickle pickle_;
};

/// All tensors of nested dicts, with dotted names.
class DictWalk {
 public:
  DictWalk(const TorchArchive& archive, FoundTensors& found) : archive_(archive), found_(found) {}

  void walk(const Pickle::Node& dict, const std::string& prefix, int depth) {
    const Pickle& pickle = archive_.pickle();
    if (depth > kMaxNesting) throw ModelError("dicts nest too deep");
    const Pickle::Node* items = &dict;
    if (pickle.is_call(dict, "collections OrderedDict")) {
      if (dict.items.size() < 3) return;
      items = &pickle.item(dict, 2);
    }
    for (size_t i = 0; i + 1 < items->items.size(); i += 2) {
      const Pickle::Node &key = pickle.item(*items, i), &value = pickle.item(*items, i + 1);
      if (key.kind != Pickle::Kind::kString && key.kind != Pickle::Kind::kInt) continue;
      const std::string name =
          cat(prefix, key.kind == Pickle::Kind::kInt ? cat(key.integer) : key.text);
      if (++visited_ > kMaxValues) throw ModelError("too many values in dicts");
      if (TorchArchive::is_tensor(pickle, value)) {
        found_.tensors.push_back(archive_.tensor(value, name));
      } else if (is_dict(value)) {
        walk(value, name + ".", depth + 1);
      } else {
        found_.skipped.push_back(name);
      }
    }
  }

  bool is_dict(const Pickle::Node& node) const {
    return node.kind == Pickle::Kind::kDict ||
           archive_.pickle().is_call(node, "collections OrderedDict");
  }

 private:
  static constexpr int64_t kMaxValues = 10'000'000;
  const TorchArchive& archive_;
  FoundTensors& found_;
  int64_t visited_ = 0;
};

FoundTensors describe_pth(const std::string& path) {
  const io::File file = io::File::open_read(path);
  const TorchArchive archive(file, 0, file.size());
  FoundTensors found{.files = {path}};
  DictWalk walk(archive, found);
  const Pickle::Node& root = archive.pickle().root();
  if (!walk.is_dict(root)) throw ModelError("the file holds no dict of tensors");
  walk.walk(root, "", 0);
  return found;
}

/// `.metadata` of a DCP directory, and the archives that it points to.
class DcpReader {
 public:
  explicit DcpReader(const std::string& directory) : directory_(directory) {
    const io::File file = io::File::open_read((fs::path(directory) / ".metadata").string());
    metadata_ = Pickle::parse(read_limited(file, 0, file.size()), is_allowed);
  }

  FoundTensors run() {
    const Pickle& m = metadata_;
    if (!m.is_call(m.root(), "torch.distributed.checkpoint.metadata Metadata"))
      throw ModelError(".metadata is none of torch.distributed.checkpoint");
    read_shapes(m.at(m.root(), "state_dict_metadata"));
    const Pickle::Node& places = m.at(m.root(), "storage_data");
    for (size_t i = 0; i + 1 < places.items.size(); i += 2)
      read_place(m.item(places, i), m.item(places, i + 1));
    return std::move(found_);
  }

 private:
  void read_shapes(const Pickle::Node& tensors) {
    const Pickle& m = metadata_;
    for (size_t i = 0; i + 1 < tensors.items.size(); i += 2) {
      const std::string& name = m.string(m.item(tensors, i));
      const Pickle::Node& value = m.item(tensors, i + 1);
      if (m.is_call(value, "torch.distributed.checkpoint.metadata TensorStorageMetadata")) {
        shapes_[name] = m.integers(m.at(value, "size"));
      } else {
        found_.skipped.push_back(name);
      }
    }
  }

  /// One item: (MetadataIndex, _StorageInfo).
  void read_place(const Pickle::Node& index, const Pickle::Node& place) {
    const Pickle& m = metadata_;
    const std::string& name = m.string(m.at(index, "fqn"));
    const auto shape = shapes_.find(name);
    if (shape == shapes_.end()) return;
    const Pickle::Node* transforms = m.find(place, "transform_descriptors");
    if (transforms != nullptr && transforms->kind != Pickle::Kind::kNone)
      throw ModelError(cat("'", name, "' is compressed or otherwise transformed"));
    const std::string& file_name = m.string(m.at(place, "relative_path"));
    const int64_t at = m.integer(m.at(place, "offset"));
    const int64_t bytes = m.integer(m.at(place, "length"));
    const size_t file = file_index(file_name);
    try {
      const TorchArchive archive(open_, at, bytes);
      if (!TorchArchive::is_tensor(archive.pickle(), archive.pickle().root()))
        throw ModelError("expected a tensor");
      FoundTensor found = archive.tensor(archive.pickle().root(), name);
      found.file = file;
      found.whole_shape = shape->second;
      const Pickle::Node& offset = m.at(index, "offset");
      if (offset.kind != Pickle::Kind::kNone) found.offsets = m.integers(offset);
      found_.tensors.push_back(std::move(found));
    } catch (const ModelError& error) {
      throw ModelError(cat(file_name, ": '", name, "': ", error.what()));
    }
  }

  /// Opens the file, unless it is the one that is open.
  size_t file_index(const std::string& name) {
    if (!is_safe_name(name)) throw ModelError("a file name leads out of the directory");
    const std::string path = (fs::path(directory_) / name).string();
    const auto [at, is_new] = files_.try_emplace(path, found_.files.size());
    if (is_new) found_.files.push_back(path);
    if (open_.path() != path) open_ = io::File::open_read(path);
    return at->second;
  }

  std::string directory_;
  Pickle metadata_;
  std::map<std::string, std::vector<int64_t>> shapes_;
  std::map<std::string, size_t> files_;
  io::File open_;
  FoundTensors found_;
};

Json list(const std::vector<std::string>& texts) {
  Json array = Json::array();
  for (const std::string& text : texts) array.push_back(text);
  return array;
}

std::string to_text(const FoundTensors& found) {
  Json tensors = Json::array();
  for (const FoundTensor& t : found.tensors) {
    tensors.push_back(Json::array({t.name, t.dtype_name, t.shape, t.offsets, t.whole_shape,
                                   static_cast<int64_t>(t.file), t.at}));
  }
  return Json::object({{"files", list(found.files)},
                       {"tensors", std::move(tensors)},
                       {"skipped", list(found.skipped)}})
      .dump();
}

FoundTensors from_text(const std::string& text, const std::string& where) {
  const Json json = Json::parse(text, where, {.max_depth = 8, .max_values = 100'000'000});
  FoundTensors found;
  for (const Json& file : json["files"].elements()) found.files.push_back(file.as_string());
  for (const Json& name : json["skipped"].elements()) found.skipped.push_back(name.as_string());
  for (const Json& t : json["tensors"].elements()) {
    FoundTensor tensor{.name = t[0].as_string(),
                       .dtype_name = t[1].as_string(),
                       .shape = t[2].as<std::vector<int64_t>>(),
                       .offsets = t[3].as<std::vector<int64_t>>(),
                       .whole_shape = t[4].as<std::vector<int64_t>>(),
                       .file = t[5].as<size_t>(),
                       .at = t[6].as_int()};
    if (tensor.file >= found.files.size())
      throw ModelError(cat(where, ": a file that is not there"));
    found.tensors.push_back(std::move(tensor));
  }
  return found;
}

std::optional<DType> dtype_of(const std::string& safetensors_name) {
  for (const DType dtype : {DType::kF64, DType::kF32, DType::kF16, DType::kBF16, DType::kI64,
                            DType::kI32, DType::kI16, DType::kI8, DType::kU8, DType::kBool}) {
    if (io::safetensors_dtype_name(dtype) == safetensors_name) return dtype;
  }
  return std::nullopt;
}

/// The entry of a found tensor, with sizes that are checked.
io::TensorEntry entry_of(const FoundTensor& found, int64_t file_bytes, const std::string& where) {
  const auto dtype = dtype_of(found.dtype_name);
  if (!dtype) throw ModelError(cat(where, ": '", found.name, "' has an unknown type"));
  io::TensorEntry entry{.name = found.name,
                        .dtype_name = found.dtype_name,
                        .dtype = dtype,
                        .shape = found.shape,
                        .begin = found.at};
  for (const int64_t dim : found.shape) {
    if (dim < 0) throw ModelError(cat(where, ": '", found.name, "' has a negative dim"));
    entry.numel = checked_mul<ModelError>(entry.numel, dim, found.name);
  }
  entry.bytes =
      checked_mul<ModelError>(entry.numel, static_cast<int64_t>(dtype_bytes(*dtype)), found.name);
  if (found.at < 0 || found.at > file_bytes || entry.bytes > file_bytes - found.at)
    throw ModelError(cat(where, ": '", found.name, "' lies outside the file"));
  return entry;
}

}  // namespace

FoundTensors find_in_pth(const std::string& path) {
  return from_text(run_isolated(path, [&] { return to_text(describe_pth(path)); }), path);
}

FoundTensors find_in_dcp(const std::string& directory) {
  return from_text(run_isolated(directory, [&] { return to_text(DcpReader(directory).run()); }),
                   directory);
}

StoredTensors as_stored(const FoundTensors& found, const std::string& directory) {
  StoredTensors stored(directory);
  std::vector<int64_t> file_bytes;
  for (const std::string& path : found.files) {
    const io::File file = io::File::open_read(path);
    file_bytes.push_back(file.size());
    stored.add_file(file);
  }
  for (const FoundTensor& tensor : found.tensors) {
    const std::string& path = found.files[tensor.file];
    stored.add(entry_of(tensor, file_bytes[tensor.file], path), tensor.file,
               StoredTensors::Place{tensor.offsets, tensor.whole_shape});
  }
  stored.finish();
  for (const auto& [name, tensor] : stored.tensors()) {
    if (uncovered_range(tensor, tensor.shape))
      throw ModelError(cat(directory, ": parts of tensor '", name, "' ",
                           io::shape_text(tensor.shape), " are missing"));
  }
  return stored;
}

}  // namespace fsdp::checkpoint
