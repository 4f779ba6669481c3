// Rotations: their definition, and every kernel against it.
//
// Bounds. With u = 2^-24 (binary32 rounds to nearest) each step of a transform has a relative error in
// the 2-norm, and since every step is orthogonal up to a factor the errors add; `rounding` sums them in
// units of u:
//   signs, scale         2: the table entry, the product
//   one level of adds    1 (radix 2: 1, radix 4: 2, radix 8: 3 and 3 for its products by 1/sqrt2)
//   twiddle products     3: sqrt5 u for a complex product (Brent, Percival, Zimmermann 2007), u/sqrt2 for the table
//   radix r = 3, 5, ...  an output is a sum of r terms through n roundings, n = 4, 6 and (r + 1)/2 + 2:
//                        n sum |re| + |im| <= n sqrt(2 r) |z|, over r outputs of a map of norm sqrt r: n sqrt(2 r)
//   split                5: sum and difference, product, sum and difference
//   odd DFT of size m    m + 1 roundings of sum |F| |z| <= |z|, over m outputs: (m + 1) sqrt m
//   one reflector        d + 12: a product of d terms (d / 2 + 4 roundings, doubled), the table, the update
// A dense matrix is bounded entry by entry: d + 1 roundings of sum |R| |x|.
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "../cases.h"
#include "cpu/isa.h"
#include "cpu/rotate_f64.h"
#include "kv4/cpu.h"
#include "rotation/rotation.h"

namespace kv4 {
namespace {

using cpu::Map;

constexpr double kUnit = 0x1p-24;
constexpr std::uint64_t kSeed = 0x6b7634;
constexpr Map kMaps[] = {Map::forward, Map::dual, Map::inverse};

// I + 0.3 G / sqrt(d) with Gaussian G: singular values within 0.4 ... 1.6, far from orthonormal.
std::vector<float> learned_matrix(int d) {
  std::vector<float> a = cases::normal_rows(d, d, 99, 0.3 / std::sqrt(d));
  for (int c = 0; c < d; ++c) a[static_cast<std::size_t>(c) * d + c] += 1.0f;
  return a;
}

struct Case {
  std::string name;
  std::shared_ptr<const Rotation> r;
  std::vector<double> matrix, inverse;
};

std::shared_ptr<const Rotation> srft(int d, std::uint64_t seed = kSeed) {
  std::shared_ptr<const Rotation> r;
  EXPECT_TRUE(Rotation::srft(d, seed, &r).ok());
  return r;
}

std::vector<Case> make_cases(int d) {
  std::vector<Case> cases;
  const auto add = [&](const std::string& name, const Status& status, std::shared_ptr<const Rotation> r) {
    ASSERT_TRUE(status.ok()) << status.message();
    cases.push_back({name + " d=" + std::to_string(d), r, r->matrix_f64(), r->inverse_f64()});
  };
  std::shared_ptr<const Rotation> r;
  Status status = Rotation::identity(d, &r);
  add("identity", status, r);
  status = Rotation::srft(d, kSeed, &r);
  add("srft", status, r);
  status = Rotation::srht(d, kSeed, &r);
  add("srht", status, r);
  for (const int reflectors : {1, 2, 7, d / 2}) {
    status = Rotation::householder(d, reflectors, kSeed, &r);
    add("householder x " + std::to_string(reflectors), status, r);
  }
  status = Rotation::dense(d, learned_matrix(d), &r);
  add("dense", status, r);
  return cases;
}

const std::vector<Case>& all_cases(int d) {
  static std::map<int, std::vector<Case>> made;
  auto [it, fresh] = made.try_emplace(d);
  if (fresh) it->second = make_cases(d);
  return it->second;
}

// Rounding errors of one application in units of u times the 2-norm; the header of this file.
double rounding(const Rotation& r) {
  const int d = r.dim();
  double sum = 0;
  switch (r.kind()) {
    case RotationKind::identity: return 0;
    case RotationKind::srft:
      sum = 2 + 5;
      for (std::size_t s = 0; s < r.fft().radix.size(); ++s) {
        const int radix = r.fft().radix[s];
        if (s > 0) sum += 3;
        const int roundings = radix == 3 ? 4 : radix == 5 ? 6 : (radix + 1) / 2 + 2;
        sum += radix == 2 ? 1 : radix == 4 ? 2 : std::sqrt(2.0 * radix) * roundings;
      }
      return sum;
    case RotationKind::srht: {
      const int m = d / r.hadamard_order();
      sum = 2 + std::countr_zero(static_cast<unsigned>(r.hadamard_order()));
      return m == 1 ? sum : sum + (m + 1) * std::sqrt(m);
    }
    case RotationKind::householder: return static_cast<double>(r.reflectors()) * (d + 12);
    case RotationKind::dense: return d + 1;
  }
  return 0;
}

// Entry (i, c) of the map's float64 matrix.
double entry(const Case& k, Map map, int i, int c) {
  const std::size_t d = static_cast<std::size_t>(k.r->dim());
  return map == Map::forward ? k.matrix[i * d + c] : map == Map::inverse ? k.inverse[i * d + c] : k.inverse[c * d + i];
}

// A x, and |A| |x| where asked for.
template <class T>
std::vector<double> product(const Case& k, Map map, const T* x, std::vector<double>* absolute = nullptr) {
  const int d = k.r->dim();
  std::vector<double> y(d);
  if (absolute != nullptr) absolute->assign(d, 0);
  for (int i = 0; i < d; ++i)
    for (int c = 0; c < d; ++c) {
      const double term = entry(k, map, i, c) * static_cast<double>(x[c]);
      y[i] += term;
      if (absolute != nullptr) (*absolute)[i] += std::abs(term);
    }
  return y;
}

template <class T>
double norm(const T* x, int d) {
  double sum = 0;
  for (int c = 0; c < d; ++c) sum += static_cast<double>(x[c]) * static_cast<double>(x[c]);
  return std::sqrt(sum);
}

// |R|_F where it is not orthonormal, 1 where it is.
double gain(const Case& k, Map map) {
  if (k.r->kind() != RotationKind::dense) return 1;
  const std::vector<double>& a = map == Map::forward ? k.matrix : k.inverse;
  return norm(a.data(), static_cast<int>(a.size()));
}

std::vector<const cpu::Kernels*> runnable() {
  std::vector<const cpu::Kernels*> all;
  for (const std::string& name : cpu::compiled_isas())
    if (cpu::supported(name)) all.push_back(cpu::find(name.c_str()));
  return all;
}

// A 64-byte aligned block of exactly `bytes` bytes between guard bytes.
class Guarded {
 public:
  explicit Guarded(std::size_t bytes) : bytes_(bytes), memory_(bytes + 256, std::byte{0xa5}) {
    const std::size_t address = reinterpret_cast<std::size_t>(memory_.data());
    offset_ = (address + 127) / 64 * 64 - address;
  }
  void* data() { return memory_.data() + offset_; }
  float* floats() { return static_cast<float*>(data()); }
  bool intact() const {
    for (std::size_t i = 0; i < memory_.size(); ++i)
      if ((i < offset_ || i >= offset_ + bytes_) && memory_[i] != std::byte{0xa5}) return false;
    return true;
  }

 private:
  std::size_t bytes_, offset_;
  std::vector<std::byte> memory_;
};

void run(const cpu::Kernels& kernels, const Rotation& r, Map map, const float* in, float* out, std::int64_t rows,
         void* scratch) {
  const auto kernel = map == Map::forward ? kernels.rotate : map == Map::dual ? kernels.rotate_dual : kernels.unrotate;
  kernel(r, in, out, rows, scratch);
}

std::vector<float> run(const cpu::Kernels& kernels, const Rotation& r, Map map, const std::vector<float>& in) {
  std::vector<float> out(in.size());
  Guarded scratch(kernels.rotate_scratch(r.dim()));
  run(kernels, r, map, in.data(), out.data(), static_cast<std::int64_t>(in.size()) / r.dim(), scratch.data());
  EXPECT_TRUE(scratch.intact());
  return out;
}

class RotationDims : public ::testing::TestWithParam<int> {};
INSTANTIATE_TEST_SUITE_P(All, RotationDims, ::testing::ValuesIn(cases::kRotationDims),
                         ::testing::PrintToStringParamName());

TEST_P(RotationDims, MatrixIsOrthonormal) {
  const std::size_t d = static_cast<std::size_t>(GetParam());
  for (const Case& k : all_cases(GetParam())) {
    if (k.r->kind() == RotationKind::dense) continue;
    // A product of rows of norm 1 has d + 1 roundings, and entries of 8; as many per reflector again.
    const double steps = k.r->kind() == RotationKind::householder ? 1.0 + k.r->reflectors() : 1.0;
    const double bound = steps * static_cast<double>(d + 9) * 0x1p-52;
    double worst = 0;
    for (std::size_t i = 0; i < d; ++i)
      for (std::size_t j = 0; j <= i; ++j) {
        double dot = 0;
        for (std::size_t c = 0; c < d; ++c) dot += k.matrix[i * d + c] * k.matrix[j * d + c];
        worst = std::max(worst, std::abs(dot - (i == j ? 1 : 0)));
      }
    EXPECT_LE(worst, bound) << k.name;
  }
}

TEST_P(RotationDims, DenseInverseInverts) {
  const int d = GetParam();
  const Case& k = all_cases(d).back();
  // Backward stability of elimination: d roundings, and a growth factor below d near the identity.
  const double bound = d * 0x1p-52 * d * gain(k, Map::inverse) * gain(k, Map::forward);
  std::vector<double> row(d);
  double worst = 0;
  for (int i = 0; i < d; ++i) {
    row.assign(d, 0);
    for (int c = 0; c < d; ++c)
      for (int j = 0; j < d; ++j)
        row[j] += entry(k, Map::inverse, i, c) * k.matrix[static_cast<std::size_t>(c) * d + j];
    for (int j = 0; j < d; ++j) worst = std::max(worst, std::abs(row[j] - (i == j ? 1 : 0)));
  }
  EXPECT_LE(worst, bound);
}

TEST_P(RotationDims, RowsEqualTheMatrix) {
  const int d = GetParam(), most = 37;
  const std::vector<float> x = cases::key_rows(most, d, 7);
  for (const Case& k : all_cases(d))
    for (const Map map : kMaps) {
      const bool dense = k.r->kind() == RotationKind::dense;
      std::vector<std::vector<double>> want(most), absolute(most);
      for (int row = 0; row < most; ++row)
        want[row] = product(k, map, &x[static_cast<std::size_t>(row) * d], dense ? &absolute[row] : nullptr);
      for (const cpu::Kernels* kernels : runnable())
        for (const int rows : {1, 3, 4, 7, 8, 9, 16, 17, most}) {
          SCOPED_TRACE(std::string(kernels->name) + " " + k.name + " map " + std::to_string(static_cast<int>(map)) +
                       " rows " + std::to_string(rows));
          Guarded out(static_cast<std::size_t>(rows) * d * sizeof(float)), scratch(kernels->rotate_scratch(d));
          run(*kernels, *k.r, map, x.data(), out.floats(), rows, scratch.data());
          ASSERT_TRUE(out.intact() && scratch.intact());
          for (int row = 0; row < rows; ++row) {
            const float* got = out.floats() + static_cast<std::size_t>(row) * d;
            double square = 0;
            for (int i = 0; i < d; ++i) {
              const double e = std::abs(got[i] - want[row][i]);
              square += e * e;
              if (dense) {
                ASSERT_LE(e, rounding(*k.r) * kUnit * absolute[row][i]) << "row " << row << " channel " << i;
              }
            }
            if (!dense) {
              ASSERT_LE(std::sqrt(square), rounding(*k.r) * kUnit * norm(&x[static_cast<std::size_t>(row) * d], d))
                  << "row " << row;
            }
          }
        }
    }
}

// Floats that end at an inaccessible memory page.
class LastFloats {
 public:
  explicit LastFloats(std::size_t count) {
    const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    const std::size_t used = (count * sizeof(float) + page - 1) / page * page;
    bytes_ = used + page;
    memory_ =
        static_cast<std::byte*>(mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    EXPECT_EQ(0, mprotect(memory_ + used, page, PROT_NONE));
    data_ = reinterpret_cast<float*>(memory_ + used - count * sizeof(float));
  }
  ~LastFloats() { munmap(memory_, bytes_); }
  LastFloats(const LastFloats&) = delete;
  LastFloats& operator=(const LastFloats&) = delete;
  float* data() { return data_; }

 private:
  std::byte* memory_;
  std::size_t bytes_;
  float* data_;
};

// Any access beyond the last row would trap.
TEST_P(RotationDims, InPlaceStaysWithinItsRows) {
  const int d = GetParam();
  for (const cpu::Kernels* kernels : runnable())
    for (const Case& k : all_cases(d))
      for (const Map map : kMaps)
        for (const int rows : {1, 5, 19}) {
          const std::vector<float> x = cases::normal_rows(rows, d, 11);
          const std::vector<float> want = run(*kernels, *k.r, map, x);
          LastFloats y(x.size());
          std::copy(x.begin(), x.end(), y.data());
          Guarded scratch(kernels->rotate_scratch(d));
          run(*kernels, *k.r, map, y.data(), y.data(), rows, scratch.data());
          EXPECT_EQ(0, std::memcmp(y.data(), want.data(), x.size() * sizeof(float))) << kernels->name << " " << k.name;
        }
}

TEST_P(RotationDims, NoRows) {
  for (const cpu::Kernels* kernels : runnable())
    for (const Case& k : all_cases(GetParam())) {
      Guarded scratch(kernels->rotate_scratch(GetParam()));
      for (const Map map : kMaps) run(*kernels, *k.r, map, nullptr, nullptr, 0, scratch.data());
      EXPECT_TRUE(scratch.intact());
    }
}

TEST_P(RotationDims, ScoresAndOutputsSurvive) {
  const int d = GetParam(), rows = 21;
  const std::vector<float> q = cases::normal_rows(rows, d, 3), key = cases::key_rows(rows, d, 4);
  for (const cpu::Kernels* kernels : runnable())
    for (const Case& k : all_cases(d)) {
      const std::vector<float> x = run(*kernels, *k.r, Map::forward, key), q2 = run(*kernels, *k.r, Map::dual, q);
      const std::vector<float> back = run(*kernels, *k.r, Map::inverse, x);
      // Each map errs by its roundings times norm and gain, and the second acts on the first's error.
      const double e = 2 * rounding(*k.r) * kUnit * gain(k, Map::forward) * gain(k, Map::inverse);
      const double second_order = 1 + rounding(*k.r) * kUnit * gain(k, Map::forward) * gain(k, Map::inverse);
      for (int row = 0; row < rows; ++row) {
        const std::size_t at = static_cast<std::size_t>(row) * d;
        double want = 0, got = 0, square = 0;
        for (int c = 0; c < d; ++c) {
          want += static_cast<double>(q[at + c]) * key[at + c];
          got += static_cast<double>(q2[at + c]) * x[at + c];
          square += std::pow(static_cast<double>(back[at + c]) - key[at + c], 2);
        }
        EXPECT_LE(std::abs(got - want), (e * second_order + d * 0x1p-52) * norm(&q[at], d) * norm(&key[at], d))
            << kernels->name << " " << k.name;
        EXPECT_LE(std::sqrt(square), e * second_order * norm(&key[at], d)) << kernels->name << " " << k.name;
      }
    }
}

TEST_P(RotationDims, BinaryDoubleEqualsTheMatrix) {
  const int d = GetParam();
  for (const Case& k : all_cases(d))
    for (const Map map : kMaps) {
      const std::vector<float> rows = cases::key_rows(1, d, 5);
      Guarded x(d * sizeof(double)), scratch(cpu::rotate_f64_scratch(d) * sizeof(double));
      double* values = static_cast<double*>(x.data());
      for (int c = 0; c < d; ++c) values[c] = static_cast<double>(rows[c]) / 3;
      const std::vector<double> in(values, values + d), want = product(k, map, in.data());
      cpu::rotate_f64(*k.r, map, values, static_cast<double*>(scratch.data()));
      EXPECT_TRUE(x.intact() && scratch.intact());
      for (int c = 0; c < d; ++c)
        ASSERT_NEAR(values[c], want[c], 1e-13 * norm(in.data(), d) * gain(k, map)) << k.name << " channel " << c;
    }
}

TEST(Rotation, EveryEvenDimension) {
  for (int d = kMinHeadDim; d <= kMaxHeadDim; d += 2) {
    std::shared_ptr<const Rotation> r = srft(d);
    Case k{"srft d=" + std::to_string(d), r, r->matrix_f64(), r->inverse_f64()};
    const std::vector<float> x = cases::normal_rows(1, d, 6);
    const std::vector<double> forward = product(k, Map::forward, x.data()),
                              inverse = product(k, Map::inverse, x.data());
    for (const cpu::Kernels* kernels : runnable()) {
      const std::vector<float> a = run(*kernels, *r, Map::forward, x), b = run(*kernels, *r, Map::inverse, x);
      double ea = 0, eb = 0;
      for (int c = 0; c < d; ++c) {
        ea += std::pow(a[c] - forward[c], 2);
        eb += std::pow(b[c] - inverse[c], 2);
      }
      EXPECT_LE(std::sqrt(ea), rounding(*r) * kUnit * norm(x.data(), d)) << kernels->name << " " << k.name;
      EXPECT_LE(std::sqrt(eb), rounding(*r) * kUnit * norm(x.data(), d)) << kernels->name << " " << k.name;
    }
  }
}

TEST(Rotation, PlanIsAFactorisation) {
  for (int d = kMinHeadDim; d <= kMaxHeadDim; d += 2) {
    const std::shared_ptr<const Rotation> r = srft(d);
    const FftPlan& plan = r->fft();
    int length = 1;
    std::size_t twiddles = 0, roots = 0;
    for (const int radix : plan.radix) {
      twiddles += 2 * static_cast<std::size_t>(length) * (radix - 1);
      roots += radix > 5 ? 2 * static_cast<std::size_t>(radix) : 0;
      length *= radix;
    }
    EXPECT_EQ(length, d / 2);
    EXPECT_EQ(plan.length, d / 2);
    EXPECT_EQ(plan.twiddle.size(), twiddles);
    EXPECT_EQ(plan.twiddle_f64.size(), twiddles);
    EXPECT_EQ(plan.root.size(), roots);
    EXPECT_EQ(plan.split.size(), static_cast<std::size_t>(d + 2));
    for (int n = 0; n < length; ++n) EXPECT_EQ(plan.source[plan.slot[n]], n);
  }
}

// FNV-1a over the bits of floats.
std::uint64_t hash(const std::vector<float>& x) {
  std::uint64_t h = 0xcbf29ce484222325ull;
  for (const float v : x) {
    const std::uint32_t bits = std::bit_cast<std::uint32_t>(v);
    for (int i = 0; i < 4; ++i) h = (h ^ (bits >> (8 * i) & 0xff)) * 0x100000001b3ull;
  }
  return h;
}

// Saved pages depend on these values: they must never change.
TEST(Rotation, SeedsGiveTheSameDataEverywhere) {
  EXPECT_EQ(hash(srft(128)->signs()), 0x08f5607ea64d25a5ull);
  EXPECT_EQ(hash(srft(80, 1)->signs()), 0x9b5e02a1beccbd25ull);
  std::shared_ptr<const Rotation> r;
  ASSERT_TRUE(Rotation::srht(128, kSeed, &r).ok());
  EXPECT_EQ(r->signs(), srft(128)->signs());
  ASSERT_TRUE(Rotation::householder(128, 64, kSeed, &r).ok());
  EXPECT_EQ(hash(r->reflector_vectors()), 0x0ecc15a47e3a57f2ull);
  EXPECT_NE(srft(128, 1)->signs(), srft(128, 2)->signs());
}

void expect_invalid(const Status& status, const std::string& argument) {
  EXPECT_EQ(status.code(), StatusCode::invalid_argument);
  EXPECT_EQ(status.message().rfind(argument + ": expected ", 0), 0u) << status.message();
  EXPECT_NE(status.message().find("; got "), std::string::npos) << status.message();
}

TEST(Rotation, ErrorsNameTheArgument) {
  std::shared_ptr<const Rotation> r;
  for (const int d : {-2, 0, 30, 33, 127, 514, 1 << 20}) {
    expect_invalid(Rotation::identity(d, &r), "d");
    expect_invalid(Rotation::srft(d, 1, &r), "d");
    expect_invalid(Rotation::srht(d, 1, &r), "d");
    expect_invalid(Rotation::householder(d, 1, 1, &r), "d");
    expect_invalid(Rotation::dense(d, {}, &r), "d");
  }
  for (const int reflectors : {-1, 0, 65}) expect_invalid(Rotation::householder(64, reflectors, 1, &r), "reflectors");
  std::vector<float> a = learned_matrix(64);
  expect_invalid(Rotation::dense(64, std::span(a).first(64 * 63), &r), "matrix");
  for (const float bad : {std::nanf(""), INFINITY, -INFINITY}) {
    std::vector<float> b = a;
    b[777] = bad;
    expect_invalid(Rotation::dense(64, b, &r), "matrix");
  }
  std::vector<float> equal_rows = a;
  std::copy(a.begin(), a.begin() + 64, equal_rows.begin() + 64);
  expect_invalid(Rotation::dense(64, equal_rows, &r), "matrix");
  std::vector<float> nearly = equal_rows;
  nearly[64] *= 1 + 0x1p-23f;
  expect_invalid(Rotation::dense(64, nearly, &r), "matrix");
  expect_invalid(Rotation::dense(64, std::vector<float>(64 * 64), &r), "matrix");
  std::vector<float> tiny(64 * 64);
  for (int c = 0; c < 64; ++c) tiny[c * 65] = 0x1p-140f;  // its inverse is no float
  expect_invalid(Rotation::dense(64, tiny, &r), "matrix");
  EXPECT_EQ(r, nullptr) << "a failed call must not touch its output";
}

}  // namespace
}  // namespace kv4
