// A small state and its checkpoints, for the tests of the commit protocol.
#pragma once

#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "libfsdp/base/error.h"
#include "libfsdp/checkpoint/checkpoint_save.h"
#include "libfsdp/checkpoint/joined.h"
#include "libfsdp/io/file.h"

namespace fsdp::testing {

/// A directory that goes with the object; below `base` (default: that of temporary files).
class ScratchDirectory {
 public:
  explicit ScratchDirectory(
      const std::string& base = std::filesystem::temp_directory_path().string()) {
    path_ = base + "/fsdp-test-XXXXXX";
    check(::mkdtemp(path_.data()) != nullptr, "mkdtemp");
  }
  ScratchDirectory(const ScratchDirectory&) = delete;
  ScratchDirectory& operator=(const ScratchDirectory&) = delete;
  ~ScratchDirectory() {
    std::error_code error;
    std::filesystem::remove_all(path_, error);
  }
  const std::string& path() const { return path_; }
  std::string operator/(const std::string& name) const { return path_ + "/" + name; }

 private:
  std::string path_;
};

/// Whether the long sizes were asked for.
inline bool long_run() {
  const char* scale = std::getenv("FSDP_TEST_SCALE");
  return scale != nullptr && std::string_view(scale) == "long";
}

/// Byte i of a rank's part of a tensor, as of a step.
inline std::byte byte_of(int64_t step, int rank, int64_t i) {
  return static_cast<std::byte>((step * 131 + rank * 17 + i * 7 + i / 251) & 0xff);
}

inline std::vector<std::byte> part_of(int64_t step, int rank, int64_t bytes) {
  std::vector<std::byte> part(static_cast<size_t>(bytes));
  for (int64_t i = 0; i < bytes; ++i) part[static_cast<size_t>(i)] = byte_of(step, rank, i);
  return part;
}

/// Writes: one file that all ranks share (a header by rank 0, two tensors), a file of each rank in
/// a folder, and a small file of rank 0. Every byte depends on `content`.
inline void write_case(checkpoint::RangeWriter& writer, int64_t content, int rank, int ranks,
                       int64_t part_bytes) {
  constexpr int64_t kHeader = 16;
  const auto part = part_of(content, rank, part_bytes);
  writer.share("model.safetensors", kHeader + 2 * ranks * part_bytes);
  if (rank == 0) {
    const auto header = part_of(content, 99, kHeader);
    writer.write("model.safetensors", "", 0, header);
    writer.write_file("trainer_state.json", checkpoint::joined("{\"step\": ", content, "}\n"));
  }
  writer.write("model.safetensors", "a.weight", kHeader + rank * part_bytes, part);
  writer.begin("model.safetensors", "b.weight", kHeader + (ranks + rank) * part_bytes);
  writer.append(std::span(part).first(part.size() / 2));
  writer.append(std::span(part).subspan(part.size() / 2));
  writer.end();
  const std::string own = checkpoint::joined("optimizer/rank-", rank, ".safetensors");
  writer.create(own, part_bytes);
  writer.write(own, checkpoint::joined("moment.", rank), 0, part);
}

/// A save of `content` (default: the step) at a step.
inline checkpoint::SaveRequest request_of(int64_t step, int rank, int ranks,
                                          int64_t part_bytes = 1000, int64_t content = -1) {
  checkpoint::SaveRequest request;
  request.step = step;
  request.strategy = "FULL_SHARD";
  if (content < 0) content = step;
  request.write = [=](checkpoint::RangeWriter& writer) {
    write_case(writer, content, rank, ranks, part_bytes);
  };
  return request;
}

/// Which content a checkpoint of write_case holds, all of it; -1 = of several.
inline int64_t content_of(const std::string& directory, int ranks, int64_t part_bytes) {
  const std::string state = io::read_text(directory + "/trainer_state.json");
  const int64_t content = std::stoll(state.substr(state.find(':') + 1));
  const auto differs = [&](const std::string& file, int64_t at, int part, int64_t bytes) {
    const std::string text = io::read_text(directory + "/" + file);
    const auto expected = part_of(content, part, bytes);
    return std::memcmp(text.data() + at, expected.data(), expected.size()) != 0;
  };
  if (differs("model.safetensors", 0, 99, 16)) return -1;
  for (int rank = 0; rank < ranks; ++rank) {
    const int64_t at = 16 + rank * part_bytes;
    if (differs("model.safetensors", at, rank, part_bytes) ||
        differs("model.safetensors", at + ranks * part_bytes, rank, part_bytes) ||
        differs(cat("optimizer/rank-", rank, ".safetensors"), 0, rank, part_bytes)) {
      return -1;
    }
  }
  return content;
}

/// Names in a directory that are neither checkpoints nor `latest`.
inline std::vector<std::string> strays(const std::string& directory) {
  std::vector<std::string> found;
  for (const auto& entry : std::filesystem::directory_iterator(directory)) {
    const std::string name = entry.path().filename().string();
    if (!name.starts_with("checkpoint-") && name != "latest") found.push_back(name);
  }
  return found;
}

}  // namespace fsdp::testing
