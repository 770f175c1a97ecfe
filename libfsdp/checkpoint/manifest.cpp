#include "libfsdp/checkpoint/manifest.h"

#include <sys/stat.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdio>
#include <system_error>

#include "libfsdp/base/checked.h"
#include "libfsdp/base/error.h"
#include "libfsdp/checkpoint/checkpoint_files.h"
#include "libfsdp/checkpoint/joined.h"

namespace fsdp::checkpoint {
namespace {

using io::Json;

constexpr std::string_view kFormat = "fsdp checkpoint";
// The manifest's digest is its last member, written in one way only.
constexpr std::string_view kBeforeDigest = ",\n\"manifest_digest\": \"";
constexpr std::string_view kAfterDigest = "\"\n}\n";
constexpr size_t kDigestDigits = 32;
constexpr int64_t kMaxManifestBytes = 256 << 20;
constexpr int64_t kMaxListBytes = int64_t{1} << 30;

[[noreturn]] void refuse(const std::string& path, std::string_view why) {
  throw ModelError(cat("[checkpoint] ", path, ": ", why));
}

/// Runs a parser; whatever it finds wrong names the path.
template <class Parse>
auto parsing(const std::string& path, Parse parse) {
  try {
    return parse();
  } catch (const io::JsonError& error) {
    refuse(path, error.what());
  }
}

int64_t size_of(const Json& value, const std::string& path) {
  const int64_t size = value.as_int();
  if (size < 0) refuse(path, cat("a size or place is ", size));
  return size;
}

std::string name_of(const Json& value, const std::string& path) {
  const std::string& name = value.as_string();
  if (!is_safe_name(name)) refuse(path, cat("'", name, "' is no name for a file of a checkpoint"));
  return name;
}

Digest digest_from(const Json& value, const std::string& path) {
  const auto digest = Digest::from_hex(value.as_string());
  if (!digest) refuse(path, cat("'", value.as_string(), "' is no digest"));
  return *digest;
}

std::vector<FileBytes> parse_files(const Json& list, const std::string& path) {
  std::vector<FileBytes> files;
  int64_t total = 0;
  for (const Json& entry : list.elements()) {
    files.push_back({name_of(entry["file"], path), size_of(entry["bytes"], path)});
    total = checked_add<ModelError>(total, files.back().bytes, path);
    if (files.size() > 1 && !(files[files.size() - 2].file < files.back().file))
      refuse(path, cat("file '", files.back().file, "' is out of order or listed twice"));
  }
  return files;
}

std::vector<RangeList> parse_lists(const Json& list, int64_t world_size, const std::string& path) {
  std::vector<RangeList> lists;
  for (const Json& entry : list.elements()) {
    lists.push_back({name_of(entry["file"], path), size_of(entry["bytes"], path),
                     digest_from(entry["digest"], path)});
    if (lists.back().file != list_file_name(static_cast<int64_t>(lists.size()) - 1, world_size))
      refuse(path, cat("'", lists.back().file, "' is not the name of that rank's list"));
  }
  if (static_cast<int64_t>(lists.size()) != world_size)
    refuse(path, cat(lists.size(), " lists, expected ", world_size));
  return lists;
}

/// The text before its digest, which is right.
std::string_view text_before_digest(std::string_view text, const std::string& path) {
  const size_t tail = kBeforeDigest.size() + kDigestDigits + kAfterDigest.size();
  if (text.size() < tail) refuse(path, "it is cut short");
  const std::string_view body = text.substr(0, text.size() - tail);
  const std::string_view end = text.substr(body.size());
  const auto digest = Digest::from_hex(end.substr(kBeforeDigest.size(), kDigestDigits));
  if (!end.starts_with(kBeforeDigest) || !end.ends_with(kAfterDigest) || !digest)
    refuse(path, "it does not end with its digest: it is cut short, or was changed");
  if (digest_of(body) != *digest) refuse(path, "its digest differs: it was changed");
  return body;
}

RangeList write_synced(const std::string& checkpoint, const std::string& name,
                       std::string_view text) {
  const io::File file = io::File::create(joined(checkpoint, "/", name));
  file.write_at(0, std::as_bytes(std::span(text.data(), text.size())));
  file.sync();
  return {name, static_cast<int64_t>(text.size()), digest_of(text)};
}

bool is_of_manifest(std::string_view name) {
  return name == kManifestFile || (name.starts_with("manifest-") && name.ends_with(".json"));
}

/// Adds the files of `checkpoint`/`below` ("", "a/", "a/b/", ...).
void collect_files(const std::string& checkpoint, const std::string& below,
                   std::vector<FileBytes>& files, std::vector<std::string>* directories) {
  const std::string directory =
      below.empty() ? checkpoint : joined(checkpoint, "/", below.substr(0, below.size() - 1));
  for (const std::string& name : names_in(directory)) {
    const std::string path = joined(directory, "/", name);
    struct stat status;
    if (::lstat(path.c_str(), &status) != 0) {
      throw HostResourceError(
          cat("[checkpoint] ", path, ": ", std::generic_category().message(errno)));
    }
    if (S_ISDIR(status.st_mode)) {
      collect_files(checkpoint, joined(below, name, "/"), files, directories);
    } else if (!below.empty() || !is_of_manifest(name)) {
      files.push_back({below + name, S_ISREG(status.st_mode) ? status.st_size : 0});
    }
  }
  if (directories != nullptr) directories->push_back(directory);
}

}  // namespace

int64_t Manifest::file_bytes() const {
  int64_t bytes = 0;
  for (const FileBytes& file : files) bytes += file.bytes;
  return bytes;
}

std::string list_file_name(int64_t rank, int64_t world_size) {
  std::array<char, 64> text;
  std::snprintf(text.data(), text.size(), "manifest-%05lld-of-%05lld.json",
                static_cast<long long>(rank + 1), static_cast<long long>(world_size));
  return text.data();
}

std::string manifest_text(const Manifest& manifest) {
  std::string text =
      joined("{\n\"format\": ", io::json_quote(kFormat), ",\n\"version\": ", kManifestVersion,
             ",\n\"step\": ", manifest.step, ",\n\"world_size\": ", manifest.world_size,
             ",\n\"time\": ", io::json_quote(manifest.time),
             ",\n\"strategy\": ", io::json_quote(manifest.strategy),
             ",\n\"digest\": \"XXH3-128\",\n\"files\": [");
  const char* separator = "\n";
  for (const FileBytes& file : manifest.files) {
    text += joined(separator, "{\"file\": ", io::json_quote(file.file), ", \"bytes\": ", file.bytes,
                   "}");
    separator = ",\n";
  }
  text += "],\n\"lists\": [";
  separator = "\n";
  for (const RangeList& list : manifest.lists) {
    text += joined(separator, "{\"file\": ", io::json_quote(list.file), ", \"bytes\": ", list.bytes,
                   ", \"digest\": \"", list.digest.hex(), "\"}");
    separator = ",\n";
  }
  text += joined("],\n\"details\": ", manifest.details.dump(2));
  return joined(text, kBeforeDigest, digest_of(text).hex(), kAfterDigest);
}

Manifest parse_manifest(std::string_view text, const std::string& path) {
  const std::string_view body = text_before_digest(text, path);
  return parsing(path, [&] {
    const Json document = Json::parse(joined(body, "}"), "JSON");
    if (document["format"].as_string() != kFormat)
      refuse(path, "it is no manifest of a checkpoint");
    if (document["version"].as_int() != kManifestVersion) {
      refuse(path, cat("format version ", document["version"].as_int(), ", this program reads ",
                       kManifestVersion));
    }
    Manifest manifest;
    manifest.step = size_of(document["step"], path);
    manifest.world_size = size_of(document["world_size"], path);
    if (manifest.world_size < 1 || manifest.world_size > kMaxWorldSize)
      refuse(path, cat("written by ", manifest.world_size, " ranks"));
    manifest.time = document["time"].as_string();
    manifest.strategy = document["strategy"].as_string();
    manifest.files = parse_files(document["files"], path);
    manifest.lists = parse_lists(document["lists"], manifest.world_size, path);
    manifest.details = document["details"];
    return manifest;
  });
}

std::string list_text(std::span<const WrittenRange> ranges) {
  std::string text = "{\"ranges\": [";
  const char* separator = "\n";
  for (const WrittenRange& range : ranges) {
    text += joined(separator, "[", io::json_quote(range.file), ", ", io::json_quote(range.tensor),
                   ", ", range.begin, ", ", range.bytes, ", \"", range.digest.hex(), "\"]");
    separator = ",\n";
  }
  return text + "\n]}\n";
}

std::vector<WrittenRange> parse_list(std::string_view text, const std::string& path) {
  return parsing(path, [&] {
    const Json document = Json::parse(text, "JSON");
    std::vector<WrittenRange> ranges;
    for (const Json& entry : document["ranges"].elements()) {
      if (entry.size() != 5) refuse(path, "a range has not 5 members");
      ranges.push_back({name_of(entry[0], path), entry[1].as_string(), size_of(entry[2], path),
                        size_of(entry[3], path), digest_from(entry[4], path)});
      const WrittenRange& range = ranges.back();
      checked_add<ModelError>(range.begin, range.bytes, path);
      if (range.bytes == 0) refuse(path, "an empty range");
    }
    return ranges;
  });
}

RangeList write_list(const std::string& checkpoint, int64_t rank, int64_t world_size,
                     std::span<const WrittenRange> ranges) {
  return write_synced(checkpoint, list_file_name(rank, world_size), list_text(ranges));
}

void write_manifest(const std::string& checkpoint, const Manifest& manifest) {
  write_synced(checkpoint, std::string(kManifestFile), manifest_text(manifest));
}

Manifest read_manifest(const std::string& checkpoint) {
  const std::string path = joined(checkpoint, "/", kManifestFile);
  return parse_manifest(io::read_text(path, kMaxManifestBytes), path);
}

std::vector<WrittenRange> read_list(const std::string& checkpoint, const RangeList& list) {
  const std::string path = joined(checkpoint, "/", list.file);
  const std::string text = io::read_text(path, kMaxListBytes);
  if (static_cast<int64_t>(text.size()) != list.bytes)
    refuse(path, cat(text.size(), " bytes, expected ", list.bytes));
  if (digest_of(text) != list.digest) refuse(path, "its digest differs: it was changed");
  return parse_list(text, path);
}

std::vector<FileBytes> files_below(const std::string& checkpoint,
                                   std::vector<std::string>* directories) {
  std::vector<FileBytes> files;
  collect_files(checkpoint, "", files, directories);
  std::sort(files.begin(), files.end(),
            [](const FileBytes& a, const FileBytes& b) { return a.file < b.file; });
  return files;
}

}  // namespace fsdp::checkpoint
