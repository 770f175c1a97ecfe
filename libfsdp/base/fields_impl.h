// Shared by the sources of fields; not part of the interface.
#pragma once

#include <string>
#include <string_view>

#include "libfsdp/base/fields.h"

namespace fsdp::detail {

/// "--lerning_rate (run.yaml:3) is not an option of 'finetune train'. Did you mean
/// --learning_rate?"
std::string unknown_option(const FieldList& fields, std::string_view name, std::string_view origin,
                           std::string_view program);

}  // namespace fsdp::detail
