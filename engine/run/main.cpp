// kv4-run: GGUF in, text out.
#include <CLI/CLI.hpp>
#ifdef __GLIBC__
#include <malloc.h>
#endif
#ifdef __linux__
#include <unistd.h>
#endif
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <string>
#include <system_error>

#include "kv4/version.h"
#include "options.h"
#include "terminal.h"

namespace kv4::run {
namespace {

constexpr int kFailed = 1, kInterrupted = 130;  // as shells report a program that Ctrl-C ended

void add_common(CLI::App* app, Common* o, bool cache) {
  app->add_option("-m,--model", o->model, "GGUF file");
  if (cache) {
    app->add_option("--cache", o->cache, "kv4: 4-bit; exact: kv4's in float16; f16: ggml's own attention")
        ->check(CLI::IsMember({"kv4", "exact", "f16"}))
        ->capture_default_str();
  }
  app->add_option("--recipe", o->recipe, "recipe of the kv4 cache (JSON, as kv4.Recipe.to_file writes it)");
  app->add_option("-c,--context", o->context, "tokens of context; default: what the work at hand needs")->check(CLI::PositiveNumber);
  app->add_option("-t,--threads", o->threads, "threads; default: the machine's cores")->check(CLI::PositiveNumber);
  app->add_option("-b,--batch", o->batch, "prompt tokens that go through the model at once")->check(CLI::PositiveNumber);
  app->add_flag("--json", o->json, "results as JSON on standard output");
}

int main(int argc, char** argv) {
  CLI::App app("Text from a GGUF model with a 4-bit key/value cache. Without -p or -f: a chat.", "kv4-run");
  app.set_version_flag("--version", KV4_VERSION);
  Common common;
  Generate generate_options;
  Bench bench_options;
  Perplexity perplexity_options;
  Verify verify_options;

  add_common(&app, &common, true);
  auto* prompt = app.add_option("-p,--prompt", generate_options.prompt, "text to complete");
  app.add_option("-f,--file", generate_options.prompt_file, "file of the text to complete")->excludes(prompt);
  app.add_flag("--chat", generate_options.chat, "-p or -f is a message, answered by the model's chat template");
  app.add_option("--system", generate_options.system, "system message of a chat");
  app.add_option("--session", generate_options.session, "file that keeps the conversation: continued if it is there, saved at the end");
  app.add_option("-n,--tokens", generate_options.tokens, "most tokens to write; default: until the model ends")->check(CLI::PositiveNumber);
  app.add_option("--temp", generate_options.sampler.temperature, "temperature; 0: the most likely token")->capture_default_str();
  app.add_option("--top-k", generate_options.sampler.top_k, "0: all")->capture_default_str();
  app.add_option("--top-p", generate_options.sampler.top_p, "1: all")->capture_default_str();
  app.add_option("--min-p", generate_options.sampler.min_p, "0: all")->capture_default_str();
  app.add_option("--seed", generate_options.sampler.seed)->capture_default_str();

  const auto command = [&](const char* name, const char* what, bool cache) {
    CLI::App* sub = app.add_subcommand(name, what);
    add_common(sub, &common, cache);
    return sub;
  };
  CLI::App* bench_command = command("bench", "time per token over context, against llama.cpp's caches", false);
  bench_command->add_option("-d,--depths", bench_options.depths, "tokens of context")->delimiter(',')->capture_default_str();
  bench_command->add_option("--caches", bench_options.caches, "kv4, exact, f16")->delimiter(',')->capture_default_str();
  bench_command->add_option("--llama", bench_options.llama, "llama.cpp's: f16, q8_0, q4_0")->delimiter(',')->capture_default_str();
  bench_command->add_flag_callback("--no-llama", [&] { bench_options.llama.clear(); }, "this engine alone");
  bench_command->add_option("-f,--file", bench_options.text, "text that fills the context; default: made up tokens");
  bench_command->add_option("--steps", bench_options.steps, "tokens of a turn")->capture_default_str();
  bench_command->add_option("--repeats", bench_options.repeats, "turns, after one to warm up")->capture_default_str();
  bench_command->add_option("--prefill", bench_options.prefill, "tokens of a prefill at each depth")->capture_default_str();
  CLI::App* perplexity_command = command("perplexity", "perplexity of a text, the second half of each window scored", true);
  perplexity_command->add_option("-f,--file", perplexity_options.text, "text")->required();
  perplexity_command->add_option("--window", perplexity_options.window, "tokens")->capture_default_str();
  perplexity_command->add_option("--windows", perplexity_options.windows)->capture_default_str();
  perplexity_command->add_flag("--kl", perplexity_options.kl, "also against the exact cache");
  perplexity_command->add_flag("--llama", perplexity_options.llama, "also llama.cpp's f16 cache");
  CLI::App* verify_command = command("verify", "most likely tokens against llama.cpp's f16 cache", true);
  verify_command->add_option("--prompts", verify_options.prompts, "file of one prompt a line; default: ten of its own");
  verify_command->add_option("-n,--tokens", verify_options.tokens)->capture_default_str();
  app.require_subcommand(0, 1);

  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& e) {
    return app.exit(e) == 0 ? 0 : kFailed;
  }
  if (common.model.empty()) {
    std::fputs("kv4-run: -m: expected a GGUF file; got nothing (--help lists all options)\n", stderr);
    return kFailed;
  }
  interrupted();  // from here on Ctrl-C stops answers
  bool was_interrupted = false;
  const Status status = bench_command->parsed()        ? bench(common, bench_options)
                        : perplexity_command->parsed() ? perplexity(common, perplexity_options)
                        : verify_command->parsed()     ? verify(common, verify_options)
                                                       : generate(common, generate_options, &was_interrupted);
  if (!status.ok()) {
    std::fprintf(stderr, "kv4-run: %s\n", status.message().c_str());
    return kFailed;
  }
  return was_interrupted ? kInterrupted : 0;
}

// ggml's threads are GNU OpenMP's: one that waits spins for milliseconds unless told otherwise, and takes from the thread that it
// waits for the time on a machine that others use. That runtime reads its environment when it is loaded, which is before main: so
// the program begins anew, unless the user has said how threads wait.
void bound_spin(char** argv) {
#ifdef __linux__
  constexpr const char* kSpins = "10000";  // 0.1 to 0.5 ms
  for (const char* name : {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"})
    if (const char* value = std::getenv(name); value != nullptr && *value != 0) return;
  std::error_code none;
  const std::string self = std::filesystem::read_symlink("/proc/self/exe", none);
  if (none || setenv("GOMP_SPINCOUNT", kSpins, 1) != 0) return;
  execv(self.c_str(), argv);  // comes back where it fails; threads then wait as they would have
#else
  (void)argv;
#endif
}

}  // namespace
}  // namespace kv4::run

int main(int argc, char** argv) {
#ifdef __GLIBC__
  // A prompt's passing buffers go back to the system. By itself glibc moves its threshold up to their size and then keeps them
  // between the pages that stay.
  mallopt(M_MMAP_THRESHOLD, 128 << 10);
#endif
  try {
    kv4::run::bound_spin(argv);
    return kv4::run::main(argc, argv);
  } catch (const std::exception& e) {  // the libraries' own, and no memory
    std::fprintf(stderr, "kv4-run: %s\n", e.what());
    return 1;
  }
}
