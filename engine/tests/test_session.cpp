// Conversations on disk.
#include "kv4_engine/session.h"

#include <fstream>
#include <iterator>

#include "tiny_model.h"

namespace kv4::engine {
namespace {

class SessionTest : public EngineTest {
 protected:
  static std::string read(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
  }
  static void write_bytes(const std::string& path, const std::string& bytes) {
    std::ofstream file(path, std::ios::binary | std::ios::trunc);
    file << bytes;
  }
  void refused(const std::shared_ptr<const Model>& model, const ContextOptions& options, const std::string& part) const {
    const std::unique_ptr<Context> c = context(model, options);
    Session session;
    const Status status = load_session(path("s"), c.get(), &session);
    EXPECT_FALSE(status.ok());
    EXPECT_NE(status.message().find(part), std::string::npos) << status.message();
    EXPECT_EQ(c->length(), 0);
    EXPECT_TRUE(session.tokens.empty());
    EXPECT_TRUE(c->decode(some_tokens(70)).ok());  // it is as good as new
  }
};

TEST_F(SessionTest, GoesOnToTheBit) {
  for (const TinyModel& m : tiny_models()) {
    for (const ContextOptions& options : {packed(), exact()}) {
      SCOPED_TRACE(m.architecture);
      const std::shared_ptr<const Model> model = load(m);
      const std::unique_ptr<Context> c = context(model, options);
      Session session;
      session.tokens = some_tokens(333);
      session.pending = {7};
      session.messages = {{"user", "Hello \xc3\xa4"}, {"assistant", ""}};
      ASSERT_TRUE(c->decode(session.tokens).ok());
      const Status saved = save_session(path("s"), session, *c);
      ASSERT_TRUE(saved.ok()) << saved.message();

      std::shared_ptr<const Model> anew;
      ASSERT_TRUE(Model::load(model->path(), nullptr, &anew).ok());
      const std::unique_ptr<Context> d = context(anew, options);
      Session back;
      const Status loaded = load_session(path("s"), d.get(), &back);
      ASSERT_TRUE(loaded.ok()) << loaded.message();
      EXPECT_EQ(back.tokens, session.tokens);
      EXPECT_EQ(back.pending, session.pending);
      ASSERT_EQ(back.messages.size(), 2u);
      EXPECT_EQ(back.messages[0].role, "user");
      EXPECT_EQ(back.messages[0].text, "Hello \xc3\xa4");
      EXPECT_EQ(d->length(), 333);
      for (const std::int32_t token : some_tokens(150, 8)) {
        ASSERT_TRUE(c->decode(std::vector{token}).ok());
        ASSERT_TRUE(d->decode(std::vector{token}).ok());
        ASSERT_EQ(copy(c->logits()), copy(d->logits()));
      }
    }
  }
}

TEST_F(SessionTest, RefusesWhatIsNotItsOwn) {
  const std::shared_ptr<const Model> model = load(TinyModel());
  const std::unique_ptr<Context> c = context(model, packed());
  Session session;
  session.tokens = some_tokens(200);
  ASSERT_TRUE(c->decode(session.tokens).ok());
  ASSERT_TRUE(save_session(path("s"), session, *c).ok());

  TinyModel other;
  other.seed = 2;
  std::shared_ptr<const Model> stranger;
  ASSERT_TRUE(Model::load(make(other, "other.gguf"), nullptr, &stranger).ok());
  refused(stranger, packed(), "of another model");
  refused(model, exact(), "recipe");
  ContextOptions options = packed();
  options.recipe.window = 128;
  refused(model, options, "window");
  options = packed();
  options.context = 150;
  {
    const std::unique_ptr<Context> small = context(model, options);
    Session back;
    EXPECT_EQ(load_session(path("s"), small.get(), &back).code(), StatusCode::out_of_range);
  }
  options = packed();
  options.cache = CacheKind::f16;
  EXPECT_EQ(save_session(path("f"), session, *context(model, options)).code(), StatusCode::unsupported);
  EXPECT_FALSE(std::filesystem::exists(path("f")));
  Session back;
  EXPECT_EQ(load_session(path("s"), c.get(), &back).code(), StatusCode::failed_precondition);
  EXPECT_EQ(c->length(), 200);
}

TEST_F(SessionTest, AFullContextIsOpenedAgain) {
  const std::shared_ptr<const Model> model = load(TinyModel());
  ContextOptions options = packed();
  options.context = 200;
  const std::unique_ptr<Context> c = context(model, options);
  Session session;
  session.tokens = some_tokens(200);
  session.pending = {7};  // drawn when there was no room left
  ASSERT_TRUE(c->decode(session.tokens).ok());
  ASSERT_TRUE(save_session(path("s"), session, *c).ok());
  EXPECT_EQ(session_tokens(path("s")), 201);
  EXPECT_EQ(session_tokens(path("none")), 0);
  EXPECT_EQ(session_tokens(model->path()), 0);
  for (const std::int64_t size : {200, 300}) {
    options.context = size;
    const std::unique_ptr<Context> again = context(model, options);
    Session back;
    const Status status = load_session(path("s"), again.get(), &back);
    ASSERT_TRUE(status.ok()) << status.message();
    EXPECT_EQ(back.pending, session.pending);
    EXPECT_EQ(again->decode(back.pending).ok(), size > 200);
  }
}

TEST_F(SessionTest, SaysBeforehandThatAPlaceCannotBeWritten) {
  EXPECT_TRUE(check_session_place(path("s")).ok());
  EXPECT_FALSE(std::filesystem::exists(path("s")));
  std::filesystem::create_directories(path("folder"));
  for (const std::string& place : {path("folder"), path("nowhere/s")}) {
    const Status status = check_session_place(place);
    EXPECT_EQ(status.code(), StatusCode::invalid_argument);
    EXPECT_NE(status.message().find("session: expected a file that can be written; got " + place), std::string::npos) << status.message();
  }
  EXPECT_TRUE(std::filesystem::is_empty(path("folder")));
}

TEST_F(SessionTest, RefusesDamage) {
  const std::shared_ptr<const Model> model = load(TinyModel());
  const std::unique_ptr<Context> c = context(model, packed());
  Session session;
  session.tokens = some_tokens(150);
  ASSERT_TRUE(c->decode(session.tokens).ok());
  ASSERT_TRUE(save_session(path("s"), session, *c).ok());
  const std::string whole = read(path("s"));
  for (std::size_t at = 0; at < whole.size(); at += at < 64 ? 1 : whole.size() / 97) {
    std::string damaged = whole;
    damaged[at] = static_cast<char>(damaged[at] ^ (1 << (at % 8)));
    write_bytes(path("s"), damaged);
    refused(model, packed(), "session: expected");
  }
  for (const std::size_t length : {std::size_t{0}, std::size_t{7}, std::size_t{20}, whole.size() / 2, whole.size() - 1}) {
    write_bytes(path("s"), whole.substr(0, length));
    refused(model, packed(), "session: expected");
  }
  write_bytes(path("s"), whole + "x");
  refused(model, packed(), "session: expected");
  std::filesystem::remove(path("s"));
  refused(model, packed(), "session: expected a file that can be read");
}

TEST_F(SessionTest, AFailedSaveLeavesTheOldFile) {
  const std::shared_ptr<const Model> model = load(TinyModel());
  const std::unique_ptr<Context> c = context(model, packed());
  Session session;
  session.tokens = some_tokens(100);
  ASSERT_TRUE(c->decode(session.tokens).ok());
  ASSERT_TRUE(save_session(path("s"), session, *c).ok());
  const std::string before = read(path("s"));
  // A folder stands where the new file would take its place, so that the last step fails.
  std::filesystem::create_directories(path("folder/inside"));
  EXPECT_FALSE(save_session(path("folder"), session, *c).ok());
  EXPECT_FALSE(save_session(path("nowhere/s"), session, *c).ok());
  EXPECT_EQ(read(path("s")), before);
  std::size_t entries = 0;
  for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator(folder_)) ++entries;
  EXPECT_EQ(entries, 3u);  // the model, the session, the folder: no part of a file is left behind
}

}  // namespace
}  // namespace kv4::engine
