#include "libfsdp/comm/control/control_hub.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <map>
#include <thread>
#include <vector>

#include "libfsdp/base/error.h"
#include "libfsdp/comm/control/control_frames.h"
#include "libfsdp/comm/os/quiet_thread.h"
#include "libfsdp/comm/os/tcp_socket.h"

namespace fsdp::comm {
namespace {

using namespace control;

constexpr size_t kMaxStrangers = 64;    // That have not shown the token yet.
constexpr double kStrangerSeconds = 5;  // To show it.
constexpr double kGoodbyeSeconds = 5;   // For the others to go before the hub does.
constexpr int kTickMs = 50;

double seconds_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

/// Takes equally long for every wrong token.
bool same_token(const char* a, const char* b) {
  unsigned difference = 0;
  for (size_t i = 0; i < kTokenBytes; ++i) difference |= static_cast<unsigned char>(a[i] ^ b[i]);
  return difference == 0;
}

}  // namespace

class ControlHub::Server {
 public:
  Server(const std::string& host, int port, int size, const std::string& token,
         double join_timeout_s, const CommOptions& options)
      : place_(cat(host, ":", port)),
        options_(options),
        members_(size),
        listener_(listen_tcp(host, port)),
        wake_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)),
        join_end_(seconds_now() + join_timeout_s) {
    if (token.size() > kTokenBytes)
      throw ConfigError(
          cat("[comm] a rendezvous token of ", token.size(), " characters; at most ", kTokenBytes));
    std::memcpy(token_, token.data(), token.size());
    port_ = local_port(listener_.get());
    place_ = cat(host, ":", port_);
    thread_ = start_quiet_thread([this] { serve(); });
  }

  ~Server() {
    stop_ = true;
    const uint64_t one = 1;
    [[maybe_unused]] const ssize_t written = write(wake_.get(), &one, sizeof(one));
    thread_.join();
  }

  int port() const { return port_; }

 private:
  struct Member {
    FileDescriptor socket;
    FrameReader in;
    FrameWriter out;
    SignOfLife state;
    double silent_s = 0;
    bool may_go = false;
    std::multimap<std::string, uint64_t> questions;  // Keys that nobody has set yet.
  };
  struct Stranger {
    FileDescriptor socket;
    std::string bytes;
    std::string from;
    double since;
  };

  // ---- The loop ----

  void serve() {
    double last = seconds_now();
    double goodbye_end = 0;
    for (;;) {
      wait_for_events();
      const double now = seconds_now();
      accept_all(now);
      for (size_t i = 0; i < strangers_.size();) hear_stranger(i, now);
      for (size_t rank = 0; rank < members_.size(); ++rank) hear_member(static_cast<int>(rank));
      look_after(now, std::min(now - last, longest_slice_s(options_)));
      last = now;
      for (Member& member : members_) {
        if (member.socket && !member.out.flush(member.socket.get())) member.in = {};
      }
      if (!stop_) continue;
      if (goodbye_end == 0) goodbye_end = now + kGoodbyeSeconds;
      if (now > goodbye_end || nobody_is_here()) return;
    }
  }

  bool nobody_is_here() const {
    return std::none_of(members_.begin(), members_.end(),
                        [](const Member& member) { return static_cast<bool>(member.socket); });
  }

  void wait_for_events() {
    polls_.clear();
    if (!stop_) polls_.push_back({wake_.get(), POLLIN, 0});
    if (listener_) polls_.push_back({listener_.get(), POLLIN, 0});
    for (const Stranger& one : strangers_) polls_.push_back({one.socket.get(), POLLIN, 0});
    for (const Member& one : members_) {
      const auto events = static_cast<short>(one.out.empty() ? POLLIN : POLLIN | POLLOUT);
      if (one.socket) polls_.push_back({one.socket.get(), events, 0});
    }
    poll(polls_.data(), polls_.size(), kTickMs);
  }

  // ---- Joining ----

  void accept_all(double now) {
    while (listener_) {
      std::string from;
      FileDescriptor socket = accept_tcp(listener_.get(), from);
      if (!socket) return;
      if (strangers_.size() == kMaxStrangers) strangers_.erase(strangers_.begin());
      strangers_.push_back({std::move(socket), {}, from, now});
    }
  }

  /// Reads what stranger i has sent; he is gone from the list, or i is the next.
  void hear_stranger(size_t& i, double now) {
    Stranger& one = strangers_[i];
    char part[sizeof(Hello)];
    const ssize_t got =
        recv(one.socket.get(), part, sizeof(Hello) - one.bytes.size(), MSG_DONTWAIT);
    if (got > 0) one.bytes.append(part, static_cast<size_t>(got));
    const bool failed = got == 0 || (got < 0 && errno != EAGAIN && errno != EWOULDBLOCK);
    if (one.bytes.size() < sizeof(Hello) && !failed && now - one.since < kStrangerSeconds) {
      ++i;
      return;
    }
    Stranger heard = std::move(one);
    strangers_.erase(strangers_.begin() + static_cast<ptrdiff_t>(i));
    if (heard.bytes.size() == sizeof(Hello)) greet(heard);
  }

  void greet(Stranger& one) {
    Hello hello;
    std::memcpy(&hello, one.bytes.data(), sizeof(hello));
    if (hello.magic != Hello{}.magic || !same_token(hello.token, token_)) {
      ++refused_;
      refused_from_ = one.from;
      return;  // Without a word.
    }
    const auto size = static_cast<int>(members_.size());
    if (hello.size != size || hello.rank < 0 || hello.rank >= size ||
        members_[hello.rank].state.presence != Presence::kAbsent) {
      return fail(cat("a process of ", one.from, " came as rank ", hello.rank, " of ", hello.size,
                      " to ", place_, "; expected ranks ", missing(), " of ", size));
    }
    Member& member = members_[hello.rank];
    member.socket = std::move(one.socket);
    member.state.presence = Presence::kJoined;
    end_when_unreachable(member.socket.get(), options_.peer_timeout_s);
    if (missing().empty()) start();
  }

  void start() {
    started_ = true;
    listener_.reset();
    strangers_.clear();
    announce(kStart, {});
  }

  std::string missing() const {
    std::string text;
    for (size_t rank = 0; rank < members_.size(); ++rank) {
      if (members_[rank].state.presence == Presence::kAbsent)
        text += cat(text.empty() ? "" : ", ", rank);
    }
    return text;
  }

  // ---- Health ----

  void look_after(double now, double slice) {
    if (!started_ && !aborted_ && now > join_end_) {
      const std::string refused = refused_ == 0
                                      ? ""
                                      : cat(" (", refused_,
                                            " callers without the right token were refused, the "
                                            "last from ",
                                            refused_from_, ")");
      fail(cat("these ranks did not come to ", place_, ": ", missing(), refused,
               ". Hint: are they started, with the same MASTER_ADDR, MASTER_PORT and token?"));
    }
    const bool speaks = now - last_alive_ >= alive_every_s(options_);
    if (speaks) last_alive_ = now;
    for (size_t rank = 0; rank < members_.size(); ++rank) {
      Member& member = members_[rank];
      if (!member.socket) continue;
      if (speaks && member.out.empty()) member.out.push(kAlive, {});
      member.silent_s += slice;
      if (member.silent_s > options_.peer_timeout_s) {
        lose(static_cast<int>(rank),
             cat("has shown no sign of life for ", options_.peer_timeout_s,
                 " s (its process is stopped, or its host cannot be reached)"));
      }
    }
  }

  void lose(int rank, const std::string& why) {
    Member& member = members_[rank];
    member.socket.reset();
    if (member.state.presence == Presence::kLeft) return let_go();
    if (!started_) return fail(cat("rank ", rank, " left while joining"));
    member.state.presence = Presence::kLeft;
    announce(kLost, cat(as_bytes(static_cast<int32_t>(rank)), why));
    let_go();
  }

  /// The failure of the whole: rank 0's, for want of a better one.
  void fail(const std::string& text) { abort(0, text); }

  void abort(int rank, const std::string& text) {
    if (!aborted_) abort_text_ = cat("rank ", rank, " failed: ", text);
    aborted_ = true;
    announce(kAbort, abort_text_);
  }

  void announce(Type type, std::string_view bytes) {
    for (Member& member : members_) {
      if (!member.socket) continue;
      member.out.push(type, bytes);
      member.out.flush(member.socket.get());
    }
  }

  /// Tells those that left and are not needed any more.
  void let_go() {
    for (Member& leaver : members_) {
      if (leaver.state.presence != Presence::kLeft || !leaver.socket || leaver.may_go) continue;
      leaver.may_go = std::all_of(members_.begin(), members_.end(), [&](const Member& one) {
        return one.state.presence == Presence::kLeft || one.state.finished >= leaver.state.begun;
      });
      if (leaver.may_go) leaver.out.push(kMayGo, {});
    }
  }

  // ---- What ranks say ----

  void hear_member(int rank) {
    Member& member = members_[rank];
    if (!member.socket) return;
    const FrameReader::Status status = member.in.read_from(member.socket.get());
    while (member.socket) {
      const std::optional<Frame> frame = member.in.next();
      if (!frame) break;
      member.silent_s = 0;
      if (!handle(rank, *frame)) return lose(rank, "sent what is no message of ours");
    }
    if (status == FrameReader::Status::kClosed && member.socket)
      lose(rank, "is gone: its process has ended, or its connection broke");
  }

  bool handle(int rank, const Frame& frame) {
    std::string_view rest = frame.bytes;
    switch (frame.type) {
      case kAlive:
        return hear_state(rank, rest);
      case kLeft:
        return hear_state(rank, rest) && hear_goodbye(rank);
      case kAbort:
        abort(rank, frame.bytes);
        return true;
      case kSet:
        return set(rest);
      default:
        return answer(rank, frame.type, rest);
    }
  }

  bool hear_state(int rank, std::string_view bytes) {
    SignOfLife& state = members_[rank].state;
    const Presence presence = state.presence;
    if (!take(bytes, state)) return false;
    state.presence = presence;
    let_go();
    return true;
  }

  bool hear_goodbye(int rank) {
    SignOfLife& state = members_[rank].state;
    state.presence = Presence::kLeft;
    announce(kLeft, cat(as_bytes(static_cast<int32_t>(rank)), as_bytes(state.begun)));
    let_go();
    return true;
  }

  // ---- The store ----

  bool set(std::string_view rest) {
    uint32_t length = 0;
    if (!take(rest, length) || rest.size() < length) return false;
    const std::string key(rest.substr(0, length));
    store_[key] = rest.substr(length);
    for (Member& member : members_) {
      const auto [first, last] = member.questions.equal_range(key);
      for (auto one = first; one != last; ++one) reply(member, one->second, store_[key]);
      member.questions.erase(first, last);
    }
    return true;
  }

  bool answer(int rank, uint32_t type, std::string_view rest) {
    Member& member = members_[rank];
    uint64_t question = 0;
    if (!take(rest, question)) return false;
    switch (type) {
      case kGet: {
        const auto found = store_.find(std::string(rest));
        if (found == store_.end())
          member.questions.emplace(rest, question);
        else
          reply(member, question, found->second);
        return true;
      }
      case kHas:
        reply(member, question, store_.count(std::string(rest)) != 0 ? "1" : "");
        return true;
      case kAdd: {
        int64_t by = 0;
        if (!take(rest, by)) return false;
        std::string& value = store_[std::string(rest)];
        value = std::to_string(std::atoll(value.c_str()) + by);
        reply(member, question, value);
        return true;
      }
      case kStates: {
        std::string all;
        for (const Member& one : members_) all += as_bytes(one.state);
        reply(member, question, all);
        return true;
      }
      default:
        return false;
    }
  }

  static void reply(Member& member, uint64_t question, std::string_view bytes) {
    if (!member.socket) return;
    member.out.push(kAnswer, cat(as_bytes(question), bytes));
  }

  std::string place_;
  CommOptions options_;
  char token_[kTokenBytes] = {};
  std::vector<Member> members_;
  std::vector<Stranger> strangers_;
  std::map<std::string, std::string> store_;
  std::vector<pollfd> polls_;
  FileDescriptor listener_;
  FileDescriptor wake_;
  int port_ = 0;
  double join_end_;
  double last_alive_ = 0;
  int refused_ = 0;
  std::string refused_from_;
  bool started_ = false;
  bool aborted_ = false;
  std::string abort_text_;
  std::atomic<bool> stop_{false};
  std::thread thread_;
};

ControlHub::ControlHub(const std::string& host, int port, int size, const std::string& token,
                       double join_timeout_s, const CommOptions& options)
    : server_(std::make_unique<Server>(host, port, size, token, join_timeout_s, options)) {}
ControlHub::~ControlHub() = default;
int ControlHub::port() const { return server_->port(); }

}  // namespace fsdp::comm
