#include "libfsdp/lora/name_match.h"

#include <algorithm>

#include "libfsdp/base/error.h"
#include "libfsdp/text/tokenizer_regex.h"

namespace fsdp::lora {

bool matches_whole(std::string_view pattern, std::string_view name) {
  return text::Regex(cat("\\A(?:", pattern, ")\\z")).find(name, 0).has_value();
}

bool names_one(const std::vector<std::string>& keys, std::string_view name) {
  return std::any_of(keys.begin(), keys.end(), [&](const std::string& key) {
    if (name == key) return true;
    return name.size() > key.size() + 1 && name.ends_with(key) &&
           name[name.size() - key.size() - 1] == '.';
  });
}

}  // namespace fsdp::lora
