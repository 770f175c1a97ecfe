// A tokenizer of bytes with a few special tokens, for tests that need ids but no vocabulary.
#pragma once

#include <array>
#include <string>
#include <utility>

#include "libfsdp/text/dataset_encoder.h"

namespace fsdp::text {

class FakeEncoder : public TokenEncoder {
 public:
  static constexpr int32_t kImStart = 256, kImEnd = 257, kBos = 258, kEos = 259;

  explicit FakeEncoder(std::string chat_template = "", bool adds_bos = false, bool adds_eos = false)
      : chat_template_(std::move(chat_template)), adds_bos_(adds_bos), adds_eos_(adds_eos) {}

  Encoding encode(std::string_view text, bool add_special_tokens) const override {
    Encoding out;
    if (add_special_tokens && adds_bos_) push(out, kBos, 0, 0);
    for (size_t at = 0; at < text.size();) {
      const auto [id, bytes] = token_at(text.substr(at));
      push(out, id, at, at + bytes);
      at += bytes;
    }
    if (add_special_tokens && adds_eos_) push(out, kEos, text.size(), text.size());
    return out;
  }

  std::string decode(std::span<const int32_t> ids) const override {
    std::string out;
    for (const int32_t id : ids) {
      if (id < 256) {
        out += static_cast<char>(id);
      } else {
        out += kSpecial[static_cast<size_t>(id - 256)];
      }
    }
    return out;
  }

  std::optional<int32_t> eos_id() const override { return kEos; }
  int32_t pad_id() const override { return 0; }
  std::string chat_template() const override { return chat_template_; }
  ChatTemplate::Variables special_tokens() const override {
    return {{"bos_token", "<s>"}, {"eos_token", "</s>"}};
  }

 private:
  static constexpr std::array<std::string_view, 4> kSpecial = {"<|im_start|>", "<|im_end|>", "<s>",
                                                               "</s>"};

  static std::pair<int32_t, size_t> token_at(std::string_view text) {
    for (size_t i = 0; i < kSpecial.size(); ++i) {
      if (text.starts_with(kSpecial[i])) return {256 + static_cast<int32_t>(i), kSpecial[i].size()};
    }
    return {static_cast<unsigned char>(text[0]), 1};
  }

  static void push(Encoding& out, int32_t id, size_t begin, size_t end) {
    out.ids.push_back(id);
    out.spans.push_back({begin, end});
  }

  std::string chat_template_;
  bool adds_bos_;
  bool adds_eos_;
};

/// In the manner of SmolLM2's.
inline const char* const kChatMl =
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

}  // namespace fsdp::text
