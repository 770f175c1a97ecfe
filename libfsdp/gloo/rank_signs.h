// Ranks' signs of life as text for people.
#pragma once

#include <string>
#include <vector>

#include "libfsdp/comm/control/control_hub.h"

namespace fsdp::gloo {

/// What `member`, whom `rank` missed, was doing, continuing a sentence; and on lines of their own
/// what the ranks besides those two were doing. `signs` by rank, `unit_names` by unit.
std::string describe_signs(const std::vector<comm::SignOfLife>& signs,
                           const std::vector<std::string>& unit_names, int member, int rank);

}  // namespace fsdp::gloo
