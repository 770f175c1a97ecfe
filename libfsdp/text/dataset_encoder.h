// What data sets need of a tokenizer, so that tests can do without a real one.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "libfsdp/text/chat.h"
#include "libfsdp/text/tokenizer.h"

namespace fsdp::text {

/// Const functions must be safe to call from several threads.
class TokenEncoder {
 public:
  virtual ~TokenEncoder() = default;
  /// Ids and the bytes each stands for; special tokens in the text are recognised.
  /// `add_special_tokens`: with what the tokenizer puts around a text (a bos, say).
  virtual Encoding encode(std::string_view text, bool add_special_tokens) const = 0;
  virtual std::string decode(std::span<const int32_t> ids) const = 0;
  virtual std::optional<int32_t> eos_id() const = 0;
  /// What padding holds; the value does not matter, as padding is never attended to.
  virtual int32_t pad_id() const = 0;
  /// Jinja text; empty when there is none.
  virtual std::string chat_template() const = 0;
  /// The special tokens by name, for the template: {"bos_token", "<s>"}, ...
  virtual ChatTemplate::Variables special_tokens() const = 0;
};

/// A Tokenizer as a TokenEncoder. `chat_template` replaces the tokenizer's own when given.
std::unique_ptr<TokenEncoder> make_token_encoder(Tokenizer tokenizer,
                                                 std::optional<std::string> chat_template = {});

}  // namespace fsdp::text
