#include "libfsdp/checkpoint/digest.h"

#include <gtest/gtest.h>

namespace fsdp {
namespace {

using checkpoint::Digest;
using checkpoint::digest_of;
using checkpoint::Hasher;

// What xxh128sum prints.
TEST(DigestTest, IsThatOfTheReferenceProgram) {
  EXPECT_EQ(digest_of("").hex(), "99aa06d3014798d86001c324468d497f");
  EXPECT_EQ(digest_of("abc").hex(), "06b05ab6733a618578af5f94892f3950");
}

TEST(DigestTest, PiecesMakeTheSameDigest) {
  std::string text(100'000, 'x');
  for (size_t i = 0; i < text.size(); ++i) text[i] = static_cast<char>(i * i % 251);
  const auto bytes = std::as_bytes(std::span(text.data(), text.size()));
  Hasher hasher;
  for (size_t at = 0; at < bytes.size(); at += 777)
    hasher.update(bytes.subspan(at, std::min<size_t>(777, bytes.size() - at)));
  EXPECT_EQ(hasher.digest(), digest_of(bytes));
  hasher.reset();
  EXPECT_EQ(hasher.digest(), digest_of(""));
}

TEST(DigestTest, OnlyOneSpellingIsADigest) {
  const Digest digest = digest_of("abc");
  EXPECT_EQ(Digest::from_hex(digest.hex()), digest);
  for (const char* text :
       {"", "06b05ab6733a618578af5f94892f395", "06B05ab6733a618578af5f94892f3950",
        "06b05ab6733a618578af5f94892f39500", "g6b05ab6733a618578af5f94892f3950",
        " 6b05ab6733a618578af5f94892f3950"}) {
    EXPECT_FALSE(Digest::from_hex(text).has_value()) << text;
  }
}

}  // namespace
}  // namespace fsdp
