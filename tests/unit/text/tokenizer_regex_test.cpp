#include "libfsdp/text/tokenizer_regex.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "libfsdp/base/error.h"

namespace fsdp::text {
namespace {

std::vector<std::string> matches(const char* pattern, std::string_view text) {
  const Regex regex(pattern);
  RegexMatches all(regex, text);
  std::vector<std::string> out;
  while (const auto span = all.next())
    out.emplace_back(text.substr(span->begin, span->end - span->begin));
  return out;
}

using Strings = std::vector<std::string>;

TEST(TokenizerRegexTest, MongolianVowelSeparatorIsNoSpace) {
  EXPECT_EQ(matches(R"(\s)", "\xe1\xa0\x8e"), Strings{});
  EXPECT_EQ(matches(R"([\s])", "\xe1\xa0\x8e"), Strings{});
  EXPECT_EQ(matches(R"(\S)", "\xe1\xa0\x8e"), Strings{"\xe1\xa0\x8e"});
  EXPECT_EQ(matches(R"([^\s])", "\xe1\xa0\x8e"), Strings{"\xe1\xa0\x8e"});
  EXPECT_EQ(matches(R"(\s)", "\xc2\x85\xe3\x80\x80"), (Strings{"\xc2\x85", "\xe3\x80\x80"}));
}

TEST(TokenizerRegexTest, LettersAreThoseOfUnicode16) {
  EXPECT_EQ(matches(R"(\p{L}+)", "a\xf0\xb1\x8d\x90z"), Strings{"a\xf0\xb1\x8d\x90z"});  // U+31350
  EXPECT_EQ(matches(R"([^\p{L}]+)", "a\xf0\xb1\x8d\x90z"), Strings{});
  EXPECT_EQ(matches(R"(\p{N})", "\xf0\x91\xbd\x90"), Strings{"\xf0\x91\xbd\x90"});  // U+11F50
}

TEST(TokenizerRegexTest, AnchorsWorkByLineAndFlagMLetsTheDotCross) {
  EXPECT_EQ(matches("^.", "ab\ncd"), (Strings{"a", "c"}));
  EXPECT_EQ(matches(".$", "ab\ncd"), (Strings{"b", "d"}));
  EXPECT_EQ(matches("(?m:b.c)", "ab\ncd"), Strings{"b\nc"});
  EXPECT_EQ(matches("b.c", "ab\ncd"), Strings{});
}

TEST(TokenizerRegexTest, HexDigitsWordsAndBoundaries) {
  EXPECT_EQ(matches(R"(\h+)", "xff G0a"), (Strings{"ff", "0a"}));
  EXPECT_EQ(matches(R"(\b\w)", "ab \xc3\xa9\xcc\x81t"), (Strings{"a", "\xc3\xa9"}));
  EXPECT_EQ(matches(R"(\p{Han}+)", "x\xe6\x9d\xb1\xe3\x80\x81"),
            Strings{"\xe6\x9d\xb1"});  // not the comma
}

TEST(TokenizerRegexTest, EmptyMatchesDoNotRepeatOrLoop) {
  EXPECT_EQ(matches("x*", "axxb"), (Strings{"", "xx", ""}));
  EXPECT_EQ(matches("", "\xc3\xa9"), (Strings{"", ""}));
}

TEST(TokenizerRegexTest, WhatCannotBeTranslatedIsRefused) {
  for (const char* pattern : {"[a[bc]]", "[a-z&&[^x]]", R"([\W])", R"([\P{L}])", R"(\p{N}{1,3}+)",
                              "[a", "(a", R"(\p{Nonsense})", "\\"}) {
    EXPECT_THROW(Regex{pattern}, ModelError) << pattern;
  }
  EXPECT_THROW(Regex{std::string(100000, 'a')}, ModelError);
}

TEST(TokenizerRegexTest, EndlessBacktrackingIsAnErrorNotAHang) {
  EXPECT_THROW(Regex(R"((a+)+$)").find(std::string(5000, 'a') + "b", 0), DataError);
}

TEST(TokenizerRegexTest, EscapedTextMatchesItself) {
  const std::string text = R"(a.b*c[d]{2}(e)|^$\-# &~)";
  EXPECT_EQ(matches(escape_regex(text).c_str(), "x" + text + "y"), Strings{text});
}

}  // namespace
}  // namespace fsdp::text
