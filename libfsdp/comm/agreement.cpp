#include "libfsdp/comm/agreement.h"

#include "libfsdp/base/error.h"

namespace fsdp::comm {
namespace {

std::string describe(const Posted& posted, const UnitName& unit_name) {
  const std::string_view name =
      posted.tag.unit >= 0 && unit_name ? unit_name(posted.tag.unit) : std::string_view();
  return cat(describe(posted.tag, name), " in the group ", group_text(posted.group));
}

bool same(const Posted& a, const Posted& b) {
  return a.sequence == b.sequence && a.group == b.group && a.offset == b.offset &&
         a.memory == b.memory && a.tag == b.tag;
}

}  // namespace

uint64_t group_key(const Group& group) {
  uint64_t mask = 0;
  uint64_t hash = 14695981039346656037ULL;
  for (const int member : group) {
    if (member < 64) mask |= uint64_t{1} << member;
    hash = (hash ^ static_cast<uint64_t>(member)) * 1099511628211ULL;
  }
  return !group.empty() && group.back() < 64 ? mask : hash;
}

std::string group_text(uint64_t key) {
  std::string text;
  for (int member = 0; member < 64; ++member) {
    if ((key >> member & 1) != 0) text += cat(text.empty() ? "" : ",", member);
  }
  return cat("{", text, "}");
}

std::string difference(int rank, const Posted& mine, int member, const Posted& theirs,
                       const UnitName& unit_name) {
  if (same(mine, theirs)) return {};
  std::string text =
      cat("[comm] ranks ", rank, " and ", member, " began different collectives at place ",
          mine.sequence, ": rank ", rank, " began ", describe(mine, unit_name), ", rank ", member,
          " began ", describe(theirs, unit_name));
  if (mine.tag == theirs.tag && mine.group == theirs.group) {
    text +=
        cat(" (sources: allocation ", mine.memory, " offset ", mine.offset, " against allocation ",
            theirs.memory, " offset ", theirs.offset, ", place ", theirs.sequence, ")");
  }
  return text + ". Hint: every rank must begin the same collectives in the same order.";
}

void throw_if_no_memory(const std::vector<std::string_view>& errors, size_t bytes,
                        std::string_view label) {
  std::string failed;
  for (size_t rank = 0; rank < errors.size(); ++rank) {
    if (!errors[rank].empty()) failed += cat("\n  rank ", rank, ": ", errors[rank]);
  }
  if (failed.empty()) return;
  throw HostResourceError(
      cat("[comm] no memory for '", label, "', ", bytes, " bytes for each of ", errors.size(),
          " ranks:", failed,
          "\n  Hint: the memory limit of the host or container is too small for this plan."));
}

}  // namespace fsdp::comm
