#include "kv4_engine/session.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <memory>

#include "context_state.h"
#include "hash.h"

namespace kv4::engine {
namespace {

constexpr char kMagic[8] = {'k', 'v', '4', ' ', 's', 'e', 's', 's'};
constexpr std::uint32_t kVersion = 1;

struct Close {
  void operator()(std::FILE* f) const { std::fclose(f); }
};
using File = std::unique_ptr<std::FILE, Close>;

// Beside the file whose place it takes.
std::string part_of(const std::string& path) { return path + ".part" + std::to_string(getpid()); }

Status damaged(const std::string& path, const std::string& what) { return invalid_argument("session", "a whole session file", path + ": " + what); }

template <class T>
void to_bytes(T value, unsigned char (&out)[sizeof(T)]) {
  for (std::size_t i = 0; i < sizeof(T); ++i) out[i] = static_cast<unsigned char>(value >> (8 * i));
}

class Writer {
 public:
  Writer(std::FILE* file, std::string path) : file_(file), path_(std::move(path)) {}
  Status bytes(const void* data, std::size_t count) {
    hash_.add(data, count);
    return raw(data, count);
  }
  template <class T>
  Status number(T value) {
    unsigned char out[sizeof(T)];
    to_bytes(value, out);
    return bytes(out, sizeof out);
  }
  Status tokens(const std::vector<std::int32_t>& list) {
    KV4_RETURN_IF_ERROR(number(static_cast<std::uint64_t>(list.size())));
    for (const std::int32_t t : list) KV4_RETURN_IF_ERROR(number(static_cast<std::uint32_t>(t)));
    return {};
  }
  Status text(const std::string& s) {
    KV4_RETURN_IF_ERROR(number(static_cast<std::uint64_t>(s.size())));
    return bytes(s.data(), s.size());
  }
  Status end() {
    unsigned char out[8];
    to_bytes(hash_.value, out);
    return raw(out, sizeof out);
  }

 private:
  Status raw(const void* data, std::size_t count) {
    if (count == 0 || std::fwrite(data, 1, count, file_) == count) return {};
    return invalid_argument("session", "a file that can be written", path_ + ": " + std::strerror(errno));
  }
  std::FILE* file_;
  std::string path_;
  Fnv hash_;
};

// Reads what was found whole before; lengths are checked against what is left all the same.
class Reader {
 public:
  Reader(std::FILE* file, std::uint64_t bytes, std::string path) : file_(file), left_(bytes), path_(std::move(path)) {}
  Status bytes(void* out, std::size_t count) {
    if (count > left_ || (count > 0 && std::fread(out, 1, count, file_) != count)) return damaged(path_, "it ends too early");
    left_ -= count;
    return {};
  }
  template <class T>
  Status number(T* value) {
    unsigned char in[sizeof(T)];
    KV4_RETURN_IF_ERROR(bytes(in, sizeof in));
    *value = 0;
    for (std::size_t i = 0; i < sizeof(T); ++i) *value = static_cast<T>(*value | static_cast<T>(static_cast<T>(in[i]) << (8 * i)));
    return {};
  }
  Status tokens(std::vector<std::int32_t>* list) {
    std::uint64_t count = 0;
    KV4_RETURN_IF_ERROR(number(&count));
    if (count > left_ / 4) return damaged(path_, "it ends too early");
    list->resize(static_cast<std::size_t>(count));
    for (std::int32_t& t : *list) {
      std::uint32_t value = 0;
      KV4_RETURN_IF_ERROR(number(&value));
      t = static_cast<std::int32_t>(value);
    }
    return {};
  }
  Status text(std::string* s) {
    std::uint64_t count = 0;
    KV4_RETURN_IF_ERROR(number(&count));
    if (count > left_) return damaged(path_, "it ends too early");
    s->resize(static_cast<std::size_t>(count));
    return bytes(s->data(), s->size());
  }
  std::uint64_t left() const { return left_; }

 private:
  std::FILE* file_;
  std::uint64_t left_;
  std::string path_;
};

Status write(std::FILE* file, const std::string& path, const Session& session, const Context& context) {
  Writer out(file, path);
  KV4_RETURN_IF_ERROR(out.bytes(kMagic, sizeof kMagic));
  KV4_RETURN_IF_ERROR(out.number(kVersion));
  KV4_RETURN_IF_ERROR(out.number(context.model().identity()));
  KV4_RETURN_IF_ERROR(out.tokens(session.tokens));
  KV4_RETURN_IF_ERROR(out.tokens(session.pending));
  KV4_RETURN_IF_ERROR(out.number(static_cast<std::uint32_t>(session.messages.size())));
  for (const Message& m : session.messages) {
    KV4_RETURN_IF_ERROR(out.text(m.role));
    KV4_RETURN_IF_ERROR(out.text(m.text));
  }
  KV4_RETURN_IF_ERROR(context.state().store->save([&](std::span<const std::byte> piece) { return out.bytes(piece.data(), piece.size()); }));
  return out.end();
}

// The file's whole content against its checksum; *bytes: without it.
Status check_whole(std::FILE* file, const std::string& path, std::uint64_t* bytes) {
  if (fseeko(file, 0, SEEK_END) != 0) return damaged(path, "its length cannot be found");
  const std::uint64_t size = static_cast<std::uint64_t>(ftello(file));
  std::rewind(file);
  char magic[sizeof kMagic] = {};
  if (size < sizeof magic || std::fread(magic, 1, sizeof magic, file) != sizeof magic || !std::equal(magic, magic + sizeof magic, kMagic))
    return invalid_argument("session", "a session file", path + ", which is none");
  if (size < sizeof kMagic + 4 + 8 + 8) return damaged(path, "it ends too early");
  *bytes = size - 8;
  std::rewind(file);
  Fnv hash;
  std::vector<unsigned char> piece(1u << 20);
  for (std::uint64_t left = *bytes; left > 0;) {
    const std::size_t now = static_cast<std::size_t>(std::min<std::uint64_t>(left, piece.size()));
    if (std::fread(piece.data(), 1, now, file) != now) return damaged(path, "it cannot be read");
    hash.add(piece.data(), now);
    left -= now;
  }
  unsigned char stored[8], expected[8];
  to_bytes(hash.value, expected);
  if (std::fread(stored, 1, 8, file) != 8 || !std::equal(stored, stored + 8, expected)) return damaged(path, "its checksum does not match");
  std::rewind(file);
  return {};
}

}  // namespace

Status save_session(const std::string& path, const Session& session, const Context& context) {
  const std::string part = part_of(path);
  const auto failed = [&](const std::string& what) { return invalid_argument("session", "a file that can be written", path + ": " + what); };
  File file(std::fopen(part.c_str(), "wb"));
  if (!file) return failed(std::strerror(errno));
  Status status = write(file.get(), path, session, context);
  if (status.ok() && (std::fflush(file.get()) != 0 || fsync(fileno(file.get())) != 0)) status = failed(std::strerror(errno));
  file.reset();
  if (status.ok() && std::rename(part.c_str(), path.c_str()) != 0) status = failed(std::strerror(errno));
  if (!status.ok()) {
    std::remove(part.c_str());
    return status;
  }
  // The new name, too, is to outlive a power cut.
  const std::string folder = std::filesystem::path(path).parent_path().string();
  if (const int fd = open(folder.empty() ? "." : folder.c_str(), O_RDONLY | O_DIRECTORY); fd >= 0) {
    static_cast<void>(fsync(fd));
    close(fd);
  }
  return {};
}

Status check_session_place(const std::string& path) {
  const auto failed = [&](const std::string& what) { return invalid_argument("session", "a file that can be written", path + ": " + what); };
  std::error_code unused;
  if (std::filesystem::is_directory(path, unused)) return failed("a folder");
  const std::string part = part_of(path);
  const File file(std::fopen(part.c_str(), "wb"));
  if (!file) return failed(std::strerror(errno));
  std::remove(part.c_str());
  return {};
}

std::int64_t session_tokens(const std::string& path) {
  const File file(std::fopen(path.c_str(), "rb"));
  std::error_code failed;
  const std::uint64_t bytes = std::filesystem::file_size(path, failed);
  if (!file || failed) return 0;
  Reader in(file.get(), bytes, path);
  char magic[sizeof kMagic];
  std::uint32_t version = 0;
  std::uint64_t identity = 0;
  std::vector<std::int32_t> tokens, pending;
  if (!in.bytes(magic, sizeof magic).ok() || !std::equal(magic, magic + sizeof magic, kMagic)) return 0;
  if (!in.number(&version).ok() || version != kVersion || !in.number(&identity).ok()) return 0;
  if (!in.tokens(&tokens).ok() || !in.tokens(&pending).ok()) return 0;
  return static_cast<std::int64_t>(tokens.size() + pending.size());
}

Status load_session(const std::string& path, Context* context, Session* out) {
  if (context->length() > 0)
    return error(StatusCode::failed_precondition, "session", "an empty conversation", std::to_string(context->length()) + " tokens");
  const File file(std::fopen(path.c_str(), "rb"));
  if (!file) return invalid_argument("session", "a file that can be read", path + ": " + std::strerror(errno));
  std::uint64_t bytes = 0;
  KV4_RETURN_IF_ERROR(check_whole(file.get(), path, &bytes));
  Reader in(file.get(), bytes, path);
  char magic[sizeof kMagic];
  KV4_RETURN_IF_ERROR(in.bytes(magic, sizeof magic));
  std::uint32_t version = 0;
  KV4_RETURN_IF_ERROR(in.number(&version));
  if (version != kVersion) return invalid_argument("session", "format version " + std::to_string(kVersion), std::to_string(version));
  std::uint64_t identity = 0;
  KV4_RETURN_IF_ERROR(in.number(&identity));
  if (identity != context->model().identity())
    return invalid_argument("session", "a session of the model " + context->model().path(), path + ", of another model");
  Session session;
  KV4_RETURN_IF_ERROR(in.tokens(&session.tokens));
  KV4_RETURN_IF_ERROR(in.tokens(&session.pending));
  std::uint32_t messages = 0;
  KV4_RETURN_IF_ERROR(in.number(&messages));
  for (std::uint32_t i = 0; i < messages; ++i) {
    Message m;
    KV4_RETURN_IF_ERROR(in.text(&m.role));
    KV4_RETURN_IF_ERROR(in.text(&m.text));
    session.messages.push_back(std::move(m));
  }
  const std::size_t held = session.tokens.size();
  if (held > static_cast<std::size_t>(context->options().context))
    return error(StatusCode::out_of_range, "context", "at least " + std::to_string(held) + ", the session's tokens",
                 std::to_string(context->options().context));
  Store& store = *context->state().store;
  KV4_RETURN_IF_ERROR(store.load([&](std::span<std::byte> piece) { return in.bytes(piece.data(), piece.size()); }));
  Status status;
  if (in.left() != 0) status = damaged(path, std::to_string(in.left()) + " bytes too many");
  if (store.length() != static_cast<std::int64_t>(session.tokens.size()))
    status = damaged(path, std::to_string(store.length()) + " tokens in its caches and " + std::to_string(session.tokens.size()) + " in its list");
  if (!status.ok()) {
    static_cast<void>(store.crop(0));
    return status;
  }
  *out = std::move(session);
  return {};
}

}  // namespace kv4::engine
