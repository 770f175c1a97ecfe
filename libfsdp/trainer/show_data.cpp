#include "libfsdp/trainer/show_data.h"

#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <iostream>
#include <span>
#include <string>
#include <vector>

#include "libfsdp/base/error.h"
#include "libfsdp/text/batch_view.h"
#include "libfsdp/text/loader.h"

namespace fsdp::trainer {

void run_show_data(const ShowDataOptions& options) {
  const auto encoder =
      text::make_token_encoder(text::Tokenizer::from_directory(options.model_name_or_path));
  const std::vector<std::string> files = {options.train_file.string()};
  const auto dataset = text::load_dataset(files, *encoder,
                                          {.train_on_inputs = options.sequence.train_on_inputs,
                                           .max_seq_length = options.sequence.max_seq_length});
  const text::Loader loader(dataset.samples, {.packing = options.sequence.packing,
                                              .max_seq_length = options.sequence.max_seq_length,
                                              .shuffle = false,
                                              .pad_id = encoder->pad_id()});
  if (options.json) {
    text::write_sequences(std::cout, dataset.samples, loader.rows());
    std::cout.flush();
  } else {
    const auto all = loader.rows().size();
    const auto shown =
        options.max_samples == 0 ? all : std::min(all, static_cast<size_t>(options.max_samples));
    const bool color = ::isatty(STDOUT_FILENO) == 1 && std::getenv("NO_COLOR") == nullptr;
    const auto rows = std::span(loader.rows()).first(shown);
    std::cout << text::show_batch(text::make_batch(dataset.samples, rows, encoder->pad_id()),
                                  *encoder, color)
              << text::describe(dataset.report) << "; " << shown << " of " << all
              << " sequences shown" << std::endl;
  }
  if (!std::cout) throw HostResourceError("[show-data] the output cannot be written.");
}

}  // namespace fsdp::trainer
