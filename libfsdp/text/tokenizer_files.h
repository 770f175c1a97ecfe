// The files of a tokenizer on disk.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

namespace fsdp::text {

/// One file that belongs to a tokenizer; kept as a text when it has no path.
struct TokenizerFile {
  std::string name;
  std::filesystem::path path;  ///< where it was read; empty for a text in memory
  std::string text;
};

/// The whole file, or an empty string when there is none. Throws ModelError when it is not a
/// regular file, is larger than 1 GiB, or cannot be read.
std::string read_tokenizer_file(const std::filesystem::path& path);

/// The files in `directory` that make up its tokenizer, named but not read.
std::vector<TokenizerFile> list_tokenizer_files(const std::filesystem::path& directory);

/// Writes `file` into `directory` through a file beside it and a rename. Throws HostResourceError.
void write_tokenizer_file(const TokenizerFile& file, const std::filesystem::path& directory);

}  // namespace fsdp::text
