// A GGUF file: its metadata and its tensors' places, checked against the file's length before anything is read.
#pragma once

#include <gguf.h>

#include <cstdint>
#include <cstdio>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "ggml_ptr.h"
#include "kv4/status.h"

namespace kv4::engine {

class GgufFile {
 public:
  // Errors: invalid_argument for no such file, one that is not GGUF or damaged, or whose tensors reach beyond its end.
  static Status open(const std::string& path, std::unique_ptr<GgufFile>* out);

  const std::string& path() const { return path_; }
  std::uint64_t bytes() const { return bytes_; }

  bool has(const std::string& key) const { return gguf_find_key(gguf_.get(), key.c_str()) >= 0; }
  // Errors: invalid_argument for a missing key or one of another type. Integers take any integer type that holds the value.
  Status text(const std::string& key, std::string* out) const;
  Status integer(const std::string& key, std::int64_t* out) const;
  Status real(const std::string& key, double* out) const;
  Status number(const std::string& key, double* out) const;  // of any of these types, or a truth value as 0 or 1
  // The same where there is such a key; else *out is as it was.
  Status optional_integer(const std::string& key, std::int64_t* out) const { return has(key) ? integer(key, out) : Status(); }
  Status optional_real(const std::string& key, double* out) const { return has(key) ? real(key, out) : Status(); }

  // Keys that begin with `prefix` and that none of the above was called with.
  std::vector<std::string> unasked(const std::string& prefix) const;

  std::vector<std::string> tensor_names() const;
  // Of a tensor: null where there is none. Its data pointer is empty.
  const ggml_tensor* tensor(const std::string& name) const { return ggml_get_tensor(tensors_.get(), name.c_str()); }
  // Copies the tensor of this name into `target`, which has its type and shape and lies in a backend's buffer.
  Status read(const std::string& name, ggml_tensor* target) const;

  // 64-bit FNV-1a over the file's length, header, metadata and every tensor's name, type, shape and offset with the first
  // kilobyte of its data: tells models apart without reading gigabytes.
  Status identity(std::uint64_t* out) const;

 private:
  struct Close {
    void operator()(std::FILE* f) const { std::fclose(f); }
    void operator()(gguf_context* g) const { gguf_free(g); }
  };
  std::int64_t find(const std::string& key) const {
    asked_.insert(key);
    return gguf_find_key(gguf_.get(), key.c_str());
  }

  std::string path_;
  std::uint64_t bytes_ = 0;
  mutable std::set<std::string> asked_;
  std::unique_ptr<std::FILE, Close> file_;
  std::unique_ptr<gguf_context, Close> gguf_;
  GgmlContext tensors_;
};

}  // namespace kv4::engine
