// Byte-pair encoding: one word to its tokens.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

namespace fsdp::text {

/// The printable character that stands for a byte in byte-level vocabularies, and back (-1 for
/// other characters).
char32_t byte_level_character(uint8_t byte);
int byte_level_byte(char32_t character);

/// `token` with every byte-level character turned into its byte; nothing when another character
/// occurs.
std::optional<std::string> byte_level_bytes(std::string_view token);

/// Distinct strings with an id each. Ids may have gaps.
class StringTable {
 public:
  /// False, and nothing is changed, when the string or the id is there already. 0 <= id <
  /// kMaxTokenIds.
  bool insert(std::string_view text, int32_t id);
  /// The id, or -1.
  int32_t find(std::string_view text) const;
  /// The string, or nothing.
  std::optional<std::string_view> text_of(int32_t id) const;

  size_t size() const { return count_; }
  /// One more than the largest id.
  int32_t id_limit() const { return static_cast<int32_t>(spans_.size()); }

 private:
  struct Span {
    uint64_t begin = kAbsent;
    uint32_t size = 0;
  };
  static constexpr uint64_t kAbsent = ~uint64_t{0};
  // A few bits of the hash beside the id, so that most probes do not touch the string.
  struct Slot {
    uint32_t hash = 0;
    int32_t id = -1;  // -1 for free
  };
  void grow();
  size_t slot_of(std::string_view text, size_t hash) const;
  std::string_view view(const Span& span) const {
    return std::string_view(bytes_).substr(span.begin, span.size);
  }

  std::string bytes_;
  std::vector<Span> spans_;  // by id
  std::vector<Slot> slots_;  // open addressing
  size_t count_ = 0;
};

/// Ids at or above this are refused: tables are indexed by id.
inline constexpr int64_t kMaxTokenIds = int64_t{1} << 24;

/// The rule that joins two neighbouring tokens: which first (lowest rank), and what they become.
struct Merge {
  uint32_t rank;
  int32_t result;
};

/// (left, right) -> Merge.
class MergeTable {
 public:
  /// A pair that is there already gets the new rule.
  void set(int32_t left, int32_t right, Merge merge);
  const Merge* find(int32_t left, int32_t right) const;
  size_t size() const { return count_; }

 private:
  struct Slot {
    uint64_t key = kFree;
    Merge merge{};
  };
  static constexpr uint64_t kFree = ~uint64_t{0};
  size_t slot_of(uint64_t key) const;
  void grow();

  std::vector<Slot> slots_;
  size_t count_ = 0;
};

/// A token within a word: the bytes [begin, end) of it.
struct BpeToken {
  int32_t id;
  uint32_t begin;
  uint32_t end;
};

struct BpeOptions {
  bool byte_level = false;  ///< words are bytes, spelled in the vocabulary by byte_level_character
  bool byte_fallback = false;  ///< an unknown character becomes <0xNN> tokens, if all of them exist
  bool fuse_unk = false;       ///< neighbouring unknown characters share one token
  bool ignore_merges = false;  ///< a word that is in the vocabulary is that token
  std::optional<std::string> unk_token;  ///< without it unknown characters are dropped
};

/// The model. Const functions are thread-safe; words seen are remembered (bounded memory).
class Bpe {
 public:
  /// Merges are given by spelling, in the order of rank. Throws ModelError for a merge or
  /// `unk_token` that is not in the vocabulary.
  Bpe(StringTable vocabulary,
      const std::vector<std::pair<std::string_view, std::string_view>>& merges, BpeOptions options);

  /// Appends the tokens of `word`, which must be valid UTF-8 unless byte_level.
  /// Cost: O(1) for a word seen before, O(n log n) in its bytes for a new one.
  void encode(std::string_view word, std::vector<BpeToken>& out) const;

  const StringTable& vocabulary() const { return vocabulary_; }
  const BpeOptions& options() const { return options_; }

 private:
  enum class Whole : uint8_t { kUnknown, kYes, kNo };
  struct CacheShard;

  void add_merge(std::string_view left, std::string_view right, uint32_t rank);
  void index_words();
  void split_word(std::string_view word, std::vector<BpeToken>& symbols) const;
  bool split_by_bytes(std::string_view word, std::vector<BpeToken>& symbols) const;
  bool fall_back_to_bytes(std::string_view word, size_t begin, size_t end,
                          std::vector<BpeToken>& symbols) const;
  void merge_word(std::string_view word, std::vector<BpeToken>& symbols) const;
  void merge_short(std::vector<BpeToken>& symbols) const;
  void merge_long(std::vector<BpeToken>& symbols) const;
  bool encode_whole(std::string_view word, std::vector<BpeToken>& out) const;
  bool encode_cached(std::string_view word, std::vector<BpeToken>& out) const;
  void remember(std::string_view word, const std::vector<BpeToken>& tokens) const;

  StringTable vocabulary_;  // as spelled in the file
  StringTable words_;       // the same ids, spelled as the bytes of a word, when byte_level
  MergeTable merges_;
  BpeOptions options_;
  int32_t unk_id_ = -1;
  std::array<int32_t, 256> byte_ids_{};      // byte_level: the token of one byte, or -1
  std::array<int32_t, 256> fallback_ids_{};  // <0xNN>, or -1
  std::unique_ptr<std::atomic<Whole>[]>
      whole_;  // by id: does this token's own text encode to it alone
  std::unique_ptr<CacheShard[]> cache_;

 public:
  ~Bpe();
};

}  // namespace fsdp::text
