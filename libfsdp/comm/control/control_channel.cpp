#include "libfsdp/comm/control/control_channel.h"

#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <map>
#include <mutex>
#include <thread>

#include "libfsdp/base/error.h"
#include "libfsdp/comm/control/control_frames.h"
#include "libfsdp/comm/os/quiet_thread.h"
#include "libfsdp/comm/os/tcp_socket.h"

namespace fsdp::comm {
namespace {

using namespace control;

constexpr int kTickMs = 50;
constexpr int kHurryMs = 5;  // While somebody waits to go.
constexpr double kAbortSeconds = 0.5;

double seconds_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

class ControlChannel::Client {
 public:
  Client(const std::string& host, int port, int rank, int size, const std::string& token,
         double join_timeout_s, const CommOptions& options, ControlEvents events)
      : rank_(rank), size_(size), options_(options), events_(std::move(events)) {
    const double end = seconds_now() + join_timeout_s;
    socket_ = connect_tcp(host, port, join_timeout_s);
    say_hello(token);
    wait_for_start(cat(host, ":", port), end + 2);  // The hub gives up first, and says why.
    end_when_unreachable(socket_.get(), options_.peer_timeout_s);
  }

  ~Client() { stop(); }

  void stop() {
    stop_ = true;
    if (thread_.joinable()) thread_.join();
  }

  void start() {
    thread_ = start_quiet_thread([this] { run(); });
  }

  std::string address() const { return local_address(socket_.get()); }

  void report(SignOfLife sign) {
    const std::lock_guard lock(mutex_);
    sign.waits_for = state_.waits_for;
    sign.waits_in = state_.waits_in;
    sign.waited_s = state_.waited_s;
    state_ = sign;
  }

  void report_waiting(int member, const Tag& what, double waited_s) {
    const std::lock_guard lock(mutex_);
    state_.waits_for = member;
    state_.waits_in = what;
    state_.waited_s = waited_s;
  }

  void send_frame(Type type, std::string_view bytes) {
    const std::lock_guard lock(send_mutex_);
    out_.push(type, bytes);
    out_.flush(socket_.get());  // A broken connection is noticed by the thread.
  }

  /// Asks the hub; empty if there is no answer within `timeout_s`.
  std::optional<std::string> ask(Type type, std::string_view bytes, double timeout_s) {
    std::unique_lock lock(mutex_);
    const uint64_t question = ++questions_;
    lock.unlock();
    send_frame(type, cat(as_bytes(question), bytes));
    lock.lock();
    const auto answered = [&] {
      return answers_.count(question) != 0 || closed_ || (type == kGet && broken_);
    };
    changed_.wait_for(lock, std::chrono::duration<double>(timeout_s), answered);
    const auto found = answers_.find(question);
    if (found == answers_.end()) return std::nullopt;
    std::string answer = std::move(found->second);
    answers_.erase(found);
    return answer;
  }

  void abort(const std::string& text) noexcept {
    try {
      send_frame(kAbort, std::string_view(text).substr(0, 8000));
      if (std::this_thread::get_id() == thread_.get_id()) return;
      // The hub's echo says that all others have been told, so that this process may end at once.
      std::unique_lock lock(mutex_);
      changed_.wait_for(lock, std::chrono::duration<double>(kAbortSeconds),
                        [&] { return aborted_ || closed_; });
    } catch (...) {  // Out of memory: the end of this process tells the others.
    }
  }

  void leave(uint64_t begun, double timeout_s) {
    SignOfLife state;
    {
      const std::lock_guard lock(mutex_);
      state = state_;
    }
    state.begun = begun;
    hurry_ = true;
    send_frame(kLeft, as_bytes(state));
    std::unique_lock lock(mutex_);
    changed_.wait_for(lock, std::chrono::duration<double>(timeout_s),
                      [&] { return may_go_ || closed_ || aborted_; });
  }

 private:
  void say_hello(const std::string& token) {
    if (token.size() > kTokenBytes)
      throw ConfigError(
          cat("[comm] a rendezvous token of ", token.size(), " characters; at most ", kTokenBytes));
    Hello hello;
    hello.rank = rank_;
    hello.size = size_;
    std::memcpy(hello.token, token.data(), token.size());
    send(socket_.get(), &hello, sizeof(hello), MSG_NOSIGNAL);
  }

  void wait_for_start(const std::string& place, double end) {
    for (;;) {
      const FrameReader::Status status = in_.read_from(socket_.get());
      while (const std::optional<Frame> frame = in_.next()) {
        if (frame->type == kStart) return;
        if (frame->type == kAbort) throw CommError(cat("[comm] ", frame->bytes));
      }
      if (status == FrameReader::Status::kClosed) {
        throw CommError(cat("[comm] rank ", rank_, " was not let in at ", place,
                            ". Hint: is the token the same on all ranks, and is it this program "
                            "that listens there?"));
      }
      if (seconds_now() > end)
        throw CommError(cat("[comm] rank ", rank_, " heard nothing from rank 0 at ", place));
      pollfd ready{socket_.get(), POLLIN, 0};
      poll(&ready, 1, kTickMs);
    }
  }

  // ---- The thread ----

  void run() {
    double last = seconds_now();
    double last_alive = 0;
    double silent_s = 0;
    while (!stop_) {
      pollfd ready{socket_.get(), static_cast<short>(is_closed() ? 0 : POLLIN), 0};
      poll(&ready, is_closed() ? 0 : 1, hurry_ ? kHurryMs : kTickMs);
      const double now = seconds_now();
      silent_s = hear() ? 0 : silent_s + std::min(now - last, longest_slice_s(options_));
      last = now;
      if (silent_s > options_.peer_timeout_s && !is_closed()) {
        close(cat("has shown no sign of life for ", options_.peer_timeout_s,
                  " s (its process is stopped, or its host cannot be reached)"));
      }
      if (hurry_ || now - last_alive >= alive_every_s(options_)) {
        last_alive = now;
        show_life();
      }
      if (events_.tick) events_.tick();
    }
  }

  void show_life() {
    SignOfLife state;
    {
      const std::lock_guard lock(mutex_);
      state = state_;
    }
    const std::lock_guard lock(send_mutex_);
    if (out_.empty()) out_.push(kAlive, as_bytes(state));
    out_.flush(socket_.get());
  }

  bool is_closed() {
    const std::lock_guard lock(mutex_);
    return closed_;
  }

  /// True if rank 0 has said anything.
  bool hear() {
    if (is_closed()) return true;
    const FrameReader::Status status = in_.read_from(socket_.get());
    bool heard = false;
    while (const std::optional<Frame> frame = in_.next()) {
      handle(*frame);
      heard = true;
    }
    if (status == FrameReader::Status::kClosed)
      close("is gone: its process has ended, or its connection broke");
    return heard;
  }

  void close(const std::string& why) {
    {
      const std::lock_guard lock(mutex_);
      closed_ = true;
    }
    changed_.notify_all();
    if (!hub_left_) events_.lost(0, why);
  }

  void handle(const Frame& frame) {
    std::string_view rest = frame.bytes;
    int32_t rank = 0;
    uint64_t number = 0;
    switch (frame.type) {
      case kAbort:
        set_flag(broken_);
        set_flag(aborted_);
        return events_.aborted(frame.bytes);
      case kMayGo:
        return set_flag(may_go_);
      case kLost:
        set_flag(broken_);
        if (take(rest, rank)) events_.lost(rank, std::string(rest));
        return;
      case kLeft:
        hurry_ = true;
        if (!take(rest, rank) || !take(rest, number)) return;
        hub_left_ = hub_left_ || rank == 0;
        return events_.left(rank, number);
      case kAnswer: {
        if (!take(rest, number)) return;
        const std::lock_guard lock(mutex_);
        answers_[number] = rest;
        changed_.notify_all();
        return;
      }
      default:
        return;  // A sign of life.
    }
  }

  void set_flag(bool& flag) {
    {
      const std::lock_guard lock(mutex_);
      flag = true;
    }
    changed_.notify_all();
  }

  int rank_;
  int size_;
  CommOptions options_;
  ControlEvents events_;
  FileDescriptor socket_;
  FrameReader in_;
  std::mutex send_mutex_;
  FrameWriter out_;
  std::mutex mutex_;  // Of all that follows, up to the flags of the thread.
  std::condition_variable changed_;
  SignOfLife state_;
  uint64_t questions_ = 0;
  std::map<uint64_t, std::string> answers_;
  bool aborted_ = false;
  bool may_go_ = false;
  bool closed_ = false;
  bool broken_ = false;    // A rank is lost: nobody need wait for what it might have set.
  bool hub_left_ = false;  // Of the thread alone.
  std::atomic<bool> hurry_{false};
  std::atomic<bool> stop_{false};
  std::thread thread_;
};

ControlChannel::ControlChannel(const std::string& host, int port, int rank, int size,
                               const std::string& token, double join_timeout_s,
                               const CommOptions& options, ControlEvents events)
    : client_(std::make_unique<Client>(host, port, rank, size, token, join_timeout_s, options,
                                       std::move(events))) {}
ControlChannel::~ControlChannel() = default;

void ControlChannel::start() { client_->start(); }
void ControlChannel::stop() { client_->stop(); }
std::string ControlChannel::address() const { return client_->address(); }

void ControlChannel::set(const std::string& key, const std::string& value) {
  client_->send_frame(kSet, cat(as_bytes(static_cast<uint32_t>(key.size())), key, value));
}

std::string ControlChannel::get(const std::string& key, double timeout_s) {
  auto answer = client_->ask(kGet, key, timeout_s);
  if (!answer) throw CommError(cat("[comm] nobody has set '", key, "' within ", timeout_s, " s"));
  return *std::move(answer);
}

int64_t ControlChannel::add(const std::string& key, int64_t value) {
  const auto answer = client_->ask(kAdd, cat(as_bytes(value), key), 30);
  if (!answer) throw CommError(cat("[comm] rank 0 does not answer about '", key, "'"));
  return std::atoll(answer->c_str());
}

bool ControlChannel::has(const std::string& key) {
  const auto answer = client_->ask(kHas, key, 30);
  if (!answer) throw CommError(cat("[comm] rank 0 does not answer about '", key, "'"));
  return !answer->empty();
}

void ControlChannel::report(const SignOfLife& sign) { client_->report(sign); }

void ControlChannel::report_waiting(int member, const Tag& what, double waited_s) {
  client_->report_waiting(member, what, waited_s);
}

std::vector<SignOfLife> ControlChannel::signs_of_life(double timeout_s) {
  std::vector<SignOfLife> all;
  const auto answer = client_->ask(kStates, {}, timeout_s);
  if (!answer) return all;
  std::string_view rest = *answer;
  for (SignOfLife one; take(rest, one);) all.push_back(one);
  return all;
}

void ControlChannel::abort(const std::string& text) noexcept { client_->abort(text); }

void ControlChannel::leave(uint64_t begun, double timeout_s) { client_->leave(begun, timeout_s); }

}  // namespace fsdp::comm
