#include "libfsdp/text/bpe.h"

#include <algorithm>
#include <cstdio>
#include <functional>
#include <queue>

#include "libfsdp/base/error.h"
#include "libfsdp/text/unicode.h"

namespace fsdp::text {
namespace {

constexpr size_t kCacheShards = 64;
constexpr size_t kWordsPerShard = 1024;
constexpr size_t kMaxCachedWordBytes = 256;
constexpr size_t kShortWordSymbols = 32;
constexpr uint32_t kNoRank = ~uint32_t{0};

bool is_printable_byte(unsigned byte) {
  return (byte >= '!' && byte <= '~') || (byte >= 0xa1 && byte <= 0xac) || byte >= 0xae;
}

struct ByteLevelMap {
  std::array<char32_t, 256> characters{};
  std::array<int16_t, 512> bytes{};

  ByteLevelMap() {
    bytes.fill(-1);
    char32_t next = 0x100;
    for (unsigned byte = 0; byte < 256; ++byte) {
      characters[byte] = is_printable_byte(byte) ? byte : next++;
      bytes[characters[byte]] = static_cast<int16_t>(byte);
    }
  }
};

const ByteLevelMap& byte_level_map() {
  static const ByteLevelMap map;
  return map;
}

struct TransparentHash {
  using is_transparent = void;
  size_t operator()(std::string_view text) const { return std::hash<std::string_view>{}(text); }
};

}  // namespace

char32_t byte_level_character(uint8_t byte) { return byte_level_map().characters[byte]; }

int byte_level_byte(char32_t character) {
  return character < 512 ? byte_level_map().bytes[character] : -1;
}

std::optional<std::string> byte_level_bytes(std::string_view token) {
  std::string out;
  for (size_t at = 0; at < token.size();) {
    const auto point = unicode::decode_at(token, at);
    const int byte = byte_level_byte(point.value);
    if (byte < 0) return std::nullopt;
    out += static_cast<char>(byte);
    at += point.num_bytes;
  }
  return out;
}

struct Bpe::CacheShard {
  std::mutex mutex;
  std::unordered_map<std::string, std::vector<BpeToken>, TransparentHash, std::equal_to<>> words;
};

Bpe::~Bpe() = default;

Bpe::Bpe(StringTable vocabulary,
         const std::vector<std::pair<std::string_view, std::string_view>>& merges,
         BpeOptions options)
    : vocabulary_(std::move(vocabulary)), options_(std::move(options)) {
  if (options_.unk_token) {
    unk_id_ = vocabulary_.find(*options_.unk_token);
    if (unk_id_ < 0)
      throw ModelError(
          cat("[tokenizer] unk_token '", *options_.unk_token, "' is not in the vocabulary."));
  }
  if (merges.size() >= kNoRank) throw ModelError("[tokenizer] too many merges.");
  for (size_t i = 0; i < merges.size(); ++i) {
    add_merge(merges[i].first, merges[i].second, static_cast<uint32_t>(i));
  }
  index_words();
  whole_ = std::make_unique<std::atomic<Whole>[]>(static_cast<size_t>(vocabulary_.id_limit()));
  cache_ = std::make_unique<CacheShard[]>(kCacheShards);
}

void Bpe::add_merge(std::string_view left, std::string_view right, uint32_t rank) {
  const auto id_of = [&](std::string_view token) {
    const int32_t id = vocabulary_.find(token);
    if (id < 0 || token.empty()) {
      throw ModelError(cat("[tokenizer] merge ", rank, " ('", left, "' + '", right,
                           "') needs the token '", token, "', which is not in the vocabulary."));
    }
    return id;
  };
  merges_.set(id_of(left), id_of(right), {rank, id_of(cat(left, right))});
}

void Bpe::index_words() {
  fallback_ids_.fill(-1);
  byte_ids_.fill(-1);
  if (options_.byte_fallback) {
    for (int byte = 0; byte < 256; ++byte) {
      std::array<char, 8> name{};
      std::snprintf(name.data(), name.size(), "<0x%02X>", static_cast<unsigned>(byte));
      fallback_ids_[static_cast<size_t>(byte)] = vocabulary_.find(name.data());
    }
  }
  if (!options_.byte_level) return;
  for (int32_t id = 0; id < vocabulary_.id_limit(); ++id) {
    const auto token = vocabulary_.text_of(id);
    const auto bytes = token ? byte_level_bytes(*token) : std::nullopt;
    if (!bytes || bytes->empty()) continue;
    words_.insert(*bytes, id);
    if (bytes->size() == 1) byte_ids_[static_cast<uint8_t>((*bytes)[0])] = id;
  }
}

void Bpe::encode(std::string_view word, std::vector<BpeToken>& out) const {
  if (word.empty() || encode_whole(word, out)) return;
  if (word.size() > kMaxCachedWordBytes) {
    if (word.size() >= kNoRank)
      throw DataError(cat("[tokenizer] a word of ", word.size(), " bytes."));
    std::vector<BpeToken> symbols;
    merge_word(word, symbols);
    out.insert(out.end(), symbols.begin(), symbols.end());
    return;
  }
  if (encode_cached(word, out)) return;
  static thread_local std::vector<BpeToken> symbols;
  merge_word(word, symbols);
  out.insert(out.end(), symbols.begin(), symbols.end());
  remember(word, symbols);
}

// Most words are one token. Whether a token's own text encodes to it alone is found out once and
// kept in a flag, so that this path takes no lock.
bool Bpe::encode_whole(std::string_view word, std::vector<BpeToken>& out) const {
  const int32_t id = (options_.byte_level ? words_ : vocabulary_).find(word);
  if (id < 0) return false;
  Whole whole = whole_[static_cast<size_t>(id)].load(std::memory_order_relaxed);
  if (whole == Whole::kUnknown) {
    std::vector<BpeToken> symbols;
    if (!options_.ignore_merges) merge_word(word, symbols);
    whole = options_.ignore_merges || (symbols.size() == 1 && symbols[0].id == id) ? Whole::kYes
                                                                                   : Whole::kNo;
    whole_[static_cast<size_t>(id)].store(whole, std::memory_order_relaxed);
  }
  if (whole == Whole::kNo) return false;
  out.push_back({id, 0, static_cast<uint32_t>(word.size())});
  return true;
}

bool Bpe::encode_cached(std::string_view word, std::vector<BpeToken>& out) const {
  CacheShard& shard = cache_[std::hash<std::string_view>{}(word) % kCacheShards];
  const std::lock_guard lock(shard.mutex);
  const auto hit = shard.words.find(word);
  if (hit == shard.words.end()) return false;
  out.insert(out.end(), hit->second.begin(), hit->second.end());
  return true;
}

void Bpe::remember(std::string_view word, const std::vector<BpeToken>& tokens) const {
  CacheShard& shard = cache_[std::hash<std::string_view>{}(word) % kCacheShards];
  const std::lock_guard lock(shard.mutex);
  if (shard.words.size() < kWordsPerShard) shard.words.emplace(std::string(word), tokens);
}

// Some vocabularies lack control characters or bytes that UTF-8 never uses; a word with one takes
// the general way.
bool Bpe::split_by_bytes(std::string_view word, std::vector<BpeToken>& symbols) const {
  if (!options_.byte_level) return false;
  symbols.resize(word.size());
  int32_t all = 0;
  for (uint32_t i = 0; i < word.size(); ++i) {
    const int32_t id = byte_ids_[static_cast<uint8_t>(word[i])];
    all |= id;  // negative as soon as one is
    symbols[i] = {id, i, i + 1};
  }
  if (all < 0) symbols.clear();
  return all >= 0;
}

bool Bpe::fall_back_to_bytes(std::string_view word, size_t begin, size_t end,
                             std::vector<BpeToken>& symbols) const {
  if (!options_.byte_fallback) return false;
  // The fallback sees the spelled character: in a byte-level word that is the printable stand-in.
  std::string spelled(word.substr(begin, end - begin));
  if (options_.byte_level) {
    spelled.clear();
    unicode::append(spelled, byte_level_character(static_cast<uint8_t>(word[begin])));
  }
  for (const char c : spelled) {
    if (fallback_ids_[static_cast<uint8_t>(c)] < 0) return false;
  }
  for (size_t i = 0; i < spelled.size(); ++i) {
    const auto at = static_cast<uint32_t>(options_.byte_level ? begin : begin + i);
    symbols.push_back({fallback_ids_[static_cast<uint8_t>(spelled[i])], at, at + 1});
  }
  return true;
}

// As the `tokenizers` package does it, its order of unknown and fallback tokens included.
void Bpe::split_word(std::string_view word, std::vector<BpeToken>& symbols) const {
  symbols.clear();
  if (split_by_bytes(word, symbols)) return;
  std::optional<BpeToken> unknown;
  for (size_t begin = 0; begin < word.size();) {
    const size_t end =
        begin + (options_.byte_level ? 1 : unicode::decode_at(word, begin).num_bytes);
    const int32_t id = options_.byte_level ? byte_ids_[static_cast<uint8_t>(word[begin])]
                                           : vocabulary_.find(word.substr(begin, end - begin));
    const BpeToken here{id, static_cast<uint32_t>(begin), static_cast<uint32_t>(end)};
    if (id >= 0) {
      if (unknown) symbols.push_back(*unknown);
      unknown.reset();
      symbols.push_back(here);
    } else if (!fall_back_to_bytes(word, begin, end, symbols) && unk_id_ >= 0) {
      if (unknown && options_.fuse_unk) {
        unknown->end = here.end;
      } else {
        if (unknown) symbols.push_back(*unknown);
        unknown = BpeToken{unk_id_, here.begin, here.end};
      }
    }
    begin = end;
  }
  if (unknown) symbols.push_back(*unknown);
}

void Bpe::merge_word(std::string_view word, std::vector<BpeToken>& symbols) const {
  split_word(word, symbols);
  if (symbols.size() < 2) return;
  symbols.size() <= kShortWordSymbols ? merge_short(symbols) : merge_long(symbols);
}

// Quadratic, but without a queue or memory: the faster way for words of usual length.
void Bpe::merge_short(std::vector<BpeToken>& symbols) const {
  std::array<const Merge*, kShortWordSymbols> rules{};
  size_t n = symbols.size();
  const auto look_up = [&](size_t i) { rules[i] = merges_.find(symbols[i].id, symbols[i + 1].id); };
  for (size_t i = 0; i + 1 < n; ++i) look_up(i);
  while (n > 1) {
    size_t best = n;
    uint32_t best_rank = kNoRank;
    for (size_t i = 0; i + 1 < n; ++i) {
      if (rules[i] != nullptr && rules[i]->rank < best_rank) {
        best = i;
        best_rank = rules[i]->rank;
      }
    }
    if (best == n) break;
    symbols[best] = {rules[best]->result, symbols[best].begin, symbols[best + 1].end};
    for (size_t i = best + 1; i + 1 < n; ++i) {
      symbols[i] = symbols[i + 1];
      rules[i] = rules[i + 1];
    }
    --n;
    if (best > 0) look_up(best - 1);
    if (best + 1 < n) look_up(best);
  }
  symbols.resize(n);
}

// A queue of candidate merges over a linked list of symbols; a candidate that no longer holds is
// dropped when popped.
void Bpe::merge_long(std::vector<BpeToken>& symbols) const {
  const auto n = static_cast<uint32_t>(symbols.size());
  std::vector<uint32_t> previous(n), next(n);  // n stands for none
  std::vector<bool> gone(n, false);
  for (uint32_t i = 0; i < n; ++i) {
    previous[i] = i == 0 ? n : i - 1;
    next[i] = i + 1;
  }
  std::priority_queue<uint64_t, std::vector<uint64_t>, std::greater<>>
      queue;  // rank, then position
  const auto rule_at = [&](uint32_t i) {
    return next[i] < n ? merges_.find(symbols[i].id, symbols[next[i]].id) : nullptr;
  };
  const auto offer = [&](uint32_t i) {
    if (const Merge* rule = rule_at(i)) queue.push(uint64_t{rule->rank} << 32 | i);
  };
  for (uint32_t i = 0; i + 1 < n; ++i) offer(i);
  while (!queue.empty()) {
    const auto rank = static_cast<uint32_t>(queue.top() >> 32);
    const auto at = static_cast<uint32_t>(queue.top());
    queue.pop();
    if (gone[at]) continue;
    const Merge* rule = rule_at(at);
    if (rule == nullptr || rule->rank != rank) continue;
    const uint32_t right = next[at];
    symbols[at] = {rule->result, symbols[at].begin, symbols[right].end};
    gone[right] = true;
    next[at] = next[right];
    if (next[at] < n) previous[next[at]] = at;
    if (previous[at] < n) offer(previous[at]);
    offer(at);
  }
  size_t kept = 0;
  for (uint32_t i = 0; i < n; ++i) {
    if (!gone[i]) symbols[kept++] = symbols[i];
  }
  symbols.resize(kept);
}

}  // namespace fsdp::text
