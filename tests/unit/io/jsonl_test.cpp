#include "libfsdp/io/jsonl.h"

#include <rapidcheck.h>

#include <vector>

#include "libfsdp/base/error.h"
#include "tests/unit/io/expect_error.h"
#include "tests/unit/io/temp_dir.h"

namespace fsdp::io {
namespace {

struct Line {
  int64_t number;
  std::string text;
  bool operator==(const Line&) const = default;
};

std::vector<Line> read_lines(std::string_view contents, int64_t max_line_bytes = 1000) {
  const TempDir dir;
  LineReader reader(dir.write("a", contents), max_line_bytes);
  std::vector<Line> lines;
  std::string_view line;
  while (reader.next(line)) lines.push_back({reader.line_number(), std::string(line)});
  return lines;
}

TEST(LineReaderTest, SkipsBlankLinesButCountsThem) {
  EXPECT_EQ(read_lines("a\n\n \t\r\nb"), (std::vector<Line>{{1, "a"}, {4, "b"}}));
  EXPECT_TRUE(read_lines("").empty());
  EXPECT_TRUE(read_lines("\n\n").empty());
}

TEST(LineReaderTest, TakesOffByteOrderMarkAndCarriageReturns) {
  EXPECT_EQ(read_lines("\xef\xbb\xbf"
                       "a\r\nb\r\n"),
            (std::vector<Line>{{1, "a"}, {2, "b"}}));
}

TEST(LineReaderTest, LinesMayBeLongerThanABlock) {
  const std::string big(3'000'000, 'x');
  EXPECT_EQ(read_lines(big + "\nb\n" + big, 4'000'000),
            (std::vector<Line>{{1, big}, {2, "b"}, {3, big}}));
}

TEST(LineReaderTest, NamesFileAndLineOfBadText) {
  EXPECT_ERROR(read_lines("ok\n\nb\xff\n"), DataError, "/a:3: the text is not UTF-8");
  EXPECT_ERROR(read_lines(std::string_view("ok\na\0b\n", 7)), DataError, "/a:2: a NUL byte");
  EXPECT_ERROR(read_lines("ok\n" + std::string(11, 'x'), 10), DataError,
               "/a:2: the line is longer than 10 bytes");
  EXPECT_EQ(read_lines(std::string(10, 'x') + "\n", 10).size(), 1U);
  EXPECT_ERROR(LineReader("/no/such/file"), DataError, "/no/such/file: cannot open");
}

TEST(LineReaderTest, KnowsWellFormedText) {
  for (const char* good :
       {"", "abc", "é", "\xe2\x82\xac", "\xf0\x9f\x98\x80", "\xed\x9f\xbf", "\xf4\x8f\xbf\xbf"}) {
    EXPECT_TRUE(is_utf8(good)) << good;
  }
  for (const char* bad : {"\x80", "\xc3", "\xc0\x80", "\xe0\x80\x80", "\xed\xa0\x80",
                          "\xf4\x90\x80\x80", "\xf8", "\xe2\x82", "\xf0\x8f\xbf\xbf",
                          "\xc3"
                          "a"}) {
    EXPECT_FALSE(is_utf8(bad));
  }
}

TEST(JsonlReaderTest, ReadsObjectsAndNamesTheLineOfWhatIsNone) {
  const TempDir dir;
  JsonlReader reader(dir.write("d.jsonl", "{\"a\":1}\n\n{\"a\":2}\n{\"a\":\n"));
  Json record;
  ASSERT_TRUE(reader.next(record));
  ASSERT_TRUE(reader.next(record));
  EXPECT_EQ(record["a"].as_int(), 2);
  EXPECT_EQ(reader.line_number(), 3);
  EXPECT_ERROR(reader.next(record), DataError, "/d.jsonl:4: parse error at line 1, column");
  JsonlReader list(dir.write("e.jsonl", "[1]\n"));
  EXPECT_ERROR(list.next(record), DataError, "/e.jsonl:1: expected a JSON object");
}

TEST(JsonlReaderTest, EveryRecordComesBack) {
  EXPECT_TRUE(rc::check([](const std::vector<uint8_t>& sizes) {
    const TempDir dir;
    std::string text;
    for (const uint8_t size : sizes) {
      text += Json::object({{"t", std::string(size * 400U, 'x')}}).dump() + "\n";
    }
    JsonlReader reader(dir.write("a", text));
    Json record;
    for (const uint8_t size : sizes) {
      RC_ASSERT(reader.next(record));
      RC_ASSERT(record["t"].as_string().size() == size * 400U);
    }
    RC_ASSERT(!reader.next(record));
  }));
}

}  // namespace
}  // namespace fsdp::io
