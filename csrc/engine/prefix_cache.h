// Which page holds the keys and values of which tokens. A full page is known by a 128-bit key, chained over the pages
// before it, and its contents are compared on every hit:
//
//   key(page) = hash(key(page before), token ids, stage ids, experts if any token of the page is not base only)
//   key(none) = hash(salt)
//
// So pages that only the base computed are shared by all sets of experts, and nothing is shared between salts. Every
// entry has a serial number that is never used again; an entry remembers that of the page before it, so that the chain
// is right even where keys collide and pages have changed hands. The caller is KvPages. Idea: vLLM's chained block
// hashes, and aLoRA's base-aligned ones (arXiv 2512.17910).
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

namespace mote::engine {

struct PageKey {
  uint64_t low = 0, high = 0;

  bool operator==(const PageKey&) const = default;
};

// Together, because a step reads and writes both, of every request in another place of memory.
struct Token {
  int64_t id = 0;
  int32_t stage_id = 0;

  bool operator==(const Token&) const = default;
};

// The contents of one full page, and what they follow.
struct PageContents {
  const Token* tokens;  // [page_size]
  uint64_t salt;
  uint64_t experts;
  uint64_t parent = 0;  // serial number of the page before, 0 for none
};

class PrefixCache {
 public:
  // key_bits: of each half of a key, less than 64 in tests, where keys must collide.
  PrefixCache(int32_t num_pages, int32_t page_size, int key_bits);

  PageKey root(uint64_t salt) const;
  PageKey extend(PageKey parent, const PageContents& contents) const;

  // The page entered under this key, whatever it holds, or -1.
  int32_t with_key(PageKey key) const;
  // The page with this key and these contents, or -1.
  int32_t find(PageKey key, const PageContents& contents) const;
  // Enters a page that has no entry, under a key that no page has.
  void add(int32_t page, PageKey key, const PageContents& contents);
  void forget(int32_t page);
  bool holds(int32_t page) const { return entries_[page].serial != 0; }
  // The number of the page's entry, 0 without one.
  uint64_t serial(int32_t page) const { return entries_[page].serial; }
  uint64_t parent(int32_t page) const { return entries_[page].parent; }

  // Every entry is found under its key, and nothing else is. std::logic_error
  void check() const;

 private:
  struct Entry {
    PageKey key;
    uint64_t serial = 0, parent = 0, salt = 0, experts = 0;
    int32_t next = -1;  // page of the same bucket
  };

  size_t bucket_of(PageKey key) const { return key.low & (buckets_.size() - 1); }
  bool uses_experts(const Token* tokens) const;
  bool is_same(int32_t page, const PageContents& contents) const;

  int32_t page_size_;
  uint64_t mask_;
  uint64_t num_serials_ = 0;
  std::vector<Entry> entries_;       // one a page
  std::vector<int32_t> buckets_;     // first page of a chain, -1 for none
  std::unique_ptr<Token[]> tokens_;  // [num_pages, page_size], of pages with an entry
};

}  // namespace mote::engine
