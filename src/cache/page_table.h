// The ids of a sequence's pages in memory that kernels read. Entries past the last one are undefined: a planned longer
// table is written there and becomes visible once it replaces this one.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "cache/pool.h"

namespace kv4 {

class PageTable {
 public:
  const PageId* data() const { return block_ == nullptr ? nullptr : block_->as<PageId>() + begin_; }
  // After a copy both are used independently: neither writes to the memory that they share.
  void fork() { own_ = false; }
  const Block* block() const { return block_.get(); }

  // The successor of this table: the range `kept` of its ids (which the host has too), the last of them replaced if
  // `last` is an id, then `fresh`. Other holders of this table find it unchanged.
  Status change(Backend& backend, std::span<const PageId> ids, const ledger::Rows& kept, PageId last,
                std::span<const PageId> fresh) {
    const std::int64_t end = begin_ + kept.end;
    if (last < 0 && (fresh.empty() || (own_ && kept.end == count_ && end + size(fresh) <= capacity()))) {
      begin_ += kept.begin;
      count_ = kept.count() + size(fresh);
      return fresh.empty() ? Status() : backend.upload(block_->as<PageId>() + end, fresh.data(), fresh.size_bytes());
    }
    std::vector<PageId> all(ids.begin() + kept.begin, ids.begin() + kept.end);
    if (last >= 0) all.back() = last;
    all.insert(all.end(), fresh.begin(), fresh.end());
    return rewrite(backend, all, size(all) + size(all) / 2);
  }
  // Room for `capacity` ids in all, of which these are held.
  Status reserve(Backend& backend, std::span<const PageId> ids, std::int64_t room) {
    return own_ && begin_ + room <= capacity() ? Status() : rewrite(backend, ids, room);
  }

 private:
  static constexpr std::int64_t kLeast = 16;  // ids; blocks are 64-byte aligned

  static std::int64_t size(std::span<const PageId> ids) { return static_cast<std::int64_t>(ids.size()); }
  std::int64_t capacity() const {
    return block_ == nullptr ? 0 : static_cast<std::int64_t>(block_->bytes() / sizeof(PageId));
  }
  Status rewrite(Backend& backend, std::span<const PageId> ids, std::int64_t room) {
    std::shared_ptr<Block> block;
    KV4_RETURN_IF_ERROR(
        Block::make(backend, "page table", static_cast<std::size_t>(std::max(room, kLeast)) * sizeof(PageId), &block));
    if (!ids.empty()) KV4_RETURN_IF_ERROR(backend.upload(block->as<PageId>(), ids.data(), ids.size_bytes()));
    block_ = std::move(block);
    begin_ = 0;
    count_ = size(ids);
    own_ = true;
    return {};
  }

  std::shared_ptr<Block> block_;
  std::int64_t begin_ = 0, count_ = 0;
  bool own_ = true;
};

}  // namespace kv4
