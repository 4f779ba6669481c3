// Runs a model through libllama and says what it wrote: a line "name: tokens" for each way of arriving at the same cells, for whoever
// compares runs with one backend and another.
//   probe BACKENDS MODEL TEXT BYTES UNIFIED GENERATED   (the first BYTES of the text are the prompt)
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <string>
#include <string_view>
#include <vector>

#include "ggml-backend.h"
#include "llama.h"

namespace {

using Tokens = std::vector<llama_token>;

llama_model* g_model;
llama_context* g_context;
const llama_vocab* g_vocab;
int g_generated;

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "probe: %s\n", what);
  std::exit(1);
}

llama_token best(int row) {
  const float* logits = llama_get_logits_ith(g_context, row);
  llama_token top = 0;
  for (llama_token i = 1; i < llama_vocab_n_tokens(g_vocab); ++i)
    if (logits[i] > logits[top]) top = i;
  return top;
}

struct Row {
  llama_token token;
  llama_pos position;
  llama_seq_id sequence;
  bool wanted;
};

void decode(const std::vector<Row>& rows) {
  llama_batch batch = llama_batch_init(static_cast<int>(rows.size()), 0, 1);
  batch.n_tokens = static_cast<int>(rows.size());
  for (std::size_t i = 0; i < rows.size(); ++i) {
    batch.token[i] = rows[i].token;
    batch.pos[i] = rows[i].position;
    batch.n_seq_id[i] = 1;
    batch.seq_id[i][0] = rows[i].sequence;
    batch.logits[i] = rows[i].wanted;
  }
  if (llama_decode(g_context, batch) != 0) fail("decode");
  llama_batch_free(batch);
}

void prompt(const Tokens& tokens, llama_seq_id sequence) {
  std::vector<Row> rows;
  for (std::size_t i = 0; i < tokens.size(); ++i) rows.push_back({tokens[i], static_cast<llama_pos>(i), sequence, i + 1 == tokens.size()});
  decode(rows);
}

Tokens go_on(llama_token token, llama_pos position, llama_seq_id sequence) {
  Tokens out;
  for (int i = 0; i < g_generated; ++i) {
    out.push_back(token);
    decode({{token, position + i, sequence, true}});
    token = best(-1);
  }
  return out;
}

void print(const char* name, const Tokens& tokens) {
  std::printf("%s:", name);
  for (const llama_token t : tokens) std::printf(" %d", t);
  std::printf("\n");
}

Tokens read_tokens(const char* path, std::size_t bytes) {
  std::ifstream file(path);
  std::string text((std::istreambuf_iterator<char>(file)), {});
  text.resize(std::min(text.size(), bytes));
  Tokens tokens(text.size() + 8);
  const int n = llama_tokenize(g_vocab, text.data(), static_cast<int>(text.size()), tokens.data(), static_cast<int>(tokens.size()), true, true);
  if (n <= 0) fail("tokenize");
  tokens.resize(static_cast<std::size_t>(n));
  return tokens;
}

void open(const char* path, bool unified) {
  llama_model_params model = llama_model_default_params();
  model.n_gpu_layers = 99;
  g_model = llama_model_load_from_file(path, model);
  if (g_model == nullptr) fail("model");
  g_vocab = llama_model_get_vocab(g_model);
  llama_context_params context = llama_context_default_params();
  context.n_ctx = 4096;
  context.n_seq_max = 2;
  context.kv_unified = unified;
  context.n_threads = context.n_threads_batch = 2;
  context.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
  context.swa_full = true;
  g_context = llama_init_from_model(g_model, context);
  if (g_context == nullptr) fail("context");
}

void speak(ggml_log_level level, const char* text, void*) {
  if (level >= GGML_LOG_LEVEL_WARN || std::string_view(text).starts_with("kv4")) std::fputs(text, stderr);
}

std::vector<std::uint8_t> state_of(llama_seq_id sequence) {
  std::vector<std::uint8_t> state(llama_state_seq_get_size(g_context, sequence));
  state.resize(llama_state_seq_get_data(g_context, state.data(), state.size(), sequence));
  return state;
}

void two_in_a_batch(const Tokens& all, llama_token first) {
  const auto n = static_cast<llama_pos>(all.size());
  llama_memory_clear(llama_get_memory(g_context), true);
  prompt(all, 0);
  const Tokens half(all.begin(), all.begin() + n / 2);
  prompt(half, 1);
  llama_token a = first, b = best(-1);
  Tokens x, y;
  for (int i = 0; i < g_generated; ++i) {
    x.push_back(a);
    y.push_back(b);
    decode({{a, n + i, 0, true}, {b, n / 2 + i, 1, true}});
    a = best(0);
    b = best(1);
  }
  print("batch of two, first", x);
  print("batch of two, second", y);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 7) fail("expected BACKENDS MODEL TEXT BYTES UNIFIED GENERATED");
  ggml_backend_load_all_from_path(argv[1]);
  llama_log_set(speak, nullptr);
  ggml_log_set(speak, nullptr);
  g_generated = std::atoi(argv[6]);
  open(argv[2], std::atoi(argv[5]) != 0);
  llama_memory_t memory = llama_get_memory(g_context);
  const Tokens tokens = read_tokens(argv[3], static_cast<std::size_t>(std::atoi(argv[4])));
  const auto n = static_cast<llama_pos>(tokens.size());

  prompt(tokens, 0);
  const llama_token first = best(-1);
  const std::vector<std::uint8_t> state = state_of(0);
  llama_memory_seq_cp(memory, 0, 1, -1, -1);
  print("greedy", go_on(first, n, 0));
  print("copied sequence", go_on(first, n, 1));
  llama_memory_seq_rm(memory, 1, -1, -1);

  llama_memory_seq_rm(memory, 0, -1, -1);
  if (llama_state_seq_set_data(g_context, state.data(), state.size(), 0) == 0) fail("state");
  std::printf("saved again: %s\n", state_of(0) == state ? "the same bytes" : "other bytes");
  if (llama_state_seq_set_data(g_context, state.data(), state.size(), 1) == 0) fail("state");
  print("restored into another sequence", go_on(first, n, 1));

  llama_memory_seq_rm(memory, 0, n, -1);
  std::vector<Row> drafts;
  for (int i = 0; i < 8; ++i) drafts.push_back({1000, n + i, 0, i == 7});
  decode(drafts);
  llama_memory_seq_rm(memory, 0, n, -1);
  print("drafts taken back", go_on(first, n, 0));

  llama_memory_seq_rm(memory, 0, n / 2, -1);
  std::vector<Row> rest;
  for (llama_pos i = n / 2; i < n; ++i) rest.push_back({tokens[static_cast<std::size_t>(i)], i, 0, i + 1 == n});
  decode(rest);
  print("second half again", go_on(first, n, 0));

  llama_memory_seq_rm(memory, 0, n, -1);
  if (llama_memory_can_shift(memory)) {
    llama_memory_seq_rm(memory, 0, 16, 80);
    llama_memory_seq_add(memory, 0, 80, -1, -64);
    print("shifted", go_on(first, n - 64, 0));
  }
  two_in_a_batch(tokens, first);
  llama_free(g_context);
  llama_model_free(g_model);
}
