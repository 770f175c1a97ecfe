// Bytes of small GGUF files, right or wrong on purpose.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

namespace fsdp::io {

/// Little-endian bytes of numbers and length-prefixed text, one after the other.
class GgufBytes {
 public:
  template <class T>
  GgufBytes& number(T value) {
    bytes_.append(reinterpret_cast<const char*>(&value), sizeof value);
    return *this;
  }
  GgufBytes& raw(std::string_view bytes) {
    bytes_ += bytes;
    return *this;
  }
  GgufBytes& text(std::string_view value) { return number<uint64_t>(value.size()).raw(value); }
  GgufBytes& text_key(std::string_view key, std::string_view value) {
    return text(key).number<uint32_t>(8).text(value);
  }
  GgufBytes& uint_key(std::string_view key, uint32_t value) {
    return text(key).number<uint32_t>(4).number(value);
  }
  GgufBytes& float_key(std::string_view key, float value) {
    return text(key).number<uint32_t>(6).number(value);
  }
  /// Magic, version, and the two counts.
  GgufBytes& header(uint64_t num_tensors, uint64_t num_keys, uint32_t version = 3) {
    return raw("GGUF").number(version).number(num_tensors).number(num_keys);
  }
  /// A tensor's entry; dims innermost first, as the file has them.
  GgufBytes& tensor(std::string_view name, const std::vector<uint64_t>& dims, uint32_t type,
                    uint64_t offset) {
    text(name).number(static_cast<uint32_t>(dims.size()));
    for (const uint64_t dim : dims) number(dim);
    return number(type).number(offset);
  }
  GgufBytes& pad(size_t alignment = 32) {
    bytes_.resize((bytes_.size() + alignment - 1) / alignment * alignment, '\0');
    return *this;
  }
  const std::string& str() const { return bytes_; }

 private:
  std::string bytes_;
};

}  // namespace fsdp::io
