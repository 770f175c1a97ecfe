// Text files with one record a line, read as a stream.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "libfsdp/io/file.h"
#include "libfsdp/io/json.h"

namespace fsdp::io {

/// Is `text` well-formed UTF-8 (no overlong forms, surrogates or values above U+10FFFF)? Cost: one
/// pass.
bool is_utf8(std::string_view text);

/// Lines of a UTF-8 file, one at a time; memory is one line and one block.
///
/// A byte order mark at the start and a CR before the line end are taken off; blank lines are
/// skipped but counted; the last line needs no end.
class LineReader {
 public:
  static constexpr int64_t kDefaultMaxLineBytes = 64 << 20;

  /// Throws: DataError when the file cannot be opened.
  explicit LineReader(const std::string& path, int64_t max_line_bytes = kDefaultMaxLineBytes);

  /// The next line that is not blank into `line`; false at the end.
  /// Throws: DataError "path:line: reason" for bad UTF-8, a NUL byte, a line above the limit, or a
  /// failed read.
  bool next(std::string_view& line);

  /// Number of the line that next() gave, from 1; `path:number` for messages.
  int64_t line_number() const { return line_number_; }
  std::string where() const;

 private:
  bool take_line(std::string_view& line);
  bool fill();
  [[noreturn]] void fail(std::string_view reason) const;

  File file_;
  int64_t max_line_bytes_;
  int64_t file_bytes_ = 0;
  int64_t read_bytes_ = 0;
  int64_t line_number_ = 0;
  std::string buffer_;
  size_t begin_ = 0;    // Of what is not handed out yet.
  size_t scanned_ = 0;  // No line end lies between begin_ and here.
};

/// One JSON object a line.
class JsonlReader {
 public:
  explicit JsonlReader(const std::string& path,
                       int64_t max_line_bytes = LineReader::kDefaultMaxLineBytes)
      : lines_(path, max_line_bytes) {}

  /// The next record; false at the end. Throws: DataError "path:line: reason", also when the line
  /// is no JSON object.
  bool next(Json& record);

  int64_t line_number() const { return lines_.line_number(); }
  std::string where() const { return lines_.where(); }

 private:
  LineReader lines_;
};

}  // namespace fsdp::io
