#include "libfsdp/gloo/transport.h"

#include <sys/random.h>

#include "libfsdp/base/error.h"
#include "libfsdp/gloo/gloo_communicator.h"

namespace fsdp::gloo {
namespace {

std::string random_token() {
  unsigned char bytes[16];
  check(getrandom(bytes, sizeof(bytes), 0) == sizeof(bytes), "no random numbers");
  std::string text;
  for (const unsigned char byte : bytes) text += "0123456789abcdef"[byte % 16];
  return text;
}

/// What rank 0 tells the ranks of its host.
struct Meeting {
  int32_t port = 0;
  char token[32] = {};
};

std::unique_ptr<comm::Communicator> join(comm::WorldPlace world, const comm::CommOptions& options) {
  GlooCommunicator::Place place{.rank = world.rank,
                                .size = world.size,
                                .local_rank = world.local_rank,
                                .local_size = world.local_size,
                                .host = world.host,
                                .port = world.port,
                                .token = world.token,
                                .join_timeout_s = world.rendezvous_timeout_s};
  std::unique_ptr<comm::ControlHub> hub;
  if (world.local) {
    place.host = "127.0.0.1";
    place.port = 0;
    place.token = random_token();
  }
  if (world.rank == 0) {
    hub = std::make_unique<comm::ControlHub>(place.host, place.port, place.size, place.token,
                                             place.join_timeout_s, options);
  }
  if (world.local) {
    Meeting meeting;
    if (hub) meeting.port = hub->port();
    place.token.copy(meeting.token, sizeof(meeting.token) - 1);
    world.local->broadcast(&meeting, sizeof(meeting), 0, comm::make_tag("meeting point"));
    place.port = meeting.port;
    place.token = meeting.token;
  }
  return std::make_unique<GlooCommunicator>(place, options, std::move(hub), std::move(world.local));
}

}  // namespace

comm::Transport transport() { return {"gloo", join}; }

}  // namespace fsdp::gloo
