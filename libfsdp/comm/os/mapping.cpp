#include "libfsdp/comm/os/mapping.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/sysinfo.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <string>

namespace fsdp::comm {
namespace {

constexpr size_t kPage = 4096;

[[noreturn]] void fail(std::string_view what, size_t bytes, int error) {
  throw HostResourceError(
      cat("[comm] cannot ", what, " ", bytes, " bytes of memory: ", strerror(error)));
}

size_t host_memory() {
  struct sysinfo info {};
  if (sysinfo(&info) != 0) return SIZE_MAX;
  return (info.totalram + info.totalswap) * static_cast<size_t>(info.mem_unit);
}

}  // namespace

size_t whole_pages(size_t bytes) {
  if (bytes == 0) return kPage;
  if (bytes > SIZE_MAX - kPage) fail("round up", bytes, EOVERFLOW);
  return (bytes + kPage - 1) / kPage * kPage;
}

std::shared_ptr<Mapping> Mapping::anonymous(size_t bytes) {
  bytes = whole_pages(bytes);
  if (bytes > host_memory()) fail("map", bytes, ENOMEM);
  void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
  if (data == MAP_FAILED) fail("map", bytes, errno);
  return std::shared_ptr<Mapping>(new Mapping(static_cast<std::byte*>(data), bytes, false));
}

std::shared_ptr<Mapping> Mapping::of_file(int fd, size_t bytes, bool writable) {
  bytes = whole_pages(bytes);
  const int protection = writable ? PROT_READ | PROT_WRITE : PROT_READ;
  // The pages exist (make_memory_file); those of a peer are mapped when they are first read,
  // because a rank reads only its part of most of them.
  void* data = mmap(nullptr, bytes, protection, MAP_SHARED | (writable ? MAP_POPULATE : 0), fd, 0);
  if (data == MAP_FAILED) fail("map", bytes, errno);
  return std::shared_ptr<Mapping>(new Mapping(static_cast<std::byte*>(data), bytes, !writable));
}

Mapping::~Mapping() { munmap(data_, bytes_); }

void Mapping::forget(size_t offset, size_t bytes) const {
  if (!view_ || offset >= bytes_) return;
  const size_t begin = offset / kPage * kPage, end = std::min(bytes_, offset + bytes);
  madvise(data_ + begin, end - begin, MADV_DONTNEED);
}

int make_memory_file(std::string_view label, size_t bytes) {
  bytes = whole_pages(bytes);
  const int fd = memfd_create(cat("fsdp:", label.substr(0, 100)).c_str(), MFD_CLOEXEC);
  if (fd < 0) fail("make a memory file of", bytes, errno);
  // ftruncate refuses what exceeds the machine before a single page is taken; posix_fallocate then
  // takes the pages, so that running out of memory is an error here and not a SIGBUS in the middle
  // of training.
  int error = bytes > host_memory() ? ENOMEM : 0;
  if (error == 0 && ftruncate(fd, static_cast<off_t>(bytes)) != 0) error = errno;
  while (error == 0) {
    error = posix_fallocate(fd, 0, static_cast<off_t>(bytes));
    if (error != EINTR) break;
    error = 0;
  }
  if (error != 0) {
    close(fd);
    fail("reserve", bytes, error);
  }
  return fd;
}

}  // namespace fsdp::comm
