// Chat templates: a Jinja2 engine with the settings that transformers renders chat templates under.
//
// trim_blocks and lstrip_blocks are on, loop controls and the generation tag are known, values are
// immutable, nothing outside the template is reachable. Not supported: include, import, extends,
// block, line statements, autoescape.
#pragma once

#include <cstdint>
#include <ctime>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "libfsdp/text/jinja_value.h"
#include "libfsdp/text/tokenizer_regex.h"

namespace fsdp::text {

namespace jinja {

struct Syntax;

struct RenderOptions {
  int64_t max_steps = 10'000'000;  ///< of evaluation; copying 16 bytes or one item counts as a step
  int max_depth = 1000;            ///< of nested evaluation, e.g. macros that call macros
  std::optional<std::tm> now;      ///< what strftime_now formats; the local time when absent
};

struct RenderResult {
  std::string text;
  std::vector<ByteSpan> generations;  ///< what stood in {% generation %} blocks
  bool generations_exact =
      true;  ///< false when such a block was in a macro or the like and could not be located
};

/// A parsed template. Immutable: may be rendered from several threads at once.
class Template {
 public:
  /// Throws TemplateError that names the line; `name` stands in front of every message.
  explicit Template(std::string_view source, std::string name = "chat template");
  ~Template();
  Template(Template&&) noexcept;
  Template& operator=(Template&&) noexcept;

  /// Renders with the entries of `context` (a dict) as variables. Throws TemplateError, also beyond
  /// the limits.
  RenderResult render(const Value& context, const RenderOptions& options = {}) const;

  bool has_generation() const;

 private:
  std::unique_ptr<const Syntax> syntax_;
  std::string name_;
};

}  // namespace jinja
}  // namespace fsdp::text
