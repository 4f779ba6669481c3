// kv4-run: GGUF in, text out.
#include <CLI/CLI.hpp>
#ifdef __GLIBC__
#include <malloc.h>
#endif
#ifdef __linux__
#include <unistd.h>
#endif
#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <functional>
#include <limits>
#include <string>
#include <system_error>
#include <vector>

#include "kv4/version.h"
#include "options.h"
#include "terminal.h"

namespace kv4::run {
namespace {

constexpr int kFailed = 1, kInterrupted = 130;  // as shells report a program that Ctrl-C ended

// Checks before CLI11's own conversion, in the one form of every error.
CLI::Validator must(const std::string& expected, const std::function<bool(const std::string&)>& holds) {
  return {[expected, holds](std::string& text) { return holds(text) ? std::string() : "expected " + expected + "; got " + (text.empty() ? "nothing" : text); }, ""};
}

template <class T>
bool reads_as(const std::string& text, T* out) {
  const auto [end, problem] = std::from_chars(text.data(), text.data() + text.size(), *out);
  return problem == std::errc() && end == text.data() + text.size();
}

CLI::Validator whole(std::int64_t least = 1, std::int64_t most = std::numeric_limits<int>::max()) {
  return must("a whole number of " + std::to_string(least) + " to " + std::to_string(most), [=](const std::string& text) {
    std::int64_t value = 0;
    return reads_as(text, &value) && value >= least && value <= most;
  });
}

CLI::Validator number() {
  return must("a number", [](const std::string& text) {
    double value = 0;
    return reads_as(text, &value) && std::isfinite(value);
  });
}

CLI::Validator one_of(const std::vector<std::string>& names) {
  std::string list;
  for (std::size_t i = 0; i < names.size(); ++i) list += (i == 0 ? "" : i + 1 == names.size() ? " or " : ", ") + names[i];
  return must(list, [names](const std::string& text) { return std::find(names.begin(), names.end(), text) != names.end(); });
}

CLI::Validator file() {
  return must("a file", [](const std::string& text) { return !text.empty(); });
}

void add_common(CLI::App* app, Common* o, bool cache) {
  app->add_option("-m,--model", o->model, "GGUF file")->check(file());
  if (cache) {
    app->add_option("--cache", o->cache, "kv4: 4-bit; exact: kv4's in float16; f16: ggml's own attention")
        ->check(one_of({"kv4", "exact", "f16"}))
        ->capture_default_str();
  }
  app->add_option("--recipe", o->recipe, "recipe of the kv4 cache (JSON, as kv4.Recipe.to_file writes it)")->check(file());
  app->add_option("-c,--context", o->context, "tokens of context; default: what the work at hand needs")->check(whole());
  app->add_option("-t,--threads", o->threads, "threads; default: the machine's cores")->check(whole(1, 512));
  app->add_option("-b,--batch", o->batch, "prompt tokens that go through the model at once")->check(whole(1, 65536));
  app->add_flag("--json", o->json, "results as JSON on standard output");
}

void add_generate(CLI::App* app, Generate* o) {
  auto* prompt = app->add_option("-p,--prompt", o->prompt, "text to complete");
  app->add_option("-f,--file", o->prompt_file, "file of the text to complete")->check(file())->excludes(prompt);
  app->add_flag("--chat", o->chat, "-p or -f is a message, answered by the model's chat template");
  app->add_option("--system", o->system, "system message of a chat");
  app->add_option("--session", o->session, "file that keeps the conversation: continued if it is there, saved at the end")->check(file());
  app->add_option("-n,--tokens", o->tokens, "most tokens to write; default: until the model ends")->check(whole());
  app->add_option("--temp", o->sampler.temperature, "temperature; 0: the most likely token")->check(number())->capture_default_str();
  app->add_option("--top-k", o->sampler.top_k, "0: all")->check(whole(0))->capture_default_str();
  app->add_option("--top-p", o->sampler.top_p, "1: all")->check(number())->capture_default_str();
  app->add_option("--min-p", o->sampler.min_p, "0: all")->check(number())->capture_default_str();
  app->add_option("--seed", o->sampler.seed)->check(whole(0, std::numeric_limits<std::uint32_t>::max()))->capture_default_str();
}

CLI::App* add_command(CLI::App* app, Common* common, const char* name, const char* what, bool cache) {
  CLI::App* sub = app->add_subcommand(name, what);
  add_common(sub, common, cache);
  return sub;
}

CLI::App* add_bench(CLI::App* app, Common* common, Bench* o) {
  CLI::App* sub = add_command(app, common, "bench", "time per token over context, against llama.cpp's caches", false);
  sub->add_option("-d,--depths", o->depths, "tokens of context")->check(whole(0))->delimiter(',')->capture_default_str();
  sub->add_option("--caches", o->caches, "kv4, exact, f16")->check(one_of({"kv4", "exact", "f16"}))->delimiter(',')->capture_default_str();
  sub->add_option("--llama", o->llama, "llama.cpp's: f16, q8_0, q4_0")->check(one_of({"f16", "q8_0", "q4_0"}))->delimiter(',')->capture_default_str();
  sub->add_flag_callback("--no-llama", [o] { o->llama.clear(); }, "this engine alone");
  sub->add_option("-f,--file", o->text, "text that fills the context; default: made up tokens")->check(file());
  sub->add_option("--steps", o->steps, "tokens of a turn")->check(whole())->capture_default_str();
  sub->add_option("--repeats", o->repeats, "turns, after one to warm up")->check(whole())->capture_default_str();
  sub->add_option("--prefill", o->prefill, "tokens of a prefill at each depth")->check(whole(2))->capture_default_str();
  return sub;
}

CLI::App* add_perplexity(CLI::App* app, Common* common, Perplexity* o) {
  CLI::App* sub = add_command(app, common, "perplexity", "perplexity of a text, the second half of each window scored", true);
  sub->add_option("-f,--file", o->text, "text")->check(file())->required();
  sub->add_option("--window", o->window, "tokens")->check(whole(4))->capture_default_str();
  sub->add_option("--windows", o->windows)->check(whole())->capture_default_str();
  sub->add_flag("--kl", o->kl, "also against the exact cache");
  sub->add_flag("--llama", o->llama, "also llama.cpp's f16 cache");
  return sub;
}

CLI::App* add_verify(CLI::App* app, Common* common, Verify* o) {
  CLI::App* sub = add_command(app, common, "verify", "most likely tokens against llama.cpp's f16 cache", true);
  sub->add_option("--prompts", o->prompts, "file of one prompt a line; default: ten of its own")->check(file());
  sub->add_option("-n,--tokens", o->tokens)->check(whole())->capture_default_str();
  return sub;
}

// A message of the libraries, which name their own arguments, under the option that the argument came from.
std::string under_option(const std::string& message) {
  static constexpr const char* kOptions[][2] = {{"model", "--model"},     {"session", "--session"},  {"recipe", "--recipe"},
                                                {"context", "--context"}, {"threads", "--threads"},  {"batch", "--batch"},
                                                {"temperature", "--temp"}, {"top-k", "--top-k"},      {"top-p", "--top-p"},
                                                {"min-p", "--min-p"}};
  for (const auto& [argument, option] : kOptions) {
    const std::string name = argument;
    if (message.starts_with(name + ":")) return option + message.substr(name.size());
    if (message.starts_with(name + ".")) return option + (": " + message);
  }
  return message;
}

int fail(const std::string& message) {
  std::string line = message;
  std::replace(line.begin(), line.end(), '\n', ' ');
  std::fprintf(stderr, "kv4-run: %s\n", under_option(line).c_str());
  return kFailed;
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
  add_generate(&app, &generate_options);
  const CLI::App* bench_command = add_bench(&app, &common, &bench_options);
  const CLI::App* perplexity_command = add_perplexity(&app, &common, &perplexity_options);
  const CLI::App* verify_command = add_verify(&app, &common, &verify_options);
  app.require_subcommand(0, 1);

  try {
    app.parse(argc, argv);
  } catch (const CLI::ArgumentMismatch& e) {
    const std::string text = e.what();
    return fail(text.substr(0, text.find(": ")) + ": expected one value; got none or several (--help lists all options)");
  } catch (const CLI::ParseError& e) {
    if (e.get_exit_code() == 0) return app.exit(e);  // --help, --version
    return fail(std::string(e.what()) + " (--help lists all options)");
  }
  generate_options.prompt_given = app.count("--prompt") > 0;
  generate_options.system_given = app.count("--system") > 0;
  if (common.model.empty()) return fail("--model: expected a GGUF file; got nothing (--help lists all options)");
  interrupted();  // from here on Ctrl-C stops answers
  bool was_interrupted = false;
  const Status status = bench_command->parsed()        ? bench(common, bench_options)
                        : perplexity_command->parsed() ? perplexity(common, perplexity_options)
                        : verify_command->parsed()     ? verify(common, verify_options)
                                                       : generate(common, generate_options, &was_interrupted);
  if (!status.ok()) return fail(status.message());
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
