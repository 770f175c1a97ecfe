#include "libfsdp/text/tokenizer_normalizer.h"

#include <algorithm>

#include "libfsdp/base/error.h"

namespace fsdp::text {
namespace {

using unicode::Edit;

// A rewriting may grow the text at every byte; beyond this it is a hostile file, not a tokenizer.
constexpr size_t kMaxRewrittenBytes = size_t{1} << 36;

class Nfc final : public Normalizer {
 public:
  Piece apply(const Piece& piece, TextTrail& trail) const override {
    // Below U+0300, whose first byte is 0xcc, every text is in form C already.
    const bool plain = std::none_of(piece.text.begin(), piece.text.end(),
                                    [](char c) { return static_cast<uint8_t>(c) >= 0xcc; });
    if (plain) return piece;
    std::vector<Edit> edits;
    std::string now = unicode::nfc(piece.text, edits);
    return edits.empty() ? piece : trail.rewrite(piece, std::move(now), std::move(edits));
  }
};

class Lowercase final : public Normalizer {
 public:
  Piece apply(const Piece& piece, TextTrail& trail) const override {
    std::vector<Edit> edits;
    std::string now = unicode::lowercase(piece.text, edits);
    return edits.empty() ? piece : trail.rewrite(piece, std::move(now), std::move(edits));
  }
};

class Prepend final : public Normalizer {
 public:
  explicit Prepend(std::string prefix) : prefix_(std::move(prefix)) {}
  Piece apply(const Piece& piece, TextTrail& trail) const override {
    if (piece.text.empty() || prefix_.empty()) return piece;
    return trail.rewrite(piece, cat(prefix_, piece.text), {{0, prefix_.size(), 0, 0}});
  }

 private:
  std::string prefix_;
};

class Replace final : public Normalizer {
 public:
  Replace(Regex pattern, std::string content)
      : pattern_(std::move(pattern)), content_(std::move(content)) {}
  Piece apply(const Piece& piece, TextTrail& trail) const override {
    std::vector<Edit> edits;
    std::string now = replace_matches(pattern_, content_, piece.text, edits);
    return edits.empty() ? piece : trail.rewrite(piece, std::move(now), std::move(edits));
  }

 private:
  Regex pattern_;
  std::string content_;
};

class NormalizerSequence final : public Normalizer {
 public:
  explicit NormalizerSequence(std::vector<std::unique_ptr<Normalizer>> parts)
      : parts_(std::move(parts)) {}
  Piece apply(const Piece& piece, TextTrail& trail) const override {
    Piece now = piece;
    for (const auto& part : parts_) now = part->apply(now, trail);
    return now;
  }

 private:
  std::vector<std::unique_ptr<Normalizer>> parts_;
};

}  // namespace

std::string Normalizer::apply_to(std::string_view text) const {
  TextTrail trail(text);
  return std::string(apply(trail.whole(), trail).text);
}

std::string replace_matches(const Regex& pattern, std::string_view content, std::string_view text,
                            std::vector<Edit>& edits) {
  std::string out;
  if (text.empty()) return out;
  size_t copied = 0;
  RegexMatches matches(pattern, text);
  while (const auto match = matches.next()) {
    out += text.substr(copied, match->begin - copied);
    edits.push_back({out.size(), out.size() + content.size(), match->begin, match->end});
    out += content;
    copied = match->end;
    if (out.size() > kMaxRewrittenBytes)
      throw DataError("[tokenizer] a Replace normalizer makes the text too long.");
  }
  out += text.substr(copied);
  return out;
}

std::unique_ptr<Normalizer> make_nfc_normalizer() { return std::make_unique<Nfc>(); }
std::unique_ptr<Normalizer> make_lowercase_normalizer() { return std::make_unique<Lowercase>(); }
std::unique_ptr<Normalizer> make_prepend_normalizer(std::string prefix) {
  return std::make_unique<Prepend>(std::move(prefix));
}
std::unique_ptr<Normalizer> make_replace_normalizer(Regex pattern, std::string content) {
  return std::make_unique<Replace>(std::move(pattern), std::move(content));
}
std::unique_ptr<Normalizer> make_normalizer_sequence(
    std::vector<std::unique_ptr<Normalizer>> parts) {
  return std::make_unique<NormalizerSequence>(std::move(parts));
}

}  // namespace fsdp::text
