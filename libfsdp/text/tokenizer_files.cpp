#include "libfsdp/text/tokenizer_files.h"

#include <fcntl.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <fstream>

#include "libfsdp/base/error.h"

namespace fsdp::text {
namespace {

namespace fs = std::filesystem;

constexpr uintmax_t kMaxFileBytes = uintmax_t{1} << 30;

constexpr std::array<const char*, 9> kFileNames = {"tokenizer.json",
                                                   "tokenizer_config.json",
                                                   "special_tokens_map.json",
                                                   "chat_template.jinja",
                                                   "chat_template.json",
                                                   "added_tokens.json",
                                                   "vocab.json",
                                                   "merges.txt",
                                                   "tokenizer.model"};

[[noreturn]] void fail_to_write(const fs::path& path) {
  throw HostResourceError(
      cat("[tokenizer] cannot write ", path.string(), ": ", std::strerror(errno), "."));
}

void write_all(const fs::path& path, std::string_view text) {
  const int fd = ::open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
  if (fd < 0) fail_to_write(path);
  bool good = true;
  while (good && !text.empty()) {
    const ssize_t n = ::write(fd, text.data(), text.size());
    if (n < 0 && errno == EINTR) continue;
    good = n >= 0;
    if (good) text.remove_prefix(static_cast<size_t>(n));
  }
  good = good && ::fsync(fd) == 0;
  const int error = errno;
  good = ::close(fd) == 0 && good;
  if (!good) {
    if (error != 0) errno = error;
    ::unlink(path.c_str());
    fail_to_write(path);
  }
}

}  // namespace

std::string read_tokenizer_file(const fs::path& path) {
  std::error_code error;
  const auto status = fs::status(path, error);
  if (!fs::exists(status)) return "";
  if (!fs::is_regular_file(status))
    throw ModelError(cat("[tokenizer] ", path.string(), " is not a regular file."));
  const auto bytes = fs::file_size(path, error);
  if (error)
    throw ModelError(cat("[tokenizer] cannot read ", path.string(), ": ", error.message(), "."));
  if (bytes > kMaxFileBytes) {
    throw ModelError(cat("[tokenizer] ", path.string(), " has ", bytes, " bytes; the limit is ",
                         kMaxFileBytes, "."));
  }
  std::string text(static_cast<size_t>(bytes), '\0');
  std::ifstream in(path, std::ios::binary);
  in.read(text.data(), static_cast<std::streamsize>(text.size()));
  if (!in) throw ModelError(cat("[tokenizer] cannot read ", path.string(), "."));
  return text;
}

std::vector<TokenizerFile> list_tokenizer_files(const fs::path& directory) {
  std::vector<TokenizerFile> files;
  const auto add = [&](const std::string& name) {
    std::error_code error;
    if (fs::is_regular_file(directory / name, error))
      files.push_back({name, fs::absolute(directory / name), ""});
  };
  for (const char* name : kFileNames) add(name);
  std::error_code error;
  for (const auto& entry : fs::directory_iterator(directory / "additional_chat_templates", error)) {
    if (entry.path().extension() == ".jinja")
      add("additional_chat_templates/" + entry.path().filename().string());
  }
  return files;
}

void write_tokenizer_file(const TokenizerFile& file, const fs::path& directory) {
  const fs::path target = directory / file.name;
  std::error_code error;
  if (!file.path.empty() && fs::equivalent(file.path, target, error)) return;
  const std::string text = file.path.empty() ? file.text : read_tokenizer_file(file.path);
  if (!file.path.empty() && text.empty() && !fs::exists(file.path)) {
    throw ModelError(
        cat("[tokenizer] ", file.path.string(), " has gone since the tokenizer was read."));
  }
  if (fs::path(file.name).has_parent_path()) fs::create_directories(target.parent_path(), error);
  const fs::path aside = cat(target.string(), ".", ::getpid(), ".tmp");
  write_all(aside, text);
  if (::rename(aside.c_str(), target.c_str()) != 0) {
    ::unlink(aside.c_str());
    fail_to_write(target);
  }
}

}  // namespace fsdp::text
