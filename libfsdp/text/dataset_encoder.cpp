#include "libfsdp/text/dataset_encoder.h"

#include <utility>

namespace fsdp::text {
namespace {

class TokenizerEncoder : public TokenEncoder {
 public:
  TokenizerEncoder(Tokenizer tokenizer, std::string chat_template)
      : tokenizer_(std::move(tokenizer)), chat_template_(std::move(chat_template)) {}

  Encoding encode(std::string_view text, bool add_special_tokens) const override {
    return tokenizer_.encode_with_offsets(text, add_special_tokens);
  }
  std::string decode(std::span<const int32_t> ids) const override { return tokenizer_.decode(ids); }
  std::optional<int32_t> eos_id() const override { return tokenizer_.eos_id(); }
  int32_t pad_id() const override {
    return tokenizer_.pad_id().value_or(tokenizer_.eos_id().value_or(0));
  }
  std::string chat_template() const override { return chat_template_; }

  ChatTemplate::Variables special_tokens() const override {
    ChatTemplate::Variables out;
    const auto add = [&out](const char* name, const std::string& token) {
      if (!token.empty()) out.emplace_back(name, token);
    };
    add("bos_token", tokenizer_.bos_token());
    add("eos_token", tokenizer_.eos_token());
    add("pad_token", tokenizer_.pad_token());
    add("unk_token", tokenizer_.unk_token());
    return out;
  }

 private:
  Tokenizer tokenizer_;
  std::string chat_template_;
};

}  // namespace

std::unique_ptr<TokenEncoder> make_token_encoder(Tokenizer tokenizer,
                                                 std::optional<std::string> chat_template) {
  std::string source = chat_template ? std::move(*chat_template) : tokenizer.chat_template();
  return std::make_unique<TokenizerEncoder>(std::move(tokenizer), std::move(source));
}

}  // namespace fsdp::text
