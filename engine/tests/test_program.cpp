// kv4-run as a person meets it.
#include <gguf.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <fstream>
#include <nlohmann/json.hpp>
#include <thread>

#include "tiny_model.h"

namespace kv4::engine {
namespace {

using nlohmann::json;

struct Outcome {
  int code = -1;
  std::string out, err;
};

class Program : public EngineTest {
 protected:
  void SetUp() override {
    EngineTest::SetUp();
    TinyModel m;
    m.architecture = "qwen2";
    m.never_ends = true;
    model_ = make(m);
  }

  // Its arguments, what is typed, and whether Ctrl-C comes once it has written something.
  Outcome run(std::vector<std::string> arguments, const std::string& input = "", bool interrupt = false) const {
    arguments.insert(arguments.begin(), KV4_RUN);
    int in[2], out[2], err[2];
    if (pipe(in) != 0 || pipe(out) != 0 || pipe(err) != 0) return {};
    const pid_t child = fork();
    if (child == 0) {
      dup2(in[0], 0), dup2(out[1], 1), dup2(err[1], 2);
      for (const int fd : {in[0], in[1], out[0], out[1], err[0], err[1]}) close(fd);
      std::vector<char*> argv;
      for (std::string& a : arguments) argv.push_back(a.data());
      argv.push_back(nullptr);
      execv(KV4_RUN, argv.data());
      _exit(127);
    }
    close(in[0]), close(out[1]), close(err[1]);
    EXPECT_EQ(write_all(in[1], input), input.size());
    close(in[1]);
    Outcome result;
    std::thread reader([&] { result.err = drain(err[0]); });
    if (interrupt) {
      char byte = 0;
      EXPECT_EQ(read(out[0], &byte, 1), 1);
      result.out = byte;
      kill(child, SIGINT);
    }
    result.out += drain(out[0]);
    reader.join();
    int status = 0;
    waitpid(child, &status, 0);
    result.code = WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + WTERMSIG(status);
    return result;
  }
  void refused(const std::vector<std::string>& arguments, const std::string& part) const {
    const Outcome o = run(arguments);
    EXPECT_EQ(o.code, 1) << o.err;
    EXPECT_EQ(o.out, "");
    EXPECT_NE(o.err.find(part), std::string::npos) << o.err;
    EXPECT_EQ(std::count(o.err.begin(), o.err.end(), '\n'), 1) << o.err;
  }
  json result(std::vector<std::string> arguments) const {
    arguments.insert(arguments.end(), {"--json", "-m", model_, "-t", "2"});
    const Outcome o = run(arguments);
    EXPECT_EQ(o.code, 0) << o.err;
    EXPECT_EQ(o.err, "");
    return json::parse(o.out, nullptr, false);
  }

  std::string model_;

 private:
  static std::size_t write_all(int fd, const std::string& text) {
    std::size_t done = 0;
    while (done < text.size()) {
      const ssize_t n = ::write(fd, text.data() + done, text.size() - done);
      if (n <= 0) break;
      done += static_cast<std::size_t>(n);
    }
    return done;
  }
  static std::string drain(int fd) {
    std::string all;
    std::array<char, 4096> piece;
    for (ssize_t n; (n = read(fd, piece.data(), piece.size())) > 0;) all.append(piece.data(), static_cast<std::size_t>(n));
    close(fd);
    return all;
  }
};

// The runtime itself says what it has read (OMP_DISPLAY_ENV).
TEST_F(Program, BoundsTheSpinOfThreadsUnlessToldHowTheyWait) {
  ASSERT_EQ(setenv("OMP_DISPLAY_ENV", "VERBOSE", 1), 0);
  const char* before = std::getenv("OMP_WAIT_POLICY");
  const std::string policy = before == nullptr ? "" : before;
  unsetenv("OMP_WAIT_POLICY");
  const std::vector<std::string> arguments = {"-m", model_, "-p", "Hello", "-n", "4", "--temp", "0", "-t", "2"};
  const Outcome bounded = run(arguments);
  setenv("GOMP_SPINCOUNT", "77", 1);
  const Outcome given = run(arguments);
  unsetenv("GOMP_SPINCOUNT");
  setenv("OMP_WAIT_POLICY", "PASSIVE", 1);
  const Outcome passive = run(arguments);
  policy.empty() ? unsetenv("OMP_WAIT_POLICY") : setenv("OMP_WAIT_POLICY", policy.c_str(), 1);
  unsetenv("OMP_DISPLAY_ENV");
  if (bounded.err.find("GOMP_SPINCOUNT") == std::string::npos) GTEST_SKIP() << "ggml's threads are not GNU OpenMP's here";
  EXPECT_EQ(bounded.code, 0);
  EXPECT_NE(bounded.err.find("GOMP_SPINCOUNT = '10000'"), std::string::npos) << bounded.err;
  EXPECT_NE(given.err.find("GOMP_SPINCOUNT = '77'"), std::string::npos) << given.err;
  EXPECT_EQ(given.err.find("GOMP_SPINCOUNT = '10000'"), std::string::npos);
  EXPECT_NE(passive.err.find("GOMP_SPINCOUNT = '0'"), std::string::npos) << passive.err;
  EXPECT_EQ(passive.err.find("GOMP_SPINCOUNT = '10000'"), std::string::npos);
  EXPECT_EQ(given.out, bounded.out);
}

TEST_F(Program, CompletesAText) {
  const Outcome o = run({"-m", model_, "-p", "Hello there", "-n", "12", "--temp", "0", "-t", "2"});
  EXPECT_EQ(o.code, 0) << o.err;
  EXPECT_FALSE(o.out.empty());
  EXPECT_NE(o.err.find("cache kv4 of"), std::string::npos) << o.err;

  std::ofstream(path("prompt.txt")) << "Hello there";
  const Outcome from_file = run({"-m", model_, "-f", path("prompt.txt"), "-n", "12", "--temp", "0", "-t", "2"});
  EXPECT_EQ(from_file.out, o.out);

  const json r = result({"-p", "Hello there", "-n", "12", "--temp", "0", "--cache", "exact"});
  ASSERT_TRUE(r.is_object());
  EXPECT_LE(r["generated_tokens"].get<int>(), 12);
  EXPECT_EQ(r["tokens"].size(), r["generated_tokens"].get<std::size_t>());
  EXPECT_GT(r["cache_bytes"].get<std::int64_t>(), 0);
  EXPECT_EQ(r["threads"], 2);
  EXPECT_EQ(r["cache"], "exact");
  // The same seed, the same text; another, another.
  const json a = result({"-p", "Hello", "-n", "30", "--seed", "4"}), b = result({"-p", "Hello", "-n", "30", "--seed", "4"}), c = result({"-p", "Hello", "-n", "30", "--seed", "5"});
  EXPECT_EQ(a["tokens"], b["tokens"]);
  EXPECT_NE(a["tokens"], c["tokens"]);
}

TEST_F(Program, ASessionGoesOnInAnotherProcess) {
  const json whole = result({"-p", "Once upon a time", "-n", "150", "--temp", "0"});
  const json first = result({"-p", "Once upon a time", "-n", "100", "--temp", "0", "--session", path("s")});
  ASSERT_EQ(first["generated_tokens"], 100);
  // What was drawn last is taken in first; the empty prompt adds nothing.
  std::ofstream(path("empty.txt")) << "";
  const json then = result({"-f", path("empty.txt"), "-n", "50", "--temp", "0", "--session", path("s")});
  EXPECT_EQ(then["restored_tokens"].get<int>(), first["context_tokens"].get<int>());
  json joined = first["tokens"];
  for (const json& t : then["tokens"]) joined.push_back(t);
  EXPECT_EQ(joined, whole["tokens"]);

  refused({"-m", model_, "-p", "x", "--session", path("s"), "--cache", "exact"}, "--cache: expected kv4, with which the session was written; got exact");
  refused({"-m", model_, "-p", "x", "--session", path("s"), "--cache", "f16"}, "--cache: expected kv4 or exact, of which a session can be kept; got f16");
  std::ofstream(path("r.json")) << R"({"format": "kv4-recipe", "version": 1, "window": 128, "key": {"mean": true, "lambda_": "auto"}})";
  refused({"-m", model_, "-p", "x", "--session", path("s"), "--recipe", path("r.json")},
          "--recipe: expected the one with which the session was written, of recipe.window 64; got recipe.window 128");
  refused({"-m", model_, "-p", "x", "--session", path("s"), "-c", "50"}, "--context: expected at least");
  refused({"-m", model_, "-p", "x", "--session", path("s"), "--chat"}, "--session: expected a session of a chat");
  TinyModel other;
  other.seed = 9;
  refused({"-m", make(other, "other.gguf"), "-p", "x", "--session", path("s")}, "of another model");
  refused({"-m", model_, "-p", "x", "--session", path("empty.txt")}, "session: expected a session file");
}

TEST_F(Program, AFullChatKeepsItsSessionAndGoesOn) {
  // The first answer fills the context; nothing more fits, and the chat lives on until it is left.
  const std::vector<std::string> chat = {"-m", model_, "-t", "2", "--temp", "0", "--session", path("s")};
  const auto with = [&](std::vector<std::string> more) {
    more.insert(more.begin(), chat.begin(), chat.end());
    return more;
  };
  const Outcome full = run(with({"-c", "128"}), "Hello\nAnd again\nOnce more\n");
  EXPECT_EQ(full.code, 0) << full.err;
  std::size_t said = 0;
  for (std::size_t at = full.err.find("--context: expected at least"); at != std::string::npos; at = full.err.find("--context: expected at least", at + 1)) ++said;
  EXPECT_EQ(said, 3u) << full.err;
  ASSERT_TRUE(std::filesystem::exists(path("s"))) << full.err;

  const Outcome same = run(with({"-c", "128"}), "Still there\n");
  EXPECT_EQ(same.code, 0) << same.err;
  EXPECT_NE(same.err.find("after 128 restored"), std::string::npos) << same.err;
  const Outcome larger = run(with({"-c", "256", "-n", "8"}), "Go on\n");
  EXPECT_EQ(larger.code, 0) << larger.err;
  EXPECT_NE(larger.err.find("after 128 restored; wrote 8"), std::string::npos) << larger.err;

  // A message that is too long is no end either: a shorter one is answered.
  const Outcome longer = run({"-m", model_, "-t", "2", "--temp", "0", "-n", "4", "-c", "256", "--session", path("t")}, std::string(400, 'x') + "\nHello\n");
  EXPECT_EQ(longer.code, 0) << longer.err;
  EXPECT_NE(longer.err.find("--context: expected at least"), std::string::npos) << longer.err;
  EXPECT_NE(longer.err.find("wrote 4"), std::string::npos) << longer.err;
  EXPECT_TRUE(std::filesystem::exists(path("t")));
  // Where nothing was said nothing is kept, which no chat could go on from.
  EXPECT_EQ(run({"-m", model_, "-t", "2", "--session", path("u")}).code, 0);
  EXPECT_FALSE(std::filesystem::exists(path("u")));
}

TEST_F(Program, ASessionThatFillsTheModelIsOpenedAgain) {
  TinyModel m;
  m.architecture = "qwen2";
  m.never_ends = true;
  m.context = 160;
  const std::vector<std::string> arguments = {"-m", make(m, "short.gguf"), "-t", "2", "--temp", "0", "--session", path("s"), "-p"};
  const auto with = [&](const std::string& prompt) {
    std::vector<std::string> all = arguments;
    all.push_back(prompt);
    return all;
  };
  const Outcome filled = run(with("Hello"));  // up to what the model was trained on
  EXPECT_EQ(filled.code, 0) << filled.err;
  refused(with("More"), "the most that the model was trained on");
  EXPECT_TRUE(std::filesystem::exists(path("s")));
}

TEST_F(Program, AnEmptyPromptIsAPrompt) {
  const json r = result({"-p", "", "-n", "3", "--temp", "0"});  // from the token that opens a text
  EXPECT_EQ(r["prompt_tokens"], 1);
  EXPECT_EQ(r["generated_tokens"], 3);
  refused({"-m", model_, "-p", "", "--chat"}, "--prompt: expected a message; got an empty text");
  TinyModel m;
  m.architecture = "qwen2";
  m.change = [](gguf_context* g) { gguf_set_val_bool(g, "tokenizer.ggml.add_bos_token", false); };
  refused({"-m", make(m, "opens_none.gguf"), "-p", ""}, "--prompt: expected some text, as the model opens none by itself; got an empty one");
}

TEST_F(Program, Chats) {
  const Outcome o = run({"-m", model_, "-n", "8", "--seed", "1", "-t", "2", "--session", path("chat")}, "Hello\n\nAnd again\n");
  EXPECT_EQ(o.code, 0) << o.err;
  EXPECT_GE(std::count(o.out.begin(), o.out.end(), '\n'), 2);
  const Outcome more = run({"-m", model_, "-n", "8", "-t", "2", "--session", path("chat")}, "Third\n");
  EXPECT_EQ(more.code, 0) << more.err;
  EXPECT_NE(more.err.find("restored"), std::string::npos) << more.err;
  const json once = result({"-p", "Hello", "--chat", "-n", "8", "--system", "Be brief."});
  EXPECT_GT(once["prompt_tokens"].get<int>(), 20);

  TinyModel without;
  without.with_template = false;
  refused({"-m", make(without, "plain.gguf")}, "chat: expected a model with a chat template");
}

TEST_F(Program, CtrlCStopsTheAnswerAndNotTheProgram) {
  TinyModel m;
  m.architecture = "qwen2";
  m.never_ends = true;
  m.context = 100000;  // minutes of text
  const Outcome o = run({"-m", make(m, "endless.gguf"), "-p", "Hello", "-c", "100000", "--temp", "0", "-t", "1", "--session", path("s")}, "", true);
  EXPECT_EQ(o.code, 130) << o.err;
  EXPECT_NE(o.err.find("cache kv4 of"), std::string::npos) << o.err;
  EXPECT_TRUE(std::filesystem::exists(path("s")));
}

TEST_F(Program, SaysWhatIsWrong) {
  refused({}, "--model: expected a GGUF file; got nothing");
  refused({"-m", ""}, "--model: expected a file; got nothing");
  refused({"-m", folder_.string()}, "--model: expected a GGUF file that can be read; got " + folder_.string() + ", a folder");
  refused({"-m", model_, "-m", model_}, "--model: expected one value; got none or several");
  for (const char* option : {"--recipe", "--file", "--session"})
    refused({"-m", model_, option, ""}, std::string(option) + ": expected a file; got nothing");
  for (const char* option : {"--file", "--recipe"})
    refused({"-m", model_, option, folder_.string()}, std::string(option) + ": expected a file that can be read; got " + folder_.string() + ", a folder");
  refused({"-m", model_, "-p", "x", "--session", folder_.string()}, "--session: expected a file that can be written; got " + folder_.string() + ": a folder");
  refused({"-m", model_, "-p", "x", "--session", path("nowhere/s")}, "--session: expected a file that can be written; got " + path("nowhere/s"));
  const std::pair<const char*, const char*> whole[] = {{"--context", "1 to"}, {"--threads", "1 to 512"}, {"--batch", "1 to 65536"}, {"--tokens", "1 to"}, {"--top-k", "0 to"}, {"--seed", "0 to"}};
  for (const auto& [option, range] : whole)
    for (const char* bad : {"", "abc", "-1", "1.5", "99999999999999999999"})
      refused({"-m", model_, "-p", "x", option, bad}, std::string(option) + ": expected a whole number of " + range);
  for (const char* option : {"--temp", "--top-p", "--min-p"})
    for (const char* bad : {"", "abc", "nan"}) refused({"-m", model_, "-p", "x", option, bad}, std::string(option) + ": expected a number; got");
  refused({"-m", model_, "-p", "x", "--temp=-1"}, "--temp: expected 0 or more");
  refused({"-m", model_, "-p", "x", "--cache", "q4"}, "--cache: expected kv4, exact or f16; got q4");
  refused({"-m", model_, "-p", "x", "-f", "y"}, "--file");
  refused({"-m", model_, "--session"}, "--session: expected one value; got none or several");
  refused({"-m", model_, "--no-such-option"}, "--no-such-option");
  refused({"bench", "-m", model_, "--caches", "kv4,q4"}, "--caches: expected kv4, exact or f16; got q4");
  refused({"bench", "-m", model_, "--llama", "q3"}, "--llama: expected f16, q8_0 or q4_0; got q3");
  refused({"bench", "-m", model_, "-d", "0,x"}, "--depths: expected a whole number of 0 to");
  refused({"bench", "-m", model_, "--prefill", "1"}, "--prefill: expected a whole number of 2 to");
  refused({"perplexity", "-m", model_}, "--file is required");
  refused({"perplexity", "-m", model_, "-f", path("none.txt")}, "--file: expected a file that can be read");
  refused({"perplexity", "-m", model_, "-f", model_, "--window", "3"}, "--window: expected a whole number of 4 to");
  refused({"verify", "-m", model_, "--prompts", folder_.string()}, "--prompts: expected a file that can be read");
  refused({"-m", path("none.gguf"), "-p", "x"}, "model: expected a GGUF file that can be read");
  refused({"-m", model_, "-p", "a\xff"}, "--prompt: expected valid UTF-8; got an invalid byte at offset 1");
  refused({"-m", model_, "-f", path("none.txt")}, "--file: expected a file that can be read");
  refused({"-m", model_, "-p", "x", "-c", "4096"}, "context: expected 1 to 2048, what the model was trained on; got 4096");
  refused({"-m", model_, "-p", "x", "--recipe", path("none.json")}, "--recipe: expected a file that can be read");
  std::ofstream(path("r.json")) << R"({"format": "kv4-recipe", "version": 1, "key": {"rotation": "twist"}})";
  refused({"-m", model_, "-p", "x", "--recipe", path("r.json")}, "recipe.key.rotation: expected one of srft, srht, householder, identity; got \"twist\"");
  std::ofstream(path("r.json")) << R"({"format": "kv4-recipe", "version": 1, "sink": 3})";
  refused({"-m", model_, "-p", "x", "--recipe", path("r.json")}, "recipe.sink: expected a known entry");
  std::ofstream(path("r.json")) << "{";
  refused({"-m", model_, "-p", "x", "--recipe", path("r.json")}, "recipe: expected a recipe in JSON");
  refused({"-m", model_, "-p", "x", "--top-p", "7"}, "top-p: expected above 0, up to 1");
  std::ofstream(path("r.json")) << R"({"format": "kv4-recipe", "version": 1, "window": 128, "sinks": 8, "key": {"mean": true, "lambda_": "auto"}})";
  EXPECT_EQ(run({"-m", model_, "-p", "x", "-n", "2", "--recipe", path("r.json")}).code, 0);
}

TEST_F(Program, BenchPerplexityVerify) {
  const json b = result({"bench", "-d", "0,100", "--caches", "kv4,f16", "--llama", "f16,q8_0", "--steps", "2", "--repeats", "1", "--prefill", "16"});
  ASSERT_EQ(b["rows"].size(), 8u);
  for (const json& row : b["rows"]) {
    EXPECT_GT(row["ms_per_token"].get<double>(), 0);
    EXPECT_GT(row["prefill_tokens_per_second"].get<double>(), 0);
  }
  std::string text;
  for (int i = 0; i < 900; ++i) text += "The quick brown fox jumps over the lazy dog. "[i % 45];
  std::ofstream(path("text.txt")) << text;
  const json p = result({"perplexity", "-f", path("text.txt"), "--window", "256", "--windows", "2", "--kl", "--llama"});
  EXPECT_EQ(p["scored_tokens"], 256);
  EXPECT_GT(p["kl"].get<double>(), 0);
  EXPECT_LT(p["kl"].get<double>(), 0.05);
  EXPECT_NEAR(p["exact_perplexity"].get<double>() / p["llama_f16_perplexity"].get<double>(), 1, 1e-3);
  const json v = result({"verify", "--cache", "exact", "-n", "6"});
  EXPECT_EQ(v["prompts"].size(), 10u);
  refused({"perplexity", "-m", model_, "-f", path("text.txt"), "--window", "2048", "--windows", "3"}, "--file: expected a text of at least");
  refused({"bench", "-m", model_, "-d", "5000"}, "--depths: expected up to");
}

}  // namespace
}  // namespace kv4::engine
