// Normalizers of tokenizer.json: what is done to a text before it is cut into words.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "libfsdp/text/tokenizer_text.h"

namespace fsdp::text {

/// Rewrites a piece of text. Const and thread-safe.
class Normalizer {
 public:
  virtual ~Normalizer() = default;

  /// The piece itself when nothing changes, else a rewritten one that lives in `trail`.
  virtual Piece apply(const Piece& piece, TextTrail& trail) const = 0;

  /// The normalized form of a text that comes from nowhere (the content of an added token).
  std::string apply_to(std::string_view text) const;
};

/// Unicode normalization form C.
std::unique_ptr<Normalizer> make_nfc_normalizer();
/// Full lower case of each character.
std::unique_ptr<Normalizer> make_lowercase_normalizer();
/// Puts `prefix` before every piece that is not empty.
std::unique_ptr<Normalizer> make_prepend_normalizer(std::string prefix);
/// Puts `content` in the place of every match.
std::unique_ptr<Normalizer> make_replace_normalizer(Regex pattern, std::string content);
/// One after the other.
std::unique_ptr<Normalizer> make_normalizer_sequence(
    std::vector<std::unique_ptr<Normalizer>> parts);

/// `text` with every match of `pattern` replaced by `content`; the changes are appended to `edits`.
std::string replace_matches(const Regex& pattern, std::string_view content, std::string_view text,
                            std::vector<unicode::Edit>& edits);

}  // namespace fsdp::text
