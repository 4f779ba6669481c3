#include "blob/blob.h"

#include <array>

#include "blob/contents.h"

namespace kv4::blob {
namespace {

constexpr std::size_t kHeadBytes = sizeof(Kind) + sizeof(std::uint64_t);

std::string hex(std::uint64_t x) {
  std::string text;
  for (int shift = 28; shift >= 0; shift -= 4) text += "0123456789abcdef"[x >> shift & 15u];
  return text;
}

std::string number(std::uint64_t x) { return std::to_string(static_cast<std::int64_t>(x)); }
std::string truth(std::uint64_t x) { return x == 0 ? "false" : "true"; }

template <std::size_t N>
std::string one_of(const std::array<const char*, N>& names, std::uint64_t x) {
  return x < N ? names[static_cast<std::size_t>(x)] : number(x);
}
std::string dtype(std::uint64_t x) { return x <= 2 ? kv4::name_of(static_cast<DType>(x)) : number(x); }
std::string rotation(std::uint64_t x) {
  return one_of(std::array{"identity", "srft", "srht", "householder", "dense"}, x);
}
std::string level_kind(std::uint64_t x) { return one_of(std::array{"lloyd_max", "uniform", "trellis"}, x); }
std::string scale_rule(std::uint64_t x) { return one_of(std::array{"least_squares", "abs_max"}, x); }
std::string lambda_mode(std::uint64_t x) { return one_of(std::array{"none", "automatic", "given"}, x); }
std::string seal_mode(std::uint64_t x) { return one_of(std::array{"page", "arrival", "never"}, x); }
std::string given(std::uint64_t x) { return x == 0 ? "none" : "values of CRC-32C " + hex(x); }

// 0 where there are none, else their checksum under a set bit.
std::uint64_t given_value(const std::vector<float>& x) {
  return x.empty() ? 0 : std::uint64_t{1} << 32 | crc32c(std::as_bytes(std::span(x)));
}

std::uint64_t matrix_value(const SideSpec& side) {
  return side.rotation == nullptr ? 0 : given_value(side.rotation->matrix());
}

template <class T>
std::uint64_t value_of(T x) {
  return static_cast<std::uint64_t>(x);
}

}  // namespace

const char* name_of(Kind kind) {
  constexpr std::array kNames{"configuration",
                              "state",
                              "sequence",
                              "page table",
                              "exact rows",
                              "record of masks",
                              "lambda",
                              "record of queries",
                              "query energies",
                              "page",
                              "counts of non-finite rows",
                              "non-finite rows",
                              "lengths"};
  return kNames[static_cast<std::size_t>(kind) - 1];
}

std::vector<Field> fields(const CacheConfig& c, const PageSpec& spec) {
  const SideRecipe &k = c.recipe.key, &v = c.recipe.value;
  return {{"dtype", value_of(c.dtype), dtype},
          {"kv_heads", value_of(c.kv_heads), number},
          {"head_dim_k", value_of(c.head_dim_k), number},
          {"head_dim_v", value_of(c.head_dim_v), number},
          {"sliding_window", value_of(c.sliding_window), number},
          {"recipe.seal", value_of(c.recipe.seal), seal_mode},
          {"recipe.sinks", value_of(c.recipe.sinks), number},
          {"recipe.window", value_of(c.recipe.window), number},
          {"recipe.key.rotation", value_of(k.rotation), rotation},
          {"recipe.key.reflectors", value_of(k.reflectors), number},
          {"recipe.key.seed", k.seed, [](std::uint64_t x) { return std::to_string(x); }},
          {"recipe.key.group", value_of(k.group), number},
          {"recipe.key.levels", value_of(k.levels), level_kind},
          {"recipe.key.scale", value_of(k.scale), scale_rule},
          {"recipe.key.mean", value_of(k.mean), truth},
          {"recipe.key.lambda", value_of(k.lambda), lambda_mode},
          {"recipe.value.rotation", value_of(v.rotation), rotation},
          {"recipe.value.reflectors", value_of(v.reflectors), number},
          {"recipe.value.seed", v.seed, [](std::uint64_t x) { return std::to_string(x); }},
          {"recipe.value.group", value_of(v.group), number},
          {"recipe.value.levels", value_of(v.levels), level_kind},
          {"recipe.value.scale", value_of(v.scale), scale_rule},
          {"recipe.value.mean", value_of(v.mean), truth},
          {"recipe.value.lambda", value_of(v.lambda), lambda_mode},
          {"lambda_k", given_value(c.lambda_k), given},
          {"lambda_v", given_value(c.lambda_v), given},
          {"matrix_k", matrix_value(spec.key), given},
          {"matrix_v", matrix_value(spec.value), given},
          {"recipe.key.bits", value_of(k.bits), number},
          {"recipe.value.bits", value_of(v.bits), number},
          {"recipe.refined", value_of(c.recipe.refined), number}};
}

Status expect_same(std::span<const Field> mine, std::span<const std::uint64_t> theirs) {
  for (std::size_t i = 0; i < mine.size(); ++i)
    if (mine[i].value != theirs[i])
      return invalid_argument(mine[i].name, mine[i].text(mine[i].value), mine[i].text(theirs[i]));
  return {};
}

Format Format::of(const CacheConfig& config, const PageSpec& spec) {
  Format format;
  format.fields = blob::fields(config, spec);
  format.policy = ledger::Policy::of(config.recipe, config.sliding_window);
  format.dtype = config.dtype;
  format.kv_heads = config.kv_heads;
  format.head_dim_k = config.head_dim_k;
  format.head_dim_v = config.head_dim_v;
  format.slice = slice_layout(spec);
  format.queries = static_cast<std::size_t>(std::int64_t{config.recipe.sinks} + config.recipe.window + kPageTokens);
  return format;
}

Status Writer::begin(std::uint32_t version) {
  std::array<std::byte, sizeof kMagic + sizeof version> head{};
  std::memcpy(head.data(), kMagic, sizeof kMagic);
  std::memcpy(head.data() + sizeof kMagic, &version, sizeof version);
  return sink_(head);
}

Status Writer::write(Kind kind, std::span<const std::byte> payload) {
  const std::uint64_t bytes = payload.size();
  block_.resize(kHeadBytes + payload.size() + sizeof(std::uint32_t));
  std::byte* to = block_.data();
  std::memcpy(to, &kind, sizeof kind);
  std::memcpy(to + sizeof kind, &bytes, sizeof bytes);
  if (!payload.empty()) std::memcpy(to + kHeadBytes, payload.data(), payload.size());
  const std::uint32_t crc = crc32c(std::span(block_).first(kHeadBytes + payload.size()));
  std::memcpy(to + kHeadBytes + payload.size(), &crc, sizeof crc);
  return sink_(block_);
}

Status Reader::begin() {
  char magic[sizeof kMagic];
  KV4_RETURN_IF_ERROR(source_(std::as_writable_bytes(std::span(magic))));
  if (std::memcmp(magic, kMagic, sizeof kMagic) != 0)
    return error(StatusCode::data_loss, "saved magic", std::string(kMagic, sizeof kMagic),
                 "other bytes: this is no saved cache");
  KV4_RETURN_IF_ERROR(source_(std::as_writable_bytes(std::span(&version_, 1))));
  if (version_ < 1 || version_ > kRefined)
    return error(StatusCode::data_loss, "saved version", "1 to " + std::to_string(kRefined), std::to_string(version_));
  return {};
}

Status Reader::read(Kind kind, std::span<std::byte> payload) {
  std::array<std::byte, kHeadBytes> head{};
  KV4_RETURN_IF_ERROR(source_(head));
  Kind got_kind{};
  std::uint64_t got_bytes = 0;
  std::memcpy(&got_kind, head.data(), sizeof got_kind);
  std::memcpy(&got_bytes, head.data() + sizeof got_kind, sizeof got_bytes);
  const std::string name = std::string("saved ") + name_of(kind);
  if (got_kind != kind)
    return error(StatusCode::data_loss, name, "a block of kind " + std::to_string(static_cast<std::uint32_t>(kind)),
                 std::to_string(static_cast<std::uint32_t>(got_kind)));
  if (got_bytes != payload.size())
    return error(StatusCode::data_loss, name, "a block of " + std::to_string(payload.size()) + " bytes",
                 std::to_string(got_bytes));
  KV4_RETURN_IF_ERROR(source_(payload));
  std::uint32_t saved = 0;
  KV4_RETURN_IF_ERROR(source_(std::as_writable_bytes(std::span(&saved, 1))));
  Crc32c crc;
  crc.add(head);
  crc.add(payload);
  if (crc.value() != saved)
    return error(StatusCode::data_loss, name, "bytes of CRC-32C " + hex(saved), hex(crc.value()));
  return {};
}

Status expect_within(const char* name, std::int64_t value, std::int64_t low, std::int64_t high) {
  if (value >= low && value <= high) return {};
  return error(StatusCode::data_loss, std::string("saved ") + name,
               low == high ? std::to_string(low) : std::to_string(low) + " to " + std::to_string(high),
               std::to_string(value));
}

}  // namespace kv4::blob
