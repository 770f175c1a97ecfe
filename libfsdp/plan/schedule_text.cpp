// What a schedule looks like to people, and its fingerprint for comparing ranks.
#include <algorithm>
#include <iomanip>
#include <sstream>

#include "libfsdp/base/error.h"
#include "libfsdp/plan/schedule.h"

namespace fsdp::plan {
namespace {

class Fnv1a {
 public:
  void add(int64_t value) {
    for (int byte = 0; byte < 8; ++byte) {
      hash_ = (hash_ ^ ((static_cast<uint64_t>(value) >> (8 * byte)) & 0xffU)) * 0x100000001b3ULL;
    }
  }
  uint64_t value() const { return hash_; }

 private:
  uint64_t hash_ = 0xcbf29ce484222325ULL;
};

void add_op(const Op& op, Fnv1a& hash) {
  for (const int64_t field : {int64_t{static_cast<uint8_t>(op.kind)}, int64_t{op.unit},
                              int64_t{static_cast<uint8_t>(op.scope)}, int64_t{op.micro_batch},
                              int64_t{op.slot}, int64_t{op.gradient_slot}, int64_t{op.stage},
                              int64_t{op.accumulate} + 2 * op.resumed + 4 * op.in_backward}) {
    hash.add(field);
  }
  hash.add(static_cast<int64_t>(op.accesses.size()));
  for (const Access& access : op.accesses) {
    hash.add(static_cast<int64_t>(access.buffer));
    hash.add(access.index);
    hash.add(access.write * 2 + access.by_peers);
    hash.add(access.unit);
  }
  hash.add(static_cast<int64_t>(op.after.size()));
  for (const Dependency& dependency : op.after) {
    hash.add(dependency.op);
    hash.add(static_cast<int64_t>(dependency.moment) * 2 + dependency.previous_step);
  }
}

std::string unit_text(const Op& op, const std::vector<std::string>& names) {
  if (op.unit < 0) return "";
  if (static_cast<size_t>(op.unit) < names.size()) return names[static_cast<size_t>(op.unit)];
  return op.unit == 0 ? "root" : cat("unit ", op.unit);
}

std::string_view stream_text(OpKind kind) {
  switch (stream_of(kind)) {
    case Stream::kCompute:
      return "  compute  ";
    case Stream::kCommunication:
      return "  comm     ";
    case Stream::kCopy:
      return "  copy     ";
  }
  throw InternalError("unknown stream");
}

std::string slots_text(const Op& op) {
  std::string text;
  if (op.slot >= 0) text = cat("slot ", op.slot);
  if (op.gradient_slot >= 0)
    text += cat(text.empty() ? "" : ", ", "gradient slot ", op.gradient_slot);
  if (op.stage >= 0) text += cat(text.empty() ? "" : ", ", "stage ", op.stage);
  if (op.accumulate) text += ", accumulate";
  if (op.resumed) text += text.empty() ? "resumed" : ", resumed";
  if (op.in_backward) text += text.empty() ? "in backward" : ", in backward";
  return text;
}

// "after 3, 7 released, previous 12".
std::string after_text(const Op& op) {
  std::string text;
  for (const Dependency& dependency : op.after) {
    text += cat(text.empty() ? "after " : ", ", dependency.previous_step ? "previous " : "",
                dependency.op, dependency.moment == Moment::kReleased ? " released" : "");
  }
  return text;
}

}  // namespace

uint64_t Schedule::hash() const {
  Fnv1a hash;
  for (const int64_t field :
       {int64_t{mesh.replicate}, int64_t{mesh.shard}, static_cast<int64_t>(reduction),
        int64_t{slots}, int64_t{gradient_slots}, int64_t{stages}, int64_t{micro_batches},
        static_cast<int64_t>(ops.size())}) {
    hash.add(field);
  }
  for (const Op& op : ops) add_op(op, hash);
  return hash.value();
}

std::string Schedule::to_string(const std::vector<std::string>& unit_names) const {
  size_t name_width = 9;
  size_t unit_width = 0;
  size_t slots_width = 0;
  for (const Op& op : ops) {
    name_width = std::max(name_width, op_name(op.kind).size());
    unit_width = std::max(unit_width, unit_text(op, unit_names).size());
    slots_width = std::max(slots_width, slots_text(op).size());
  }
  std::ostringstream out;
  for (size_t i = 0; i < ops.size(); ++i) {
    const Op& op = ops[i];
    std::ostringstream line;
    line << std::right << std::setw(4) << i << stream_text(op.kind) << std::left
         << std::setw(static_cast<int>(name_width) + 2) << op_name(op.kind)
         << std::setw(static_cast<int>(unit_width) + 2) << unit_text(op, unit_names) << "m"
         << std::setw(4) << op.micro_batch << std::setw(static_cast<int>(slots_width) + 2)
         << slots_text(op) << after_text(op);
    std::string text = line.str();
    text.erase(text.find_last_not_of(' ') + 1);
    out << text << '\n';
  }
  return out.str();
}

}  // namespace fsdp::plan
