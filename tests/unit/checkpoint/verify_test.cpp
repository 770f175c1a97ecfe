// Damage of every kind is found, and named.
#include "libfsdp/checkpoint/verify.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>

#include "libfsdp/base/error.h"
#include "libfsdp/checkpoint/checkpoint_files.h"
#include "libfsdp/checkpoint/checkpoint_list.h"
#include "libfsdp/comm/host/thread_world.h"
#include "tests/support/checkpoint_cases.h"
#include "tests/support/rank_threads.h"

namespace fsdp {
namespace {

namespace fs = std::filesystem;
using checkpoint::CheckpointSave;
using checkpoint::Damage;
using checkpoint::verify;
using checkpoint::VerifyReport;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using testing::long_run;
using testing::ScratchDirectory;

class VerifyTest : public ::testing::Test {
 protected:
  VerifyTest() {
    testing::run_ranks(2, [&](comm::Communicator& comm) {
      CheckpointSave save(comm, scratch_.path());
      for (const int64_t step : {1, 2})
        save.save(testing::request_of(step, comm.rank(), comm.size(), 3000));
    });
  }

  std::string path(const std::string& name) const { return directory_ + "/" + name; }

  /// The damages' file names and tensors, "x:t".
  std::vector<std::string> damages() const {
    std::vector<std::string> found;
    for (const Damage& one : verify(directory_).damages)
      found.push_back(fs::path(one.file).filename().string() + ":" + one.tensor);
    return found;
  }

  static void flip(const std::string& path, int64_t bit) {
    const io::File file = io::File::open_write(path);
    std::vector<std::byte> byte(1);
    file.read_at(bit / 8, byte);
    byte[0] ^= static_cast<std::byte>(1 << bit % 8);
    file.write_at(bit / 8, byte);
  }

  /// Every `stride`-th bit of a file, flipped alone, is found, and the file is named.
  void expect_all_bits_matter(const std::string& name, int64_t stride) {
    const auto bits = static_cast<int64_t>(fs::file_size(path(name))) * 8;
    for (int64_t bit = 0; bit < bits; bit += stride) {
      flip(path(name), bit);
      const VerifyReport report = verify(directory_);
      ASSERT_FALSE(report.whole()) << name << " bit " << bit;
      ASSERT_THAT(report.damages[0].text(), HasSubstr(name)) << bit;
      flip(path(name), bit);
    }
    EXPECT_TRUE(verify(directory_).whole());
  }

  ScratchDirectory scratch_{"/dev/shm"};
  std::string directory_ = scratch_ / "checkpoint-2";
};

TEST_F(VerifyTest, SharesTogetherAreTheWhole) {
  for (const int count : {1, 2, 3, 50}) {
    int64_t digests = 0;
    int64_t bytes = 0;
    for (int i = 0; i < count; ++i) {
      const VerifyReport report = verify(directory_, {i, count});
      EXPECT_TRUE(report.whole());
      digests += report.digests;
      bytes += report.read_bytes;
    }
    EXPECT_EQ(digests, 8);
    EXPECT_EQ(bytes, verify(directory_).bytes);
  }
  const VerifyReport report = checkpoint::verify_by_threads(directory_, 3);
  EXPECT_TRUE(report.whole());
  EXPECT_EQ(report.digests, 8);
}

TEST_F(VerifyTest, EveryBitOfManifestAndListsMatters) {
  const int64_t stride = long_run() ? 1 : 7;
  expect_all_bits_matter("manifest.json", stride);
  expect_all_bits_matter("manifest-00001-of-00002.json", stride);
  expect_all_bits_matter("manifest-00002-of-00002.json", stride);
}

TEST_F(VerifyTest, RandomBitsOfDataAndHeadersAreFoundWithTheirTensor) {
  std::mt19937_64 random(20260228);
  const auto bytes = static_cast<int64_t>(fs::file_size(path("model.safetensors")));
  for (int64_t bit = 0; bit < 16 * 8; ++bit) {
    flip(path("model.safetensors"), bit);
    EXPECT_THAT(damages(), ElementsAre("model.safetensors:"));
    flip(path("model.safetensors"), bit);
  }
  for (int i = 0; i < (long_run() ? 10'000 : 1000); ++i) {
    const auto bit = static_cast<int64_t>(random() % static_cast<uint64_t>(bytes * 8));
    flip(path("model.safetensors"), bit);
    const int64_t at = bit / 8 - 16;
    EXPECT_THAT(damages(),
                ElementsAre(at < 0 ? "model.safetensors:"
                                   : cat("model.safetensors:", at < 6000 ? "a" : "b", ".weight")));
    flip(path("model.safetensors"), bit);
  }
}

TEST_F(VerifyTest, TruncatedAndGrownFilesAreFound) {
  for (const std::string name :
       {"model.safetensors", "optimizer/rank-1.safetensors", "trainer_state.json", "manifest.json",
        "manifest-00002-of-00002.json"}) {
    const std::string content = io::read_text(path(name));
    for (size_t i = 0; i <= 20; ++i) {
      fs::resize_file(path(name), content.size() * i / 20 + (i == 20 ? 1 : 0));
      const VerifyReport report = verify(directory_);
      ASSERT_FALSE(report.whole()) << name << " " << i;
      EXPECT_THAT(report.damages[0].text(), HasSubstr(name));
      EXPECT_THROW(checkpoint::read_checked_manifest(directory_), ModelError);
      io::write_text_atomic(path(name), content);
    }
  }
  EXPECT_TRUE(verify(directory_).whole());
  fs::resize_file(path("model.safetensors"), 16 + 6000);
  EXPECT_THAT(damages(), ElementsAre("model.safetensors:b.weight", "model.safetensors:b.weight"));
}

TEST_F(VerifyTest, MissingFilesAreFoundAndStrangeOnesAreNotAllHarmless) {
  fs::rename(path("optimizer/rank-1.safetensors"), path("notes.txt"));
  EXPECT_THAT(damages(), ElementsAre("rank-1.safetensors:"));
  fs::rename(path("notes.txt"), path("optimizer/rank-1.safetensors"));
  io::write_text_atomic(path("notes.txt"), "mine");
  VerifyReport report = verify(directory_);
  EXPECT_TRUE(report.whole());
  EXPECT_THAT(report.extra, ElementsAre("notes.txt"));
  io::write_text_atomic(path("model-00002-of-00002.safetensors"), "x");
  EXPECT_THAT(damages(), ElementsAre("model-00002-of-00002.safetensors:"));
  fs::remove(path("model-00002-of-00002.safetensors"));
  fs::remove(path("manifest-00001-of-00002.json"));
  report = verify(directory_);
  EXPECT_THAT(report.damages[0].text(), HasSubstr("manifest-00001-of-00002.json"));
  fs::remove(path("manifest.json"));
  EXPECT_THAT(damages(), ElementsAre("manifest.json:"));
  EXPECT_THAT(verify(scratch_ / "nowhere").damages[0].text(), HasSubstr("nowhere/manifest.json"));
  fs::create_directories(path("manifest.json"));
  EXPECT_THAT(damages(), ElementsAre("manifest.json:"));
}

TEST_F(VerifyTest, SwappedFilesAreFound) {
  const std::string one = path("optimizer/rank-0.safetensors");
  const std::string two = path("optimizer/rank-1.safetensors");
  fs::rename(one, path("aside"));
  fs::rename(two, one);
  fs::rename(path("aside"), two);
  EXPECT_THAT(damages(), ElementsAre("rank-0.safetensors:moment.0", "rank-1.safetensors:moment.1"));
  const std::string list = path("manifest-00001-of-00002.json");
  fs::remove(list);
  fs::copy(path("manifest-00002-of-00002.json"), list);
  EXPECT_THAT(verify(directory_).damages[0].text(), HasSubstr("manifest-00001-of-00002.json"));
}

TEST_F(VerifyTest, FilesOfAnotherStepAreFound) {
  std::vector<std::string> names;
  for (const auto& file : checkpoint::files_below(directory_)) names.push_back(file.file);
  names.insert(names.end(),
               {"manifest.json", "manifest-00001-of-00002.json", "manifest-00002-of-00002.json"});
  for (const std::string& name : names) {
    const std::string own = io::read_text(path(name));
    fs::copy_file(scratch_ / ("checkpoint-1/" + name), path(name),
                  fs::copy_options::overwrite_existing);
    EXPECT_FALSE(verify(directory_).whole()) << name;
    io::write_text_atomic(path(name), own);
  }
  EXPECT_TRUE(verify(directory_).whole());
  // A whole checkpoint under the name of another step.
  fs::rename(directory_, scratch_ / "checkpoint-3");
  const checkpoint::CheckpointList list(scratch_.path());
  ASSERT_EQ(list.skipped().size(), 1U);
  EXPECT_THAT(list.skipped()[0].why, HasSubstr("step 2, not 3"));
}

/// A checkpoint whose digests are right and whose ranges are not.
std::vector<std::string> damages_of_ranges(std::vector<checkpoint::WrittenRange> ranges) {
  const ScratchDirectory scratch;
  const std::string text = "0123456789";
  io::write_text_atomic(scratch / "x", text);
  for (auto& range : ranges) {
    if (range.file == "x" && range.begin + range.bytes <= 10) {
      range.digest = checkpoint::digest_of(std::string_view(text).substr(
          static_cast<size_t>(range.begin), static_cast<size_t>(range.bytes)));
    }
  }
  checkpoint::Manifest manifest;
  manifest.files = {{"x", 10}};
  manifest.lists = {checkpoint::write_list(scratch.path(), 0, 1, ranges)};
  checkpoint::write_manifest(scratch.path(), manifest);
  std::vector<std::string> found;
  for (const Damage& one : verify(scratch.path()).damages) found.push_back(one.what);
  return found;
}

TEST(VerifyRangesTest, EveryByteIsInOneRange) {
  EXPECT_THAT(damages_of_ranges({{"x", "t", 0, 4, {}}, {"x", "u", 4, 6, {}}}), IsEmpty());
  EXPECT_THAT(damages_of_ranges({{"x", "t", 0, 4, {}}, {"x", "u", 5, 5, {}}}),
              ElementsAre("ranges leave a gap at byte 4"));
  EXPECT_THAT(damages_of_ranges({{"x", "t", 0, 4, {}}, {"x", "u", 3, 7, {}}}),
              ElementsAre("ranges overlap at byte 3"));
  EXPECT_THAT(damages_of_ranges({{"x", "t", 0, 4, {}}}),
              ElementsAre("its ranges end at byte 4 of 10"));
  EXPECT_THAT(damages_of_ranges({}), ElementsAre("its ranges end at byte 0 of 10"));
  EXPECT_THAT(damages_of_ranges({{"x", "t", 0, 10, {}}, {"x", "u", 10, 1LL << 62, {}}}),
              ::testing::Contains(HasSubstr("end at byte 4611686018427387914 of 10")));
  EXPECT_THAT(damages_of_ranges({{"x", "t", 0, 10, {}}, {"a", "u", 0, 1, {}}}),
              ::testing::Contains("a list names it, the manifest does not"));
  EXPECT_THAT(damages_of_ranges({{"x", "t", 0, 10, {}}, {"z", "u", 0, 1, {}}}),
              ::testing::Contains("a list names it, the manifest does not"));
}

}  // namespace
}  // namespace fsdp
