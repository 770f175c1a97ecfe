#include "libfsdp/checkpoint/model_save.h"

#include <optional>

#include "libfsdp/base/error.h"
#include "libfsdp/checkpoint/joined.h"
#include "libfsdp/checkpoint/manifest.h"
#include "libfsdp/checkpoint/staged_directory.h"
#include "libfsdp/checkpoint/verdict.h"

namespace fsdp::checkpoint {
namespace {

void check_complete(const std::string& path, std::span<const Outcome> written) {
  int64_t expected = 0, bytes = 0;
  for (const FileBytes& file : files_below(path)) expected += file.bytes;
  for (const Outcome& rank : written) bytes += rank.values[0];
  check(bytes == expected, cat("a save wrote ", bytes, " bytes of files that have ", expected));
}

}  // namespace

void save_model(comm::Communicator& comm, const std::string& directory, const StateDict& state,
                const FullForm& form, const std::vector<TextFile>& texts) {
  Verdict verdict(comm);
  std::optional<StagedDirectory> staged;  // On rank 0.
  Outcome outcome;
  outcome.run([&] {
    verdict.reserve();
    if (comm.rank() != 0) return;
    make_directories(directory);
    staged.emplace(directory);
  });
  verdict.agree(outcome, "make files");
  if (staged) outcome.set_text(staged->name());
  const std::string name = verdict.exchange(outcome, "name of the files")[0].text;
  outcome.run([&] {
    RangeWriter writer(joined(directory, "/", name));
    write_state(plan_full(state, form), state, comm.rank(), writer);
    if (comm.rank() == 0) {
      for (const TextFile& text : texts) writer.write_file(text.name, text.content);
    }
    writer.finish();
    outcome.values[0] = writer.written_bytes();
  });
  const auto written = verdict.exchange(outcome, "files are written");
  verdict.throw_if_failed(written);
  if (staged) {
    outcome.run([&] {
      check_complete(staged->path(), written);
      staged->publish();
    });
  }
  verdict.agree(outcome, "files are saved");
}

}  // namespace fsdp::checkpoint
