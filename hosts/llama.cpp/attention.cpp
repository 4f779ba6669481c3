#include "attention.h"

#include <cstring>
#include <limits>

#include "buffer.h"
#include "settings.h"

namespace kv4::llama {
namespace {

// Masks in use at a time: of all tokens and of a sliding window, each for what is packed in the layers that have it.
constexpr std::size_t kPlans = 4;

float parameter(const ggml_tensor* op, int i) {
  float x;
  std::memcpy(&x, op->op_params + i, sizeof x);
  return x;
}

std::int64_t floats(std::size_t bytes) { return static_cast<std::int64_t>(bytes / sizeof(float)); }

}  // namespace

const Plan& Attention::plan_of(const MaskRows& mask, const Layer& layer, int first_stream) {
  const std::int64_t blocks = layer.keys().blocks_of_stream();
  const std::uint64_t digest = mask.digest();
  for (const Plan& plan : plans_)
    if (plan.holds(mask, digest, layer.packed(), blocks, first_stream)) return plan;
  if (plans_.size() < kPlans) plans_.resize(kPlans);
  Plan& plan = plans_[next_++ % kPlans];
  plan.make(mask, digest, layer.packed(), blocks, first_stream);
  return plan;
}

// q [head_dim, rows, q_heads, streams]; out [head_dim, q_heads, rows, streams], contiguous. Row t of stream s is row s
// * rows + t of the call.
Status Attention::run(Layer* layer, const ggml_tensor* op) {
  const ggml_tensor *q = op->src[0], *k = op->src[1], *m = op->src[3], *sinks = op->src[4];
  const Geometry& g = layer->geometry();
  const std::int64_t rows = q->ne[1], streams = q->ne[3];
  const auto first_stream = static_cast<int>(range_of(k, layer->keys()).first / layer->keys().cells);
  MaskRows mask;
  mask.cells = k->ne[1];
  mask.rows = static_cast<int>(rows);
  mask.streams = static_cast<int>(streams);
  if (m != nullptr) {
    mask.data = static_cast<const std::byte*>(m->data);
    mask.row_bytes = m->ne[1] > 1 ? m->nb[1] : 0;
    mask.stream_bytes = m->ne[3] > 1 ? m->nb[3] : 0;
  }
  const Plan& plan = plan_of(mask, *layer, first_stream);

  AttendArgs args;
  args.q = {
      q->data, DType::f32, {1, g.q_heads, rows * streams, g.head_dim_k}, {0, floats(q->nb[2]), floats(q->nb[1]), 1}};
  if (streams > 1 && q->nb[3] != q->nb[1] * static_cast<std::size_t>(rows)) {
    const std::int64_t row = g.q_heads * std::int64_t{g.head_dim_k};
    queries_.resize(static_cast<std::size_t>(streams * rows * row));
    for (std::int64_t s = 0; s < streams; ++s)
      for (std::int64_t t = 0; t < rows; ++t)
        for (int h = 0; h < g.q_heads; ++h)
          std::memcpy(queries_.data() + (s * rows + t) * row + h * g.head_dim_k,
                      static_cast<const std::byte*>(q->data) + static_cast<std::size_t>(s) * q->nb[3] +
                          static_cast<std::size_t>(t) * q->nb[1] + static_cast<std::size_t>(h) * q->nb[2],
                      static_cast<std::size_t>(g.head_dim_k) * sizeof(float));
    args.q.data = queries_.data();
    args.q.stride = {0, g.head_dim_k, row, 1};
  }
  args.scale = parameter(op, 0);
  args.softcap = parameter(op, 2);
  args.sinks = sinks == nullptr ? nullptr : static_cast<const float*>(sinks->data);
  const MutableTensorView out{
      op->data, DType::f32, {1, g.q_heads, rows * streams, g.head_dim_v}, {0, floats(op->nb[1]), floats(op->nb[2]), 1}};
  PageFormat::Limits limits = plan.limits();
  limits.q_heads = g.q_heads;
  std::size_t bytes = 0;
  KV4_RETURN_IF_ERROR(layer->format().workspace_bytes(limits, &bytes));
  const std::span<std::byte> workspace = Layer::scratch(bytes);
  bool finite = true;
  for (const Plan::Part& part : plan.parts()) {
    PagedBatch batch = layer->batch();
    args.mask = {};
    plan.apply(part, &batch, &args.mask);
    const Status status = layer->format().attend(batch, args, out, workspace);
    finite = finite && status.code() != StatusCode::non_finite;
    if (status.code() != StatusCode::non_finite) KV4_RETURN_IF_ERROR(status);
  }
  // As llama.cpp's own attention has it: NaN in, NaN out.
  if (!finite) {
    auto* x = static_cast<float*>(op->data);
    std::fill(x, x + ggml_nelements(op), std::numeric_limits<float>::quiet_NaN());
  }
  layer->attended(args.q, plan.sequences_of_stream());
  return {};
}

}  // namespace kv4::llama
