// A range of mapped memory that is unmapped with its last owner.
#pragma once

#include <cstddef>
#include <memory>
#include <string_view>

#include "libfsdp/base/error.h"

namespace fsdp::comm {

/// Owns one mmap. Writable pages are made present when it is created, so that no later touch pays
/// for a page fault.
class Mapping {
 public:
  /// Private memory of this process. Throws HostResourceError.
  static std::shared_ptr<Mapping> anonymous(size_t bytes);
  /// The memory behind `fd`, which must have `bytes` bytes. Does not close fd. Throws
  /// HostResourceError.
  static std::shared_ptr<Mapping> of_file(int fd, size_t bytes, bool writable);

  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  ~Mapping();

  std::byte* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  /// In a view of a file that is only read: its pages in [offset, offset + bytes) no longer count
  /// as this process's, until it reads them again (0.1 ms a MiB). Nothing in other mappings.
  void forget(size_t offset, size_t bytes) const;

 private:
  Mapping(std::byte* data, size_t bytes, bool view) : data_(data), bytes_(bytes), view_(view) {}
  std::byte* data_;
  size_t bytes_;
  bool view_;  // Read-only pages of a file.
};

/// bytes rounded up to whole pages, at least one page.
size_t whole_pages(size_t bytes);

/// An unnamed memory file of `bytes` bytes with all its pages reserved now; close-on-exec.
///
/// It is no file of any directory: nothing is left behind however the processes end.
/// Throws HostResourceError when the host, or the memory limit of this container, cannot give that
/// much.
int make_memory_file(std::string_view label, size_t bytes);

}  // namespace fsdp::comm
