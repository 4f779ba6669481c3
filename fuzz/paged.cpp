// The operations of kv4/paged.h on arbitrary tables and lengths. Each buffer is a separate allocation of exactly the
// bytes that the contract requires, so that AddressSanitizer catches any access beyond.
//
// Properties: a refused call has written nothing; an accepted attention call equals float64 softmax over the tokens
// that the tables name.
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "cases.h"
#include "input.h"
#include "kv4/cpu.h"
#include "kv4/paged.h"

namespace kv4::fuzz {
namespace {

constexpr int kHeads = 2, kGroup = 2, kDim = 32, kPages = 6, kBlocks = 7, kTable = 4, kMost = 3;
constexpr std::int64_t kRow = kHeads * kDim;
// Relative to the largest output: the bound of the attention kernels.
constexpr double kTolerance = 1e-3;

// 64-byte aligned memory that ends at its allocation's end, or as close as alignment allows.
class Memory {
 public:
  explicit Memory(std::size_t bytes) : held_(new std::uint8_t[bytes + 64]), bytes_(bytes) {
    const auto end = reinterpret_cast<std::uintptr_t>(held_.get()) + bytes + 64;
    data_ = reinterpret_cast<std::uint8_t*>((end - bytes) / 64 * 64);
    std::memset(data_, 0, bytes);
  }
  std::uint8_t* data() const { return data_; }
  std::span<std::byte> span(std::size_t bytes) const { return {reinterpret_cast<std::byte*>(data_), bytes}; }
  std::vector<std::uint8_t> copy() const { return {data_, data_ + bytes_}; }

 private:
  std::unique_ptr<std::uint8_t[]> held_;
  std::size_t bytes_;
  std::uint8_t* data_;
};

const PageFormat& format() {
  static const std::unique_ptr<PageFormat> instance = [] {
    CacheConfig config;
    config.kv_heads = kHeads;
    config.head_dim_k = config.head_dim_v = kDim;
    std::unique_ptr<PageFormat> made;
    KV4_EXPECT(PageFormat::create(config, &made).ok(), "a format");
    return made;
  }();
  return *instance;
}

bool says_why(const Status& status) {
  return status.message().find("expected ") != std::string::npos &&
         status.message().find("; got ") != std::string::npos;
}

class Calls {
 public:
  explicit Calls(Input& in)
      : in_(in), random_(in.raw<std::uint16_t>()), pages_(kPages * format().page_bytes()),
        rows_(kBlocks * format().block_bytes()) {
    fill();
  }

  void run() {
    for (int i = 0; i < 12 && !in_.empty(); ++i) {
      draw_batch();
      switch (in_.below(6)) {
        case 0: store(); break;
        case 1: on_pages(true); break;
        case 2: on_pages(false); break;
        case 3: sizes(); break;
        case 4: learn(); break;
        default: attend();
      }
    }
  }

 private:
  // Fills every block and seals every page, so that any table entry is readable.
  void fill() {
    auto* values = reinterpret_cast<float*>(rows_.data());
    for (std::size_t i = 0; i < kBlocks * format().block_bytes() / sizeof(float); ++i)
      values[i] = static_cast<float>(random_.normal());
    size_ = 1;
    queries_ = {0, 0};
    lengths_ = {kPages * kPageTokens};
    sealed_ = {0};
    page_ids_ = {0, 1, 2, 3, 4, 5};
    block_ids_ = {0, 1, 2, 3, 4, 5};
    sinks_ = {0};
    PagedBatch batch = batch_of();
    batch.pages_stride = batch.blocks_stride = kPages;
    const std::int32_t begin = 0, end = kPages * kPageTokens;
    std::size_t bytes = 0;
    KV4_EXPECT(format().workspace_bytes({.q_heads = kHeads * kGroup, .most_pages = kPages}, &bytes).ok(),
               "a workspace");
    const Memory workspace(bytes);
    KV4_EXPECT(format().seal(batch, {&begin, &end, kPages}, workspace.span(bytes)).ok(), "pages to begin with");
  }

  static std::int32_t wrapping_sum(std::int32_t a, std::int32_t b) {
    return static_cast<std::int32_t>(static_cast<std::uint32_t>(a) + static_cast<std::uint32_t>(b));
  }

  void draw_batch() {
    size_ = in_.below(kMost + 1);
    const auto n = static_cast<std::size_t>(size_);
    queries_.assign(1, in_.one_in(16) ? in_.mostly_below(8) : 0);
    lengths_.clear();
    sealed_.clear();
    sinks_.clear();
    for (std::size_t b = 0; b < n; ++b) {
      const int plausible[] = {0, 1, 1, 1, 2, 17, 64, 65};
      queries_.push_back(in_.one_in(16) ? in_.raw<std::int32_t>()
                                        : wrapping_sum(queries_.back(), plausible[in_.below(8)]));
      lengths_.push_back(in_.mostly_below(kTable * kPageTokens + 2));
      sealed_.push_back(in_.one_in(16) ? in_.raw<std::int32_t>() : kPageTokens * in_.below(kTable + 1));
      sinks_.push_back(in_.mostly_below(kBlocks));
    }
    page_ids_.clear();
    block_ids_.clear();
    for (std::size_t i = 0; i < n * kTable; ++i) {
      page_ids_.push_back(in_.mostly_below(kPages));
      block_ids_.push_back(in_.mostly_below(kBlocks));
    }
    sink_tokens_ = in_.one_in(4) ? in_.mostly_below(kPageTokens + 2) : 4;
    window_ = in_.one_in(4) ? in_.mostly_below(100) : 0;
    with_sinks_ = !in_.one_in(4);
  }

  PagedBatch batch_of() {
    PagedBatch b;
    b.size = size_;
    b.queries = queries_.data();
    b.lengths = lengths_.data();
    b.sealed = sealed_.data();
    b.pages = page_ids_.data();
    b.blocks = block_ids_.data();
    b.pages_stride = b.blocks_stride = kTable;
    b.sinks = with_sinks_ ? sinks_.data() : nullptr;
    b.sink_tokens = with_sinks_ ? sink_tokens_ : 0;
    b.window = window_;
    b.page_memory.data = pages_.data();
    b.page_memory.page_stride = static_cast<std::int64_t>(format().page_bytes());
    b.page_memory.head_stride = static_cast<std::int64_t>(format().head_bytes());
    auto* rows = reinterpret_cast<float*>(rows_.data());
    const std::int64_t half = kPageTokens * kRow;
    b.row_memory = {rows, rows + half, 2 * half, 2 * half, kPageTokens * kDim, kPageTokens * kDim, kDim, kDim};
    b.page_count = kPages;
    b.block_count = kBlocks;
    return b;
  }

  // Rows of a call's tensors: as many as queries_ needs if plausible, or another number.
  std::int64_t call_rows() {
    const std::int64_t all = queries_.empty() ? 0 : queries_.back();
    return in_.one_in(8) ? in_.below(80) : all >= 0 && all <= 400 ? all : in_.below(80);
  }
  std::vector<float> tensor(std::int64_t heads, std::int64_t rows) {
    std::vector<float> x(static_cast<std::size_t>(heads * rows * kDim));
    for (float& each : x) each = static_cast<float>(random_.normal());
    return x;
  }
  static TensorView view(const std::vector<float>& x, std::int64_t heads, std::int64_t rows) {
    return {x.data(), DType::f32, {1, heads, rows, kDim}, {heads * rows * kDim, rows * kDim, kDim, 1}};
  }
  // As large as the limits require; sometimes smaller, which must be refused or suffice.
  Memory workspace(std::int64_t queries, int most_pages, std::size_t* bytes) {
    PageFormat::Limits limits{.sequences = std::max(1, size_), .q_heads = kHeads * kGroup, .most_pages = most_pages};
    limits.most_queries = std::max<std::int64_t>(1, queries);
    limits.longest = kTable * kPageTokens;
    limits.all = std::max(1, size_) * limits.longest;
    KV4_EXPECT(format().workspace_bytes(limits, bytes).ok(), "limits of these calls");
    if (in_.one_in(8)) *bytes = *bytes * static_cast<std::size_t>(in_.byte()) / 256;
    return Memory(*bytes);
  }

  void expect_nothing_written(const Status& status, const std::vector<std::uint8_t>& pages,
                              const std::vector<std::uint8_t>& rows) const {
    KV4_EXPECT(says_why(status), status.message().c_str());
    KV4_EXPECT(pages_.copy() == pages && rows_.copy() == rows, "a refused call writes nothing");
  }

  void store() {
    const std::int64_t n = call_rows();
    const std::vector<float> k = tensor(kHeads, n), v = tensor(kHeads, n);
    std::size_t bytes = 0;
    const Memory space = workspace(n, 1, &bytes);
    const auto pages = pages_.copy(), rows = rows_.copy();
    const PagedBatch batch = batch_of();
    const Status status = format().store(batch, view(k, kHeads, n), view(v, kHeads, n), space.span(bytes));
    if (!status.ok()) return expect_nothing_written(status, pages, rows);
    KV4_EXPECT(pages_.copy() == pages, "store writes to blocks alone");
    for (int b = 0; b < size_ && n > 0; ++b) expect_stored(b, k, n);
  }
  // A sequence's newest row, unless a later sequence of the call wrote to the same block.
  void expect_stored(int b, const std::vector<float>& k, std::int64_t n) const {
    const std::int64_t count = queries_[static_cast<std::size_t>(b) + 1] - queries_[static_cast<std::size_t>(b)];
    if (count == 0 || b + 1 < size_) return;
    const std::int64_t position = lengths_[static_cast<std::size_t>(b)] - 1;
    const float* held =
        row(true, block_ids_[static_cast<std::size_t>(b * kTable + position / kPageTokens)], 0, position % kPageTokens);
    const float* came = k.data() + (queries_[static_cast<std::size_t>(b) + 1] - 1) * kDim;
    KV4_EXPECT(n > 0 && std::equal(held, held + kDim, came), "a stored row is where its table says");
  }

  void on_pages(bool seal) {
    std::vector<std::int32_t> begin, end;
    for (int b = 0; b < size_; ++b) {
      begin.push_back(in_.one_in(16) ? in_.raw<std::int32_t>() : kPageTokens * in_.below(kTable));
      end.push_back(in_.one_in(16) ? in_.raw<std::int32_t>() : wrapping_sum(begin.back(), kPageTokens * in_.below(3)));
    }
    const int most = in_.mostly_below(kTable + 1);
    std::size_t bytes = 0;
    const Memory space = workspace(1, std::clamp(most, 0, kTable), &bytes);
    const auto pages = pages_.copy(), rows = rows_.copy();
    const PagedBatch batch = batch_of();
    const PageRange range{begin.data(), end.data(), most};
    const Status status = seal ? format().seal(batch, range, space.span(bytes))
                               : format().dequantise(batch, range, space.span(bytes));
    if (!status.ok()) return expect_nothing_written(status, pages, rows);
    KV4_EXPECT(seal ? rows_.copy() == rows : pages_.copy() == pages, "seal writes pages, dequantise rows");
  }

  void sizes() {
    PageFormat::Limits limits;
    limits.sequences = in_.mostly_below(5);
    limits.q_heads = in_.mostly_below(9);
    limits.most_pages = in_.mostly_below(9);
    limits.most_queries = in_.mostly_below(100);
    limits.longest = in_.mostly_below(1000);
    limits.all = in_.mostly_below(1000);
    std::size_t bytes = 0;
    const Status status = format().workspace_bytes(limits, &bytes);
    KV4_EXPECT(status.ok() ? bytes > 0 : says_why(status), status.message().c_str());
  }

  void learn() {
    const std::int64_t n = 64 * in_.below(3) + (in_.one_in(4) ? in_.below(64) : 0), q_rows = in_.below(4);
    const std::vector<float> q = tensor(kHeads * kGroup, q_rows), k = tensor(kHeads, n);
    std::vector<float> lambda(kRow, -1.0f);
    const Status status = format().learn_lambda(view(q, kHeads * kGroup, q_rows), view(k, kHeads, n), lambda.data());
    for (const float x : lambda)
      KV4_EXPECT(status.ok() ? x > 0 && std::isfinite(x) : x == -1.0f, "lambda is positive, or as it was");
  }

  const float* row(bool key, std::int64_t block, std::int64_t head, std::int64_t r) const {
    const auto* rows = reinterpret_cast<const float*>(rows_.data());
    return rows + ((2 * block + (key ? 0 : 1)) * kHeads + head) * kPageTokens * kDim + r * kDim;
  }

  // Dequantised pages.
  std::vector<float> opened() {
    const std::vector<std::int32_t> zero(1, 0), end(1, kPages * kPageTokens), ids{0, 1, 2, 3, 4, 5};
    Memory blocks(kPages * format().block_bytes());
    PagedBatch batch = batch_of();
    batch.size = 1;
    batch.window = batch.sink_tokens = 0;
    batch.sinks = nullptr;
    batch.pages = batch.blocks = ids.data();
    batch.pages_stride = batch.blocks_stride = kPages;
    batch.page_count = batch.block_count = kPages;
    auto* rows = reinterpret_cast<float*>(blocks.data());
    batch.row_memory.k = rows;
    batch.row_memory.v = rows + kPageTokens * kRow;
    std::size_t bytes = 0;
    KV4_EXPECT(format().workspace_bytes({.q_heads = kHeads * kGroup, .most_pages = kPages}, &bytes).ok(),
               "a workspace");
    const Memory space(bytes);
    const Status status = format().dequantise(batch, {zero.data(), end.data(), kPages}, space.span(bytes));
    KV4_EXPECT(status.ok(), status.message().c_str());
    return {rows, rows + kPages * 2 * kPageTokens * kRow};
  }

  void attend() {
    const std::int64_t n = call_rows(), heads = kHeads * kGroup;
    const std::vector<float> q = tensor(heads, n);
    std::vector<float> out(q.size(), -77.0f);
    std::size_t bytes = 0;
    const Memory space = workspace(n, 1, &bytes);
    const auto pages = pages_.copy(), rows = rows_.copy();
    const PagedBatch batch = batch_of();
    AttendArgs args;
    args.q = view(q, heads, n);
    const MutableTensorView to{out.data(), DType::f32, args.q.shape, args.q.stride};
    const Status status = format().attend(batch, args, to, space.span(bytes));
    KV4_EXPECT(pages_.copy() == pages && rows_.copy() == rows, "attention writes to its output alone");
    if (!status.ok()) {
      KV4_EXPECT(says_why(status), status.message().c_str());
      return;
    }
    if (n == 0 || size_ == 0) return;
    const std::vector<float> pages_as_rows = opened();
    for (int b = 0; b < size_; ++b) {
      const std::int64_t first = queries_[static_cast<std::size_t>(b)],
                         count = queries_[static_cast<std::size_t>(b) + 1] - first;
      if (overlaps(b)) continue;
      for (std::int64_t t = 0; t < count; t += std::max<std::int64_t>(1, count - 1))
        expect_output(b, first + t, lengths_[static_cast<std::size_t>(b)] - count + t, q, n, out, pages_as_rows);
    }
  }
  // Whether a later sequence's rows overlap b's, and so overwrite its outputs.
  bool overlaps(int b) const {
    for (int other = 0; other < size_; ++other)
      if (other != b && queries_[static_cast<std::size_t>(other)] < queries_[static_cast<std::size_t>(b) + 1] &&
          queries_[static_cast<std::size_t>(other) + 1] > queries_[static_cast<std::size_t>(b)])
        return true;
    return false;
  }

  void expect_output(int b, std::int64_t query, std::int64_t position, const std::vector<float>& q, std::int64_t n,
                     const std::vector<float>& out, const std::vector<float>& pages) const {
    const std::int64_t sealed = sealed_[static_cast<std::size_t>(b)];
    const std::int64_t sinks = with_sinks_ && sealed > 0 ? sink_tokens_ : 0;
    const auto held = [&](bool key, std::int64_t j, std::int64_t head) -> const float* {
      const auto entry = static_cast<std::size_t>(b * kTable + j / kPageTokens);
      if (j < sinks) return row(key, sinks_[static_cast<std::size_t>(b)], head, j);
      if (j >= sealed) return row(key, block_ids_[entry], head, j % kPageTokens);
      return pages.data() + ((2 * page_ids_[entry] + (key ? 0 : 1)) * kHeads + head) * kPageTokens * kDim +
             j % kPageTokens * kDim;
    };
    for (std::int64_t head = 0; head < kHeads * kGroup; ++head) {
      const float* x = q.data() + (head * n + query) * kDim;
      std::vector<double> scores;
      const std::int64_t first = window_ > 0 ? std::max<std::int64_t>(0, position - window_ + 1) : 0;
      double top = -std::numeric_limits<double>::infinity();
      for (std::int64_t j = first; j <= position; ++j) {
        double s = 0;
        for (int c = 0; c < kDim; ++c) s += static_cast<double>(x[c]) * held(true, j, head / kGroup)[c];
        scores.push_back(s / std::sqrt(static_cast<double>(kDim)));
        top = std::max(top, scores.back());
      }
      std::vector<double> want(kDim, 0.0);
      double sum = 0, largest = 1e-6;
      for (std::size_t i = 0; i < scores.size(); ++i) {
        const double p = std::exp(scores[i] - top);
        sum += p;
        for (int c = 0; c < kDim; ++c)
          want[static_cast<std::size_t>(c)] += p * held(false, first + static_cast<std::int64_t>(i), head / kGroup)[c];
      }
      for (double& w : want) largest = std::max(largest, std::abs(w /= sum));
      for (int c = 0; c < kDim; ++c)
        KV4_EXPECT(std::abs(out[static_cast<std::size_t>((head * n + query) * kDim + c)] -
                            want[static_cast<std::size_t>(c)]) <= kTolerance * largest,
                   "attention is softmax over what the tables name");
    }
  }

  Input& in_;
  cases::Random random_;
  Memory pages_, rows_;
  int size_ = 0, sink_tokens_ = 4, window_ = 0;
  bool with_sinks_ = true;
  std::vector<std::int32_t> queries_, lengths_, sealed_, page_ids_, block_ids_, sinks_;
};

}  // namespace
}  // namespace kv4::fuzz

extern "C" int LLVMFuzzerInitialize(int*, char***) {
  KV4_EXPECT(kv4::cpu::set_num_threads(1).ok(), "one thread");
  KV4_EXPECT(kv4::cpu::set_operand_bits(16).ok(), "as close to the reference as it can be");
  return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace kv4::fuzz;
  Input in(data, size);
  Calls(in).run();
  return 0;
}
