// Derives what an operation must wait for, in the steady state of steps that follow each other.
//
// Note [Knowledge] What has surely happened when an operation begins is four positions in the
// unrolled issue order, because both streams are ordered: up to which compute operation everything
// has finished here, up to which communication everything has finished here, on every rank of the
// shard group, and on every rank. The last two grow by collectives: all ranks run the same
// schedule, so what this rank knew to be finished when it began a collective was finished on every
// member when that member began; and nobody's finish comes before everybody's begin. A dependency
// that the knowledge of the stream and of the other dependencies contains is left out.
//
// Note [Early collection] Gradients may be written into their slot as soon as they arrive, before
// the stream has come to their kCollect. So what a kCollect must wait for is derived as if it stood
// at the begin of its micro-batch.
#include <algorithm>
#include <map>
#include <utility>

#include "libfsdp/plan/dependencies_impl.h"

namespace fsdp::plan::detail {
namespace {

struct Knowledge {
  int compute = -1;  // Finished here.
  int comm = -1;     // Finished here.
  int group = -1;    // Communication finished on every rank of the shard group.
  int world = -1;    // Communication finished on every rank.

  void merge(const Knowledge& other) {
    compute = std::max(compute, other.compute);
    comm = std::max(comm, other.comm);
    group = std::max(group, other.group);
    world = std::max(world, other.world);
  }
};

struct Need {
  int position = 0;
  Moment moment = Moment::kFinished;

  auto operator<=>(const Need&) const = default;
};

// A buffer's last write and the reads since, as positions; bool: a read by peers.
struct History {
  int writer = -1;
  std::vector<std::pair<int, bool>> readers;
};

class Analysis {
 public:
  explicit Analysis(Schedule& schedule)
      : schedule_(schedule), num_ops_(static_cast<int>(schedule.ops.size())) {}

  // The second copy of the step sees a whole step before it: that is the steady state.
  void run() {
    for (int position = 0; position < 2 * num_ops_; ++position) visit(position);
  }

 private:
  const Op& op(int position) const {
    return schedule_.ops[static_cast<size_t>(position % num_ops_)];
  }
  bool comm(int position) const { return on_communication_stream(op(position).kind); }

  void visit(int position) {
    std::vector<Need> needs = needs_of(position);
    remember(position);
    note_micro_batch(position);
    const Knowledge stream = knowledge_of_stream(position);
    const bool early = op(position).kind == OpKind::kCollect;
    const Knowledge before = early ? at_micro_batch_ : stream;
    drop_implied(needs, before);
    Knowledge begin = stream;
    for (const Need& need : needs) begin.merge(after(need));
    begins_.push_back(begin);
    finishes_.push_back(finish(position, begin));
    (comm(position) ? last_comm_ : last_compute_) = position;
    if (position >= num_ops_) store(position, needs);
  }

  // See Note [Early collection].
  void note_micro_batch(int position) {
    if (comm(position) || last_compute_ < 0) return;
    if (op(position).micro_batch == op(last_compute_).micro_batch &&
        position / num_ops_ == last_compute_ / num_ops_)
      return;
    at_micro_batch_ = finishes_[static_cast<size_t>(last_compute_)];
  }

  std::vector<Need> needs_of(int position) const {
    std::vector<Need> needs;
    for (const Access& access : op(position).accesses) {
      const auto found = histories_.find({access.buffer, access.index});
      if (found == histories_.end()) continue;
      const History& history = found->second;
      // Peers may read the source from begin on, so even this stream's own write must have finished
      // by then.
      if (history.writer >= 0 && (comm(history.writer) != comm(position) || access.by_peers)) {
        needs.push_back({history.writer, Moment::kFinished});
      }
      if (!access.write) continue;
      for (const auto& [reader, by_peers] : history.readers) {
        if (by_peers) {
          needs.push_back({reader, Moment::kReleased});
        } else if (comm(reader) != comm(position)) {
          needs.push_back({reader, Moment::kFinished});
        }
      }
    }
    std::sort(needs.begin(), needs.end());
    needs.erase(std::unique(needs.begin(), needs.end()), needs.end());
    return needs;
  }

  void remember(int position) {
    for (const Access& access : op(position).accesses) {
      History& history = histories_[{access.buffer, access.index}];
      if (access.write) {
        history = {.writer = position, .readers = {}};
      } else {
        history.readers.emplace_back(position, access.by_peers);
      }
    }
  }

  Knowledge knowledge_of_stream(int position) const {
    const int previous = comm(position) ? last_comm_ : last_compute_;
    if (previous < 0) return {};
    // Communication only begins in order; a begin does not wait for the finish before it.
    return (comm(position) ? begins_ : finishes_)[static_cast<size_t>(previous)];
  }

  Knowledge after(const Need& need) const {
    Knowledge known = finishes_[static_cast<size_t>(need.position)];
    if (need.moment == Moment::kReleased) released(need.position, need.position, known);
    return known;
  }

  // Notes that the members of the collective at `position` have all finished communication up to
  // `up_to`.
  void released(int position, int up_to, Knowledge& known) const {
    const bool everybody =
        !is_within_shard_group(op(position).kind) || schedule_.mesh.replicate == 1;
    known.group = std::max(known.group, up_to);
    if (everybody) known.world = std::max(known.world, up_to);
  }

  bool knows(const Knowledge& known, const Need& need) const {
    if (!comm(need.position)) return known.compute >= need.position;
    if (need.moment == Moment::kFinished) return known.comm >= need.position;
    return (is_within_shard_group(op(need.position).kind) ? known.group : known.world) >=
           need.position;
  }

  // "Implies" is happens-before, so it has no cycles and what remains does not depend on the order
  // of dropping: from the last to the first, given `before`, all earlier ones and the later ones
  // that stay.
  void drop_implied(std::vector<Need>& needs, const Knowledge& before) const {
    std::vector<Knowledge> earlier = {before};
    for (const Need& need : needs) {
      earlier.push_back(earlier.back());
      earlier.back().merge(after(need));
    }
    Knowledge later;
    std::vector<Need> kept;
    for (size_t i = needs.size(); i-- > 0;) {
      Knowledge others = earlier[i];
      others.merge(later);
      if (knows(others, needs[i])) continue;
      later.merge(after(needs[i]));
      kept.push_back(needs[i]);
    }
    needs.assign(kept.rbegin(), kept.rend());
  }

  Knowledge finish(int position, const Knowledge& begin) const {
    Knowledge known = begin;
    if (comm(position)) {
      if (last_comm_ >= 0) known.merge(finishes_[static_cast<size_t>(last_comm_)]);
      known.comm = position;
    } else {
      known.compute = position;
    }
    if (is_collective(op(position).kind)) released(position, begin.comm, known);
    return known;
  }

  void store(int position, const std::vector<Need>& needs) {
    std::vector<Dependency>& after = schedule_.ops[static_cast<size_t>(position - num_ops_)].after;
    after.clear();
    for (const Need& need : needs) {
      after.push_back({.op = need.position % num_ops_,
                       .moment = need.moment,
                       .previous_step = need.position < num_ops_});
    }
  }

  Schedule& schedule_;
  const int num_ops_;
  int last_comm_ = -1;
  int last_compute_ = -1;
  Knowledge at_micro_batch_;  // When the micro-batch began.
  std::map<std::pair<BufferKind, int>, History> histories_;
  std::vector<Knowledge> begins_;    // By position.
  std::vector<Knowledge> finishes_;  // By position.
};

}  // namespace

void add_dependencies(Schedule& schedule) { Analysis(schedule).run(); }

}  // namespace fsdp::plan::detail
