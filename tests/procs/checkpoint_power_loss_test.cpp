// Power is lost at every instant of a save: from a log of its system calls, every directory that a
// disk may then hold is built, and loaded.
//
// What a disk may have lost: any data of a file that was not synced since, in whole or in part (cut
// at 512 bytes, or zeros); any name that was made, changed or removed in a directory that was not
// synced since, one without the other. What was synced is there.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <optional>
#include <random>
#include <set>

#include "libfsdp/base/log.h"
#include "libfsdp/checkpoint/checkpoint_files.h"
#include "libfsdp/checkpoint/checkpoint_list.h"
#include "libfsdp/comm/host/thread_world.h"
#include "tests/support/checkpoint_cases.h"
#include "tests/support/rank_threads.h"
#include "tests/support/system_calls.h"

namespace fsdp {
namespace {

namespace fs = std::filesystem;
using checkpoint::CheckpointSave;
using checkpoint::SaveRequest;
using comm::Communicator;
using testing::LoggedCall;
using testing::long_run;
using testing::ScratchDirectory;
using Kind = LoggedCall::Kind;

constexpr int kRanks = 2;
constexpr int64_t kPartBytes = 1500;

/// A logged call by what it acts on, whatever that is called at the time.
struct Operation {
  Kind kind = Kind::kMark;
  int node = -1;       // The file written, resized or synced, or what is made.
  int directory = -1;  // In which names change, or which is synced.
  std::string name;
  std::string new_name;
  int64_t offset = 0;
  std::string data;

  bool changes_names() const {
    return kind == Kind::kMakeFile || kind == Kind::kMakeDirectory || kind == Kind::kRename ||
           kind == Kind::kExchange || kind == Kind::kRemove;
  }
  bool changes_data() const { return kind == Kind::kWrite || kind == Kind::kResize; }
};

/// A tree of files in memory. Node 0 is the directory that was logged.
class Tree {
 public:
  explicit Tree(int nodes) : nodes_(static_cast<size_t>(nodes)) {}

  int find(int directory, const std::string& name) const {
    const auto& names = nodes_[static_cast<size_t>(directory)].names;
    const auto found = names.find(name);
    return found == names.end() ? -1 : found->second;
  }

  /// Applies what can be applied: a name that was never made cannot be changed.
  void apply(const Operation& op, size_t data_bytes = std::string::npos) {
    auto& names = nodes_[static_cast<size_t>(std::max(op.directory, 0))].names;
    auto& content = nodes_[static_cast<size_t>(std::max(op.node, 0))].content;
    switch (op.kind) {
      case Kind::kMakeDirectory:
      case Kind::kMakeFile:
        names[op.name] = op.node;
        return;
      case Kind::kRemove:
        names.erase(op.name);
        return;
      case Kind::kRename:
        if (!names.contains(op.name)) return;
        names[op.new_name] = names[op.name];
        names.erase(op.name);
        return;
      case Kind::kExchange:
        if (names.contains(op.name) && names.contains(op.new_name))
          std::swap(names[op.name], names[op.new_name]);
        return;
      case Kind::kResize:
        content.resize(static_cast<size_t>(op.offset));
        return;
      case Kind::kWrite: {
        const std::string_view data = std::string_view(op.data).substr(0, data_bytes);
        const auto end = static_cast<size_t>(op.offset) + data.size();
        if (content.size() < end) content.resize(end);
        std::copy(data.begin(), data.end(), content.begin() + op.offset);
        return;
      }
      default:
        return;
    }
  }

  void write_to(const std::string& path, const std::vector<bool>& is_directory,
                int node = 0) const {
    for (const auto& [name, child] : nodes_[static_cast<size_t>(node)].names) {
      const std::string below = path + "/" + name;
      if (is_directory[static_cast<size_t>(child)]) {
        fs::create_directory(below);
        write_to(below, is_directory, child);
      } else {
        const io::File file = io::File::create(below);
        const std::string& content = nodes_[static_cast<size_t>(child)].content;
        file.write_at(0, std::as_bytes(std::span(content.data(), content.size())));
      }
    }
  }

  /// Equal trees have equal texts.
  std::string text(int node = 0) const {
    std::string all;
    for (const auto& [name, child] : nodes_[static_cast<size_t>(node)].names) {
      all += name + "(" + text(child) + ")" +
             checkpoint::digest_of(nodes_[static_cast<size_t>(child)].content).hex();
    }
    return all;
  }

 private:
  struct Node {
    std::map<std::string, int> names;
    std::string content;
  };
  std::vector<Node> nodes_;
};

/// The log, with every path resolved.
class History {
 public:
  History(const std::string& root, const std::vector<LoggedCall>& calls) : root_(root) {
    is_directory_ = {true};
    std::vector<Operation> done;
    for (const LoggedCall& call : calls) {
      Tree now(static_cast<int>(is_directory_.size()) + 1);
      for (const Operation& op : done) now.apply(op);
      done.push_back(resolve(call, now));
    }
    operations_ = std::move(done);
  }

  /// As if these calls had not been made; how many there are.
  int forget(const std::function<bool(const Operation&)>& forgotten) {
    int count = 0;
    for (Operation& op : operations_) {
      if (!forgotten(op)) continue;
      op.node = op.directory = -1;
      ++count;
    }
    return count;
  }

  const std::vector<Operation>& operations() const { return operations_; }
  const std::vector<bool>& is_directory() const { return is_directory_; }
  int num_nodes() const { return static_cast<int>(is_directory_.size()); }

 private:
  /// The directory that holds `path`, and the last name of it.
  std::pair<int, std::string> place(const std::string& path, const Tree& now) const {
    check(path.starts_with(root_), "a path outside the log");
    int directory = 0;
    std::string rest = path.substr(root_.size() + 1);
    for (size_t slash; (slash = rest.find('/')) != std::string::npos;
         rest = rest.substr(slash + 1)) {
      directory = now.find(directory, rest.substr(0, slash));
      check(directory >= 0, cat("unknown directory in ", path));
    }
    return {directory, rest};
  }

  Operation resolve(const LoggedCall& call, const Tree& now) {
    Operation op{.kind = call.kind, .offset = call.offset, .data = call.data};
    if (call.kind == Kind::kMark) {
      op.name = call.path;
      return op;
    }
    if (call.path == root_) {
      op.directory = 0;
      return op;
    }
    std::tie(op.directory, op.name) = place(call.path, now);
    if (call.kind == Kind::kMakeFile || call.kind == Kind::kMakeDirectory) {
      op.node = num_nodes();
      is_directory_.push_back(call.kind == Kind::kMakeDirectory);
    } else if (op.changes_names()) {
      if (call.kind != Kind::kRemove) {
        const auto [directory, name] = place(call.to, now);
        check(directory == op.directory, "a rename between directories");
        op.new_name = name;
      }
    } else {
      op.node = now.find(op.directory, op.name);
      check(op.node >= 0, cat("unknown file ", call.path));
      if (call.kind == Kind::kSyncDirectory) op.directory = op.node;
    }
    return op;
  }

  std::string root_;
  std::vector<bool> is_directory_;
  std::vector<Operation> operations_;
};

/// Which operations up to `end` a disk need not hold when power is lost then.
std::vector<size_t> unsynced(const std::vector<Operation>& operations, size_t end) {
  std::vector<size_t> open;
  std::set<int> synced_files;
  std::set<int> synced_directories;
  for (size_t i = end; i-- > 0;) {
    const Operation& op = operations[i];
    if (op.kind == Kind::kSyncFile) synced_files.insert(op.node);
    if (op.kind == Kind::kSyncDirectory) synced_directories.insert(op.directory);
    if (op.changes_data() && !synced_files.contains(op.node)) open.push_back(i);
    if (op.changes_names() && !synced_directories.contains(op.directory)) open.push_back(i);
  }
  std::reverse(open.begin(), open.end());
  return open;
}

/// What a disk holds of the first `end` operations: all but those of `lost`; writes of `torn` as
/// far as they say.
Tree state_of(const History& history, size_t end, const std::set<size_t>& lost,
              const std::map<size_t, size_t>& torn) {
  Tree tree(history.num_nodes());
  for (size_t i = 0; i < end; ++i) {
    if (lost.contains(i)) continue;
    const auto part = torn.find(i);
    tree.apply(history.operations()[i], part == torn.end() ? std::string::npos : part->second);
  }
  return tree;
}

/// What the program that made the log promised at a moment.
struct Promise {
  int64_t returned = 0;  ///< Content of the newest save that has returned.
  int64_t begun = 0;     ///< And of the newest that has begun.
};

class Replay {
 public:
  Replay(const History& history, bool overwrites, uint64_t seed)
      : history_(history), overwrites_(overwrites), random_(seed) {}

  /// All states after each operation; "" or what is wrong with one.
  std::string run() {
    Promise promise;
    for (size_t end = 0; end <= history_.operations().size(); ++end) {
      if (end > 0) note(history_.operations()[end - 1], promise);
      const std::string wrong = try_instant(end, promise);
      if (!wrong.empty()) return cat("after call ", end, ": ", wrong);
    }
    return {};
  }
  int64_t num_states() const { return num_states_; }

 private:
  static void note(const Operation& op, Promise& promise) {
    if (op.kind != Kind::kMark) return;
    const int64_t content = std::stoll(op.name.substr(op.name.find(' ') + 1));
    (op.name.starts_with("begun") ? promise.begun : promise.returned) = content;
  }

  std::string try_instant(size_t end, const Promise& promise) {
    const std::vector<size_t> open = unsynced(history_.operations(), end);
    const std::set<size_t> all(open.begin(), open.end());
    std::string wrong = try_state(end, {}, {}, promise);
    if (wrong.empty()) wrong = try_state(end, all, {}, promise);
    constexpr size_t kMostExhaustive = 8;
    if (open.size() <= kMostExhaustive) {
      for (size_t mask = 1; wrong.empty() && mask + 1 < size_t{1} << open.size(); ++mask) {
        std::set<size_t> lost;
        for (size_t i = 0; i < open.size(); ++i) {
          if ((mask >> i & 1) != 0) lost.insert(open[i]);
        }
        wrong = try_state(end, lost, {}, promise);
      }
    }
    for (size_t i = 0; wrong.empty() && i < open.size(); ++i) {
      wrong = try_state(end, {open[i]}, {}, promise);
      std::set<size_t> others = all;
      others.erase(open[i]);
      if (wrong.empty()) wrong = try_state(end, others, {}, promise);
    }
    const int samples = open.empty() ? 0 : long_run() ? 200 : 8;
    for (int i = 0; wrong.empty() && i < samples; ++i) wrong = try_random(end, open, promise);
    return wrong;
  }

  std::string try_random(size_t end, const std::vector<size_t>& open, const Promise& promise) {
    std::set<size_t> lost;
    std::map<size_t, size_t> torn;
    const uint64_t share = 1 + random_() % 9;
    for (const size_t i : open) {
      const Operation& op = history_.operations()[i];
      if (random_() % 10 < share) {
        lost.insert(i);
      } else if (op.kind == Kind::kWrite && random_() % 2 == 0) {
        torn[i] = random_() % (op.data.size() / 512 + 1) * 512;
      }
    }
    return try_state(end, lost, torn, promise);
  }

  std::string try_state(size_t end, const std::set<size_t>& lost,
                        const std::map<size_t, size_t>& torn, const Promise& promise) {
    const Tree tree = state_of(history_, end, lost, torn);
    const auto [ignored, is_new] =
        seen_.insert(cat(tree.text(), " ", promise.returned, " ", promise.begun));
    if (!is_new) return {};
    ++num_states_;
    const ScratchDirectory scratch("/dev/shm");
    tree.write_to(scratch.path(), history_.is_directory());
    const auto comm = comm::make_single();
    const std::string before = look(scratch.path(), *comm, promise);
    if (!before.empty()) return before;
    // The next run tidies up and finds the same.
    const CheckpointSave next(*comm, scratch.path());
    const auto strays = testing::strays(scratch.path());
    if (!strays.empty()) return cat("the next run leaves ", strays[0]);
    const std::string after = look(scratch.path(), *comm, promise);
    return after.empty() ? after : "after tidying up: " + after;
  }

  /// Is the newest whole checkpoint one that may be there?
  std::string look(const std::string& directory, Communicator& comm, const Promise& promise) const {
    checkpoint::CheckpointList list(directory);
    const auto found = list.newest_whole(comm);
    const int64_t content = found ? testing::content_of(found->path, kRanks, kPartBytes) : 0;
    if (content < 0) return "a mix of two contents was taken for whole";
    if (content < promise.returned)
      return cat("content ", content, " is found, a save of ", promise.returned, " had returned");
    if (content > promise.begun) return cat("content ", content, " comes from nowhere");
    // A damaged one under a good name is never the fruit of a power loss.
    for (const auto& one : list.skipped()) return cat("skipped: ", one.why);
    if (overwrites_ && list.entries().size() > 1) return "two names of one step";
    return {};
  }

  const History& history_;
  bool overwrites_;
  std::mt19937_64 random_;
  std::set<std::string> seen_;
  int64_t num_states_ = 0;
};

/// Three saves, logged.
struct Scenario {
  std::string name;
  bool overwrite = false;
  int64_t limit = 0;
  bool in_background = false;
};

History logged_run(const Scenario& scenario) {
  const ScratchDirectory scratch("/dev/shm");
  const std::string root = fs::canonical(scratch.path()).string();
  testing::start_log(root);
  testing::run_ranks(kRanks, [&](Communicator& comm) {
    CheckpointSave save(comm, root);
    for (const int64_t content : {1, 2, 3}) {
      SaveRequest request = testing::request_of(scenario.overwrite ? 7 : content, comm.rank(),
                                                kRanks, kPartBytes, content);
      request.overwrite = scenario.overwrite;
      request.save_total_limit = scenario.limit;
      request.in_background = scenario.in_background;
      if (comm.rank() == 0) testing::log_mark(cat("begun ", content));
      comm.barrier(comm::make_tag("begun"));
      save.save(std::move(request));
      if (comm.rank() == 0) testing::log_mark(cat("returned ", content));
      comm.barrier(comm::make_tag("returned"));
    }
  });
  return History(root, testing::take_log());
}

const std::vector<Scenario> kScenarios = {
    {.name = "new steps"},
    {.name = "overwrite", .overwrite = true},
    {.name = "limit 1", .limit = 1},
    {.name = "in background, limit 2", .limit = 2, .in_background = true},
};

TEST(CheckpointPowerLossTest, EveryStateLoadsTheOldOrTheNewAndWhatReturnedStays) {
  log::set_level(log::Level::kError);
  for (const Scenario& scenario : kScenarios) {
    const History history = logged_run(scenario);
    ASSERT_GT(history.operations().size(), 60U);
    Replay replay(history, scenario.overwrite, 20260228);
    EXPECT_EQ(replay.run(), "") << scenario.name;
    std::printf("%s: %zu calls, %ld states\n", scenario.name.c_str(), history.operations().size(),
                static_cast<long>(replay.num_states()));
  }
}

// The replay itself must be able to fail.
TEST(CheckpointPowerLossTest, EverySyncIsNeeded) {
  log::set_level(log::Level::kError);
  const std::vector<std::pair<std::string, std::function<bool(const Operation&)>>> syncs = {
      {"model.safetensors", {}},
      {"trainer_state.json", {}},
      {"rank-1.safetensors", {}},
      {"manifest.json", {}},
      {"manifest-00002-of-00002.json", {}},
      {"optimizer", {}},
      {".tmp-checkpoint-", {}},
      {"", [](const Operation& op) { return op.kind == Kind::kSyncDirectory && op.name.empty(); }}};
  for (const bool overwrite : {false, true}) {
    for (const auto& [name, matches] : syncs) {
      History history = logged_run({.name = "forgetful", .overwrite = overwrite});
      const int forgotten =
          history.forget([&, &file = name, &match = matches](const Operation& op) {
            const bool sync = op.kind == Kind::kSyncFile || op.kind == Kind::kSyncDirectory;
            return match ? match(op) : sync && op.name.starts_with(file);
          });
      EXPECT_GE(forgotten, 3) << name;
      EXPECT_NE(Replay(history, overwrite, 1).run(), "") << "without the sync of '" << name << "'";
    }
  }
}

}  // namespace
}  // namespace fsdp
