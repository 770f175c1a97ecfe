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

constexpr int kRoot = 0;
constexpr int kTorn = -7;

// What a buffer holds: parameters of `unit` after `version` updates, or `parts` sums of gradients.
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
  bool packet_posted = false, computing = false, copying = false;
  std::vector<bool> finished;
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
    }
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

  std::vector<int> members(int position, int r) const {
    const int group = size() / schedule_.mesh.replicate;
    std::vector<int> list;
    for (int q = 0; q < size(); ++q) {
      if (op(position).kind != OpKind::kGather || q / group == r / group) list.push_back(q);
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
    if (!rank.packet_posted) return ready(rank.next_compute, r);
    return std::all_of(ranks_.begin(), ranks_.end(), [&](const Rank& other) {
      return other.next_compute > rank.next_compute ||
             (other.next_compute == rank.next_compute && other.packet_posted);
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
    if (op(position).kind == OpKind::kPacket && !rank.packet_posted) {
      rank.packet_posted = true;
      return;
    }
    perform(position, r, rank.computing);
    rank.computing = !rank.computing;
    if (rank.computing) return;
    rank.packet_posted = false;
    rank.finished[static_cast<size_t>(position)] = true;
    rank.next_compute = following(position, false);
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

  // The old value is returned; the new one is there when the operation is over.
  static void write(Tag& cell, const Tag& value, bool over) {
    cell = over ? value : Tag{.unit = kTorn};
  }

  void perform(int position, int r, bool over) {
    switch (op(position).kind) {
      case OpKind::kGather:
        return gather(position, r, over);
      case OpKind::kForward:
        return parameters(position, r);
      case OpKind::kBackward:
        return backward(position, r, over);
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
    write(ranks_[static_cast<size_t>(r)].slots[o.slot], current(o.unit, position), over);
  }

  void parameters(int position, int r) {
    const Op& o = op(position);
    Rank& rank = ranks_[static_cast<size_t>(r)];
    if (o.slot >= 0) expect(rank.slots[o.slot], current(o.unit, position), "its slot", position, r);
    for (const Access& access : o.accesses) {
      if (access.buffer == BufferKind::kShard) {
        expect(shard(r, access.index), current(access.index, position), "a shard", position, r);
      } else if (access.buffer == BufferKind::kSlot && access.index == schedule_.slots) {
        expect(rank.slots[access.index], current(kRoot, position), "the root's slot", position, r);
      }
    }
  }

  void add_gradients(int position, int unit, int r, int slot, bool over) {
    Tag& cell = ranks_[static_cast<size_t>(r)].gradient_slots[slot];
    const Tag mine{.unit = unit,
                   .version = step(position),
                   .micro_batch = op(position).micro_batch,
                   .parts = 1};
    const bool adds =
        cell.unit == unit && cell.version == mine.version && cell.micro_batch == mine.micro_batch;
    if (!over) old_[r] = adds ? cell.parts : 0;
    Tag sum = mine;
    if (unit == kRoot) sum.parts += old_[r];
    write(cell, sum, over);
  }

  int writers_of_root(int micro_batch) const {
    int writers = 0;
    for (const Op& o : schedule_.ops) {
      for (const Access& access : o.accesses) {
        writers += o.kind == OpKind::kBackward && o.micro_batch == micro_batch &&
                   access.buffer == BufferKind::kGradientSlot &&
                   access.index == schedule_.gradient_slots;
      }
    }
    return writers;
  }

  void backward(int position, int r, bool over) {
    parameters(position, r);
    const Op& o = op(position);
    if (o.unit != kRoot && o.gradient_slot >= 0)
      add_gradients(position, o.unit, r, o.gradient_slot, over);
    for (const Access& access : o.accesses) {
      const bool root = access.index == schedule_.gradient_slots || o.unit == kRoot;
      if (access.buffer == BufferKind::kGradientSlot && root)
        add_gradients(position, kRoot, r, access.index, over);
    }
  }

  void reduce(int position, int r, bool over) {
    const Op& o = op(position);
    const Tag wanted{o.unit, step(position), o.micro_batch,
                     o.unit == kRoot ? writers_of_root(o.micro_batch) : 1};
    for (int q = 0; q < size(); ++q) {
      expect(ranks_[static_cast<size_t>(q)].gradient_slots[o.gradient_slot], wanted,
             "a gradient slot", position, r);
    }
    Tag& cell = ranks_[static_cast<size_t>(r)].gradient_shards[o.unit];
    const Tag before{o.unit, step(position), -1, o.micro_batch};
    if (o.accumulate && !over) expect(cell, before, "its gradient shard", position, r);
    write(cell, {o.unit, step(position), -1, o.accumulate ? o.micro_batch + 1 : 1}, over);
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
      write(shard(r, access.index), {.unit = access.index, .version = step(position) + 1}, over);
    }
  }

  const Schedule& schedule_;
  const int num_ops_;
  const int end_;
  std::mt19937 random_;
  std::vector<Rank> ranks_;
  std::set<int> updated_;   // Units that the optimizer writes.
  std::map<int, int> old_;  // By rank: parts of the root's gradients before the backward under way.
  std::string wrong_;
};

}  // namespace

std::string simulate(const Schedule& schedule, int ranks, int steps, unsigned seed) {
  return World(schedule, ranks, steps, seed).run();
}

}  // namespace fsdp::plan
