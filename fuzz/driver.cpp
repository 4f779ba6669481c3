// Runs a fuzz target without libFuzzer, with any compiler: the given files and folders, then `--mutations N` random
// mutations of them (`--seed S`). A crash ends the process and leaves its input in `--crash FILE`.
#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "cases.h"
#include "input.h"

namespace {

using Bytes = std::vector<std::uint8_t>;

Bytes read(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

// Mutations like libFuzzer's.
Bytes mutated(const std::vector<Bytes>& corpus, kv4::cases::Random& random) {
  const auto any = [&](std::size_t n) { return static_cast<std::size_t>(random.bits() % n); };
  Bytes x = corpus[any(corpus.size())];
  for (int changes = 1 + random.below(4); changes > 0; --changes) {
    const auto at = x.begin() + static_cast<std::ptrdiff_t>(any(x.size() + 1));
    const auto left = static_cast<std::size_t>(x.end() - at);
    switch (random.below(6)) {
      case 0: x.insert(at, static_cast<std::uint8_t>(random.bits())); break;
      case 1: x.erase(at, at + static_cast<std::ptrdiff_t>(any(std::min<std::size_t>(left, 16) + 1))); break;
      case 2: {  // replace a number by an extreme value
        const std::int64_t numbers[] = {-1, 0, 1, 63, 64, 65, INT32_MAX, INT32_MIN, INT64_MAX, INT64_MIN};
        std::memcpy(x.data() + (at - x.begin()), &numbers[random.below(10)],
                    std::min<std::size_t>(left, random.below(2) == 0 ? 4 : 8));
        break;
      }
      case 3: {  // splice in the tail of another input
        const Bytes& other = corpus[any(corpus.size())];
        x.resize(static_cast<std::size_t>(at - x.begin()));
        x.insert(x.end(), other.begin() + static_cast<std::ptrdiff_t>(any(other.size() + 1)), other.end());
        break;
      }
      default:
        if (left > 0) *at ^= static_cast<std::uint8_t>(1u << random.below(8));
    }
  }
  return x;
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<Bytes> corpus;
  long mutations = 0;
  std::uint64_t seed = 1;
  std::string crash;
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    if (i + 1 < argc && word == "--mutations") mutations = std::atol(argv[++i]);
    else if (i + 1 < argc && word == "--seed") seed = std::strtoull(argv[++i], nullptr, 10);
    else if (i + 1 < argc && word == "--crash") crash = argv[++i];
    else if (std::filesystem::is_directory(word)) {
      std::vector<std::filesystem::path> files;
      for (const auto& entry : std::filesystem::directory_iterator(word)) files.push_back(entry.path());
      std::sort(files.begin(), files.end());
      for (const auto& file : files) corpus.push_back(read(file));
    } else if (std::filesystem::is_regular_file(word)) {
      corpus.push_back(read(word));
    } else {
      std::fprintf(stderr, "input: expected a file or a folder; got %s\n", word.c_str());
      return 2;
    }
  }
  if (corpus.empty()) {
    std::fprintf(stderr, "input: expected files or folders of them; got none\n");
    return 2;
  }
  LLVMFuzzerInitialize(&argc, &argv);
  for (const Bytes& x : corpus) LLVMFuzzerTestOneInput(x.data(), x.size());
  kv4::cases::Random random(seed);
  for (long i = 0; i < mutations; ++i) {
    const Bytes x = mutated(corpus, random);
    if (!crash.empty()) {
      std::ofstream file(crash, std::ios::binary);
      file.write(reinterpret_cast<const char*>(x.data()), static_cast<std::streamsize>(x.size()));
    }
    LLVMFuzzerTestOneInput(x.data(), x.size());
  }
  if (!crash.empty()) std::filesystem::remove(crash);
  std::printf("%zu inputs of the corpus and %ld mutations of them from seed %llu\n", corpus.size(), mutations,
              static_cast<unsigned long long>(seed));
  return 0;
}
