#include "libfsdp/trainer/verify.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "libfsdp/comm/host/thread_world.h"
#include "libfsdp/io/json.h"
#include "tests/support/checkpoint_cases.h"

namespace fsdp {
namespace {

namespace fs = std::filesystem;
using ::testing::HasSubstr;
using testing::ScratchDirectory;

class VerifyCommandTest : public ::testing::Test {
 protected:
  VerifyCommandTest() {
    const auto comm = comm::make_single();
    checkpoint::CheckpointSave save(*comm, scratch_.path());
    for (const int64_t step : {9, 10}) save.save(testing::request_of(step, 0, 1));
  }

  ExitCode verify(const std::string& directory, bool json = false) {
    trainer::VerifyOptions options;
    options.dir = directory;
    options.threads = 2;
    options.json = json;
    ::testing::internal::CaptureStdout();
    ExitCode code = ExitCode::kInternal;
    try {
      code = trainer::run_verify(options);
    } catch (...) {
      output_ = ::testing::internal::GetCapturedStdout();
      throw;
    }
    output_ = ::testing::internal::GetCapturedStdout();
    return code;
  }

  void damage() {
    const io::File file = io::File::open_write(scratch_ / "checkpoint-9/model.safetensors");
    const std::vector<std::byte> other(1, std::byte{0x5a});
    file.write_at(16 + 1500, other);
  }

  ScratchDirectory scratch_;
  std::string output_;
};

TEST_F(VerifyCommandTest, WholeCheckpointsAreALineEachByStep) {
  EXPECT_EQ(verify(scratch_.path() + "/"), ExitCode::kOk);
  EXPECT_THAT(output_, HasSubstr(scratch_ / "checkpoint-9: whole; step 9 by 1 rank, FULL_SHARD"));
  EXPECT_THAT(output_, HasSubstr("3 files, 3.0 kB, 5 digests"));
  EXPECT_LT(output_.find("checkpoint-9:"), output_.find("checkpoint-10:"));
  EXPECT_THAT(output_, HasSubstr("2 of 2 whole\n"));
  EXPECT_EQ(verify(scratch_ / "checkpoint-10"), ExitCode::kOk);
  EXPECT_THAT(output_, HasSubstr("1 of 1 whole\n"));
}

TEST_F(VerifyCommandTest, DamageIsExitCodeFourAndNamesFileAndTensor) {
  damage();
  fs::remove(scratch_ / "checkpoint-10/manifest.json");
  EXPECT_EQ(verify(scratch_.path()), ExitCode::kModel);
  EXPECT_THAT(output_, HasSubstr("checkpoint-9: DAMAGED; step 9"));
  EXPECT_THAT(output_, HasSubstr("checkpoint-9/model.safetensors, tensor 'b.weight': "));
  EXPECT_THAT(output_, HasSubstr("checkpoint-10: DAMAGED\n"));
  EXPECT_THAT(output_, HasSubstr("checkpoint-10/manifest.json"));
  EXPECT_THAT(output_, HasSubstr("0 of 2 whole\n"));
}

TEST_F(VerifyCommandTest, JsonSaysTheSame) {
  damage();
  EXPECT_EQ(verify(scratch_.path(), true), ExitCode::kModel);
  const io::Json document = io::Json::parse(output_, "output");
  EXPECT_FALSE(document["whole"].as_bool());
  EXPECT_FALSE(document["checkpoints"][0]["whole"].as_bool());
  EXPECT_EQ(document["checkpoints"][0]["damages"][0]["tensor"].as_string(), "b.weight");
  EXPECT_TRUE(document["checkpoints"][1]["whole"].as_bool());
  EXPECT_EQ(document["checkpoints"][1]["step"].as_int(), 10);
}

TEST_F(VerifyCommandTest, AFolderWithoutCheckpointsIsAnError) {
  EXPECT_THROW(verify(scratch_ / "nowhere"), ModelError);
  EXPECT_THROW(verify(scratch_ / "checkpoint-9/optimizer"), ModelError);
}

}  // namespace
}  // namespace fsdp
