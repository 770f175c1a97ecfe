#include "libfsdp/gloo/mesh.h"

#include <ATen/ops/from_blob.h>
#include <sys/socket.h>

#include <chrono>
#include <csignal>
#include <filesystem>
#include <mutex>
#include <set>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>

#include "libfsdp/base/error.h"
#include "libfsdp/comm/os/tcp_socket.h"

namespace fsdp::gloo {
namespace {

// Our own clocks end every wait long before: see GlooCommunicator.
constexpr auto kNever = std::chrono::hours(24 * 20);

/// The hub's store as c10d wants it.
class ControlStore final : public c10d::Store {
 public:
  explicit ControlStore(comm::ControlChannel& control) : control_(&control) {}
  c10::intrusive_ptr<c10d::Store> clone() override {
    return c10::make_intrusive<ControlStore>(*control_);
  }
  void set(const std::string& key, const std::vector<uint8_t>& value) override {
    control_->set(key, {value.begin(), value.end()});
  }
  std::vector<uint8_t> get(const std::string& key) override {
    const std::string value =
        control_->get(key, std::chrono::duration<double>(getTimeout()).count());
    return {value.begin(), value.end()};
  }
  int64_t add(const std::string& key, int64_t value) override { return control_->add(key, value); }
  bool deleteKey(const std::string&) override { return false; }
  bool check(const std::vector<std::string>& keys) override {
    for (const std::string& key : keys) {
      if (!control_->has(key)) return false;
    }
    return true;
  }
  int64_t getNumKeys() override { return 0; }
  void wait(const std::vector<std::string>& keys) override { wait(keys, getTimeout()); }
  void wait(const std::vector<std::string>& keys,
            const std::chrono::milliseconds& timeout) override {
    for (const std::string& key : keys)
      control_->get(key, std::chrono::duration<double>(timeout).count());
  }

 private:
  comm::ControlChannel* control_;
};

/// Keeps signals from the calling thread, and from threads that it starts meanwhile.
class NoSignals {
 public:
  explicit NoSignals(const sigset_t& blocked) { pthread_sigmask(SIG_BLOCK, &blocked, &before_); }
  ~NoSignals() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

 private:
  sigset_t before_{};
};

/// gloo writes to sockets without MSG_NOSIGNAL: a peer that has gone must not end this process.
class NoPipeSignal {
 public:
  NoPipeSignal() : blocked_(pipe_signal()) {}
  ~NoPipeSignal() {
    sigset_t pending;
    sigpending(&pending);
    const timespec now{};
    if (sigismember(&pending, SIGPIPE) == 1) {
      const sigset_t pipe = pipe_signal();
      sigtimedwait(&pipe, nullptr, &now);
    }
  }

 private:
  static sigset_t pipe_signal() {
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGPIPE);
    return set;
  }
  NoSignals blocked_;
};

std::set<int> open_descriptors() {
  std::set<int> open;
  for (const auto& entry : std::filesystem::directory_iterator("/proc/self/fd"))
    open.insert(std::atoi(entry.path().filename().c_str()));
  return open;
}

/// Without c10's backtrace.
std::string text_of(const std::exception& e) {
  const auto* error = dynamic_cast<const c10::Error*>(&e);
  return error == nullptr ? e.what() : error->what_without_backtrace();
}

class GlooTransfer final : public Transfer {
 public:
  explicit GlooTransfer(c10::intrusive_ptr<c10d::Work> work) : work_(std::move(work)) {}
  bool wait() override {
    try {
      return work_->wait(std::chrono::duration_cast<std::chrono::milliseconds>(kNever));
    } catch (const std::exception& e) {
      throw CommError(text_of(e));
    }
  }
  void abort() override { work_->abort(); }

 private:
  c10::intrusive_ptr<c10d::Work> work_;
};

}  // namespace

struct Mesh::State {
  std::mutex mutex;  // c10d's group is for one thread at a time.
  c10::intrusive_ptr<c10d::ProcessGroupGloo> group;
};

Mesh::Mesh(comm::ControlChannel& control, int rank, int size, const std::string& address,
           double join_timeout_s, double unreachable_s)
    : state_(std::make_unique<State>()) {
  const std::set<int> before = open_descriptors();
  sigset_t all;
  sigfillset(&all);
  const NoSignals blocked(all);  // Signals are for the program's own threads, not for gloo's.
  try {
    const auto join_time = std::chrono::duration_cast<std::chrono::milliseconds>(
        std::chrono::duration<double>(join_timeout_s));
    auto store = c10::make_intrusive<ControlStore>(control);
    store->setTimeout(join_time);
    auto options = c10d::ProcessGroupGloo::Options::create(join_time);
    options->devices.push_back(c10d::ProcessGroupGloo::createDeviceForHostname(address, false));
    options->threads = 1;  // Sends and receives are the device thread's; none of c10d's are used.
    state_->group = c10::make_intrusive<c10d::ProcessGroupGloo>(
        c10::intrusive_ptr<c10d::Store>(std::move(store)), rank, size, std::move(options));
  } catch (const CommError&) {
    throw;
  } catch (const std::exception& e) {
    throw CommError(cat("[gloo] rank ", rank, " at ", address,
                        " cannot connect to the other ranks: ", text_of(e)));
  }
  for (const int fd : open_descriptors()) {
    if (before.count(fd) == 0) comm::end_when_unreachable(fd, unreachable_s);
  }
}

Mesh::~Mesh() = default;

namespace {

std::vector<at::Tensor> as_tensors(const void* data, size_t bytes) {
  return {
      at::from_blob(const_cast<void*>(data), {static_cast<int64_t>(bytes)}, at::dtype(at::kByte))};
}

}  // namespace

std::unique_ptr<Transfer> Mesh::send(int to, int channel, const void* data, size_t bytes) {
  std::vector<at::Tensor> tensors = as_tensors(data, bytes);
  const NoPipeSignal no_signal;
  const std::lock_guard lock(state_->mutex);
  try {
    return std::make_unique<GlooTransfer>(state_->group->send(tensors, to, channel));
  } catch (const std::exception& e) {
    throw CommError(text_of(e));
  }
}

std::unique_ptr<Transfer> Mesh::receive(int from, int channel, void* data, size_t bytes) {
  std::vector<at::Tensor> tensors = as_tensors(data, bytes);
  const NoPipeSignal no_signal;
  const std::lock_guard lock(state_->mutex);
  try {
    return std::make_unique<GlooTransfer>(state_->group->recv(tensors, from, channel));
  } catch (const std::exception& e) {
    throw CommError(text_of(e));
  }
}

}  // namespace fsdp::gloo
