// The directory of a zip archive whose entries are stored, not compressed: what torch.save writes.
#pragma once

#include <cstdint>
#include <map>
#include <string>

#include "libfsdp/io/file.h"

namespace fsdp::io {

/// Bytes [at, at + bytes) of the file are the entry's contents.
struct ZipEntry {
  int64_t at = 0;
  int64_t bytes = 0;
};

/// Entries by name, of the archive that is bytes [at, at + bytes) of the file; also with 64-bit
/// sizes. The contents are not read, so a huge entry costs nothing.
/// Throws: ModelError for anything that torch.save does not write: compressed or encrypted entries,
/// a repeated, empty, absolute or upward (`..`) name, entries that overlap or reach outside, more
/// than a million of them.
std::map<std::string, ZipEntry> read_zip(const File& file, int64_t at, int64_t bytes);

}  // namespace fsdp::io
