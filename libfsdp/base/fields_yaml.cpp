// Reading options from a yaml file, by events: nothing is built before it is known to be a flat
// map, so neither nesting nor aliases can make a small file large.
#include <yaml-cpp/eventhandler.h>
#include <yaml-cpp/exceptions.h>
#include <yaml-cpp/mark.h>
#include <yaml-cpp/parser.h>

#include <fstream>
#include <set>
#include <sstream>

#include "libfsdp/base/error.h"
#include "libfsdp/base/fields.h"
#include "libfsdp/base/fields_impl.h"

namespace fsdp {
namespace {

constexpr size_t kMaxYamlBytes = size_t{1} << 20;

/// Where the reader is: outside of everything, between entries of the map, after a key, or in a
/// list of scalars.
enum class Place { kOutside, kKey, kValue, kList };

class OptionEvents : public YAML::EventHandler {
 public:
  OptionEvents(const FieldList& fields, std::string file, std::string_view program)
      : fields_(fields), file_(std::move(file)), program_(program) {}

  std::vector<Assignment> take() { return std::move(assignments_); }

  void OnDocumentStart(const YAML::Mark& mark) override {
    if (++documents_ > 1) refuse(mark, "has a second document; one map of options is expected");
  }
  void OnDocumentEnd() override {}
  void OnAlias(const YAML::Mark& mark, YAML::anchor_t) override {
    refuse(mark, "uses an alias; write the value out");
  }
  void OnNull(const YAML::Mark& mark, YAML::anchor_t anchor) override {
    no_anchor(mark, anchor);
    if (place_ == Place::kOutside) return;  // an empty file gives no options
    if (place_ != Place::kValue) refuse(mark, "has an empty name or list entry");
    assignments_.back().is_null = true;
    place_ = Place::kKey;
  }
  void OnScalar(const YAML::Mark& mark, const std::string&, YAML::anchor_t anchor,
                const std::string& value) override {
    no_anchor(mark, anchor);
    if (place_ == Place::kOutside) refuse(mark, "is not a map of options ('name: value' lines)");
    if (place_ == Place::kKey) return begin_entry(mark, value);
    assignments_.back().values.push_back(value);
    if (place_ == Place::kValue) place_ = Place::kKey;
  }
  void OnSequenceStart(const YAML::Mark& mark, const std::string&, YAML::anchor_t anchor,
                       YAML::EmitterStyle::value) override {
    no_anchor(mark, anchor);
    if (place_ == Place::kOutside) refuse(mark, "is not a map of options ('name: value' lines)");
    if (place_ != Place::kValue) refuse(mark, "nests a list where a plain value is expected");
    assignments_.back().is_list = true;
    place_ = Place::kList;
  }
  void OnSequenceEnd() override { place_ = Place::kKey; }
  void OnMapStart(const YAML::Mark& mark, const std::string&, YAML::anchor_t anchor,
                  YAML::EmitterStyle::value) override {
    no_anchor(mark, anchor);
    if (place_ != Place::kOutside)
      refuse(mark, "nests a map; options are flat 'name: value' lines");
    place_ = Place::kKey;
  }
  void OnMapEnd() override { place_ = Place::kOutside; }

 private:
  std::string at(const YAML::Mark& mark) const { return cat(file_, ":", mark.line + 1); }
  [[noreturn]] void refuse(const YAML::Mark& mark, std::string_view why) const {
    throw ConfigError(cat("[options] ", at(mark), " ", why, "."));
  }
  void no_anchor(const YAML::Mark& mark, YAML::anchor_t anchor) const {
    if (anchor != 0) refuse(mark, "uses an anchor; write the value out");
  }
  void begin_entry(const YAML::Mark& mark, const std::string& name) {
    const auto* field = find_field(fields_, name);
    if (field == nullptr)
      throw ConfigError(detail::unknown_option(fields_, name, at(mark), program_));
    if (field->name == "config")
      refuse(mark, "names another configuration file; that works on the command line only");
    if (!seen_.insert(field->name).second)
      refuse(mark, cat("gives '", field->name, "' a second time"));
    assignments_.push_back({field->name, {}, false, false, at(mark)});
    place_ = Place::kValue;
  }

  const FieldList& fields_;
  std::string file_;
  std::string_view program_;
  int documents_ = 0;
  Place place_ = Place::kOutside;
  std::set<std::string> seen_;
  std::vector<Assignment> assignments_;
};

/// Ignores everything: a first pass that finds only errors of syntax, so that those are told as
/// such.
class NoEvents : public YAML::EventHandler {
 public:
  void OnDocumentStart(const YAML::Mark&) override {}
  void OnDocumentEnd() override {}
  void OnNull(const YAML::Mark&, YAML::anchor_t) override {}
  void OnAlias(const YAML::Mark&, YAML::anchor_t) override {}
  void OnScalar(const YAML::Mark&, const std::string&, YAML::anchor_t,
                const std::string&) override {}
  void OnSequenceStart(const YAML::Mark&, const std::string&, YAML::anchor_t,
                       YAML::EmitterStyle::value) override {}
  void OnSequenceEnd() override {}
  void OnMapStart(const YAML::Mark&, const std::string&, YAML::anchor_t,
                  YAML::EmitterStyle::value) override {}
  void OnMapEnd() override {}
};

void parse(const std::string& text, YAML::EventHandler& events) {
  std::istringstream in(text);
  YAML::Parser parser(in);
  while (parser.HandleNextDocument(events)) {
  }
}

std::string read_small_file(const std::filesystem::path& path) {
  std::error_code problem;
  if (!std::filesystem::is_regular_file(path, problem)) {
    throw ConfigError(cat("[options] --config: ", path.string(), " is not a file."));
  }
  if (std::filesystem::file_size(path) > kMaxYamlBytes) {
    throw ConfigError(
        cat("[options] --config: ", path.string(), " is larger than 1 MiB; is it a yaml file?"));
  }
  std::ifstream in(path, std::ios::binary);
  std::ostringstream text;
  text << in.rdbuf();
  if (!in) throw ConfigError(cat("[options] --config: ", path.string(), " cannot be read."));
  return std::move(text).str();
}

}  // namespace

std::vector<Assignment> read_yaml(const FieldList& fields, const std::filesystem::path& path,
                                  std::string_view program) {
  const auto text = read_small_file(path);
  if (text.find('\0') != std::string::npos) {
    throw ConfigError(cat("[options] ", path.string(), " contains a NUL byte; is it a yaml file?"));
  }
  OptionEvents events(fields, path.string(), program);
  NoEvents no_events;
  try {
    parse(text, no_events);
    parse(text, events);
  } catch (const YAML::Exception& problem) {
    throw ConfigError(cat("[options] ", path.string(), ":", problem.mark.line + 1,
                          " is not valid yaml: ", problem.msg, "."));
  }
  return events.take();
}

}  // namespace fsdp
