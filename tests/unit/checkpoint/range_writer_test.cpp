#include "libfsdp/checkpoint/range_writer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "libfsdp/base/error.h"
#include "tests/support/checkpoint_cases.h"

namespace fsdp {
namespace {

using checkpoint::digest_of;
using checkpoint::is_safe_name;
using checkpoint::RangeWriter;
using checkpoint::WrittenRange;
using ::testing::ElementsAre;
using testing::part_of;
using testing::ScratchDirectory;

TEST(RangeWriterTest, WritesRangesAndKnowsTheirDigests) {
  const ScratchDirectory scratch;
  const auto data = part_of(1, 0, 3'000'000);  // Several pieces.
  RangeWriter writer(scratch.path());
  writer.create("sub/dir/x", 3'000'010);
  writer.begin("sub/dir/x", "t", 10);
  writer.append(std::span(data).first(7));
  writer.append(std::span(data).subspan(7));
  writer.end();
  writer.write("sub/dir/x", "", 0, std::span(data).first(10));
  writer.write("sub/dir/x", "empty", 10, {});
  writer.write_file("y", "text");
  writer.write_file("empty", "");
  EXPECT_THAT(
      writer.written(),
      ElementsAre(WrittenRange{"sub/dir/x", "t", 10, 3'000'000, digest_of(data)},
                  WrittenRange{"sub/dir/x", "", 0, 10, digest_of(std::span(data).first(10))},
                  WrittenRange{"y", "", 0, 4, digest_of("text")}));
  EXPECT_EQ(writer.written_bytes(), 3'000'014);
  writer.finish();
  const std::string text = io::read_text(scratch / "sub/dir/x");
  EXPECT_EQ(text.size(), 3'000'010U);
  EXPECT_EQ(digest_of(std::string_view(text).substr(10)), digest_of(data));
  EXPECT_EQ(io::read_text(scratch / "y"), "text");
}

TEST(RangeWriterTest, SeveralWritersShareAFileWithoutABarrier) {
  const ScratchDirectory scratch;
  const auto data = part_of(1, 0, 100);
  RangeWriter one(scratch.path());
  RangeWriter two(scratch.path());
  one.share("x", 200);
  one.write("x", "a", 0, data);
  two.share("x", 200);  // Later than the first write.
  two.write("x", "b", 100, data);
  one.finish();
  two.finish();
  const std::string text = io::read_text(scratch / "x");
  EXPECT_EQ(digest_of(std::string_view(text).substr(0, 100)), digest_of(data));
  EXPECT_EQ(digest_of(std::string_view(text).substr(100)), digest_of(data));
}

TEST(RangeWriterTest, CopiesFilesOfAnySize) {
  const ScratchDirectory scratch;
  const auto data = part_of(3, 0, 2'500'000);
  const std::string text(reinterpret_cast<const char*>(data.data()), data.size());
  io::write_text_atomic(scratch / "large", text);
  io::write_text_atomic(scratch / "empty", "");
  RangeWriter writer(scratch.path());
  writer.copy_file(scratch / "large", "copy");
  writer.copy_file(scratch / "empty", "nothing");
  writer.finish();
  EXPECT_EQ(io::read_text(scratch / "copy"), text);
  EXPECT_EQ(io::read_text(scratch / "nothing"), "");
  ASSERT_EQ(writer.written().size(), 1U);
  EXPECT_EQ(writer.written()[0].digest, digest_of(text));
}

TEST(RangeWriterTest, RefusesWhatWouldBreakAFile) {
  const ScratchDirectory scratch;
  const std::vector<std::byte> ten(10);
  RangeWriter writer(scratch.path());
  writer.create("x", 10);
  EXPECT_THROW(writer.create("x", 10), InternalError);
  EXPECT_THROW(writer.write("y", "", 0, ten), InternalError);
  EXPECT_THROW(writer.write("x", "", -1, ten), InternalError);
  EXPECT_THROW(writer.create("../x", 10), InternalError);
  RangeWriter other(scratch.path());
  EXPECT_THROW(other.create("x", 10), ConfigError);
  std::filesystem::create_symlink("x", scratch / "link");
  EXPECT_THROW(other.share("link", 10), ConfigError);
  EXPECT_THROW(RangeWriter(scratch / "nowhere"), ConfigError);
  writer.begin("x", "t", 5);
  EXPECT_THROW(writer.append(ten), InternalError);
  EXPECT_THROW(writer.begin("x", "t", 0), InternalError);
  EXPECT_THROW(writer.finish(), InternalError);
  writer.end();
  writer.cancel();
  EXPECT_THROW(writer.finish(), InternalError);
}

TEST(RangeWriterTest, NamesStayWithinTheDirectory) {
  for (const char* name : {"x", "a/b", ".hidden", "a..b", "..."}) EXPECT_TRUE(is_safe_name(name));
  const std::string with_nul("a\0b", 3);
  for (const std::string& name : {std::string(), std::string("/x"), std::string(".."),
                                  std::string("a/../b"), std::string("./a"), std::string("a//b"),
                                  std::string("a/"), with_nul, std::string(300, 'a')}) {
    EXPECT_FALSE(is_safe_name(name)) << name;
  }
}

}  // namespace
}  // namespace fsdp
