#include "libfsdp/comm/communicator.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "libfsdp/base/error.h"
#include "libfsdp/kernels/compute.h"

namespace fsdp::comm {
namespace {

const char* kind_name(CollectiveKind kind) {
  switch (kind) {
    case CollectiveKind::kGather:
      return "gather";
    case CollectiveKind::kFold:
      return "fold";
    case CollectiveKind::kExchange:
      return "exchange";
    case CollectiveKind::kBroadcast:
      return "broadcast";
    case CollectiveKind::kBarrier:
      return "barrier";
    case CollectiveKind::kAllocate:
      return "allocation";
    case CollectiveKind::kFence:
      return "fence";
    case CollectiveKind::kAllocateShared:
      return "shared allocation";
  }
  return "collective";
}

}  // namespace

Tag make_tag(std::string_view what, int64_t step, int32_t unit) {
  Tag tag;
  tag.step = step;
  tag.unit = unit;
  std::memcpy(tag.what, what.data(), std::min(what.size(), sizeof(tag.what) - 1));
  return tag;
}

std::string unit_text(int32_t unit, std::string_view name) {
  return name.empty() ? cat("unit ", unit) : cat("unit '", name, "'");
}

std::string describe_briefly(const Tag& tag, std::string_view unit_name) {
  const bool kind_tells = tag.what[0] == '\0' || tag.kind == CollectiveKind::kBarrier ||
                          tag.kind == CollectiveKind::kAllocate;
  std::string text = kind_tells ? kind_name(tag.kind) : tag.what;
  if (kind_tells && tag.what[0] != '\0') text += cat(" '", tag.what, "'");
  if (tag.unit >= 0) text += cat(" of ", unit_text(tag.unit, unit_name));
  return text;
}

std::string describe(const Tag& tag, std::string_view unit_name) {
  std::string text = kind_name(tag.kind);
  if (tag.what[0] != '\0' && text != tag.what) text += cat(" '", tag.what, "'");
  if (tag.unit >= 0) text += cat(" of ", unit_text(tag.unit, unit_name));
  if (tag.step >= 0) text += cat(" at step ", tag.step);
  if (tag.kind == CollectiveKind::kBarrier || tag.kind == CollectiveKind::kFence) return text;
  const bool typed = tag.kind == CollectiveKind::kFold;
  return text + cat(" (", typed ? cat(dtype_name(tag.dtype), ", ") : "", tag.bytes, " bytes)");
}

kernels::Compute& Communicator::compute() { return kernels::host_compute(); }

int64_t Communicator::sum(int64_t value, std::string_view what) {
  int64_t total = 0;
  for_each_value(value, what, [&](int64_t one) { total += one; });
  return total;
}

int64_t Communicator::maximum(int64_t value, std::string_view what) {
  int64_t largest = value;
  for_each_value(value, what, [&](int64_t one) { largest = std::max(largest, one); });
  return largest;
}

template <class Use>
void Communicator::for_each_value(int64_t value, std::string_view what, Use use) {
  std::array<int64_t, 128> few;  // No heap in the usual case: the engine counts allocations.
  std::vector<int64_t> many;
  int64_t* values = few.data();
  if (static_cast<size_t>(size()) > few.size()) {
    many.resize(size());
    values = many.data();
  }
  exchange(&value, sizeof(value), values, make_tag(what));
  for (int rank = 0; rank < size(); ++rank) use(values[rank]);
}

}  // namespace fsdp::comm
