// Runs a model through libllama and says what it wrote: a line "name: ..." for each way of arriving at the same cells,
// to be compared between runs with one backend and another.
//   probe BACKENDS MODEL OPTIONS GENERATED ways TEXT BYTES       (the first BYTES of the text are the prompt)
//   probe BACKENDS MODEL OPTIONS GENERATED prompts FILE          (a prompt a line)
//   probe BACKENDS MODEL OPTIONS GENERATED sessions TEXT BYTES STATE
// OPTIONS: those of llama.cpp's programs, in one argument: -kvu, -nkvo, -fa off, -ngl N, -ctk TYPE, -ctv TYPE
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <sstream>
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

// FNV-1a of all logits that were looked at.
std::uint64_t g_logits = 14695981039346656037u;

llama_token best(int row) {
  const float* logits = llama_get_logits_ith(g_context, row);
  llama_token top = 0;
  const auto* bytes = reinterpret_cast<const unsigned char*>(logits);
  for (std::size_t i = 0; i < static_cast<std::size_t>(llama_vocab_n_tokens(g_vocab)) * sizeof *logits; ++i)
    g_logits = (g_logits ^ bytes[i]) * 1099511628211u;
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
  for (std::size_t i = 0; i < tokens.size(); ++i)
    rows.push_back({tokens[i], static_cast<llama_pos>(i), sequence, i + 1 == tokens.size()});
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

// Of the last row, every so manieth.
void print_values(const char* name) {
  const float* logits = llama_get_logits_ith(g_context, -1);
  const int n = llama_vocab_n_tokens(g_vocab);
  std::printf("%s:", name);
  for (int i = 0; i < n; i += n / 300 + 1) std::printf(" %.6g", static_cast<double>(logits[i]));
  std::printf("\n");
}

std::string contents(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

Tokens tokens_of(const std::string& text) {
  Tokens tokens(text.size() + 8);
  const int n = llama_tokenize(g_vocab, text.data(), static_cast<int>(text.size()), tokens.data(),
                               static_cast<int>(tokens.size()), true, true);
  if (n <= 0) fail("tokenize");
  tokens.resize(static_cast<std::size_t>(n));
  return tokens;
}

ggml_type type_of(const std::string& name) {
  for (int t = 0; t < GGML_TYPE_COUNT; ++t)
    if (ggml_type_name(static_cast<ggml_type>(t)) != nullptr && name == ggml_type_name(static_cast<ggml_type>(t)))
      return static_cast<ggml_type>(t);
  fail("a cache type");
}

void open(const char* path, const char* options, bool swa_full) {
  llama_model_params model = llama_model_default_params();
  llama_context_params context = llama_context_default_params();
  model.n_gpu_layers = 99;
  context.n_ctx = 4096;
  context.n_seq_max = 2;
  context.kv_unified = false;
  context.n_threads = context.n_threads_batch = 2;
  context.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
  context.swa_full = swa_full;
  context.n_batch = 4096;  // of which 512 are computed at a time
  std::istringstream words(options);
  for (std::string option, value; words >> option;) {
    if (option == "-kvu") context.kv_unified = true;
    else if (option == "-nkvo") context.offload_kqv = false;
    else if (!(words >> value)) fail("an option's value");
    else if (option == "-fa")
      context.flash_attn_type = value == "off" ? LLAMA_FLASH_ATTN_TYPE_DISABLED : LLAMA_FLASH_ATTN_TYPE_ENABLED;
    else if (option == "-ngl") model.n_gpu_layers = std::atoi(value.c_str());
    else if (option == "-ctk") context.type_k = type_of(value);
    else if (option == "-ctv") context.type_v = type_of(value);
    else fail("an option");
  }
  g_model = llama_model_load_from_file(path, model);
  if (g_model == nullptr) fail("model");
  g_vocab = llama_model_get_vocab(g_model);
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

void ways(const Tokens& tokens) {
  llama_memory_t memory = llama_get_memory(g_context);
  const auto n = static_cast<llama_pos>(tokens.size());
  prompt(tokens, 0);
  const llama_token first = best(-1);
  print_values("logits of the prompt");
  const std::vector<std::uint8_t> state = state_of(0);
  llama_memory_seq_cp(memory, 0, 1, -1, -1);
  print("greedy", go_on(first, n, 0));
  print_values("logits at the end");
  print("copied sequence", go_on(first, n, 1));
  llama_memory_seq_rm(memory, 1, -1, -1);

  llama_memory_seq_rm(memory, 0, -1, -1);
  if (llama_state_seq_set_data(g_context, state.data(), state.size(), 0) == 0) fail("state");
  std::printf("saved again: %s\n", state_of(0) == state ? "the same bytes" : "other bytes");
  if (llama_state_seq_set_data(g_context, state.data(), state.size(), 1) == 0) fail("state");
  print("restored into another sequence", go_on(first, n, 1));

  llama_memory_seq_rm(memory, 0, n, -1);
  std::vector<Row> drafts;
  for (int i = 0; i < 8; ++i) drafts.push_back({100 + i, n + i, 0, i == 7});
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
}

void prompts(const std::string& file) {
  for (std::size_t at = 0, end; at < file.size(); at = end + 1) {
    end = std::min(file.find('\n', at), file.size());
    const Tokens tokens = tokens_of(file.substr(at, end - at));
    llama_memory_seq_rm(llama_get_memory(g_context), 0, -1, -1);
    prompt(tokens, 0);
    print(("prompt at " + std::to_string(at)).c_str(), go_on(best(-1), static_cast<llama_pos>(tokens.size()), 0));
  }
}

// A sequence saved, in a file and in memory; truncated, and with flipped bits: what is refused, and what goes on.
void sessions(const Tokens& tokens, const std::string& file) {
  llama_memory_t memory = llama_get_memory(g_context);
  const auto n = static_cast<llama_pos>(tokens.size());
  prompt(tokens, 0);
  const llama_token first = best(-1);
  if (llama_state_seq_save_file(g_context, file.c_str(), 0, tokens.data(), tokens.size()) == 0) fail("save");
  const std::vector<std::uint8_t> whole = state_of(0);
  print("greedy", go_on(first, n, 0));
  // Where it is taken there is an answer, whatever it holds.
  const auto refused = [&](const std::vector<std::uint8_t>& state) {
    llama_memory_seq_rm(memory, 1, -1, -1);
    if (llama_state_seq_set_data(g_context, state.data(), state.size(), 1) == 0) return 1;
    decode({{first, n, 1, true}});
    return 0;
  };
  int cut = 0, flipped = 0;
  for (const std::size_t size :
       {whole.size() - 1, whole.size() / 2, whole.size() / 3, std::size_t{100}, std::size_t{8}, std::size_t{1}})
    cut += refused({whole.begin(), whole.begin() + static_cast<std::ptrdiff_t>(size)});
  for (std::size_t i = 0; i < 40; ++i) {
    std::vector<std::uint8_t> damaged = whole;
    damaged[whole.size() - 1 - i * (whole.size() / 41)] ^= static_cast<std::uint8_t>(1 << (i % 8));
    flipped += refused(damaged);
  }
  std::vector<std::uint8_t> infinite = whole;
  for (std::size_t i = infinite.size() / 2; i + 1 < infinite.size() / 2 + 4096; i += 2)
    infinite[i] = 0, infinite[i + 1] = 0x7c;
  std::printf("refused: %d cut, %d with a flipped bit, %d with infinities\n", cut, flipped, refused(infinite));

  Tokens read(tokens.size());
  std::size_t count = 0;
  llama_memory_seq_rm(memory, 1, -1, -1);
  if (llama_state_seq_load_file(g_context, file.c_str(), 1, read.data(), read.size(), &count) == 0 || read != tokens)
    fail("load");
  print("loaded", go_on(first, n, 1));
}

}  // namespace

int main(int argc, char** argv) {
  const std::string_view what = argc > 5 ? argv[5] : "";
  const bool fits = (what == "ways" && argc == 8) || (what == "prompts" && argc == 7) ||
                    (what == "sessions" && argc == 9);
  if (!fits)
    fail("expected BACKENDS MODEL OPTIONS GENERATED and ways TEXT BYTES, prompts FILE or sessions TEXT BYTES STATE");
  ggml_backend_load_all_from_path(argv[1]);
  llama_log_set(speak, nullptr);
  ggml_log_set(speak, nullptr);
  g_generated = std::atoi(argv[4]);
  open(argv[2], argv[3], what != "prompts");
  const std::string text = contents(argv[6]);
  const auto beginning = [&] { return tokens_of(text.substr(0, static_cast<std::size_t>(std::atoi(argv[7])))); };
  if (what == "ways") ways(beginning());
  else if (what == "prompts") prompts(text);
  else sessions(beginning(), argv[8]);
  std::printf("all logits: %016llx\n", static_cast<unsigned long long>(g_logits));
  llama_free(g_context);
  llama_model_free(g_model);
}
