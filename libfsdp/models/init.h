// Random weights for new models: pure functions of (seed, name, place), so any shard can be filled
// on its own.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>

namespace fsdp::models {

/// Elements [begin, begin + out.size()) of the flat parameter `name`: ones for norms, zeros for
/// biases, else normal with mean 0 and deviation `std_dev`. The same numbers however a parameter is
/// cut.
void random_init(std::string_view name, int64_t begin, std::span<float> out, uint64_t seed,
                 double std_dev = 0.02);

}  // namespace fsdp::models
