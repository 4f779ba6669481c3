// The calibration files that llama.cpp's backend reads. Property: any bytes either are refused with a one-line
// error (expected, got) or yield positive finite numbers in the declared shapes.
#include "calibration.h"

#include <cmath>
#include <string>

#include "input.h"

extern "C" int LLVMFuzzerInitialize(int*, char***) { return 0; }

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace kv4;
  const std::string bytes(reinterpret_cast<const char*>(data), size);
  llama::Calibration read;
  const Status status = llama::Calibration::parse(bytes, "input", &read);
  if (!status.ok()) {
    const std::string& text = status.message();
    KV4_EXPECT(text.find("KV4_CALIBRATION: expected ") == 0 && text.find("; got ") != std::string::npos, text.c_str());
    KV4_EXPECT(text.find('\n') == std::string::npos, "one line");
    return 0;
  }
  for (int layer = 0; layer < 4; ++layer)
    for (const int dim : {4, 64}) {
      std::vector<float> lambda;
      if (!read.keys_of(layer, 1, dim, &lambda).ok()) continue;
      KV4_EXPECT(lambda.size() == static_cast<std::size_t>(dim), "of its shape");
      for (const float x : lambda) KV4_EXPECT(x > 0 && std::isfinite(x), "positive finite numbers");
      llama::pair_neighbours(&lambda, dim, dim / 2);
    }
  return 0;
}
