// Dequantising tokens of a head slice into rows of the model's own basis, kLanes tokens at a time.
//
// Instructions per vector of kLanes values (AVX2 counts): unpack under 1; level lookup 1/4; shift up,
// shift down, convert, fma with the scale, store; the inverse rotation; 3 transpose, 1 multiply, store.
// Bound by the rotation: it reads about half a byte and writes four per value.
#pragma once

#include "cpu/second_rows.inl"
#include "cpu/trellis.inl"

namespace kv4::cpu::KV4_ISA {

struct DequantiseScratch {
  float* x;             // [padded][kLanes]
  float* rotate;        // rotate_lanes_scratch(d)
  float* inverse;       // [d] 1 / lambda
  float* mean;          // [padded]
  std::int32_t* quads;  // [padded / 4][kPageTokens]
  float* second;        // [rows][padded] what second rows of codes add
  std::size_t bytes;

  DequantiseScratch(int d, int lanes, std::uint32_t rows, void* block) {
    Parts parts(block);
    const std::size_t padded = static_cast<std::size_t>(pad_channels(d));
    x = parts.take<float>(padded * lanes);
    rotate = parts.take<float>(rotate_lanes_scratch(d));
    inverse = parts.take<float>(padded);
    mean = parts.take<float>(padded);
    quads = parts.take<std::int32_t>(padded / 4 * kPageTokens);
    second = parts.take<float>(rows * padded);
    bytes = parts.used();
  }
};

// The tokens of second rows, one byte each.
struct SecondPlaces {
  const std::uint8_t* token = nullptr;
  int rows = 0;
};

// The levels of a quad of channels at q, of tokens t ... of a trellis: its codes, and those before them in their
// chains, are in `quads`. table: of even places and of odd ones.
template <class Isa>
KV4_INLINE typename Isa::I trellis_levels(const SideSpec& spec, const ByteTable<Isa, 4> (&table)[2],
                                          const std::int32_t* quads, int q, int t) {
  using I = typename Isa::I;
  const std::int32_t* const at = quads + q * kPageTokens + t;
  I before{}, odd{};
  if (spec.values) {
    alignas(64) std::int32_t earlier[Isa::kLanes] = {};
    const int none = t == 0 ? 4 : 0;  // tokens of the chains' first places
    std::memcpy(earlier + none, at - 4 + none, sizeof(earlier) - static_cast<std::size_t>(none) * sizeof *earlier);
    before = load_as<I>(earlier);
    odd = -((load_as<I>(kLaneIndex) + t) >> 2 & 1);
  } else {
    if (4 * q % spec.group != 0) before = load_as<I>(at - kPageTokens);
    odd = -(I{} + (q % 2));
  }
  const I pairs = trellis_pairs<I>(spec.levels.bits, load_as<I>(at), before, odd);
  return (table[0].lookup(pairs) & ~odd) | (table[1].lookup(pairs) & odd);
}

// scratch.quads holds the codes, scratch.second what `places` are for. mean: fp16 [d] or null; out [count, d].
template <class Isa, LookUp kLookUp>
void dequantise_side(const SideSpec& spec, const std::uint8_t* scales, const std::uint8_t* mean, SecondPlaces places,
                     const float* lambda, int first, int count, float* out, const DequantiseScratch& scratch) {
  using F = typename Isa::F;
  using I = typename Isa::I;
  constexpr int L = Isa::kLanes;
  const int d = spec.dim, end = first + count;
  for (int c = 0; c < d; ++c) {
    scratch.inverse[c] = lambda != nullptr ? 1.0f / lambda[c] : 1.0f;
    scratch.mean[c] = mean != nullptr ? f16_to_f32(load_as<std::uint16_t>(mean + 2 * c)) : 0.0f;
  }
  for (int c = d; c < pad_channels(d); ++c) scratch.mean[c] = 0.0f;
  ByteTable<Isa, 4> table, by_place[2];
  table.set(reinterpret_cast<const std::uint8_t*>(spec.levels.table.data()));
  if constexpr (kLookUp == LookUp::trellis) {
    const TrellisTables<Isa> tables(spec.levels);
    for (int i = 0; i < 2; ++i) by_place[i] = tables.bytes[i];
  }

  for (int t = first / L * L; t < end; t += L) {
    for (int g = 0; g < spec.groups; ++g) {
      alignas(64) std::uint16_t halves[L];
      std::memcpy(halves, scales + 2 * (g * kPageTokens + t), sizeof halves);
      const F scale = Isa::load_f16(halves);
      for (int c = g * spec.group; c < (g + 1) * spec.group; c += 4) {
        const I quad = load_as<I>(scratch.quads + c / 4 * kPageTokens + t);
        I level;
        if constexpr (kLookUp == LookUp::none) level = quad ^ every_byte<I>(0x80);
        else if constexpr (kLookUp == LookUp::trellis)
          level = trellis_levels<Isa>(spec, by_place, scratch.quads, c / 4, t);
        else if constexpr (kLookUp == LookUp::one) level = SealOps::lookup16(table.part[0], quad);
        else level = table.lookup(quad);
        for (int k = 0; k < 4; ++k) {
          const F value = Isa::to_float((level << (24 - 8 * k)) >> 24);
          Isa::store(scratch.x + (c + k) * L, Isa::fma(value, scale, Isa::set1(scratch.mean[c + k])));
        }
      }
    }
    for (int r = 0; r < places.rows; ++r) {
      const int lane = places.token[r] - t;
      if (lane < 0 || lane >= L) continue;
      for (int c = 0; c < d; ++c) scratch.x[c * L + lane] += scratch.second[r * pad_channels(d) + c];
    }
    rotate_lanes<Isa>(*spec.rotation, Map::inverse, scratch.x, scratch.rotate);
    for (int next = 0; next < d; next += L) {
      const int c = next + L <= d ? next : d - L;  // the last block overlaps rather than overruns
      F r[L];
      for (int i = 0; i < L; ++i) r[i] = Isa::load(scratch.x + (c + i) * L);
      Isa::transpose(r);
      const F inverse = Isa::load(scratch.inverse + c);
      for (int i = 0; i < L; ++i) {
        const int j = t + i - first;
        if (j >= 0 && j < count) Isa::store(out + static_cast<std::int64_t>(j) * d + c, r[i] * inverse);
      }
    }
  }
}

template <class Isa>
auto dequantise_side_of(const Levels& levels) {
  if (levels.is_trellis()) return dequantise_side<Isa, LookUp::trellis>;
  switch (look_up_of(levels.bits)) {
    case LookUp::none: return dequantise_side<Isa, LookUp::none>;
    case LookUp::four: return dequantise_side<Isa, LookUp::four>;
    default: return dequantise_side<Isa, LookUp::one>;
  }
}

template <class Isa>
void dequantise(const PageSpec& spec, const std::uint8_t* slice, const float* lambda_k, const float* lambda_v,
                int first, int count, float* k, float* v, void* scratch) {
  const kv4_page_layout& at = spec.layout;
  if (k != nullptr) {
    const int rows = static_cast<int>(spec.second.rows);
    const DequantiseScratch parts(spec.key.dim, Isa::kLanes, spec.second.rows, scratch);
    for (int r = 0; r < rows; ++r) widen_second<Isa>(spec, slice, r, parts.second + r * pad_channels(spec.key.dim));
    const int bits = spec.key.levels.bits;
    unpack_of<Isa>(true, bits)(slice + at.k_codes, pad_channels(spec.key.dim), first, count, parts.quads);
    dequantise_side_of<Isa>(spec.key.levels)(spec.key, slice + at.k_scales, spec.key.mean ? slice + at.k_mean : nullptr,
                                             {slice + spec.second.places, rows}, lambda_k, first, count, k, parts);
  }
  if (v != nullptr) {
    const DequantiseScratch parts(spec.value.dim, Isa::kLanes, 0, scratch);
    const int bits = spec.value.levels.bits;
    // The tokens before them too, which a trellis asks for.
    const int before = first / Isa::kLanes * Isa::kLanes, from = std::max(0, before - 4);
    unpack_of<Isa>(false, bits)(slice + at.v_codes, pad_channels(spec.value.dim), from, first + count - from,
                                parts.quads);
    dequantise_side_of<Isa>(spec.value.levels)(spec.value, slice + at.v_scales, nullptr, {}, lambda_v, first, count, v,
                                               parts);
  }
}

template <class Isa>
std::size_t dequantise_scratch(const PageSpec& spec) {
  return DequantiseScratch(std::max(spec.key.dim, spec.value.dim), Isa::kLanes, spec.second.rows, nullptr).bytes;
}

}  // namespace kv4::cpu::KV4_ISA
