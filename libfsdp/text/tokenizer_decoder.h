// Decoders of tokenizer.json: from the spelling of tokens to text.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "libfsdp/text/tokenizer_regex.h"

namespace fsdp::text {

/// Rewrites the spellings of a sequence of tokens; the text is what they give when joined. Const
/// and thread-safe.
class TokenDecoder {
 public:
  virtual ~TokenDecoder() = default;
  virtual void apply(std::vector<std::string>& tokens) const = 0;
  /// True when the text is the tokens' bytes one after the other, so that it can be streamed byte
  /// by byte.
  virtual bool is_byte_level() const { return false; }
};

/// Byte-level characters to bytes; a token with any other character stands for itself. Bad UTF-8
/// becomes U+FFFD.
std::unique_ptr<TokenDecoder> make_byte_level_decoder();
/// `content` in the place of every match, token by token.
std::unique_ptr<TokenDecoder> make_replace_decoder(Regex pattern, std::string content);
/// Runs of <0xNN> tokens to characters, or to one U+FFFD a byte where the run is not UTF-8.
std::unique_ptr<TokenDecoder> make_byte_fallback_decoder();
/// All tokens to one.
std::unique_ptr<TokenDecoder> make_fuse_decoder();
/// Takes up to `start` / `stop` times the character `content` off the ends of each token.
std::unique_ptr<TokenDecoder> make_strip_decoder(std::string content, size_t start, size_t stop);
/// The mark to a space; `drops_first`: marks of the first token vanish.
std::unique_ptr<TokenDecoder> make_metaspace_decoder(std::string mark, bool drops_first);
/// One after the other.
std::unique_ptr<TokenDecoder> make_decoder_sequence(
    std::vector<std::unique_ptr<TokenDecoder>> parts);

/// The bytes that a token spells for the byte-level decoder.
std::string byte_level_token_bytes(const std::string& token);

}  // namespace fsdp::text
