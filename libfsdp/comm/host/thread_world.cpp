#include "libfsdp/comm/host/thread_world.h"

#include <map>
#include <mutex>

#include "libfsdp/comm/host/peer_communicator.h"

namespace fsdp::comm {

struct ThreadWorld::State {
  State(int size, const CommOptions& options)
      : options(options),
        memory(Mapping::anonymous(ControlView::bytes(size))),
        control(ControlView::create(memory->data(), size)) {}

  CommOptions options;
  std::shared_ptr<Mapping> memory;
  ControlView control;
  std::mutex mutex;
  // Blocks of allocations that are under way: allocation number -> rank -> block.
  std::map<uint32_t, std::map<int, std::shared_ptr<Mapping>>> parts;
};

class ThreadWorld::Rank final : public PeerCommunicator {
 public:
  Rank(std::shared_ptr<State> state, int rank)
      : PeerCommunicator(state->memory, state->control, rank, state->options),
        state_(std::move(state)) {}

 private:
  std::shared_ptr<Mapping> create_part(uint32_t id, const Group&, size_t bytes,
                                       std::string_view) override {
    auto part = Mapping::anonymous(bytes);
    const std::lock_guard lock(state_->mutex);
    state_->parts[id][rank()] = part;
    return part;
  }

  std::shared_ptr<Mapping> attach_part(uint32_t id, int owner, size_t, bool) override {
    const std::lock_guard lock(state_->mutex);
    return state_->parts.at(id).at(owner);
  }

  void parts_settled(uint32_t id) override {
    const std::lock_guard lock(state_->mutex);
    const auto parts = state_->parts.find(id);
    if (parts == state_->parts.end()) return;
    parts->second.erase(rank());
    if (parts->second.empty()) state_->parts.erase(parts);
  }

  std::string why_lost(int) override { return {}; }  // Threads of one process die together.

  std::shared_ptr<State> state_;
};

ThreadWorld::ThreadWorld(int size, const CommOptions& options)
    : state_(std::make_shared<State>(size, options)) {}
ThreadWorld::~ThreadWorld() = default;

int ThreadWorld::size() const { return state_->control.size(); }

std::unique_ptr<Communicator> ThreadWorld::communicator(int rank) {
  check(rank >= 0 && rank < size(), cat("rank ", rank, " of a world of ", size()));
  return std::make_unique<Rank>(state_, rank);
}

std::unique_ptr<Communicator> make_single() { return ThreadWorld(1).communicator(0); }

}  // namespace fsdp::comm
