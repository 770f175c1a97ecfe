// Happens-before of the schedule as executed, and the search for accesses that it leaves unordered.
//
// Note [Events] A rank has four chains of events: ends of compute operations, begins (posts) of
// communication, finishes of communication, and finishes of copies. A clock holds, for every rank
// and chain, the last event that has surely happened. A compute operation starts after the one
// before it and its dependencies; a begin likewise; a collective moves data on a rank after all
// members have begun and the one before it has finished there; a copy starts after the one before
// it. A kCollect may write from the begin of its micro-batch on, once its dependencies have
// happened. Nothing else is ordered.
#include "libfsdp/plan/race_check.h"

#include <algorithm>
#include <array>
#include <map>
#include <set>
#include <tuple>
#include <utility>

#include "libfsdp/base/error.h"
#include "libfsdp/plan/race_contents_impl.h"

namespace fsdp::plan {
namespace {

constexpr int kSteps = 3;
enum Chain { kComputeEnd, kCommBegin, kCommFinish, kCopyFinish, kNumChains };

Chain finish_chain(Stream stream) {
  switch (stream) {
    case Stream::kCompute:
      return kComputeEnd;
    case Stream::kCommunication:
      return kCommFinish;
    case Stream::kCopy:
      return kCopyFinish;
  }
  throw InternalError("unknown stream");
}

class Clock {
 public:
  explicit Clock(int ranks) : events_(static_cast<size_t>(ranks) * kNumChains, -1) {}

  void join(const Clock& other) {
    for (size_t i = 0; i < events_.size(); ++i) {
      events_[i] = std::max(events_[i], other.events_[i]);
    }
  }
  void set(int rank, Chain chain, int event) { events_[at(rank, chain)] = event; }
  bool has(int rank, Chain chain, int event) const { return events_[at(rank, chain)] >= event; }

 private:
  static size_t at(int rank, Chain chain) {
    return static_cast<size_t>(rank) * kNumChains + static_cast<size_t>(chain);
  }
  std::vector<int> events_;
};

// One run of an operation on one rank; positions count through the steps.
struct Run {
  Clock ready;   // What has happened when it may begin (communication: when it has begun).
  Clock start;   // What has happened when it first touches memory.
  Clock finish;  // What has happened when it is done here.
};

struct Touch {
  int position = -1;
  int rank = 0;  // Who touches, not whose buffer.
};

struct Cell {
  Touch writer;
  std::vector<Touch> readers;  // Since the last write.
};

class Checker {
 public:
  Checker(const Schedule& schedule, int ranks)
      : schedule_(schedule), num_ops_(static_cast<int>(schedule.ops.size())), ranks_(ranks) {
    if (ranks < 1 || schedule.mesh.replicate < 1 || ranks % schedule.mesh.replicate != 0) {
      throw ConfigError(cat("cannot check a schedule on ", ranks, " ranks; expected a multiple of ",
                            schedule.mesh.replicate, ", the replicas of its mesh"));
    }
    group_size_ = ranks / schedule.mesh.replicate;
    runs_.reserve(static_cast<size_t>(kSteps) * schedule.ops.size());
  }

  std::vector<Race> run() {
    if (!dependencies_point_back()) return std::move(races_);
    for (int position = 0; position < kSteps * num_ops_; ++position) {
      order(position);
      for (int rank = 0; rank < ranks_; ++rank) touch_all(position, rank);
    }
    if (races_.empty()) detail::check_contents(schedule_, kSteps, races_);
    return std::move(races_);
  }

 private:
  const Op& op(int position) const {
    return schedule_.ops[static_cast<size_t>(position % num_ops_)];
  }
  Stream stream(int position) const { return stream_of(op(position).kind); }
  int last(Stream stream) const { return last_[static_cast<size_t>(stream)]; }
  const Run& run_of(int position, int rank) const {
    return runs_[static_cast<size_t>(position)][static_cast<size_t>(rank)];
  }

  // What is waited for must have been issued: anything else is a deadlock.
  bool dependencies_point_back() {
    for (int i = 0; i < num_ops_; ++i) {
      for (const Dependency& dependency : op(i).after) {
        const bool known = dependency.op >= 0 && dependency.op < num_ops_;
        if (known && (dependency.previous_step || dependency.op < i)) continue;
        races_.push_back({.first_op = known ? dependency.op : i,
                          .second_op = i,
                          .reason = cat("waits for operation ", dependency.op,
                                        ", which has not been issued by then")});
      }
    }
    return races_.empty();
  }

  // Ranks that must have begun the collective before `rank` proceeds, or whose shards it reads in
  // place.
  std::vector<int> members(int position, int rank) const {
    const Scope scope = op(position).scope;
    std::vector<int> group;
    for (int other = 0; other < ranks_; ++other) {
      const bool same_group = other / group_size_ == rank / group_size_;
      const bool same_place = other % group_size_ == rank % group_size_;
      if (scope == Scope::kWorld || (scope == Scope::kShardGroup ? same_group : same_place))
        group.push_back(other);
    }
    return group;
  }

  void order(int position) {
    runs_.emplace_back();
    const bool compute = stream(position) == Stream::kCompute;
    if (compute && last(Stream::kCompute) >= 0 && starts_micro_batch(position))
      before_micro_batch_ = last(Stream::kCompute);
    const bool early = op(position).kind == OpKind::kCollect;
    for (int rank = 0; rank < ranks_; ++rank) {
      const Clock ready = ready_clock(position, rank);
      runs_.back().push_back({ready, early ? early_clock(position, rank) : ready, ready});
    }
    for (int rank = 0; rank < ranks_; ++rank) complete(position, rank);
    last_[static_cast<size_t>(stream(position))] = position;
  }

  bool starts_micro_batch(int position) const {
    const int before = last(Stream::kCompute);
    return op(position).micro_batch != op(before).micro_batch ||
           position / num_ops_ != before / num_ops_;
  }

  Clock early_clock(int position, int rank) const {
    Clock clock(ranks_);
    if (before_micro_batch_ >= 0) clock.join(run_of(before_micro_batch_, rank).finish);
    for (const Dependency& d : op(position).after) wait(d, position, rank, clock);
    return clock;
  }

  Clock ready_clock(int position, int rank) const {
    Clock clock(ranks_);
    if (const int before = last(stream(position)); before >= 0) {
      const Run& run = run_of(before, rank);
      clock.join(stream(position) == Stream::kCompute ? run.finish : run.ready);
    }
    for (const Dependency& d : op(position).after) wait(d, position, rank, clock);
    if (stream(position) == Stream::kCommunication) clock.set(rank, kCommBegin, position);
    return clock;
  }

  void wait(const Dependency& dependency, int position, int rank, Clock& clock) const {
    const int step = position / num_ops_ - (dependency.previous_step ? 1 : 0);
    if (step < 0) return;
    const int on = step * num_ops_ + dependency.op;
    clock.join(run_of(on, rank).finish);
    if (dependency.moment != Moment::kReleased || !is_collective(op(on).kind)) return;
    for (const int member : members(on, rank)) clock.join(run_of(on, member).finish);
  }

  void complete(int position, int rank) {
    Run& run = runs_.back()[static_cast<size_t>(rank)];
    if (is_collective(op(position).kind)) {
      for (const int member : members(position, rank)) {
        run.start.join(run_of(position, member).ready);
      }
    }
    const int before = last(stream(position));
    if (stream(position) != Stream::kCompute && before >= 0)
      run.start.join(run_of(before, rank).finish);
    run.finish = run.start;
    run.finish.join(run.ready);
    run.finish.set(rank, finish_chain(stream(position)), position);
  }

  void touch_all(int position, int rank) {
    for (const Access& access : op(position).accesses) {
      if (!access.by_peers) {
        touch(position, rank, rank, access);
      } else {
        for (const int owner : members(position, rank)) touch(position, rank, owner, access);
      }
    }
  }

  // Positions are visited in an order that contains happens-before, so a write that is ordered
  // after the last write and the reads since is ordered after everything.
  void touch(int position, int rank, int owner, const Access& access) {
    Cell& cell = cells_[{owner, access.buffer, access.index}];
    const Touch now{position, rank};
    if (cell.writer.position >= 0) compare(cell.writer, now, owner, access);
    if (access.write) {
      for (const Touch& reader : cell.readers) compare(reader, now, owner, access);
      cell.writer = now;
      cell.readers.clear();
    } else {
      cell.readers.push_back(now);
    }
  }

  void compare(const Touch& before, const Touch& now, int owner, const Access& access) {
    if (before.position == now.position && before.rank == now.rank) return;
    const Chain chain = finish_chain(stream(before.position));
    if (run_of(now.position, now.rank).start.has(before.rank, chain, before.position)) return;
    Race race{.first_op = before.position % num_ops_,
              .second_op = now.position % num_ops_,
              .first_rank = before.rank,
              .second_rank = now.rank,
              .next_step = before.position / num_ops_ != now.position / num_ops_,
              .access = access,
              .owner_rank = owner,
              .reason = "nothing orders them"};
    if (seen_.insert({race.first_op, race.second_op, access.buffer, access.index}).second) {
      races_.push_back(std::move(race));
    }
  }

  const Schedule& schedule_;
  const int num_ops_;
  const int ranks_;
  int group_size_ = 1;
  std::array<int, kNumStreams> last_ = {-1, -1, -1};  // By stream: the operation before.
  int before_micro_batch_ = -1;         // The last compute operation before the micro-batch.
  std::vector<std::vector<Run>> runs_;  // By position, then rank.
  std::map<std::tuple<int, BufferKind, int>, Cell> cells_;
  std::set<std::tuple<int, int, BufferKind, int>> seen_;
  std::vector<Race> races_;
};

std::string op_text(const Schedule& schedule, int index, int rank) {
  const Op& op = schedule.ops.at(static_cast<size_t>(index));
  const std::string unit = op.unit < 0 ? "" : cat(" of unit ", op.unit);
  return cat("operation ", index, " (", op_name(op.kind), unit, ", micro-batch ", op.micro_batch,
             ") on rank ", rank);
}

}  // namespace

std::string Race::to_string(const Schedule& schedule) const {
  return cat(op_text(schedule, second_op, second_rank), access.write ? " writes " : " reads ",
             buffer_name(access.buffer), " ", access.index, " of rank ", owner_rank,
             ", last used by ", op_text(schedule, first_op, first_rank),
             next_step ? " in the step before" : "", ": ", reason);
}

std::vector<Race> find_races(const Schedule& schedule, int ranks) {
  return Checker(schedule, ranks).run();
}

}  // namespace fsdp::plan
