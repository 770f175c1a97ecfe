#include "libfsdp/comm/launch/meeting_point.h"

#include <gtest/gtest.h>

#include <map>

#include "libfsdp/base/error.h"

namespace fsdp::comm {
namespace {

MeetingPoint meet(const std::map<std::string, std::string>& variables) {
  return meeting_point_of([&](const char* name) {
    const auto found = variables.find(name);
    return found == variables.end() ? std::string() : found->second;
  });
}

TEST(MeetingPointTest, StandsBesideTorchrunsOwnStore) {
  const MeetingPoint point = meet({{"MASTER_ADDR", "10.1.2.3"},
                                   {"MASTER_PORT", "29400"},
                                   {"TORCHELASTIC_USE_AGENT_STORE", "True"},
                                   {"TORCHELASTIC_RUN_ID", "run7"},
                                   {"TORCHELASTIC_RESTART_COUNT", "2"}});
  EXPECT_EQ(point.host, "10.1.2.3");
  EXPECT_EQ(point.port, 29401);
  EXPECT_EQ(point.token, "run7/2");
  EXPECT_EQ(point.token_from, "TORCHELASTIC_RUN_ID");
  EXPECT_EQ(
      meet({{"MASTER_ADDR", "a"}, {"MASTER_PORT", "29400"}, {"FSDP_RENDEZVOUS_TOKEN", "x"}}).port,
      29400);
}

TEST(MeetingPointTest, OwnVariablesComeFirst) {
  const MeetingPoint point = meet({{"MASTER_ADDR", "host"},
                                   {"MASTER_PORT", "29400"},
                                   {"FSDP_RENDEZVOUS_PORT", "7000"},
                                   {"FSDP_RENDEZVOUS_TOKEN", "secret"},
                                   {"TORCHELASTIC_RUN_ID", "run7"}});
  EXPECT_EQ(point.port, 7000);
  EXPECT_EQ(point.token, "secret");
}

TEST(MeetingPointTest, IsDerivedFromSlurmsStep) {
  const MeetingPoint point = meet({{"SLURM_STEP_NODELIST", "node[07-09,12]"},
                                   {"SLURM_JOB_NODELIST", "node[01-20]"},
                                   {"SLURM_JOB_ID", "1234567"},
                                   {"SLURM_STEP_ID", "3"}});
  EXPECT_EQ(point.host, "node07");
  EXPECT_EQ(point.port, 15000 + 4567);
  EXPECT_EQ(point.token, "1234567/3");
}

TEST(MeetingPointTest, FindsTheFirstHostOfSlurmsLists) {
  EXPECT_EQ(first_slurm_host("login1"), "login1");
  EXPECT_EQ(first_slurm_host("a5,b6"), "a5");
  EXPECT_EQ(first_slurm_host("node[3,5-9]"), "node3");
  EXPECT_EQ(first_slurm_host("rack1-n[001-128],gpu4"), "rack1-n001");
  EXPECT_EQ(first_slurm_host("n[1-4]-ib,m2"), "n1-ib");
  EXPECT_EQ(first_slurm_host("n[1-4]-ib"), "n1-ib");
  EXPECT_THROW(first_slurm_host("n[1"), ConfigError);
}

std::string refusal(const std::map<std::string, std::string>& variables) {
  try {
    meet(variables);
    return "accepted";
  } catch (const ConfigError& e) {
    return e.what();
  }
}

TEST(MeetingPointTest, SaysWhatIsMissing) {
  EXPECT_NE(refusal({{"FSDP_RENDEZVOUS_TOKEN", "x"}}).find("MASTER_ADDR is not set"),
            std::string::npos);
  EXPECT_NE(refusal({{"MASTER_ADDR", "a"}}).find("set FSDP_RENDEZVOUS_TOKEN"), std::string::npos);
  EXPECT_NE(refusal({{"MASTER_ADDR", "a"}, {"MASTER_PORT", "80x"}}).find("MASTER_PORT='80x'"),
            std::string::npos);
  EXPECT_NE(refusal({{"MASTER_ADDR", "a"}, {"FSDP_RENDEZVOUS_PORT", "70000"}}).find("a port"),
            std::string::npos);
  EXPECT_NE(refusal({{"MASTER_ADDR", "a"}, {"FSDP_RENDEZVOUS_TOKEN", std::string(121, 'x')}})
                .find("at most 120"),
            std::string::npos);
}

}  // namespace
}  // namespace fsdp::comm
