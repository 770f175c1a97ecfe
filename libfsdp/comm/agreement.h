// What ranks must agree on, and the texts when they do not; the same on every transport.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "libfsdp/comm/communicator.h"
#include "libfsdp/comm/control/control.h"

namespace fsdp::comm {

/// Bit mask of the members up to rank 63, beyond that a hash.
uint64_t group_key(const Group& group);
/// "{0,3}"
std::string group_text(uint64_t key);

/// Name of a unit of the plan, for people; empty when it is not known.
using UnitName = std::function<std::string_view(int32_t)>;

/// Empty if both ranks have begun the same collective on equal sources, else the error's text,
/// which names both. Costs nothing if they have.
std::string difference(int rank, const Posted& mine, int member, const Posted& theirs,
                       const UnitName& unit_name = {});

/// Throws HostResourceError if a rank has an error; `errors` holds one text a rank, empty = none.
void throw_if_no_memory(const std::vector<std::string_view>& errors, size_t bytes,
                        std::string_view label);

}  // namespace fsdp::comm
