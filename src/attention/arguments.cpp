#include "attention/arguments.h"

#include <cmath>

#include "attention/output.h"
#include "format/limits.h"

namespace kv4 {
namespace {

Status check_mask(const Mask& m) {
  const bool offset = m.start != nullptr || m.kind != Mask::General::none;
  if (offset && (m.offset < -kMostTokens || m.offset > kMostTokens))
    return invalid_argument("mask.offset", "a position within " + std::to_string(kMostTokens) + " of 0",
                            std::to_string(m.offset));
  if (m.kind == Mask::General::none) return {};
  if (m.general == nullptr) return invalid_argument("mask", "data", "a null pointer");
  if (m.columns < 0 || m.columns > kMostTokens)
    return invalid_argument("mask", "0 to " + std::to_string(kMostTokens) + " columns", std::to_string(m.columns));
  return m.kind == Mask::General::additive ? check_dtype("mask", m.general_dtype) : Status();
}

}  // namespace

std::string shape_text(const std::array<std::int64_t, 4>& s) {
  return "[" + std::to_string(s[0]) + ", " + std::to_string(s[1]) + ", " + std::to_string(s[2]) + ", " +
         std::to_string(s[3]) + "]";
}

Status check_dtype(const char* name, DType dtype) {
  if (dtype == DType::f32 || dtype == DType::f16 || dtype == DType::bf16) return {};
  return invalid_argument(name, "dtype float32, float16 or bfloat16", std::to_string(static_cast<int>(dtype)));
}

Status check_arguments(const AttendArgs& args) {
  const TensorView& q = args.q;
  KV4_RETURN_IF_ERROR(check_dtype("q", q.dtype));
  if (q.stride[3] != 1 && q.shape[3] > 1) return invalid_argument("q", "channel stride 1", std::to_string(q.stride[3]));
  if (q.data == nullptr) return invalid_argument("q", "data", "a null pointer");
  if (!(args.softcap >= 0) || !std::isfinite(args.softcap))
    return invalid_argument("softcap", "0 (none) or a positive number", std::to_string(args.softcap));
  if (!std::isfinite(args.scale)) return invalid_argument("scale", "a number", std::to_string(args.scale));
  return check_mask(args.mask);
}

Status check_output(const AttendArgs& args, int dim, const MutableTensorView* out, const PartialState* partial) {
  if (out == nullptr) {
    if (partial->o == nullptr || partial->m == nullptr || partial->l == nullptr)
      return invalid_argument("state", "pointers to o, m and l", "a null pointer");
    return check_places(*partial, args.q, dim);
  }
  const std::array<std::int64_t, 4> wanted{args.q.shape[0], args.q.shape[1], args.q.shape[2], dim};
  if (out->shape != wanted) return invalid_argument("out", "shape " + shape_text(wanted), shape_text(out->shape));
  if (out->stride[3] != 1 && dim > 1)
    return invalid_argument("out", "channel stride 1", std::to_string(out->stride[3]));
  KV4_RETURN_IF_ERROR(check_dtype("out", out->dtype));
  return check_places(*out, &args.q);
}

}  // namespace kv4
