#include "libfsdp/text/jinja.h"

#include "libfsdp/text/jinja_interpreter.h"
#include "libfsdp/text/jinja_parser.h"

namespace fsdp::text::jinja {

Template::Template(std::string_view source, std::string name) : name_(std::move(name)) {
  try {
    syntax_ = std::make_unique<const Syntax>(parse(source));
  } catch (const TemplateError& error) {
    throw TemplateError(cat(name_, ", ", error.what()));
  }
}

Template::~Template() = default;
Template::Template(Template&&) noexcept = default;
Template& Template::operator=(Template&&) noexcept = default;

bool Template::has_generation() const { return syntax_->has_generation; }

RenderResult Template::render(const Value& context, const RenderOptions& options) const {
  Interpreter interpreter(*syntax_, context, options);
  try {
    return interpreter.run();
  } catch (const TemplateError& error) {
    throw TemplateError(cat(name_, ", line ", interpreter.line(), ": ", error.what()),
                        error.raised_by_template());
  }
}

}  // namespace fsdp::text::jinja
