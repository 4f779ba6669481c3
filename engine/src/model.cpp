#include "kv4_engine/model.h"

#include <exception>
#include <new>

#include "model_state.h"

namespace kv4::engine {

Model::Model(std::unique_ptr<State> state) : state_(std::move(state)) {}
Model::~Model() = default;

namespace {

// Damaged counts make the libraries that read them throw.
template <class F>
Status without_exceptions(const std::string& path, F&& f) {
  try {
    return f();
  } catch (const std::bad_alloc&) {
    return error(StatusCode::out_of_memory, "model", "memory for what " + path + " says it holds", "none");
  } catch (const std::exception& e) {
    return invalid_argument("model", "a whole GGUF file", path + ": " + e.what());
  }
}

}  // namespace

Status Model::load(const std::string& path, const std::function<void(double)>& progress, std::shared_ptr<const Model>* out) {
  return without_exceptions(path, [&] { return read(path, progress, out); });
}

Status Model::read(const std::string& path, const std::function<void(double)>& progress, std::shared_ptr<const Model>* out) {
  std::unique_ptr<GgufFile> file;
  KV4_RETURN_IF_ERROR(GgufFile::open(path, &file));
  auto state = std::make_unique<State>();
  state->path = path;
  std::string name;
  KV4_RETURN_IF_ERROR(file->text("general.architecture", &name));
  KV4_RETURN_IF_ERROR(find_architecture(name, &state->architecture));
  KV4_RETURN_IF_ERROR(read_config(*file, &state->config));
  if (state->architecture->refine != nullptr) KV4_RETURN_IF_ERROR(state->architecture->refine(*file, &state->config));
  KV4_RETURN_IF_ERROR(refuse_unknown(*file, state->config));
  KV4_RETURN_IF_ERROR(Vocabulary::load(path, &state->vocabulary));
  if (state->vocabulary->size() != state->config.vocabulary)
    return invalid_argument("tokenizer.ggml.tokens", std::to_string(state->config.vocabulary) + " tokens, as many as token_embd.weight has rows",
                            std::to_string(state->vocabulary->size()));
  KV4_RETURN_IF_ERROR(Weights::load(*file, wanted_tensors(*state->architecture, state->config, *file), progress, &state->weights));
  KV4_RETURN_IF_ERROR(file->identity(&state->identity));
  *out = std::shared_ptr<const Model>(new Model(std::move(state)));
  return {};
}

const Vocabulary& Model::vocabulary() const { return *state_->vocabulary; }
const std::string& Model::path() const { return state_->path; }
const std::string& Model::architecture() const { return state_->config.architecture; }
std::int64_t Model::layers() const { return state_->config.layers; }
std::int64_t Model::vocabulary_size() const { return state_->config.vocabulary; }
std::int64_t Model::context_length() const { return state_->config.context; }
std::size_t Model::nbytes() const { return state_->weights->nbytes(); }
std::uint64_t Model::identity() const { return state_->identity; }

}  // namespace kv4::engine
