// Hostile files of torch.save: whatever the bytes, the end is a ModelError or tensors that lie
// within their file.
#include "libfsdp/checkpoint/torch_files.h"

#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <random>

#include "libfsdp/base/error.h"
#include "libfsdp/checkpoint/isolated.h"
#include "libfsdp/io/pickle.h"
#include "libfsdp/io/zip.h"
#include "tests/unit/io/expect_error.h"
#include "tests/unit/io/temp_dir.h"

namespace fsdp::checkpoint {
namespace {

using io::TempDir;

template <class T>
std::string le(T value) {
  return {reinterpret_cast<const char*>(&value), sizeof value};
}

struct Entry {
  std::string name;
  std::string data;
};

/// A zip archive of stored entries, as torch.save makes it.
std::string zip(const std::vector<Entry>& entries) {
  std::string text, directory;
  for (const Entry& entry : entries) {
    const auto bytes = static_cast<uint32_t>(entry.data.size());
    const auto name = static_cast<uint16_t>(entry.name.size());
    const auto at = static_cast<uint32_t>(text.size());
    const std::string sizes = le(uint32_t{0}) + le(bytes) + le(bytes) + le(name);
    text += "PK\3\4" + le(uint16_t{0}) + le(uint16_t{0}) + le(uint16_t{0}) + le(uint32_t{0}) +
            sizes + le(uint16_t{0}) + entry.name + entry.data;
    directory += "PK\1\2" + le(uint16_t{0}) + le(uint16_t{0}) + le(uint16_t{0}) + le(uint16_t{0}) +
                 le(uint32_t{0}) + sizes + le(uint16_t{0}) + le(uint16_t{0}) + le(uint16_t{0}) +
                 le(uint16_t{0}) + le(uint32_t{0}) + le(at) + entry.name;
  }
  const auto n = static_cast<uint16_t>(entries.size());
  const auto at = static_cast<uint32_t>(text.size());
  return text + directory + "PK\5\6" + le(uint16_t{0}) + le(uint16_t{0}) + le(n) + le(n) +
         le(static_cast<uint32_t>(directory.size())) + le(at) + le(uint16_t{0});
}

std::string text_op(const std::string& text) {
  return "X" + le(static_cast<uint32_t>(text.size())) + text;
}

/// {"w": a float tensor of [rows, 3] in storage 0 of `numel` elements}
std::string pickle(uint8_t rows, uint8_t numel,
                   const std::string& rebuild = "torch._utils\n_rebuild_tensor_v2\n") {
  const auto byte = [](uint8_t value) { return "K" + std::string(1, static_cast<char>(value)); };
  return std::string("\x80\x02}") + text_op("w") + "c" + rebuild + "((" + text_op("storage") +
         "ctorch\nFloatStorage\n" + text_op("0") + text_op("cpu") + byte(numel) + "tQ" + byte(0) +
         byte(rows) + byte(3) + "\x86" + byte(3) + byte(1) + "\x86\x89" +
         "ccollections\nOrderedDict\n)RtRs.";
}

std::vector<Entry> entries(const std::string& pickled, size_t data_bytes = 24) {
  return {{"a/data.pkl", pickled},
          {"a/byteorder", "little"},
          {"a/data/0", std::string(data_bytes, 'x')},
          {"a/version", "3\n"}};
}

std::string refusal(const TempDir& dir, const std::string& bytes) {
  try {
    find_in_pth(dir.write("x.pth", bytes));
  } catch (const ModelError& error) {
    return error.what();
  }
  return "accepted";
}

TEST(TorchFilesTest, ReadsTheArchiveThatTheOthersAreMadeFrom) {
  const TempDir dir;
  const FoundTensors found = find_in_pth(dir.write("x.pth", zip(entries(pickle(2, 6)))));
  ASSERT_EQ(found.tensors.size(), 1U);
  EXPECT_EQ(found.tensors[0].name, "w");
  EXPECT_EQ(found.tensors[0].shape, (std::vector<int64_t>{2, 3}));
  EXPECT_EQ(io::read_text(dir / "x.pth").substr(static_cast<size_t>(found.tensors[0].at), 24),
            std::string(24, 'x'));
}

TEST(TorchFilesTest, RefusesPicklesThatAskForMore) {
  const TempDir dir;
  const auto expect = [&](const std::string& pickled, const char* text) {
    EXPECT_THAT(refusal(dir, zip(entries(pickled))), testing::HasSubstr(text));
  };
  expect(pickle(2, 6, "builtins\neval\n"), "asks for 'builtins eval', which is not accepted");
  expect(pickle(2, 6, "torch._utils\n_rebuild_tensor_v2.x\n"), "which is not accepted");
  expect(pickle(3, 6), "'w' reaches outside its storage");
  expect(pickle(2, 7), "'w': its data is shorter than it should be");
  expect("\x80\x02(i", "operation 105, which no tensor file needs");
  expect("\x80\x06N.", "a protocol above 5");
  expect("\x80\x02]", "it ends early");
  expect("\x80\x02R.", "it takes from an empty stack");
  expect("\x80\x02h\x01.", "it recalls what was not kept");
  expect(
      "\x80\x02X\xff\xff\xff\xff"
      "abc.",
      "it ends early");
  expect("\x80\x02}q\x01(X\1\0\0\0", "it ends early");
}

TEST(TorchFilesTest, ADictThatContainsItselfEnds) {
  const TempDir dir;
  const std::string loop = std::string("\x80\x02}q\x01") + text_op("k") + "h\x01s.";
  EXPECT_THAT(refusal(dir, zip(entries(loop))), testing::HasSubstr("dicts nest too deep"));
  // And one whose every level has two references to the next: 2^k paths.
  std::string wide = "\x80\x02}q" + std::string(1, '\0');
  for (char level = 1; level < 30; ++level) {
    wide += "}q" + std::string(1, level);
    for (const char* key : {"a", "b"})
      wide += text_op(key) + "h" + std::string(1, static_cast<char>(level - 1)) + "s";
  }
  EXPECT_THAT(refusal(dir, zip(entries(wide + "."))), testing::HasSubstr("dicts nest too deep"));
}

TEST(TorchFilesTest, RefusesArchivesThatTorchDoesNotWrite) {
  const TempDir dir;
  const auto expect = [&](const std::vector<Entry>& list, const char* text) {
    EXPECT_THAT(refusal(dir, zip(list)), testing::HasSubstr(text));
  };
  const std::string good = pickle(2, 6);
  for (const char* name : {"/etc/passwd", "../x", "a/../../x", "", "a\\b"}) {
    auto list = entries(good);
    list.push_back({name, "x"});
    expect(list, "forbidden name");
  }
  auto twice = entries(good);
  twice.push_back(twice[2]);
  expect(twice, "two entries 'a/data/0'");
  expect({{"data.pkl", good}}, "none of torch.save");
  auto big = entries(good);
  big[1].data = "big";
  expect(big, "not little-endian");
  EXPECT_THAT(refusal(dir, zip(entries(good)) + "x"), testing::HasSubstr("not where it belongs"));
  EXPECT_THAT(refusal(dir, ""), testing::HasSubstr("too short"));
}

TEST(TorchFilesTest, OverlappingEntriesAreRefused) {
  const TempDir dir;
  std::string bytes = zip(entries(pickle(2, 6)));
  // The third entry's directory record gets the second one's place.
  std::vector<size_t> records;
  for (size_t at = bytes.find("PK\1\2"); at != std::string::npos; at = bytes.find("PK\1\2", at + 1))
    records.push_back(at);
  ASSERT_EQ(records.size(), 4U);
  std::memcpy(&bytes[records[2] + 42], &bytes[records[1] + 42], 4);
  EXPECT_THAT(refusal(dir, bytes), testing::HasSubstr("overlaps another"));
}

TEST(TorchFilesTest, DamagedFilesEndInAModelErrorOrInTensorsWithinTheFile) {
  const char* scale = std::getenv("FSDP_TEST_SCALE");
  const int rounds = scale != nullptr && std::string_view(scale) == "long" ? 20'000 : 500;
  const TempDir dir;
  const std::string good = zip(entries(pickle(2, 6)));
  std::mt19937_64 random(11);
  int accepted = 0;
  for (int round = 0; round < rounds; ++round) {
    std::string bytes = good;
    for (uint64_t k = 1 + random() % 4; k-- > 0;)
      bytes[random() % bytes.size()] = static_cast<char>(random());
    if (random() % 8 == 0) bytes.resize(random() % bytes.size());
    const std::string path = dir.write("x.pth", bytes);
    try {
      const StoredTensors stored = as_stored(find_in_pth(path), dir.path());
      ++accepted;
      for (const auto& [name, tensor] : stored.tensors()) {
        for (const StoredChunk& chunk : tensor.chunks)
          EXPECT_LE(chunk.file_at, static_cast<int64_t>(bytes.size()));
      }
    } catch (const ModelError&) {
    }
  }
  EXPECT_GT(accepted, 0);  // Bytes of the data, of times and checksums.
  EXPECT_LT(accepted, rounds);
}

TEST(IsolatedTest, HandsBackTextAndErrors) {
  EXPECT_EQ(run_isolated("x", [] { return std::string(1 << 20, 'y'); }), std::string(1 << 20, 'y'));
  EXPECT_ERROR(run_isolated("here", []() -> std::string { throw ModelError("bad"); }), ModelError,
               "here: bad");
  EXPECT_ERROR(run_isolated("here", []() -> std::string { std::abort(); }), ModelError,
               "ended with signal 6");
  EXPECT_ERROR(run_isolated("here", [] { return std::string(100, 'y'); }, {.result_bytes = 50}),
               ModelError, "too long");
}

TEST(IsolatedTest, TheChildCanNeitherWriteNorStartPrograms) {
  const TempDir dir;
  const auto work = [&] {
    std::string result;
    result += std::system("true") == 0 ? "ran " : "";
    result += ::fork() >= 0 ? "forked " : "";
    result += std::fopen((dir / "made").c_str(), "w") != nullptr ? "wrote " : "";
    result += ::unlink((dir / "kept").c_str()) == 0 ? "removed " : "";
    FILE* kept = std::fopen((dir / "kept").c_str(), "r");
    return result + (kept != nullptr ? "read" : "");
  };
  dir.write("kept", "x");
#if defined(__x86_64__)
  EXPECT_EQ(run_isolated("x", work), "read");
#endif
}

TEST(IsolatedTest, MemoryAndTimeAreLimited) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "a sanitizer needs all the address space";
#endif
  const IsolationLimits limits{.memory_bytes = 64 << 20, .cpu_seconds = 1};
  const auto hoard = [] { return std::string(size_t{1} << 30, 'y'); };
  EXPECT_ERROR(run_isolated("x", hoard, limits), ModelError, "needs more than 64 MiB of memory");
  const auto spin = []() -> std::string {
    volatile bool forever = true;
    while (forever) {
    }
    return "";
  };
  EXPECT_ERROR(run_isolated("x", spin, limits), ModelError, "took too long");
}

}  // namespace
}  // namespace fsdp::checkpoint
