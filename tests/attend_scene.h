// A batch of cached sequences built from random codes and rows, as the attention kernels see it and
// as dense tokens in float64. Pages are random bytes, read code by code through the documented order.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "backend/backend.h"
#include "cases.h"
#include "cpu/layout.h"
#include "format/convert.h"
#include "reference/attend.h"
#include "reference/seal.h"

namespace kv4::scene {

// Bits of a code of keys and of values, and refined keys, of the shapes made from now on. Levels of other than 4 bits
// are lloyd_max; trellis: those of up to 4 bits are a trellis's.
struct Widths {
  int k = 4, v = 4, refined = 0;
  bool trellis = false;
};
inline Widths widths_of_shapes;

// An element of a tensor's bytes.
inline double element(const std::uint8_t* at, DType dtype) {
  if (dtype == DType::f32) {
    float f;
    std::memcpy(&f, at, 4);
    return f;
  }
  std::uint16_t h;
  std::memcpy(&h, at, 2);
  return dtype == DType::f16 ? f16_to_f32(h) : bf16_to_f32(h);
}

struct Shape {
  int kv_heads = 2, group = 1;  // query heads: kv_heads * group
  int dim_k = 128, dim_v = 128;
  int scale_group_k = 0, scale_group_v = 0;
  bool mean = true, lambda = true;
  LevelKind levels = LevelKind::lloyd_max;
  Widths bits = widths_of_shapes;
  RotationKind rotation = RotationKind::srft;  // every kind but dense
  DType dtype = DType::f16;                    // of the exact rows
  double bias = 0;                             // size of the means; 0: like the keys
  std::uint64_t seed = 1;
};

struct Held {
  int sinks = 0, page_tokens = 0, window = 0;
  int dropped = 0;  // position of the first token
  int tokens() const { return sinks + page_tokens + window; }

  // `n` tokens as a cache of the default recipe stores them.
  static Held of(int n) {
    Held h;
    h.sinks = std::min(n, 4);
    const int rest = n - h.sinks;
    h.page_tokens = rest >= 128 ? (rest - 64) / 64 * 64 : 0;
    h.window = rest - h.page_tokens;
    return h;
  }
};

class Scene {
 public:
  Scene(const Shape& shape, const std::vector<Held>& held, bool dense = true) : shape_(shape) {
    make_spec();
    cases::Random random(shape.seed);
    lambda_k_ = positive(random, shape.kv_heads * shape.dim_k);
    lambda_v_ = positive(random, shape.kv_heads * shape.dim_v);
    sequences_.resize(held.size());
    for (const Held& h : held) free_pages_ += pages_of(h);
    memory_.resize(page_bytes() * static_cast<std::size_t>(free_pages_) + 64);
    for (std::size_t b = 0; b < held.size(); ++b) add(random, held[b], sequences_[b], dense);
  }

  const PageSpec& spec() const { return spec_; }
  const Shape& shape() const { return shape_; }
  int batch() const { return static_cast<int>(sequences_.size()); }
  std::vector<reference::DenseTokens> dense() const {
    std::vector<reference::DenseTokens> all;
    for (const Sequence& s : sequences_) all.push_back(s.dense);
    return all;
  }
  // Of tokens in pages: |s L| over the key's groups, and the value's scales; [kv_heads][tokens, groups].
  struct Steps {
    std::int64_t first_token = 0;  // index of the first page's first token among the dense tokens
    std::vector<std::vector<double>> key_norm, value_scale;
  };
  const Steps& steps(int b) const { return sequences_[static_cast<std::size_t>(b)].steps; }
  const float* lambda_k(int head) const { return shape_.lambda ? lambda_k_.data() + head * shape_.dim_k : nullptr; }
  const float* lambda_v(int head) const { return shape_.lambda ? lambda_v_.data() + head * shape_.dim_v : nullptr; }
  // Position after the last token.
  std::int64_t length(int b) const { return sequences_[static_cast<std::size_t>(b)].length; }

  // All pages of all sequences; ids descend as positions ascend.
  PageMemory pages() const {
    std::uint8_t* const first = const_cast<std::uint8_t*>(memory_.data());
    PageMemory out;
    out.data = first + (64 - reinterpret_cast<std::uintptr_t>(first) % 64) % 64;
    out.page_stride = static_cast<std::int64_t>(page_bytes());
    out.head_stride = spec_.layout.head_bytes;
    return out;
  }
  std::size_t pages_bytes() const { return memory_.size() - 64; }

  // Views for a call whose T queries are the newest tokens.
  std::vector<SequenceView> views(std::int64_t queries) const {
    std::vector<SequenceView> out;
    for (const Sequence& s : sequences_) {
      SequenceView v = s.view;
      v.pages = s.ids.data();
      v.input = static_cast<std::int32_t>(out.size());
      v.query_count = queries;
      v.lambda_k = shape_.lambda ? lambda_k_.data() : nullptr;
      v.lambda_v = shape_.lambda ? lambda_v_.data() : nullptr;
      v.query_position = s.length - queries;
      out.push_back(v);
    }
    return out;
  }
  AttendJob job(const AttendArgs& args, const std::vector<SequenceView>& views) const {
    AttendJob job;
    job.args = args;
    job.spec = spec_.key.rotation ? &spec_ : nullptr;
    job.dtype = shape_.dtype;
    job.kv_heads = shape_.kv_heads;
    job.head_dim_k = shape_.dim_k;
    job.head_dim_v = shape_.dim_v;
    job.pages = pages();
    job.sequences.views = views;
    return job;
  }
  std::size_t page_bytes() const { return static_cast<std::size_t>(spec_.layout.head_bytes) * shape_.kv_heads; }

 private:
  struct Sequence {
    std::vector<std::int32_t> ids;
    std::vector<std::byte> k[2], v[2];
    SequenceView view;
    std::int64_t length = 0;
    reference::DenseTokens dense;
    Steps steps;
  };

  static int pages_of(const Held& held) { return (held.page_tokens + kPageTokens - 1) / kPageTokens; }
  static std::vector<float> positive(cases::Random& random, int n) {
    std::vector<float> x(static_cast<std::size_t>(n));
    for (float& f : x) f = static_cast<float>(0.5 + random.uniform());
    return x;
  }

  LevelKind kind(int bits) const {
    if (shape_.bits.trellis && bits <= 4) return LevelKind::trellis;
    return bits == 4 ? shape_.levels : LevelKind::lloyd_max;
  }
  void make_side(SideSpec& side, int dim, int group, bool mean, int bits) {
    side.dim = dim;
    side.group = group == 0 ? dim : group;
    side.groups = dim / side.group;
    side.levels = levels(kind(bits), bits);
    side.mean = mean;
    switch (shape_.rotation) {
      case RotationKind::identity: static_cast<void>(Rotation::identity(dim, &side.rotation)); break;
      case RotationKind::srht: static_cast<void>(Rotation::srht(dim, shape_.seed, &side.rotation)); break;
      case RotationKind::householder:
        static_cast<void>(Rotation::householder(dim, dim / 2, shape_.seed, &side.rotation));
        break;
      default: static_cast<void>(Rotation::srft(dim, shape_.seed, &side.rotation)); break;
    }
  }
  void make_spec() {
    if (shape_.dim_k % 2 != 0 || shape_.dim_k < kMinHeadDim || shape_.dim_v % 2 != 0 || shape_.dim_v < kMinHeadDim)
      return;
    make_side(spec_.key, shape_.dim_k, shape_.scale_group_k, shape_.mean, shape_.bits.k);
    make_side(spec_.value, shape_.dim_v, shape_.scale_group_v, false, shape_.bits.v);
    const auto channels_k = static_cast<std::uint32_t>(cpu::pad_channels(shape_.dim_k)),
               channels_v = static_cast<std::uint32_t>(cpu::pad_channels(shape_.dim_v)),
               refined = static_cast<std::uint32_t>(shape_.bits.refined);
    spec_.layout = kv4_make_page_layout(
        static_cast<std::uint32_t>(shape_.dim_k), static_cast<std::uint32_t>(shape_.dim_v),
        static_cast<std::uint32_t>(spec_.key.groups), static_cast<std::uint32_t>(spec_.value.groups), shape_.mean,
        channels_k, channels_v, static_cast<std::uint32_t>(shape_.bits.k), static_cast<std::uint32_t>(shape_.bits.v),
        refined);
    spec_.second = kv4_make_second_layout(spec_.layout, channels_k, refined);
    spec_.value.values = true;
    spec_.second_levels = second_levels(kind(shape_.bits.k));
  }

  void fill_slice(cases::Random& random, int tokens, std::uint8_t* slice, std::vector<std::uint8_t>& k,
                  std::vector<std::uint8_t>& v) {
    for (std::uint32_t i = 0; i < spec_.layout.head_bytes; ++i) slice[i] = static_cast<std::uint8_t>(random.bits());
    const double step = 1.0 / (shape_.levels == LevelKind::uniform ? 4 : 68);
    const auto put = [&](std::uint32_t at, double x) {
      const std::uint16_t h = f32_to_f16(static_cast<float>(x));
      std::memcpy(slice + at, &h, 2);
    };
    // Scales past the sealed tokens stay random bytes, including NaN and infinity.
    for (int g = 0; g < spec_.key.groups; ++g)
      for (int j = 0; j < tokens; ++j)
        put(spec_.layout.k_scales + static_cast<std::uint32_t>(g * kPageTokens + j) * 2,
            step * (0.5 + random.uniform()));
    for (int g = 0; g < spec_.value.groups; ++g)
      for (int j = 0; j < tokens; ++j)
        put(spec_.layout.v_scales + static_cast<std::uint32_t>(g * kPageTokens + j) * 2,
            step * (0.5 + random.uniform()));
    for (int c = 0; c < shape_.dim_k && shape_.mean; ++c)
      put(spec_.layout.k_mean + static_cast<std::uint32_t>(c) * 2,
          (shape_.bias == 0 ? 0.3 : shape_.bias) * random.normal());
    // As large as the first rows, so that leaving them out gives a large error.
    for (std::uint32_t row = 0; row < spec_.second.rows; ++row) {
      for (int g = 0; g < spec_.key.groups; ++g)
        put(spec_.second.scales +
                (row * static_cast<std::uint32_t>(spec_.key.groups) + static_cast<std::uint32_t>(g)) * 2,
            step * (0.5 + random.uniform()));
      const std::uint8_t place = static_cast<std::uint8_t>(random.below(kPageTokens));
      slice[spec_.second.places + row] =
          row > 0 && place == slice[spec_.second.places] ? static_cast<std::uint8_t>((place + 1) % kPageTokens) : place;
    }
    k = codes_of(slice + spec_.layout.k_codes, spec_.key, true);
    v = codes_of(slice + spec_.layout.v_codes, spec_.value, false);
  }

  // In canonical order, through the documented order of the CPU's planes (cpu/layout.h).
  static std::vector<std::uint8_t> codes_of(const std::uint8_t* side, const SideSpec& spec, bool keys) {
    const int bits = spec.levels.bits, first = cpu::first_plane(bits), padded = cpu::pad_channels(spec.dim);
    std::vector<std::uint8_t> codes;
    for (int j = 0; j < kPageTokens; ++j) {
      for (int c = 0; c < spec.dim; ++c) {
        const auto read = [&](const std::uint8_t* from, int plane) {
          const cpu::Nibble n = keys ? cpu::key_place(plane, j, c, padded) : cpu::value_place(plane, j, c);
          return from[n.byte] >> n.shift & ((1 << plane) - 1);
        };
        int code = read(side, first);
        if (bits > first) code |= read(side + cpu::second_plane(bits, padded), bits - first) << first;
        codes.push_back(static_cast<std::uint8_t>(code));
      }
    }
    return reference::to_canonical(codes, bits);
  }

  // Appends [tokens][groups] numbers of one page.
  void add_steps(const std::uint8_t* slice, const std::vector<std::uint8_t>& k, int tokens, int head,
                 Steps& steps) const {
    const auto scale = [&](std::uint32_t at, int group, int token) {
      std::uint16_t h;
      std::memcpy(&h, slice + at + static_cast<std::uint32_t>(group * kPageTokens + token) * 2, 2);
      return static_cast<double>(f16_to_f32(h));
    };
    const std::vector<std::uint8_t> codes =
        reference::from_canonical(k.data(), tokens, shape_.dim_k, spec_.key.levels.bits);
    const std::vector<double> levels = reference::levels_of(spec_.key, spec_.key.levels, codes.data(), tokens);
    for (int j = 0; j < tokens; ++j) {
      for (int g = 0; g < spec_.key.groups; ++g) {
        double squares = 0;
        for (int c = g * spec_.key.group; c < (g + 1) * spec_.key.group; ++c) {
          const double level = levels[static_cast<std::size_t>(j * shape_.dim_k + c)];
          squares += level * level;
        }
        steps.key_norm[static_cast<std::size_t>(head)].push_back(scale(spec_.layout.k_scales, g, j) *
                                                                 std::sqrt(squares));
      }
      for (int g = 0; g < spec_.value.groups; ++g)
        steps.value_scale[static_cast<std::size_t>(head)].push_back(scale(spec_.layout.v_scales, g, j));
    }
  }

  static double put_element(std::vector<std::byte>& bytes, DType dtype, std::size_t i, double x) {
    if (dtype == DType::f32) {
      const float f = static_cast<float>(x);
      std::memcpy(bytes.data() + i * 4, &f, 4);
      return f;
    }
    const std::uint16_t h = dtype == DType::f16 ? f32_to_f16(static_cast<float>(x))
                                                : f32_to_bf16(static_cast<float>(x));
    std::memcpy(bytes.data() + i * 2, &h, 2);
    return dtype == DType::f16 ? f16_to_f32(h) : bf16_to_f32(h);
  }

  void add(cases::Random& random, const Held& held, Sequence& s, bool dense) {
    const int heads = shape_.kv_heads;
    s.dense.k.resize(static_cast<std::size_t>(heads));
    s.dense.v.resize(static_cast<std::size_t>(heads));
    std::int64_t position = held.dropped;
    const auto exact = [&](int set, int count) {
      ExactRows& x = s.view.exact[set];
      x.position = position;
      x.count = count;
      x.k_stride = shape_.dim_k + 3;  // odd strides, so that kernels must use them
      x.v_stride = shape_.dim_v + 5;
      x.k_head_stride = x.k_stride * (count + 1);
      x.v_head_stride = x.v_stride * (count + 2);
      const std::byte nan{0xff};
      s.k[set].assign(static_cast<std::size_t>(x.k_head_stride * heads) * size_of(shape_.dtype), nan);
      s.v[set].assign(static_cast<std::size_t>(x.v_head_stride * heads) * size_of(shape_.dtype), nan);
      for (int h = 0; h < heads; ++h)
        for (int j = 0; j < count; ++j) {
          for (int c = 0; c < shape_.dim_k; ++c)
            s.dense.k[static_cast<std::size_t>(h)].push_back(
                put_element(s.k[set], shape_.dtype, static_cast<std::size_t>(h * x.k_head_stride + j * x.k_stride + c),
                            random.normal()));
          for (int c = 0; c < shape_.dim_v; ++c)
            s.dense.v[static_cast<std::size_t>(h)].push_back(
                put_element(s.v[set], shape_.dtype, static_cast<std::size_t>(h * x.v_head_stride + j * x.v_stride + c),
                            random.normal()));
        }
      x.k = s.k[set].data();
      x.v = s.v[set].data();
      for (int j = 0; j < count; ++j) s.dense.position.push_back(position++);
    };
    exact(0, held.sinks);
    const int pages = pages_of(held);
    if (pages > 0) {
      s.view.page_count = pages;
      s.view.pages_position = position;
      s.view.last_page_tokens = held.page_tokens - (pages - 1) * kPageTokens;
      s.steps.first_token = static_cast<std::int64_t>(s.dense.position.size());
      s.steps.key_norm.resize(static_cast<std::size_t>(heads));
      s.steps.value_scale.resize(static_cast<std::size_t>(heads));
      std::vector<std::uint8_t> k, v;
      for (int p = 0; p < pages; ++p) {
        const int tokens = p + 1 < pages ? kPageTokens : s.view.last_page_tokens;
        const std::int32_t id = --free_pages_;
        s.ids.push_back(id);
        for (int h = 0; h < heads; ++h) {
          std::uint8_t* slice = slice_at(this->pages(), id, h);
          fill_slice(random, tokens, slice, k, v);
          if (!dense) continue;
          reference::append_page(spec_, slice, k.data(), v.data(), tokens, lambda_k(h), lambda_v(h), h, &s.dense);
          add_steps(slice, k, tokens, h, s.steps);
        }
        for (int j = 0; j < tokens; ++j) s.dense.position.push_back(position++);
      }
    }
    exact(1, held.window);
    s.length = position;
  }

  Shape shape_;
  PageSpec spec_;
  std::vector<float> lambda_k_, lambda_v_;
  std::vector<std::uint8_t> memory_;
  std::int32_t free_pages_ = 0;
  std::vector<Sequence> sequences_;
};

}  // namespace kv4::scene
