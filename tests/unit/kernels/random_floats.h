// Floats of all kinds for kernel tests, from a seed.
#pragma once

#include <bit>
#include <cstdint>
#include <cstdlib>
#include <random>
#include <string_view>
#include <vector>

namespace fsdp::kernels {

/// Whether FSDP_TEST_SCALE=long asks for exhaustive tests.
inline bool test_everything() {
  const char* scale = std::getenv("FSDP_TEST_SCALE");
  return scale != nullptr && std::string_view(scale) == "long";
}

/// n finite floats: mostly of everyday size, some tiny, huge, zero or subnormal.
inline std::vector<float> random_floats(int64_t n, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<size_t>(n));
  for (float& value : values) {
    value = normal(random);
    switch (random() % 16) {
      case 0:
        value *= 1e-20F;
        break;
      case 1:
        value *= 1e6F;
        break;
      case 2:
        value = 0;
        break;
      case 3:
        value *= 1e-42F;
        break;
      default:
        break;
    }
  }
  return values;
}

inline std::vector<uint32_t> bits_of(const std::vector<float>& values) {
  std::vector<uint32_t> bits;
  for (const float value : values) bits.push_back(std::bit_cast<uint32_t>(value));
  return bits;
}

}  // namespace fsdp::kernels
