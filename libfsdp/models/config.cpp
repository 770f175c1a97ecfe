#include "libfsdp/models/config.h"

#include "libfsdp/base/error.h"

namespace fsdp::models {
namespace {

void require_positive(const char* name, int64_t value) {
  if (value <= 0)
    throw ModelError(cat("config: ", name, " is ", value, ", expected a positive number"));
}

}  // namespace

void validate(const LlamaConfig& c) {
  require_positive("vocab_size", c.vocab_size);
  require_positive("hidden_size", c.hidden_size);
  require_positive("intermediate_size", c.intermediate_size);
  require_positive("num_hidden_layers", c.num_hidden_layers);
  require_positive("num_attention_heads", c.num_attention_heads);
  require_positive("num_key_value_heads", c.num_key_value_heads);
  require_positive("head_dim", c.head_dim);
  if (c.num_attention_heads % c.num_key_value_heads != 0) {
    throw ModelError(cat("config: num_attention_heads is ", c.num_attention_heads,
                         ", not a multiple of num_key_value_heads, ", c.num_key_value_heads));
  }
  if (c.head_dim % 2 != 0)
    throw ModelError(
        cat("config: head_dim is ", c.head_dim, ", rotary positions need an even one"));
}

}  // namespace fsdp::models
