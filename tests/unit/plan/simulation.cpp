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
// `parts` micro-batches, the last one being `micro_batch`, over the replicas too where `outer`.
// While it is written: whose write it is.
struct Tag {
  int unit = -1;
  int version = 0;
  int micro_batch = -1;
  int parts = 0;
  bool outer = false;

  bool operator==(const Tag&) const = default;
};

using Cells = std::map<int, Tag>;

struct Rank {
  Cells shards, stages, slots, gradient_slots, gradient_stages, gradient_shards;
  Tag outer;
  // Positions count through the steps; the next of each stream, and what is under way.
  int next_compute = 0, next_post = 0, next_exec = 0, next_copy = 0;
  // Posted: a collective of compute. Moving: data of a collective.
  bool posted = false, computing = false, moving = false, copying = false;
  std::vector<bool> finished;
  std::map<int, int> collecting;  // By position of a kCollect under way: parts that were there.
  int compute_weight = 1, comm_weight = 1, copy_weight = 1;
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
      rank.copy_weight = weight();
      rank.next_compute = following(-1, Stream::kCompute);
      rank.next_post = rank.next_exec = following(-1, Stream::kCommunication);
      rank.next_copy = following(-1, Stream::kCopy);
      ranks_.push_back(std::move(rank));
    }
  }

  std::string run() {
    while (wrong_.empty()) {
      std::vector<std::pair<int, Stream>> enabled;
      for (int r = 0; r < size(); ++r) {
        const Rank& rank = ranks_[static_cast<size_t>(r)];
        const auto enable = [&](Stream stream, int weight) {
          enabled.insert(enabled.end(), static_cast<size_t>(weight), {r, stream});
        };
        if (can_compute(r)) enable(Stream::kCompute, rank.compute_weight);
        if (can_post(r) || can_move(r)) enable(Stream::kCommunication, rank.comm_weight);
        if (can_copy(r)) enable(Stream::kCopy, rank.copy_weight);
        if (random_() % 2 == 0) collect_early(r);
      }
      if (enabled.empty()) return done() ? "" : "deadlock";
      const auto [r, stream] = enabled[random_() % enabled.size()];
      if (stream == Stream::kCompute) advance_compute(r);
      if (stream == Stream::kCommunication) advance_comm(r);
      if (stream == Stream::kCopy) advance_copy(r);
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

  int following(int position, Stream stream) const {
    do {
      ++position;
    } while (position < end_ && stream_of(op(position).kind) != stream);
    return position;
  }

  bool done() const {
    return std::all_of(ranks_.begin(), ranks_.end(), [this](const Rank& rank) {
      return rank.next_compute == end_ && rank.next_exec == end_ && rank.next_copy == end_;
    });
  }

  static bool posts(OpKind kind) { return kind == OpKind::kPacket || kind == OpKind::kFence; }

  std::vector<int> members(int position, int r) const {
    const int group = size() / schedule_.mesh.replicate;
    const OpKind kind = op(position).kind;
    const bool outer = kind == OpKind::kReduceOuter || kind == OpKind::kGatherOuter;
    const bool world = kind == OpKind::kPacket || (kind == OpKind::kReduce && !two_level());
    std::vector<int> list;
    for (int q = 0; q < size(); ++q) {
      const bool member = outer ? q % group == r % group : q / group == r / group;
      if (world || member) list.push_back(q);
    }
    return list;
  }
  bool two_level() const { return schedule_.reduction == Reduction::kTwoLevel; }
  bool offloads() const { return schedule_.stages > 0; }

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
    return rank.copying || (rank.next_copy < end_ && ready(rank.next_copy, r));
  }

  bool can_move(int r) const {
    const Rank& rank = ranks_[static_cast<size_t>(r)];
    if (rank.moving) return true;
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
    rank.next_compute = following(position, Stream::kCompute);
  }

  // Notes for each compute operation the last one before its micro-batch.
  void find_micro_batches() {
    before_micro_batch_.assign(static_cast<size_t>(end_), -1);
    int last = -1;
    int before = -1;
    for (int p = following(-1, Stream::kCompute); p < end_; p = following(p, Stream::kCompute)) {
      if (last >= 0 && (op(p).micro_batch != op(last).micro_batch || step(p) != step(last)))
        before = last;
      before_micro_batch_[static_cast<size_t>(p)] = before;
      last = p;
    }
  }

  // Gradients that arrive before the stream has come to their collection.
  void collect_early(int r) {
    Rank& rank = ranks_[static_cast<size_t>(r)];
    for (int p = rank.next_compute; p < end_; p = following(p, Stream::kCompute)) {
      const int before = before_micro_batch_[static_cast<size_t>(p)];
      if (before >= 0 && !rank.finished[static_cast<size_t>(before)]) return;
      if (op(p).kind == OpKind::kCollect && ready(p, r) && random_() % 2 == 0) begin_collect(p, r);
    }
  }

  void advance_comm(int r) {
    Rank& rank = ranks_[static_cast<size_t>(r)];
    if (can_post(r) && (!can_move(r) || random_() % 2 == 0)) {
      rank.next_post = following(rank.next_post, Stream::kCommunication);
      return;
    }
    const int position = rank.next_exec;
    perform(position, r, rank.moving);
    rank.moving = !rank.moving;
    if (rank.moving) return;
    rank.finished[static_cast<size_t>(position)] = true;
    rank.next_exec = following(position, Stream::kCommunication);
  }

  void advance_copy(int r) {
    Rank& rank = ranks_[static_cast<size_t>(r)];
    const int position = rank.next_copy;
    perform(position, r, rank.copying);
    rank.copying = !rank.copying;
    if (rank.copying) return;
    rank.finished[static_cast<size_t>(position)] = true;
    rank.next_copy = following(position, Stream::kCopy);
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
      case OpKind::kFetch:
        return fetch(position, r, over);
      case OpKind::kGather:
        return gather(position, r, over);
      case OpKind::kForward:
      case OpKind::kBackward:
        return parameters(position, r);
      case OpKind::kCollect:
        begin_collect(position, r);
        return over ? end_collect(position, r) : void();
      case OpKind::kFetchSums:
      case OpKind::kStoreSums:
        return move_sums(position, r, over);
      case OpKind::kReduce:
        return reduce(position, r, over);
      case OpKind::kReduceOuter:
        return reduce_outer(position, r, over);
      case OpKind::kGatherOuter:
        return gather_outer(position, r, over);
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
    for (const int q : members(position, r)) {
      const Tag& from =
          offloads() ? ranks_[static_cast<size_t>(q)].stages[o.stage] : shard(q, o.unit);
      expect(from, current(o.unit, position), "a shard", position, r);
    }
    write(ranks_[static_cast<size_t>(r)].slots[o.slot], current(o.unit, position), position, r,
          over);
  }

  void fetch(int position, int r, bool over) {
    const Op& o = op(position);
    expect(shard(r, o.unit), current(o.unit, position), "its shard", position, r);
    write(ranks_[static_cast<size_t>(r)].stages[o.stage], current(o.unit, position), position, r,
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

  Tag& sums(const Op& o, int r) {
    Rank& rank = ranks_[static_cast<size_t>(r)];
    return offloads() ? rank.gradient_stages[o.gradient_slot] : rank.gradient_shards[o.unit];
  }

  Tag sums_of(int unit, int parts, bool outer, int position) const {
    return {.unit = unit, .version = step(position), .parts = parts, .outer = outer};
  }

  void move_sums(int position, int r, bool over) {
    const Op& o = op(position);
    const bool back = o.kind == OpKind::kFetchSums;
    const int parts = o.micro_batch + (back ? 0 : 1);
    const bool outer = two_level() && parts == schedule_.micro_batches;
    const Tag wanted = sums_of(o.unit, parts, outer, position);
    Tag& shard = ranks_[static_cast<size_t>(r)].gradient_shards[o.unit];
    Tag& stage = ranks_[static_cast<size_t>(r)].gradient_stages[o.gradient_slot];
    expect(back ? shard : stage, wanted, "sums that are copied", position, r);
    write(back ? stage : shard, wanted, position, r, over);
  }

  void reduce_outer(int position, int r, bool over) {
    const Op& o = op(position);
    const Tag wanted = sums_of(o.unit, schedule_.micro_batches, false, position);
    for (const int q : members(position, r))
      expect(sums(o, q), wanted, "a replica's sums", position, r);
    write(ranks_[static_cast<size_t>(r)].outer,
          sums_of(o.unit, schedule_.micro_batches, true, position), position, r, over);
  }

  void gather_outer(int position, int r, bool over) {
    const Op& o = op(position);
    const Tag wanted = sums_of(o.unit, schedule_.micro_batches, true, position);
    for (const int q : members(position, r))
      expect(ranks_[static_cast<size_t>(q)].outer, wanted, "an outer slot", position, r);
    write(sums(o, r), wanted, position, r, over);
  }

  void reduce(int position, int r, bool over) {
    const Op& o = op(position);
    // Every micro-batch counts once: what the shard does not have yet comes now.
    const int there = o.accumulate ? o.micro_batch : 0;
    const int comes = unsharded_units_.count(o.unit) != 0 ? o.micro_batch + 1 - there : 1;
    const Tag wanted{o.unit, step(position), o.micro_batch, comes};
    for (const int q : members(position, r)) {
      expect(ranks_[static_cast<size_t>(q)].gradient_slots[o.gradient_slot], wanted,
             "a gradient slot", position, r);
    }
    Tag& cell = sums(o, r);
    if (o.accumulate && !over)
      expect(cell, sums_of(o.unit, there, false, position), "its sums", position, r);
    write(cell, sums_of(o.unit, there + comes, false, position), position, r, over);
  }

  void gradients_are_there(int position, int r) {
    for (const Access& access : op(position).accesses) {
      if (access.buffer != BufferKind::kGradientShard) continue;
      expect(ranks_[static_cast<size_t>(r)].gradient_shards[access.index],
             sums_of(access.index, schedule_.micro_batches, two_level(), position),
             "a gradient shard", position, r);
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
