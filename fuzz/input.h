// Shared by the fuzz targets: numbers decoded from an input's bytes, and how findings are reported.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <span>

// Aborts, so that the fuzzer keeps the input. `what` names the violated property.
#define KV4_EXPECT(condition, what)                                                    \
  do {                                                                                 \
    if (!(condition)) {                                                                \
      std::fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #condition, (what)); \
      std::abort();                                                                    \
    }                                                                                  \
  } while (false)

namespace kv4::fuzz {

// An input as a sequence of numbers; zeros past its end.
class Input {
 public:
  Input(const std::uint8_t* data, std::size_t size) : rest_(data, size) {}

  bool empty() const { return rest_.empty(); }
  std::span<const std::uint8_t> rest() const { return rest_; }

  std::uint8_t byte() {
    if (rest_.empty()) return 0;
    const std::uint8_t x = rest_.front();
    rest_ = rest_.subspan(1);
    return x;
  }
  // [0, n), from one byte.
  int below(int n) { return byte() % n; }
  bool one_in(int n) { return byte() % n == n - 1; }
  template <class T>
  T raw() {
    T x{};
    const std::size_t bytes = rest_.size() < sizeof x ? rest_.size() : sizeof x;
    if (bytes > 0) std::memcpy(&x, rest_.data(), bytes);
    rest_ = rest_.subspan(bytes);
    return x;
  }
  // Mostly in [0, plausible), sometimes any number.
  std::int32_t mostly_below(int plausible) { return one_in(16) ? raw<std::int32_t>() : below(plausible); }

 private:
  std::span<const std::uint8_t> rest_;
};

}  // namespace kv4::fuzz

// Defined by each target.
extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);
extern "C" int LLVMFuzzerInitialize(int* argc, char*** argv);
