#include "libfsdp/text/pre_tokenizer.h"

#include "libfsdp/base/error.h"

namespace fsdp::text {
namespace {

using unicode::Edit;

constexpr std::string_view kGpt2Pattern =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

// Takes the stretches of one piece from left to right, matched or not, and hands on what the
// behavior makes of them.
class Cutter {
 public:
  Cutter(const Piece& piece, SplitBehavior behavior, bool invert, PieceSink& next)
      : piece_(piece), next_(next), behavior_(behavior), invert_(invert) {}

  void add(size_t begin, size_t end, bool matched) {
    const bool is_match = matched != invert_;
    switch (behavior_) {
      case SplitBehavior::kIsolated:
        return emit(begin, end);
      case SplitBehavior::kRemoved:
        if (!is_match) emit(begin, end);
        return;
      case SplitBehavior::kContiguous:
        return extend_or_start(begin, end, is_match == last_matched_, is_match);
      case SplitBehavior::kMergedWithPrevious:
        return extend_or_start(begin, end, is_match && !last_matched_, is_match);
      case SplitBehavior::kMergedWithNext:
        return merge_with_next(begin, end, is_match);
    }
  }

  void finish() {
    if (pending_) emit(begin_, end_);
    pending_ = false;
  }

 private:
  void emit(size_t begin, size_t end) {
    if (begin < end) next_.take(piece_.part(begin, end));
  }

  void extend_or_start(size_t begin, size_t end, bool extend, bool is_match) {
    if (!(extend && pending_)) {
      finish();
      begin_ = begin;
    }
    end_ = end;
    pending_ = true;
    last_matched_ = is_match;
  }

  // A match waits for the stretch after it; only one that did not match takes it in.
  void merge_with_next(size_t begin, size_t end, bool is_match) {
    if (!is_match) {
      emit(pending_ ? begin_ : begin, end);
      pending_ = false;
      return;
    }
    finish();
    begin_ = begin;
    end_ = end;
    pending_ = true;
  }

  const Piece& piece_;
  PieceSink& next_;
  const SplitBehavior behavior_;
  const bool invert_;
  bool pending_ = false, last_matched_ = false;
  size_t begin_ = 0, end_ = 0;
};

void split_by_regex(const Regex& regex, const Piece& piece, SplitBehavior behavior, bool invert,
                    PieceSink& next) {
  Cutter cutter(piece, behavior, invert, next);
  RegexMatches matches(regex, piece.text);
  size_t done = 0;
  while (const auto match = matches.next()) {
    if (done != match->begin) cutter.add(done, match->begin, false);
    cutter.add(match->begin, match->end, true);
    done = match->end;
  }
  if (done != piece.text.size()) cutter.add(done, piece.text.size(), false);
  cutter.finish();
}

template <class Predicate>
void split_by_character(Predicate matches, const Piece& piece, SplitBehavior behavior, bool invert,
                        PieceSink& next) {
  Cutter cutter(piece, behavior, invert, next);
  size_t done = 0;
  for (size_t at = 0; at < piece.text.size();) {
    const auto point = unicode::decode_at(piece.text, at);
    const size_t end = at + point.num_bytes;
    if (matches(point.value)) {
      if (done < at) cutter.add(done, at, false);
      cutter.add(at, end, true);
      done = end;
    }
    at = end;
  }
  if (done < piece.text.size()) cutter.add(done, piece.text.size(), false);
  cutter.finish();
}

class Split final : public PreTokenizer {
 public:
  Split(Regex pattern, SplitBehavior behavior, bool invert)
      : pattern_(std::move(pattern)), behavior_(behavior), invert_(invert) {}
  void run(const Piece& piece, TextTrail&, PieceSink& next) const override {
    if (!piece.text.empty()) split_by_regex(pattern_, piece, behavior_, invert_, next);
  }

 private:
  Regex pattern_;
  SplitBehavior behavior_;
  bool invert_;
};

class Digits final : public PreTokenizer {
 public:
  explicit Digits(bool individual)
      : behavior_(individual ? SplitBehavior::kIsolated : SplitBehavior::kContiguous) {}
  void run(const Piece& piece, TextTrail&, PieceSink& next) const override {
    split_by_character(unicode::is_numeric, piece, behavior_, false, next);
  }

 private:
  SplitBehavior behavior_;
};

class ByteLevel final : public PreTokenizer {
 public:
  ByteLevel(bool add_prefix_space, bool use_regex) : add_prefix_space_(add_prefix_space) {
    if (use_regex) pattern_.emplace(kGpt2Pattern);
  }
  void run(const Piece& piece, TextTrail& trail, PieceSink& next) const override {
    if (piece.text.empty()) return;
    Piece now = piece;
    if (add_prefix_space_ && piece.text[0] != ' ') {
      now = trail.rewrite(piece, cat(' ', piece.text), {{0, 1, 0, 0}});
    }
    if (!pattern_) return next.take(now);
    split_by_regex(*pattern_, now, SplitBehavior::kIsolated, false, next);
  }

 private:
  bool add_prefix_space_;
  std::optional<Regex> pattern_;
};

class Metaspace final : public PreTokenizer {
 public:
  Metaspace(std::string mark, PrependScheme scheme, bool split)
      : mark_(std::move(mark)), scheme_(scheme), split_(split) {}

  void run(const Piece& piece, TextTrail& trail, PieceSink& next) const override {
    if (piece.text.empty()) return;
    const Piece now = mark_spaces(piece, trail);
    if (!split_) return next.take(now);
    const char32_t mark = unicode::decode_at(mark_, 0).value;
    split_by_character([mark](char32_t value) { return value == mark; }, now,
                       SplitBehavior::kMergedWithNext, false, next);
  }

 private:
  bool wants_prefix(const Piece& piece, const TextTrail& trail) const {
    if (piece.text.starts_with(' ') || piece.text.starts_with(mark_)) return false;
    if (scheme_ == PrependScheme::kAlways) return true;
    return scheme_ == PrependScheme::kFirst && trail.origin(piece, 0, piece.text.size()).begin == 0;
  }

  Piece mark_spaces(const Piece& piece, TextTrail& trail) const {
    std::string now;
    std::vector<Edit> edits;
    if (wants_prefix(piece, trail)) {
      now = mark_;
      edits.push_back({0, mark_.size(), 0, 0});
    }
    for (size_t i = 0; i < piece.text.size(); ++i) {
      if (piece.text[i] != ' ') {
        now += piece.text[i];
        continue;
      }
      edits.push_back({now.size(), now.size() + mark_.size(), i, i + 1});
      now += mark_;
    }
    return edits.empty() ? piece : trail.rewrite(piece, std::move(now), std::move(edits));
  }

  std::string mark_;
  PrependScheme scheme_;
  bool split_;
};

class Whitespace final : public PreTokenizer {
 public:
  void run(const Piece& piece, TextTrail&, PieceSink& next) const override {
    enum class Kind { kWord, kSpace, kOther };
    const auto kind_of = [](char32_t value) {
      if (unicode::is_word(value)) return Kind::kWord;
      return unicode::is_space(value) ? Kind::kSpace : Kind::kOther;
    };
    size_t begin = 0;
    Kind run_kind = Kind::kSpace;
    for (size_t at = 0; at < piece.text.size();) {
      const auto point = unicode::decode_at(piece.text, at);
      const Kind kind = kind_of(point.value);
      if (kind != run_kind) {
        if (run_kind != Kind::kSpace) next.take(piece.part(begin, at));
        begin = at;
        run_kind = kind;
      }
      at += point.num_bytes;
    }
    if (run_kind != Kind::kSpace && begin < piece.text.size())
      next.take(piece.part(begin, piece.text.size()));
  }
};

// Each piece that one part makes goes through all the later parts before the next one is made:
// nothing is stored.
class PreTokenizerSequence final : public PreTokenizer {
 public:
  explicit PreTokenizerSequence(std::vector<std::unique_ptr<PreTokenizer>> parts)
      : parts_(std::move(parts)) {}
  void run(const Piece& piece, TextTrail& trail, PieceSink& next) const override {
    run_from(0, piece, trail, next);
  }

 private:
  struct Stage final : PieceSink {
    Stage(const PreTokenizerSequence& sequence, size_t part, TextTrail& trail, PieceSink& next)
        : sequence_(sequence), part_(part), trail_(trail), next_(next) {}
    void take(const Piece& piece) override { sequence_.run_from(part_, piece, trail_, next_); }
    const PreTokenizerSequence& sequence_;
    size_t part_;
    TextTrail& trail_;
    PieceSink& next_;
  };

  void run_from(size_t part, const Piece& piece, TextTrail& trail, PieceSink& next) const {
    if (part == parts_.size()) return next.take(piece);
    if (part + 1 == parts_.size()) return parts_[part]->run(piece, trail, next);
    Stage stage(*this, part + 1, trail, next);
    parts_[part]->run(piece, trail, stage);
  }

  std::vector<std::unique_ptr<PreTokenizer>> parts_;
};

}  // namespace

std::unique_ptr<PreTokenizer> make_split(Regex pattern, SplitBehavior behavior, bool invert) {
  return std::make_unique<Split>(std::move(pattern), behavior, invert);
}
std::unique_ptr<PreTokenizer> make_digits(bool individual_digits) {
  return std::make_unique<Digits>(individual_digits);
}
std::unique_ptr<PreTokenizer> make_byte_level(bool add_prefix_space, bool use_regex) {
  return std::make_unique<ByteLevel>(add_prefix_space, use_regex);
}
std::unique_ptr<PreTokenizer> make_metaspace(std::string mark, PrependScheme scheme, bool split) {
  return std::make_unique<Metaspace>(std::move(mark), scheme, split);
}
std::unique_ptr<PreTokenizer> make_whitespace() { return std::make_unique<Whitespace>(); }
std::unique_ptr<PreTokenizer> make_pre_tokenizer_sequence(
    std::vector<std::unique_ptr<PreTokenizer>> parts) {
  return std::make_unique<PreTokenizerSequence>(std::move(parts));
}

}  // namespace fsdp::text
