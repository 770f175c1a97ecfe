#include "libfsdp/io/jsonl.h"

#include <algorithm>
#include <array>

#include "libfsdp/base/error.h"

namespace fsdp::io {
namespace {

constexpr int64_t kBlockBytes = 1 << 20;
constexpr std::string_view kByteOrderMark = "\xef\xbb\xbf";

File open_data(const std::string& path) {
  try {
    return File::open_read(path);
  } catch (const ModelError& error) {
    throw DataError(error.what());
  }
}

/// Bytes of the well-formed character that starts at text[0]; 0 when there is none.
size_t character_bytes(std::string_view text) {
  const auto byte = [&](size_t i) {
    return i < text.size() ? static_cast<unsigned char>(text[i]) : 0U;
  };
  const auto continues = [&](size_t i) { return (byte(i) & 0xC0U) == 0x80U; };
  const unsigned lead = byte(0);
  if (lead < 0x80) return 1;
  if (lead >= 0xC2 && lead <= 0xDF) return continues(1) ? 2 : 0;
  if (lead >= 0xE0 && lead <= 0xEF) {
    const unsigned low = lead == 0xE0 ? 0xA0 : 0x80, high = lead == 0xED ? 0x9F : 0xBF;
    return byte(1) >= low && byte(1) <= high && continues(2) ? 3 : 0;
  }
  if (lead >= 0xF0 && lead <= 0xF4) {
    const unsigned low = lead == 0xF0 ? 0x90 : 0x80, high = lead == 0xF4 ? 0x8F : 0xBF;
    return byte(1) >= low && byte(1) <= high && continues(2) && continues(3) ? 4 : 0;
  }
  return 0;
}

}  // namespace

bool is_utf8(std::string_view text) {
  while (!text.empty()) {
    const size_t bytes = character_bytes(text);
    if (bytes == 0) return false;
    text.remove_prefix(bytes);
  }
  return true;
}

LineReader::LineReader(const std::string& path, int64_t max_line_bytes)
    : file_(open_data(path)), max_line_bytes_(max_line_bytes), file_bytes_(file_.size()) {}

std::string LineReader::where() const { return cat(file_.path(), ":", line_number_); }

void LineReader::fail(std::string_view reason) const {
  throw DataError(cat(where(), ": ", reason));
}

/// Reads the next block behind what is left; false at the end of the file.
bool LineReader::fill() {
  const int64_t bytes = std::min(kBlockBytes, file_bytes_ - read_bytes_);
  if (bytes <= 0) return false;
  buffer_.erase(0, begin_);
  scanned_ -= begin_;
  begin_ = 0;
  const size_t kept = buffer_.size();
  buffer_.resize(kept + static_cast<size_t>(bytes));
  try {
    file_.read_at(read_bytes_, std::as_writable_bytes(
                                   std::span(buffer_.data() + kept, static_cast<size_t>(bytes))));
  } catch (const ModelError& error) {
    throw DataError(error.what());
  }
  read_bytes_ += bytes;
  return true;
}

/// The next line without its end, blank or not.
bool LineReader::take_line(std::string_view& line) {
  ++line_number_;
  for (;;) {
    const size_t end = buffer_.find('\n', scanned_);
    const size_t line_end = std::min(end, buffer_.size());
    if (static_cast<int64_t>(line_end - begin_) > max_line_bytes_) {
      fail(cat("the line is longer than ", max_line_bytes_, " bytes"));
    }
    if (end != std::string::npos) {
      line = std::string_view(buffer_).substr(begin_, end - begin_);
      begin_ = scanned_ = end + 1;
      return true;
    }
    scanned_ = buffer_.size();
    if (fill()) continue;
    line = std::string_view(buffer_).substr(begin_);
    begin_ = scanned_ = buffer_.size();
    return !line.empty();
  }
}

bool LineReader::next(std::string_view& line) {
  while (take_line(line)) {
    if (line_number_ == 1 && line.starts_with(kByteOrderMark))
      line.remove_prefix(kByteOrderMark.size());
    if (line.ends_with('\r')) line.remove_suffix(1);
    if (line.find_first_not_of(" \t\r\v\f") == std::string_view::npos) continue;
    if (line.find('\0') != std::string_view::npos) fail("a NUL byte in text");
    if (!is_utf8(line)) fail("the text is not UTF-8. Hint: convert the file with iconv.");
    return true;
  }
  return false;
}

bool JsonlReader::next(Json& record) {
  std::string_view line;
  if (!lines_.next(line)) return false;
  try {
    record = Json::parse(line, where());
  } catch (const JsonError& error) {
    throw DataError(error.what());
  }
  if (!record.is_object())
    throw DataError(cat(where(), ": expected a JSON object, as {\"text\": \"...\"}"));
  return true;
}

}  // namespace fsdp::io
