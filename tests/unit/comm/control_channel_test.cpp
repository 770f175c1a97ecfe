// The switchboard between hosts, with all ranks in this process.
#include "libfsdp/comm/control/control_channel.h"

#include <gtest/gtest.h>
#include <poll.h>
#include <sys/socket.h>

#include <chrono>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <thread>

#include "libfsdp/base/error.h"
#include "libfsdp/comm/control/control_frames.h"
#include "libfsdp/comm/os/tcp_socket.h"

namespace fsdp::comm {
namespace {

constexpr char kHost[] = "127.0.0.1";
constexpr char kToken[] = "the token";

double seconds_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

/// One rank's channel and what it was told.
struct Rank {
  std::mutex mutex;
  std::condition_variable changed;
  std::string told;
  std::unique_ptr<ControlChannel> channel;

  void tell(const std::string& text) {
    const std::lock_guard lock(mutex);
    told += text + "\n";
    changed.notify_all();
  }
  bool is_told(const std::string& text, double seconds) {
    std::unique_lock lock(mutex);
    return changed.wait_for(lock, std::chrono::duration<double>(seconds),
                            [&] { return told.find(text) != std::string::npos; });
  }
  ControlEvents events() {
    return {
        .aborted = [this](const std::string& text) { tell("aborted: " + text); },
        .lost = [this](int rank, const std::string& why) { tell(cat("lost ", rank, ": ", why)); },
        .left = [this](int rank, uint64_t begun) { tell(cat("left ", rank, " at ", begun)); },
        .tick = {}};
  }
};

struct World {
  World(int size, const CommOptions& options = {})
      : hub(std::make_unique<ControlHub>(kHost, 0, size, kToken, 10, options)), ranks(size) {
    std::vector<std::thread> threads;
    for (int rank = 0; rank < size; ++rank) {
      threads.emplace_back([&, rank] {
        ranks[rank].channel = std::make_unique<ControlChannel>(
            kHost, hub->port(), rank, size, kToken, 10, options, ranks[rank].events());
        ranks[rank].channel->start();
      });
    }
    for (std::thread& thread : threads) thread.join();
  }
  ~World() {
    for (Rank& rank : ranks) rank.channel.reset();
  }
  std::unique_ptr<ControlHub> hub;
  std::vector<Rank> ranks;
};

std::string join_text(int port, int rank, int size, const std::string& token) {
  try {
    ControlChannel channel(kHost, port, rank, size, token, 5, {}, {});
    return "joined";
  } catch (const Error& e) {
    return e.what();
  }
}

TEST(ControlChannelTest, KeepsASmallStore) {
  World world(3);
  std::thread late([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    world.ranks[2].channel->set("key", std::string("a\0b", 3));
  });
  EXPECT_EQ(world.ranks[0].channel->get("key", 5), std::string("a\0b", 3));
  late.join();
  EXPECT_EQ(world.ranks[1].channel->get("key", 5), std::string("a\0b", 3));
  EXPECT_TRUE(world.ranks[1].channel->has("key"));
  EXPECT_FALSE(world.ranks[1].channel->has("other"));
  EXPECT_EQ(world.ranks[0].channel->add("count", 3), 3);
  EXPECT_EQ(world.ranks[2].channel->add("count", -1), 2);
  EXPECT_THROW(world.ranks[0].channel->get("never", 0.05), CommError);
}

TEST(ControlChannelTest, SaysNothingToAStranger) {
  ControlHub hub(kHost, 0, 2, kToken, 10, {});
  const FileDescriptor socket = connect_tcp(kHost, hub.port(), 5);
  control::Hello hello;
  hello.size = 2;
  std::strcpy(hello.token, "the tokem");
  ASSERT_EQ(send(socket.get(), &hello, sizeof(hello), 0), static_cast<ssize_t>(sizeof(hello)));
  char byte = 0;
  pollfd ready{socket.get(), POLLIN, 0};
  ASSERT_EQ(poll(&ready, 1, 5000), 1);
  EXPECT_LE(recv(socket.get(), &byte, 1, 0), 0);  // Closed, and not a byte.
  EXPECT_NE(join_text(hub.port(), 1, 2, "wrong").find("was not let in"), std::string::npos);
}

TEST(ControlChannelTest, ListensOnlyUntilAllHaveCome) {
  World world(2);
  const double end = seconds_now() + 5;
  EXPECT_THROW(while (seconds_now() < end) connect_tcp(kHost, world.hub->port(), 0), CommError);
}

TEST(ControlChannelTest, NamesWhoDidNotCome) {
  ControlHub hub(kHost, 0, 4, kToken, 0.4, {});
  std::thread stranger([&] { join_text(hub.port(), 3, 4, "wrong"); });
  std::thread other([&] { join_text(hub.port(), 2, 4, kToken); });
  const std::string text = join_text(hub.port(), 0, 4, kToken);
  stranger.join();
  other.join();
  EXPECT_NE(text.find("these ranks did not come to 127.0.0.1:"), std::string::npos) << text;
  EXPECT_NE(text.find(": 1, 3"), std::string::npos) << text;
  EXPECT_NE(text.find("1 callers without the right token were refused, the last from 127.0.0.1"),
            std::string::npos)
      << text;
}

TEST(ControlChannelTest, RefusesAnotherSizeAndASecondRankByName) {
  ControlHub hub(kHost, 0, 2, kToken, 10, {});
  std::thread rank_0([&] {
    EXPECT_NE(join_text(hub.port(), 0, 2, kToken).find("came as rank 1 of 3"), std::string::npos);
  });
  std::this_thread::sleep_for(std::chrono::milliseconds(100));
  join_text(hub.port(), 1, 3, kToken);
  rank_0.join();
}

TEST(ControlChannelTest, AnAbortReachesAllAndTheFirstWins) {
  World world(3);
  world.ranks[1].channel->abort("out of data");
  world.ranks[2].channel->abort("something else");
  for (Rank& rank : world.ranks)
    EXPECT_TRUE(rank.is_told("aborted: rank 1 failed: out of data", 2)) << rank.told;
}

TEST(ControlChannelTest, AClosedConnectionIsALostRankAtOnce) {
  World world(3);
  const double start = seconds_now();
  world.ranks[1].channel.reset();
  EXPECT_TRUE(world.ranks[0].is_told("lost 1: is gone", 2));
  EXPECT_TRUE(world.ranks[2].is_told("lost 1: is gone", 2));
  EXPECT_LT(seconds_now() - start, 1);
}

TEST(ControlChannelTest, ASilentRankIsLostAfterThePeerTimeout) {
  World world(3, {.peer_timeout_s = 0.6});
  const double start = seconds_now();
  world.ranks[2].channel->stop();  // As if its process were stopped: the connection stays.
  EXPECT_TRUE(world.ranks[0].is_told("lost 2: has shown no sign of life for 0.6 s", 5));
  EXPECT_TRUE(world.ranks[1].is_told("lost 2", 5));
  EXPECT_GT(seconds_now() - start, 0.4);
}

TEST(ControlChannelTest, ALostHubIsALostRankZero) {
  World world(2);
  world.ranks[0].channel.reset();
  world.hub.reset();
  EXPECT_TRUE(world.ranks[1].is_told("lost 0: is gone", 8)) << world.ranks[1].told;
}

TEST(ControlChannelTest, AGoodbyeWaitsForThoseWhoNeedTheLeaver) {
  World world(2);
  SignOfLife sign;
  sign.begun = 7;
  sign.step = 12;
  world.ranks[1].channel->report(sign);
  std::thread slow([&] {
    EXPECT_TRUE(world.ranks[0].is_told("left 1 at 7", 2));
    std::this_thread::sleep_for(std::chrono::milliseconds(200));
    sign.finished = 7;
    world.ranks[0].channel->report(sign);
  });
  const double start = seconds_now();
  world.ranks[1].channel->leave(7, 10);
  const double took = seconds_now() - start;
  slow.join();
  EXPECT_GE(took, 0.2);
  EXPECT_LT(took, 2);
  const auto signs = world.ranks[0].channel->signs_of_life(2);
  ASSERT_EQ(signs.size(), 2U);
  EXPECT_EQ(signs[1].step, 12);
  EXPECT_EQ(signs[1].presence, Presence::kLeft);
  world.ranks[1].channel.reset();
  EXPECT_FALSE(world.ranks[0].is_told("lost", 0.2));
}

TEST(FrameReaderTest, CutsAStreamWhereverItIsCutAndRefusesNonsense) {
  auto [left, right] = std::pair<FileDescriptor, FileDescriptor>();
  int ends[2];
  ASSERT_EQ(socketpair(AF_UNIX, SOCK_STREAM, 0, ends), 0);
  left = FileDescriptor(ends[0]);
  right = FileDescriptor(ends[1]);
  FrameWriter writer;
  writer.push(7, "seven");
  writer.push(8, "");
  ASSERT_TRUE(writer.flush(left.get()));
  FrameReader whole;
  EXPECT_EQ(whole.read_from(right.get()), FrameReader::Status::kOpen);
  EXPECT_EQ(whole.next()->bytes, "seven");
  EXPECT_EQ(whole.next()->type, 8U);
  EXPECT_FALSE(whole.next());
  const uint32_t header[] = {5, 9};
  FrameReader pieces;
  std::string stream(reinterpret_cast<const char*>(header), sizeof(header));
  stream += "fives";
  for (const char byte : stream) {
    EXPECT_FALSE(pieces.next());
    ASSERT_EQ(send(left.get(), &byte, 1, 0), 1);
    pieces.read_from(right.get());
  }
  EXPECT_EQ(pieces.next()->bytes, "fives");
  const uint32_t nonsense[] = {0xffffffff, 9};
  ASSERT_EQ(send(left.get(), nonsense, sizeof(nonsense), 0), 8);
  pieces.read_from(right.get());
  EXPECT_FALSE(pieces.next());
  EXPECT_EQ(pieces.read_from(right.get()), FrameReader::Status::kClosed);
}

}  // namespace
}  // namespace fsdp::comm
