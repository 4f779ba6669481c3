#include "kv4_engine/vocabulary.h"

#include "tiny_model.h"

namespace kv4::engine {
namespace {

TEST(Utf8, FindsTheFirstInvalidByte) {
  EXPECT_EQ(invalid_utf8("plain, \xc3\xa4, \xe2\x82\xac, \xf0\x9f\x98\x80"), std::string_view::npos);
  EXPECT_EQ(invalid_utf8("ab\xff"), 2u);
  EXPECT_EQ(invalid_utf8("ab\xc3"), 2u);          // cut
  EXPECT_EQ(invalid_utf8("\xc0\x80"), 0u);        // overlong
  EXPECT_EQ(invalid_utf8("\xe0\x80\x80"), 0u);    // overlong
  EXPECT_EQ(invalid_utf8("a\xed\xa0\x80"), 1u);   // a surrogate
  EXPECT_EQ(invalid_utf8("\xf4\x90\x80\x80"), 0u);  // beyond U+10FFFF
  EXPECT_EQ(invalid_utf8("\xe2\x28\xa1"), 0u);
}

TEST(Utf8, KeepsWhatIsNotComplete) {
  EXPECT_EQ(incomplete_utf8("abc"), 0u);
  EXPECT_EQ(incomplete_utf8("a\xc3\xa4"), 0u);
  EXPECT_EQ(incomplete_utf8("a\xc3"), 1u);
  EXPECT_EQ(incomplete_utf8("a\xe2\x82"), 2u);
  EXPECT_EQ(incomplete_utf8("a\xf0\x9f\x98"), 3u);
  EXPECT_EQ(incomplete_utf8("a\xf0\x9f\x98\x80"), 0u);
}

class VocabularyTest : public EngineTest {};

TEST_F(VocabularyTest, TextThereAndBack) {
  const std::shared_ptr<const Model> model = load(TinyModel());
  const Vocabulary& v = model->vocabulary();
  std::vector<std::int32_t> tokens;
  ASSERT_TRUE(v.tokenize("Ab \xc3\xa4!", true, false, &tokens).ok());
  ASSERT_FALSE(tokens.empty());
  EXPECT_EQ(tokens.front(), 1);
  std::string text;
  for (const std::int32_t t : tokens) text += v.piece(t);
  EXPECT_NE(text.find("Ab \xc3\xa4!"), std::string::npos) << text;
  EXPECT_TRUE(v.ends_generation(2));
  EXPECT_FALSE(v.ends_generation(20));
  EXPECT_EQ(v.size(), kTinyVocabulary);

  const Status status = v.tokenize("a\xff", false, false, &tokens);
  EXPECT_EQ(status.message(), "text: expected valid UTF-8; got an invalid byte at offset 1");

  // A marker in a message is text; in what the template wrote it is a token.
  ASSERT_TRUE(v.tokenize("<|im_start|>", false, true, &tokens).ok());
  EXPECT_NE(std::find(tokens.begin(), tokens.end(), 3), tokens.end());
  ASSERT_TRUE(v.tokenize("<|im_start|>", false, false, &tokens).ok());
  EXPECT_EQ(std::find(tokens.begin(), tokens.end(), 3), tokens.end());
}

TEST_F(VocabularyTest, Template) {
  const std::shared_ptr<const Model> model = load(TinyModel());
  const std::vector<Message> messages = {{"system", "Be brief."}, {"user", "Hello"}};
  std::string text;
  ASSERT_TRUE(model->vocabulary().apply_template(messages, true, &text).ok());
  EXPECT_EQ(text, "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n");

  TinyModel without;
  without.with_template = false;
  const std::shared_ptr<const Model> plain = load(without);
  EXPECT_FALSE(plain->vocabulary().has_template());
  EXPECT_EQ(plain->vocabulary().apply_template(messages, true, &text).code(), StatusCode::unsupported);
}

}  // namespace
}  // namespace kv4::engine
