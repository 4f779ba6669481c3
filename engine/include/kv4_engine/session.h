// A conversation on disk. All numbers little-endian:
//
//   8   magic "kv4 sess"
//   4   format version, 1
//   8   identity of the model (Model::identity)
//   8   tokens that the cache holds, then each as 4 bytes
//   8   pending tokens, then each as 4 bytes: drawn, but not yet taken in
//   4   messages, then for each: 8 bytes length and the role, 8 bytes length and the text
//   ..  the cache of each layer, as Cache::save writes it
//   8   64-bit FNV-1a of all before it
//
// Saving writes a file beside the old one, which takes its place once it is whole.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kv4/status.h"
#include "kv4_engine/context.h"
#include "kv4_engine/vocabulary.h"

namespace kv4::engine {

struct Session {
  std::vector<std::int32_t> tokens;   // what the context holds
  std::vector<std::int32_t> pending;  // what is to be taken in next
  std::vector<Message> messages;      // of a chat; empty otherwise
};

// Errors: unsupported for a context of CacheKind::f16; invalid_argument where the file cannot be written (an old one is then as it was).
Status save_session(const std::string& path, const Session& session, const Context& context);
// Into an empty context, which stays empty on errors: invalid_argument for a file that cannot be read, is no session, is damaged, or
// belongs to another model, recipe or version; out_of_range where it holds more than the context takes. What is pending need not fit.
Status load_session(const std::string& path, Context* context, Session* out);

// Before a conversation begins. Errors: invalid_argument where save_session could not write this file.
Status check_session_place(const std::string& path);
// How many tokens a session's file says that it holds, pending ones included, as a hint of how large a context it needs: nothing else
// of it is looked at. 0 where there is no such file or it is no session.
std::int64_t session_tokens(const std::string& path);

}  // namespace kv4::engine
