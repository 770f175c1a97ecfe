#include "tests/unit/plan/simulation.h"

#include <algorithm>
#include <map>
#include <random>
#include <set>
#include <utility>
#include <vector>

#include "libfsdp/base/error.h"

namespace fsdp::plan {
namespace {

constexpr int kTorn = -7;

// What a buffer holds: parameters of `unit` after `version` updates, or the sum of gradients of
// `parts` micro-batches, the last one being `micro_batch`. While it is written: whose write it is.
struct Tag {
  int unit = -1;
  int version = 0;
  int micro_batch = -1;
  int parts = 0;

  bool operator==(const Tag&) const = default;
};

using Cells = std::map<int, Tag>;

struct Rank {
  Cells shards, slots, gradient_slots, gradient_shards;
  // Positions count through the steps; the next of each stream, and what is under way.
  int next_compute = 0, next_post = 0, next_exec = 0;
  bool posted = false, computing = false, copying = false;  // Posted: a collective of compute.
  std::vector<bool> finished;
  std::map<int, int> collecting;  // By position of a kCollect under way: parts that were there.
  int compute_weight = 1, comm_weight = 1;
};

class World {
 public:
  World(const Schedule& schedule, int ranks, int steps, unsigned seed)
      : schedule_(schedule),
        num_ops_(static_cast<int>(schedule.ops.size())),
        end_(steps * num_ops_),
        random_(seed) {
    for (const Op& op : schedule.ops) {
      for (const Access& access : op.accesses) {
        if (access.buffer == BufferKind::kShard && access.write) updated_.insert(access.index);
      }
      if (op.kind == OpKind::kCollect && op.accumulate) unsharded_units_.insert(op.unit);
    }
    find_micro_batches();
    for (int r = 0; r < ranks; ++r) {
      Rank rank;
      rank.finished.resize(static_cast<size_t>(end_));
      rank.compute_weight = weight();
      rank.comm_weight = weight();
      rank.next_compute = following(-1, false);
      rank.next_post = rank.next_exec = following(-1, true);
      ranks_.push_back(std::move(rank));
    }
  }

  std::string run() {
    while (wrong_.empty()) {
      std::vector<std::pair<int, bool>> enabled;  // Rank, is communication.
      for (int r = 0; r < size(); ++r) {
        const Rank& rank = ranks_[static_cast<size_t>(r)];
        if (can_compute(r))
          enabled.insert(enabled.end(), static_cast<size_t>(rank.compute_weight), {r, false});
        if (can_post(r) || can_copy(r)) {
          enabled.insert(enabled.end(), static_cast<size_t>(rank.comm_weight), {r, true});
        }
        if (random_() % 2 == 0) collect_early(r);
      }
      if (enabled.empty()) return done() ? "" : "deadlock";
      const auto [r, is_comm] = enabled[random_() % enabled.size()];
      is_comm ? advance_comm(r) : advance_compute(r);
    }
    return wrong_;
  }

 private:
  int size() const { return static_cast<int>(ranks_.size()); }
  int weight() { return random_() % 3 == 0 ? 30 : 1; }
  const Op& op(int position) const {
    return schedule_.ops[static_cast<size_t>(position % num_ops_)];
  }
  int step(int position) const { return position / num_ops_; }

  int following(int position, bool comm) const {
    do {
      ++position;
    } while (position < end_ && on_communication_stream(op(position).kind) != comm);
    return position;
  }

  bool done() const {
    return std::all_of(ranks_.begin(), ranks_.end(), [this](const Rank& rank) {
      return rank.next_compute == end_ && rank.next_exec == end_;
    });
  }

  static bool within(OpKind kind) { return kind != OpKind::kReduce && kind != OpKind::kPacket; }
  static bool posts(OpKind kind) { return kind == OpKind::kPacket || kind == OpKind::kFence; }

  std::vector<int> members(int position, int r) const {
    const int group = size() / schedule_.mesh.replicate;
    std::vector<int> list;
    for (int q = 0; q < size(); ++q) {
      if (!within(op(position).kind) || q / group == r / group) list.push_back(q);
    }
    return list;
  }

  bool ready(int position, int r) const {
    for (const Dependency& d : op(position).after) {
      const int on = (step(position) - (d.previous_step ? 1 : 0)) * num_ops_ + d.op;
      if (on < 0) continue;
      if (!ranks_[static_cast<size_t>(r)].finished[static_cast<size_t>(on)]) return false;
      if (d.moment != Moment::kReleased) continue;
      for (const int q : members(on, r)) {
        if (!ranks_[static_cast<size_t>(q)].finished[static_cast<size_t>(on)]) return false;
      }
    }
    return true;
  }

  bool can_compute(int r) const {
    const Rank& rank = ranks_[static_cast<size_t>(r)];
    if (rank.next_compute == end_) return false;
    if (rank.computing) return true;
    if (!rank.posted) return ready(rank.next_compute, r);
    const std::vector<int> group = members(rank.next_compute, r);
    return std::all_of(group.begin(), group.end(), [&](int q) {
      const Rank& other = ranks_[static_cast<size_t>(q)];
      return other.next_compute > rank.next_compute ||
             (other.next_compute == rank.next_compute && other.posted);
    });
  }

  bool can_post(int r) const {
    const Rank& rank = ranks_[static_cast<size_t>(r)];
    return rank.next_post < end_ && ready(rank.next_post, r);
  }

  bool can_copy(int r) const {
    const Rank& rank = ranks_[static_cast<size_t>(r)];
    if (rank.copying) return true;
    if (rank.next_exec == end_) return false;
    for (const int q : members(rank.next_exec, r)) {
      if (ranks_[static_cast<size_t>(q)].next_post <= rank.next_exec) return false;
    }
    return true;
  }

  void advance_compute(int r) {
    Rank& rank = ranks_[static_cast<size_t>(r)];
    const int position = rank.next_compute;
    if (posts(op(position).kind) && !rank.posted) {
      rank.posted = true;
      return;
    }
    perform(position, r, rank.computing);
    rank.computing = !rank.computing;
    if (rank.computing) return;
    rank.posted = false;
    rank.finished[static_cast<size_t>(position)] = true;
    rank.next_compute = following(position, false);
  }

  // Notes for each compute operation the last one before its micro-batch.
  void find_micro_batches() {
    before_micro_batch_.assign(static_cast<size_t>(end_), -1);
    int last = -1;
    int before = -1;
    for (int p = following(-1, false); p < end_; p = following(p, false)) {
      if (last >= 0 && (op(p).micro_batch != op(last).micro_batch || step(p) != step(last)))
        before = last;
      before_micro_batch_[static_cast<size_t>(p)] = before;
      last = p;
    }
  }

  // Gradients that arrive before the stream has come to their collection.
  void collect_early(int r) {
    Rank& rank = ranks_[static_cast<size_t>(r)];
    for (int p = rank.next_compute; p < end_; p = following(p, false)) {
      const int before = before_micro_batch_[static_cast<size_t>(p)];
      if (before >= 0 && !rank.finished[static_cast<size_t>(before)]) return;
      if (op(p).kind == OpKind::kCollect && ready(p, r) && random_() % 2 == 0) begin_collect(p, r);
    }
  }

  void advance_comm(int r) {
    Rank& rank = ranks_[static_cast<size_t>(r)];
    if (can_post(r) && (!can_copy(r) || random_() % 2 == 0)) {
      rank.next_post = following(rank.next_post, true);
      return;
    }
    const int position = rank.next_exec;
    perform(position, r, rank.copying);
    rank.copying = !rank.copying;
    if (rank.copying) return;
    rank.finished[static_cast<size_t>(position)] = true;
    rank.next_exec = following(position, true);
  }

  void expect(const Tag& found, const Tag& wanted, std::string_view where, int position, int r) {
    if (found == wanted || !wrong_.empty()) return;
    wrong_ = cat("operation ", position % num_ops_, " of step ", step(position), " on rank ", r,
                 " found unit ", found.unit, " version ", found.version, " in ", where);
  }

  // The new value is there when the operation is over, and torn before.
  void write(Tag& cell, const Tag& value, int position, int r, bool over) {
    const Tag torn{.unit = kTorn, .version = position};
    if (over && cell != torn && wrong_.empty()) {
      wrong_ = cat("operation ", position % num_ops_, " of step ", step(position), " on rank ", r,
                   " is not alone in writing");
    }
    cell = over ? value : torn;
  }

  void perform(int position, int r, bool over) {
    switch (op(position).kind) {
      case OpKind::kFence:
        return;
      case OpKind::kGather:
        return gather(position, r, over);
      case OpKind::kForward:
      case OpKind::kBackward:
        return parameters(position, r);
      case OpKind::kCollect:
        begin_collect(position, r);
        return over ? end_collect(position, r) : void();
      case OpKind::kReduce:
        return reduce(position, r, over);
      case OpKind::kPacket:
        return gradients_are_there(position, r);
      case OpKind::kOptimizer:
        return optimizer(position, r, over);
    }
  }

  Tag current(int unit, int position) const {
    return {.unit = unit, .version = updated_.count(unit) != 0 ? step(position) : 0};
  }
  Tag& shard(int r, int unit) {
    return ranks_[static_cast<size_t>(r)].shards.try_emplace(unit, Tag{.unit = unit}).first->second;
  }

  void gather(int position, int r, bool over) {
    const Op& o = op(position);
    for (const int q : members(position, r))
      expect(shard(q, o.unit), current(o.unit, position), "a shard", position, r);
    write(ranks_[static_cast<size_t>(r)].slots[o.slot], current(o.unit, position), position, r,
          over);
  }

  void parameters(int position, int r) {
    const Op& o = op(position);
    Rank& rank = ranks_[static_cast<size_t>(r)];
    if (o.slot >= 0) expect(rank.slots[o.slot], current(o.unit, position), "its slot", position, r);
    for (const Access& access : o.accesses) {
      if (access.buffer == BufferKind::kSlot) {
        expect(rank.slots[access.index], current(access.unit, position), "a slot", position, r);
      } else if (access.buffer == BufferKind::kShard) {
        const Tag wanted = current(access.index, position);
        expect(shard(r, access.index), wanted, "its shard", position, r);
        if (!access.by_peers) continue;
        for (const int q : members(position, r))
          expect(shard(q, access.index), wanted, "a peer's shard", position, r);
      }
    }
  }

  void begin_collect(int position, int r) {
    Rank& rank = ranks_[static_cast<size_t>(r)];
    if (rank.collecting.count(position) != 0) return;
    const Op& o = op(position);
    Tag& cell = rank.gradient_slots[o.gradient_slot];
    const Tag before{o.unit, step(position), o.micro_batch - 1, o.micro_batch};
    if (o.accumulate) expect(cell, before, "its gradient slot", position, r);
    rank.collecting[position] = o.accumulate ? cell.parts : 0;
    write(cell, {}, position, r, false);
  }

  void end_collect(int position, int r) {
    Rank& rank = ranks_[static_cast<size_t>(r)];
    const Op& o = op(position);
    write(rank.gradient_slots[o.gradient_slot],
          {o.unit, step(position), o.micro_batch, rank.collecting.at(position) + 1}, position, r,
          true);
  }

  void reduce(int position, int r, bool over) {
    const Op& o = op(position);
    // Every micro-batch counts once: what the shard does not have yet comes now.
    const int there = o.accumulate ? o.micro_batch : 0;
    const int comes = unsharded_units_.count(o.unit) != 0 ? o.micro_batch + 1 - there : 1;
    const Tag wanted{o.unit, step(position), o.micro_batch, comes};
    for (int q = 0; q < size(); ++q) {
      expect(ranks_[static_cast<size_t>(q)].gradient_slots[o.gradient_slot], wanted,
             "a gradient slot", position, r);
    }
    Tag& cell = ranks_[static_cast<size_t>(r)].gradient_shards[o.unit];
    const Tag before{o.unit, step(position), -1, there};
    if (o.accumulate && !over) expect(cell, before, "its gradient shard", position, r);
    write(cell, {o.unit, step(position), -1, there + comes}, position, r, over);
  }

  void gradients_are_there(int position, int r) {
    for (const Access& access : op(position).accesses) {
      if (access.buffer != BufferKind::kGradientShard) continue;
      expect(ranks_[static_cast<size_t>(r)].gradient_shards[access.index],
             {access.index, step(position), -1, schedule_.micro_batches}, "a gradient shard",
             position, r);
    }
  }

  void optimizer(int position, int r, bool over) {
    gradients_are_there(position, r);
    for (const Access& access : op(position).accesses) {
      if (!access.write) continue;
      write(shard(r, access.index), {.unit = access.index, .version = step(position) + 1}, position,
            r, over);
    }
  }

  const Schedule& schedule_;
  const int num_ops_;
  const int end_;
  std::mt19937 random_;
  std::vector<Rank> ranks_;
  std::set<int> updated_;                // Units that the optimizer writes.
  std::set<int> unsharded_units_;        // Whose collections add.
  std::vector<int> before_micro_batch_;  // By position of compute operations.
  std::string wrong_;
};

}  // namespace

std::string simulate(const Schedule& schedule, int ranks, int steps, unsigned seed) {
  return World(schedule, ranks, steps, seed).run();
}

}  // namespace fsdp::plan
