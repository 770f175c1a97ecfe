// Grammar of chat templates: the statements and expressions of Jinja2 that work on one template
// alone.
#pragma once

#include <string_view>

#include "libfsdp/text/jinja_ast.h"

namespace fsdp::text::jinja {

/// Syntax tree of a template. Throws TemplateError that names the line; what is not supported is an
/// error too.
Syntax parse(std::string_view source);

}  // namespace fsdp::text::jinja
