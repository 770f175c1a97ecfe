// How names of modules are chosen, as PEFT does it.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace fsdp::lora {

/// Whether the regular expression fits all of `name`.
bool matches_whole(std::string_view pattern, std::string_view name);
/// Whether `name` is one of `keys`, or ends with "." and one of them.
bool names_one(const std::vector<std::string>& keys, std::string_view name);

}  // namespace fsdp::lora
