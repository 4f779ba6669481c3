// The cache of one attention layer: sinks, sealed pages and exact window of every sequence of
// a batch, each of its own length. A model holds one Cache per layer.
//
// A step is append, attend, seal:
//   append  adds tokens to sequences (sealing first what earlier steps left due),
//   attend  answers queries over all that is held; it may be called any number of times,
//   seal    turns what is due into pages and releases the exact rows. The next append does it
//           too, so calling seal only returns memory earlier.
// Sealing comes after attention because it uses what attention saw: the queries (automatic
// lambda) and the masks (tokens that no query ever saw, such as padding, stay out of means and
// scales; leading ones are dropped).
//
// What a query sees depends only on its position: a call of at most kPageTokens tokens answers
// each query exactly as if the tokens had come one by one. Longer calls (prefill) see their own
// tokens exactly.
//
// A failed call leaves the cache as it was. Running out of host memory is out_of_memory, like running out of the
// device's. A device that queues its work reports what went wrong there with a later call. Objects are not
// thread-safe; clones may be used from different threads (they share pages).
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "kv4/attention.h"
#include "kv4/export.h"
#include "kv4/recipe.h"
#include "kv4/status.h"
#include "kv4/types.h"

namespace kv4 {

struct CacheConfig {
  Recipe recipe;
  DType dtype = DType::f32;  // of appended and exact tokens
  int kv_heads = 0;
  int head_dim_k = 0;
  int head_dim_v = 0;
  int sliding_window = 0;       // > 0: queries see at most this many newest tokens; older ones are evicted
  std::vector<float> lambda_k;  // [kv_heads, head_dim_k], positive: where recipe.key.lambda is given
  std::vector<float> lambda_v;  // [kv_heads, head_dim_v], positive: where recipe.value.lambda is given
  std::vector<float> matrix_k;  // [head_dim_k, head_dim_k]: where recipe.key.rotation is dense
  std::vector<float> matrix_v;  // [head_dim_v, head_dim_v]: where recipe.value.rotation is dense
  // "cpu", or "cuda" (the first device), "cuda:1", ... where they are built in and there. On a device every tensor of a
  // call is its memory, but for the start and window of a mask.
  std::string backend = "cpu";
};

// The backends that are built in and find a device.
KV4_API std::vector<std::string> backends();
// Why "cuda" (or another name) is not among them: "built without it", "no device that it serves"; "" where it is.
KV4_API std::string why_not(const std::string& backend);

// Where saved bytes go, and where they come from.
using Sink = std::function<Status(std::span<const std::byte>)>;  // takes all the bytes, or says why not
using Source = std::function<Status(std::span<std::byte>)>;      // fills all of it, or says why not

// Rows of one sequence in a call's tensors.
struct RowCount {
  std::int64_t row = 0;  // of the cache
  std::int64_t tokens = 0;
};

// Memory that caches of one process have in common: tables of a rotation, one for all that define it alike, on the host
// and on each device that has used it. `identity` is unique while any cache that has it lives.
struct SharedMemory {
  const void* identity = nullptr;
  std::size_t bytes = 0;
  bool on_device = false;  // of memory that is not the host's
};

// Second rows of codes of a sealed head slice (Recipe::refined), for tools. A row that no token was left for has place
// 0 and scales of 0.
struct SecondRows {
  std::vector<int> places;            // [rows] tokens of the page
  std::vector<std::uint8_t> codes;    // [rows][head_dim_k / 2], even channels in the low nibble
  std::vector<std::uint16_t> scales;  // fp16 [rows][groups]
};

struct CacheState;

class KV4_API Cache {
 public:
  // Errors: invalid_argument naming the field; unsupported with the reason where no kernel
  // serves the head dims (Recipe::exact() serves any).
  static Status create(const CacheConfig& config, std::unique_ptr<Cache>* out);
  ~Cache();
  Cache(const Cache&) = delete;
  Cache& operator=(const Cache&) = delete;

  // k [batch, kv_heads, T, head_dim_k], v [batch, kv_heads, T, head_dim_v]: T tokens to each sequence; T may be 0. The
  // first append to a cache without sequences makes them. Non-finite rows are held as zeros and refused by the first
  // attend that sees them.
  Status append(const TensorView& k, const TensorView& v);
  // To some sequences, to each its own number of tokens: k [1, kv_heads, T, head_dim_k] holds their rows one after
  // another, in the order of `rows`, and so does v. A row is named once at most.
  Status append(std::span<const RowCount> rows, const TensorView& k, const TensorView& v);

  // out [batch, q_heads, T, head_dim_v] for the newest T positions of each sequence. Like every output of this class it
  // has a place of its own for each element, and shares memory neither with q nor with another output.
  // Errors: invalid_argument; non_finite for a visible NaN or infinity in q, k or v.
  Status attend(const AttendArgs& args, const MutableTensorView& out);
  // For the newest positions of some sequences, as many of each as `rows` says: q [1, q_heads, T, head_dim_k], out and
  // the T axis of a general mask hold theirs one after another; the mask's start and window have one value for each of
  // `rows`.
  Status attend(std::span<const RowCount> rows, const AttendArgs& args, const MutableTensorView& out);
  // The partial state over the tokens at positions below `upto`, which must not cut into sealed
  // tokens; queries and masks are recorded for all tokens as attend does.
  Status attend_partial(const AttendArgs& args, std::int64_t upto, const PartialState& out);
  // Of some sequences, as attend has them; `upto` has a position for each of `rows`, and out [1, q_heads, T, ...] their
  // queries one after another.
  Status attend_partial(std::span<const RowCount> rows, const AttendArgs& args, std::span<const std::int64_t> upto,
                        const PartialState& out);

  Status seal();

  // Devices. Work is queued on `stream` (a cudaStream_t; null: the device's default stream) by every call that follows,
  // the destructor's included; calls wait for nothing but what they hand to the host. A new cache is on the default
  // stream, all that create() put there being done; a clone on the stream of what it is a clone of. A cache that moves
  // to another stream has the other wait for the work of the one before; cudaStreamPerThread is another stream on
  // another thread. Clones that share pages need one order of their streams' work; other caches may run beside each
  // other, captured or not. The device flags non-finite rows: an attend that sees them fails once the
  // flag has arrived.
  void set_stream(void* stream);
  // Room for `tokens` more of each sequence, so that steps of one token allocate nothing until then.
  Status reserve(std::int64_t tokens);
  // While the stream is being captured, append and attend of one token only queue kernels, which read counts and tables
  // from device memory: the captured step may be replayed. Before each replay, on the same stream, advance() seals what
  // is due and counts the token that the replay appends.
  // Errors: unsupported where the backend cannot be captured; failed_precondition for an empty cache.
  // Capture needs one step of the same shape before it, and lambda_fixed() of every row: failed_precondition otherwise.
  Status advance();

  // Keeps the first `length` positions of every sequence that is longer. Inside sealed pages the page is
  // dequantised into the window (exactly restored if it was sealed during the last call).
  // Errors: out_of_range beyond length(), below 0, or where the queries that follow would need
  // tokens that a sliding window evicted.
  Status crop(std::int64_t length);
  Status crop(int row, std::int64_t length);  // of one sequence
  // Seals what is due in one sequence, then takes out the positions [first, first + count). Those behind move up, and
  // their positions with them: for keys that carry none of their own.
  // Errors: out_of_range naming what is in the way: all of them have to be exact tokens behind the sinks, and a sliding
  // window must still hold what the queries that follow see.
  Status erase(int row, std::int64_t first, std::int64_t count);
  Status add(int count);  // so many sequences more, that hold nothing yet, behind the others
  Status remove(std::span<const std::int64_t> rows);  // the others keep their order; a row is named once at most
  // The sequences of another cache of the same configuration go on here too, behind the others. Exact rows are shared
  // until one of them writes, as with a clone; pages are where this cache comes from the other by clone() or the
  // reverse, else they are copied.
  // Errors: invalid_argument naming what differs.
  Status extend(const Cache& other);
  // The new batch: sequence i continues old sequence rows[i]. Pages are shared, not copied.
  Status select(std::span<const std::int64_t> rows);
  Status repeat(int times);  // each sequence `times` times, in order
  void reset();              // back to empty; the batch is open again
  // Another cache that goes on from here by itself; exact rows, pages and lambda are shared until one of them writes.
  Status clone(std::unique_ptr<Cache>* out) const;
  // While on, a sliding window evicts nothing, so that any crop finds what it needs (assisted
  // decoding). Whether on or off, a crop of tokens of the last call restores exactly what
  // one-by-one decoding would hold.
  void record_past(bool on);

  // Writes the cache to `sink`, block by block, at any boundary of calls (format: docs/format.md). Pages that sequences
  // share are written once; exact rows, and a prefill that is not sealed yet, as they are: seal() before makes the
  // least of them, and gives up that a crop into the last call restores its tokens exactly.
  // Errors: what the sink says, passed on; failed_precondition while the stream is being captured.
  Status save(const Sink& sink) const;
  // Takes over what another cache of the same configuration saved, on any backend or instruction set: outputs and codes
  // are then those that it would have gone on to give, bit for bit where the same kernels run. What sequences shared of
  // exact rows each holds for itself. Reads just what save wrote, so that several caches may follow each other in a
  // file. Errors, the cache then being empty as before: failed_precondition where it is not empty; invalid_argument
  // naming the field of the configuration that differs; data_loss for other bytes than save wrote (magic, version,
  // CRC-32C, values that no cache has); what the source says, passed on. Memory is taken as bytes come in, never for a
  // count alone.
  Status load(const Source& source);

  // Tokens at positions [first, first + count), which every sequence has, in the model's own basis, dequantised where
  // sealed: [batch, kv_heads, count, dim]. Dropped padding reads as 0.
  Status dense_keys(std::int64_t first, std::int64_t count, const MutableTensorView& out) const;
  Status dense_values(std::int64_t first, std::int64_t count, const MutableTensorView& out) const;

  // Every byte held: page slabs with their slack, exact rows by capacity, tables, lambda and the
  // statistics kept for it, and what shared() lists.
  std::size_t nbytes() const;
  // The part of nbytes() that other caches may hold as well, each thing once: who adds up caches counts it once by its
  // identity.
  std::vector<SharedMemory> shared() const;

  const CacheConfig& config() const;
  int batch() const;            // 0 before the first append
  std::int64_t length() const;  // tokens appended to the longest sequence, minus cropped ones
  std::int64_t length(int row) const;
  std::int64_t first() const;  // smallest position that every sequence still holds
  std::int64_t sealed_tokens(int row) const;
  std::int64_t exact_tokens(int row) const;  // sinks and window; padding not yet dropped included
  std::uint64_t version() const;             // changes with whatever changes length or order of sequences
  // Into out: [kv_heads, head_dim_k]; empty before it is fixed or where the recipe has none. Errors: the device's.
  Status lambda(int row, std::vector<float>* out) const;
  // Whether row's lambda changes no more, since the page that fixed it can no longer be cropped; also where none is
  // learnt.
  bool lambda_fixed(int row) const;
  // A sealed head slice of row's page `index`, for tools: codes in canonical order. Those of refined keys' second rows
  // are in page_second_rows.
  Status page_codes(int row, int index, int head, std::span<std::uint8_t> k, std::span<std::uint8_t> v) const;
  // Its scales, fp16 bits: [groups, kPageTokens] of keys and of values.
  Status page_scales(int row, int index, int head, std::span<std::uint16_t> k, std::span<std::uint16_t> v) const;
  Status page_second_rows(int row, int index, int head, SecondRows* out) const;
  int page_count(int row) const;

 private:
  explicit Cache(std::unique_ptr<CacheState> state);
  std::unique_ptr<CacheState> state_;
};

}  // namespace kv4
