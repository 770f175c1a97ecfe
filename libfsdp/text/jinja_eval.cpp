// Evaluation of expressions.
#include "libfsdp/text/jinja_interpreter.h"
#include "libfsdp/text/jinja_runtime.h"

namespace fsdp::text::jinja {

void Interpreter::charge(int64_t steps) {
  steps_ += steps;
  if (steps_ > options_.max_steps)
    throw TemplateError(cat("rendering takes more than ", options_.max_steps, " steps"));
}

void Interpreter::charge_for(const Value& value) {
  if (value.is_string()) charge(static_cast<int64_t>(value.string().size() / 16));
  if (value.is_sequence()) charge(static_cast<int64_t>(value.items().size()));
}

Value Interpreter::eval(const Expr& expr) {
  const Depth depth(*this);
  charge(1);
  line_ = expr.line;
  Value value = eval_uncounted(expr);
  charge_for(value);
  return value;
}

Value Interpreter::eval_uncounted(const Expr& expr) {
  const auto part = [&](size_t i) { return eval(*expr.parts[i]); };
  switch (expr.kind) {
    case ExprKind::kLiteral:
      return expr.value;
    case ExprKind::kName:
      return eval_name(expr);
    case ExprKind::kList:
      return Value::sequence(eval_parts(expr));
    case ExprKind::kTuple:
      return Value::sequence(eval_parts(expr), SequenceKind::kTuple);
    case ExprKind::kDict:
      return eval_dict(expr);
    case ExprKind::kAttribute:
      return get_attribute(part(0), expr.name);
    case ExprKind::kItem: {
      const Value container = part(0);
      return get_item(container, part(1));
    }
    case ExprKind::kSlice:
      return eval_slice(expr);
    case ExprKind::kCall: {
      const Value callee = part(0);
      return call(callee, eval_arguments(expr.arguments));
    }
    case ExprKind::kFilter:
      return eval_filter(expr, nullptr);
    case ExprKind::kTest: {
      const Value subject = part(0);
      return apply_test(expr.name, subject, eval_arguments(expr.arguments));
    }
    case ExprKind::kNot:
      return !part(0).truthy();
    case ExprKind::kNegate:
      return negate(part(0));
    case ExprKind::kPlus:
      return arithmetic("+", 0, part(0));
    case ExprKind::kBinary: {
      const Value left = part(0);
      return arithmetic(expr.name, left, part(1));
    }
    case ExprKind::kConcat:
      return eval_concat(expr);
    case ExprKind::kCompare:
      return eval_compare(expr);
    case ExprKind::kAnd: {
      Value left = part(0);
      return left.truthy() ? part(1) : left;
    }
    case ExprKind::kOr: {
      Value left = part(0);
      return left.truthy() ? left : part(1);
    }
    case ExprKind::kConditional:
      if (part(0).truthy()) return part(1);
      return expr.parts[2] ? part(2)
                           : Value::undefined("the condition is false and there is no else");
    case ExprKind::kNamespace:
      break;
  }
  throw InternalError("internal error: an assignment target was evaluated");
}

Value Interpreter::eval_name(const Expr& expr) {
  for (Scope* at = scope_.get(); at != nullptr; at = at->parent.get()) {
    charge(1);
    if (const Value* found = at->find(expr.name)) return *found;
  }
  if (const auto global = find_global(expr.name)) return make_global(global, expr.name);
  return Value::undefined(cat("'", expr.name, "' is undefined"));
}

Value::List Interpreter::eval_parts(const Expr& expr) {
  Value::List out;
  for (const auto& part : expr.parts) out.push_back(eval(*part));
  return out;
}

Value Interpreter::eval_dict(const Expr& expr) {
  Value::List parts = eval_parts(expr);
  Value::Dict pairs;
  for (size_t i = 0; i + 1 < parts.size(); i += 2)
    pairs.emplace_back(std::move(parts[i]), std::move(parts[i + 1]));
  return Value::mapping(std::move(pairs));
}

Value Interpreter::eval_concat(const Expr& expr) {
  std::string out;
  for (const auto& part : expr.parts) append_bounded(out, to_text(eval(*part)));
  return out;
}

Value Interpreter::eval_compare(const Expr& expr) {
  Value left = eval(*expr.parts[0]);
  for (size_t i = 0; i < expr.ops.size(); ++i) {
    Value right = eval(*expr.parts[i + 1]);
    charge_for(left);
    charge_for(right);
    if (!compare(expr.ops[i], left, right)) return false;
    left = std::move(right);
  }
  return true;
}

Value Interpreter::eval_slice(const Expr& expr) {
  const auto bound = [&](size_t i) { return expr.parts[i] ? eval(*expr.parts[i]) : Value::none(); };
  const Value container = eval(*expr.parts[0]);
  const Value start = bound(1);
  const Value stop = bound(2);
  return get_slice(container, start, stop, bound(3));
}

Value Interpreter::eval_filter(const Expr& expr, const Value* block_text) {
  Value subject;
  if (!expr.parts[0]) {
    check(block_text != nullptr, "a filter without a subject");
    subject = *block_text;
  } else if (block_text != nullptr && expr.parts[0]->kind == ExprKind::kFilter) {
    subject = eval_filter(*expr.parts[0], block_text);
  } else {
    subject = eval(*expr.parts[0]);
  }
  return apply_filter(expr.name, subject, eval_arguments(expr.arguments));
}

Arguments Interpreter::eval_arguments(const CallSyntax& syntax) {
  Arguments out;
  for (const auto& expr : syntax.positional) out.positional.push_back(eval(*expr));
  for (const auto& [name, expr] : syntax.named) out.named.emplace_back(name, eval(*expr));
  if (syntax.star) {
    for (auto& item : eval(*syntax.star).iterate()) out.positional.push_back(std::move(item));
  }
  if (syntax.double_star) {
    const Value extra = eval(*syntax.double_star);
    if (!extra.is_mapping()) throw TemplateError("what follows ** must be a dict");
    for (const auto& [name, value] : extra.pairs()) out.named.emplace_back(to_text(name), value);
  }
  return out;
}

Value Interpreter::apply_filter(const std::string& name, const Value& subject,
                                const Arguments& arguments) {
  const FilterFunction filter = find_filter(name);
  if (filter == nullptr) throw TemplateError(cat("unknown filter '", name, "'"));
  charge_for(subject);
  return filter(*this, subject, arguments);
}

bool Interpreter::apply_test(const std::string& name, const Value& subject,
                             const Arguments& arguments) {
  const TestFunction test = find_test(name);
  if (test == nullptr) throw TemplateError(cat("unknown test '", name, "'"));
  return test(*this, subject, arguments);
}

Value Interpreter::call(const Value& callee, const Arguments& arguments) {
  if (callee.is_undefined()) throw TemplateError(callee.undefined_hint());
  if (!callee.is_object()) throw TemplateError(cat("'", callee.type_name(), "' cannot be called"));
  return callee.object()->call(arguments);
}

}  // namespace fsdp::text::jinja
