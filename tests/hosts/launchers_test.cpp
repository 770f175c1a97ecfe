// The same program under torchrun, mpirun and srun's variables: the same bits as a world of
// threads.
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>

#include "libfsdp/base/error.h"
#include "tests/hosts/worlds.h"

namespace fsdp::testing {
namespace {

void expect_digests(std::vector<ChildProgram>& programs, int world, int ranks_per_host) {
  std::string output;
  for (ChildProgram& program : programs) {
    EXPECT_EQ(describe_status(program.wait(120)), "exit 0") << program.output();
    output += program.output();
  }
  for (const std::string& line : digest_lines(world)) {
    EXPECT_NE(output.find(cat(line, ", ", ranks_per_host, " ranks a host")), std::string::npos)
        << line << " in\n"
        << output;
  }
}

std::vector<std::string> torchrun(const std::vector<std::string>& options) {
  std::vector<std::string> argv = {FSDP_PYTHON, "-m", "torch.distributed.run", "--no-python"};
  argv.insert(argv.end(), options.begin(), options.end());
  argv.insert(argv.end(), {FSDP_WORLD_PROGRAM, "digest"});
  return argv;
}

TEST(TorchrunTest, StartsRanksOfOneHost) {
  for (const char* transport : {"FSDP_COMM=shm", "FSDP_COMM=gloo"}) {
    std::vector<ChildProgram> programs;
    programs.emplace_back(torchrun({"--standalone", "--nproc-per-node=2"}),
                          std::vector<std::string>{transport});
    expect_digests(programs, 2, 2);
  }
}

TEST(TorchrunTest, StartsRanksOfTwoHosts) {
  const std::string port = cat("--master-port=", free_port());
  std::vector<ChildProgram> programs;
  for (const char* node : {"--node-rank=0", "--node-rank=1"}) {
    programs.emplace_back(torchrun({"--nnodes=2", "--nproc-per-node=2", node,
                                    "--master-addr=127.0.0.1", port, "--rdzv-id=test-of-gloo"}),
                          std::vector<std::string>{});
  }
  expect_digests(programs, 4, 2);
  EXPECT_NE((programs[0].output() + programs[1].output()).find("token from TORCHELASTIC_RUN_ID"),
            std::string::npos)
      << programs[0].output();
}

TEST(MpirunTest, StartsRanksOfOneHost) {
  if (std::system("command -v mpirun > /dev/null") != 0)
    GTEST_SKIP() << "mpirun (Debian package openmpi-bin) is not installed";
  for (const char* transport : {"FSDP_COMM=shm", "FSDP_COMM=gloo"}) {
    std::vector<ChildProgram> programs;
    programs.emplace_back(
        std::vector<std::string>{"mpirun", "--allow-run-as-root", "--oversubscribe", "-np", "3",
                                 FSDP_WORLD_PROGRAM, "digest"},
        std::vector<std::string>{transport, "OMPI_MCA_btl_base_warn_component_unused=0"});
    expect_digests(programs, 3, 3);
  }
}

TEST(SrunTest, VariablesOfOneAndOfTwoHostsAreUnderstood) {
  const int port = free_port();
  const std::string job = std::to_string(100000 + port % 10000);
  for (const bool one_host : {true, false}) {
    std::vector<ChildProgram> programs;
    for (int rank = 0; rank < 2; ++rank) {
      programs.emplace_back(
          std::vector<std::string>{FSDP_WORLD_PROGRAM, "digest"},
          std::vector<std::string>{
              cat("SLURM_PROCID=", rank), cat("SLURM_LOCALID=", one_host ? rank : 0),
              "SLURM_STEP_NUM_TASKS=2", cat("SLURM_STEP_TASKS_PER_NODE=", one_host ? "2" : "1(x2)"),
              cat("SLURM_JOB_ID=", job), "SLURM_STEP_ID=0", "SLURM_STEP_NODELIST=localhost"});
    }
    expect_digests(programs, 2, one_host ? 2 : 1);
  }
}

}  // namespace
}  // namespace fsdp::testing
