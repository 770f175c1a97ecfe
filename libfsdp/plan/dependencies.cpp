// Derives what an operation must wait for, in the steady state of steps that follow each other.
//
// Note [Knowledge] What has surely happened when an operation begins is a few positions in the
// unrolled issue order, because all streams are ordered: for each stream, up to which operation
// everything has finished here; for each scope, up to which communication everything has finished
// on every rank of it. The latter grow by collectives: all ranks run the same schedule, so what
// this rank knew to be finished when it began a collective was finished on every member when that
// member began; and nobody's finish comes before everybody's begin. A dependency that the knowledge
// of the stream and of the other dependencies contains is left out.
//
// Note [Destinations] What a collective writes it writes after all its members have begun, so that
// by then they have finished whatever they had to finish before.
//
// Note [Early collection] Gradients may be written into their slot as soon as they arrive, before
// the stream has come to their kCollect. So what a kCollect must wait for is derived as if it stood
// at the begin of its micro-batch.
#include <algorithm>
#include <array>
#include <map>
#include <utility>

#include "libfsdp/plan/dependencies_impl.h"

namespace fsdp::plan::detail {
namespace {

size_t at(Stream stream) { return static_cast<size_t>(stream); }
size_t at(Scope scope) { return static_cast<size_t>(scope); }

constexpr int kNumScopes = 3;

struct Knowledge {
  std::array<int, kNumStreams> here = {-1, -1, -1};       // By stream: finished on this rank.
  std::array<int, kNumScopes> everywhere = {-1, -1, -1};  // By scope: communication finished.

  void merge(const Knowledge& other) {
    for (size_t i = 0; i < here.size(); ++i) here[i] = std::max(here[i], other.here[i]);
    for (size_t i = 0; i < everywhere.size(); ++i)
      everywhere[i] = std::max(everywhere[i], other.everywhere[i]);
  }
};

struct Need {
  int position = 0;
  Moment moment = Moment::kFinished;
  bool at_begin = true;  // Else when data moves: after all members of a collective have begun.

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
  Stream stream(int position) const { return stream_of(op(position).kind); }
  int& last(Stream stream) { return last_[at(stream)]; }
  int last(Stream stream) const { return last_[at(stream)]; }

  void visit(int position) {
    std::vector<Need> needs = needs_of(position);
    remember(position);
    note_micro_batch(position);
    const Knowledge own = knowledge_of_stream(position);
    const bool early = op(position).kind == OpKind::kCollect;
    const Knowledge before = early ? at_micro_batch_ : own;
    drop_implied(position, needs, before);
    Knowledge begin = own;
    for (const Need& need : needs) begin.merge(after(need));
    begins_.push_back(begin);
    finishes_.push_back(finish(position, begin));
    last(stream(position)) = position;
    if (position >= num_ops_) store(position, needs);
  }

  // See Note [Early collection].
  void note_micro_batch(int position) {
    const int before = last(Stream::kCompute);
    if (stream(position) != Stream::kCompute || before < 0) return;
    if (op(position).micro_batch == op(before).micro_batch &&
        position / num_ops_ == before / num_ops_)
      return;
    at_micro_batch_ = finishes_[static_cast<size_t>(before)];
  }

  std::vector<Need> needs_of(int position) const {
    std::vector<Need> needs;
    const bool moves = stream(position) == Stream::kCommunication;
    for (const Access& access : op(position).accesses) {
      const bool at_begin = !moves || !access.write;
      const auto found = histories_.find({access.buffer, access.index});
      if (found == histories_.end()) continue;
      const History& history = found->second;
      // Peers may read the source from begin on, so even this stream's own write must have finished
      // by then.
      if (history.writer >= 0 && (stream(history.writer) != stream(position) || access.by_peers)) {
        needs.push_back({history.writer, Moment::kFinished, at_begin});
      }
      if (!access.write) continue;
      for (const auto& [reader, by_peers] : history.readers) {
        if (by_peers) {
          needs.push_back({reader, Moment::kReleased, at_begin});
        } else if (stream(reader) != stream(position)) {
          needs.push_back({reader, Moment::kFinished, at_begin});
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
    const int previous = last(stream(position));
    if (previous < 0) return {};
    // Communication and copies only begin in order; a begin does not wait for the finish before it.
    const bool compute = stream(position) == Stream::kCompute;
    return (compute ? finishes_ : begins_)[static_cast<size_t>(previous)];
  }

  Knowledge after(const Need& need) const {
    Knowledge known = finishes_[static_cast<size_t>(need.position)];
    if (is_release(need)) released(need.position, need.position, known);
    return known;
  }

  // Notes that the members of the collective at `position` have all finished communication up to
  // `up_to`.
  void released(int position, int up_to, Knowledge& known) const {
    const Scope scope = op(position).scope;
    const auto note = [&](Scope on) {
      known.everywhere[at(on)] = std::max(known.everywhere[at(on)], up_to);
    };
    note(scope);
    // Without replicas the shard group is the world. How many ranks it has does not matter.
    const bool everybody =
        scope == Scope::kWorld || (scope == Scope::kShardGroup && schedule_.mesh.replicate == 1);
    if (!everybody) return;
    for (const Scope all : {Scope::kShardGroup, Scope::kReplicas, Scope::kWorld}) note(all);
  }

  // Who reads peers' shards in place is released by the packet, and finished before.
  bool is_release(const Need& need) const {
    return need.moment == Moment::kReleased && stream(need.position) == Stream::kCommunication;
  }

  bool knows(const Knowledge& known, const Need& need) const {
    if (is_release(need)) return known.everywhere[at(op(need.position).scope)] >= need.position;
    return known.here[at(stream(need.position))] >= need.position;
  }

  // "Implies" is happens-before, so it has no cycles and what remains does not depend on the order
  // of dropping: from the last to the first, given `before`, all earlier ones and the later ones
  // that stay.
  void drop_implied(int position, std::vector<Need>& needs, const Knowledge& before) const {
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
      if (!needs[i].at_begin) released(position, others.here[at(Stream::kCommunication)], others);
      if (knows(others, needs[i])) continue;
      later.merge(after(needs[i]));
      kept.push_back(needs[i]);
    }
    needs.assign(kept.rbegin(), kept.rend());
  }

  Knowledge finish(int position, const Knowledge& begin) const {
    Knowledge known = begin;
    const int previous = last(stream(position));
    if (previous >= 0) known.merge(finishes_[static_cast<size_t>(previous)]);
    known.here[at(stream(position))] = position;
    if (is_collective(op(position).kind))
      released(position, begin.here[at(Stream::kCommunication)], known);
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
  std::array<int, kNumStreams> last_ = {-1, -1, -1};  // By stream: the operation before.
  Knowledge at_micro_batch_;                          // When the micro-batch began.
  std::map<std::pair<BufferKind, int>, History> histories_;
  std::vector<Knowledge> begins_;    // By position.
  std::vector<Knowledge> finishes_;  // By position.
};

}  // namespace

void add_dependencies(Schedule& schedule) { Analysis(schedule).run(); }

}  // namespace fsdp::plan::detail
