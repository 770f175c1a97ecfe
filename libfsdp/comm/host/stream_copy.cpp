#include "libfsdp/comm/host/stream_copy.h"

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace fsdp::comm {

#if defined(__SSE2__)
void stream_copy(std::byte* destination, const std::byte* source, size_t bytes) {
  constexpr size_t kLine = 64;
  const size_t head = (kLine - reinterpret_cast<uintptr_t>(destination) % kLine) % kLine;
  if (bytes < head + kLine) {
    std::memcpy(destination, source, bytes);
    return;
  }
  std::memcpy(destination, source, head);
  size_t at = head;
  for (; at + kLine <= bytes; at += kLine) {
    __m128i line[4];
    std::memcpy(line, source + at, kLine);
    for (int i = 0; i < 4; ++i)
      _mm_stream_si128(reinterpret_cast<__m128i*>(destination + at) + i, line[i]);
  }
  _mm_sfence();  // Streamed stores are ordered by this alone, and peers may be told right after.
  std::memcpy(destination + at, source + at, bytes - at);
}
#else
void stream_copy(std::byte* destination, const std::byte* source, size_t bytes) {
  std::memcpy(destination, source, bytes);
}
#endif

}  // namespace fsdp::comm
