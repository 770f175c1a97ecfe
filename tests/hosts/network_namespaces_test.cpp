// Two ranks with a network of their own each, and a cable between them.
#include <gtest/gtest.h>

#include "libfsdp/base/error.h"
#include "tests/hosts/worlds.h"

namespace fsdp::testing {
namespace {

/// What two_hosts.sh prints; empty if it cannot be run here.
std::string run_two_hosts(const std::vector<std::string>& arguments,
                          const std::vector<std::string>& environment, std::string& why_not) {
  std::vector<std::string> argv = {"bash", FSDP_TWO_HOSTS, FSDP_WORLD_PROGRAM};
  argv.insert(argv.end(), arguments.begin(), arguments.end());
  ChildProgram script(argv, environment);
  const std::string status = describe_status(script.wait(120));
  if (status == "exit 77") {
    why_not = script.output();
    return {};
  }
  EXPECT_EQ(status, "exit 0") << script.output();
  return script.output();
}

double number_after(const std::string& text, const std::string& mark) {
  const size_t at = text.find(mark);
  return at == std::string::npos ? -1 : std::stod(text.substr(at + mark.size()));
}

TEST(NetworkNamespacesTest, GlooCarriesTheBitsOfAWorldOfThreads) {
  std::string why_not;
  const std::string output = run_two_hosts({"digest"}, {}, why_not);
  if (output.empty()) GTEST_SKIP() << why_not;
  for (const std::string& line : digest_lines(2))
    EXPECT_NE(output.find(line), std::string::npos) << line << " in\n" << output;
  EXPECT_NE(output.find("early rank 0 listens at: 10.77.0.1:29500 \n"), std::string::npos)
      << output;
}

TEST(NetworkNamespacesTest, APulledCableIsNoticedOnBothEnds) {
  std::string why_not;
  const std::string timeout = is_long() ? "8" : "2";
  const std::string output =
      run_two_hosts({"work", "cut"}, {cat("FSDP_PEER_TIMEOUT=", timeout)}, why_not);
  if (output.empty()) GTEST_SKIP() << why_not;
  for (const char* text : {"rank 0 ended with 8", "rank 1 ended with 8",
                           "world: rank 0: [comm] rank 1 ", "world: rank 1: [comm] rank 0 "}) {
    EXPECT_NE(output.find(text), std::string::npos) << output;
  }
  EXPECT_LT(number_after(output, "noticed after "), is_long() ? 10'000 : 4'000) << output;
  // The rendezvous is over; gloo's own doors are at the address of the cable alone.
  for (const char* door : {"\nrank 0 listens at: 10.77.0.1:29500", " 10.77.0.1:29500 10"})
    EXPECT_EQ(output.find(door), std::string::npos) << output;
  for (const char* everywhere : {"0.0.0.0:", "*:", "[::]:"})
    EXPECT_EQ(output.find(everywhere), std::string::npos) << output;
}

}  // namespace
}  // namespace fsdp::testing
