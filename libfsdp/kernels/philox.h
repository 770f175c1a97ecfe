// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC11):
// random numbers as a function of a key and a counter, without state. The same words on every
// device.
//
// C++17 and free of other headers of ours but one: nvcc reads it too.
#pragma once

#include <cstdint>

#include "libfsdp/kernels/element_math.h"

namespace fsdp::kernels {

constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53U;
constexpr uint32_t kPhiloxMultiplier1 = 0xCD9E8D57U;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9U;
constexpr uint32_t kPhiloxWeyl1 = 0xBB67AE85U;
constexpr int kPhiloxRounds = 10;

/// The counter before, the random words after the rounds.
struct PhiloxWords {
  uint32_t word[4];
};

FSDP_HD void philox_round(PhiloxWords& x, uint32_t key0, uint32_t key1) {
  const uint64_t product0 = uint64_t{kPhiloxMultiplier0} * x.word[0];
  const uint64_t product1 = uint64_t{kPhiloxMultiplier1} * x.word[2];
  x.word[0] = static_cast<uint32_t>(product1 >> 32) ^ x.word[1] ^ key0;
  x.word[1] = static_cast<uint32_t>(product1);
  x.word[2] = static_cast<uint32_t>(product0 >> 32) ^ x.word[3] ^ key1;
  x.word[3] = static_cast<uint32_t>(product0);
}

/// 128 random bits for (key, counter).
FSDP_HD PhiloxWords philox4x32(PhiloxWords counter, uint64_t key) {
  auto key0 = static_cast<uint32_t>(key);
  auto key1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    philox_round(counter, key0, key1);
    key0 += kPhiloxWeyl0;
    key1 += kPhiloxWeyl1;
  }
  return counter;
}

/// The same with a counter of two 64-bit numbers, the low words first.
FSDP_HD PhiloxWords philox4x32(uint64_t low, uint64_t high, uint64_t key) {
  return philox4x32(PhiloxWords{{static_cast<uint32_t>(low), static_cast<uint32_t>(low >> 32),
                                 static_cast<uint32_t>(high), static_cast<uint32_t>(high >> 32)}},
                    key);
}

}  // namespace fsdp::kernels
