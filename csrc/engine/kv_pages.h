// What sequences own of the KV memory: their pages, which of them are shared with others or found in the prefix cache,
// and the copies that keep one sequence from writing into what another one reads.
//
// Three rules hold everything together. A page that a step writes into is used by one sequence and has no entry in the
// cache (make_writable). Pages are entered when a step has filled them, and only behind a page that is entered itself
// (commit). A sequence always has a token left to compute, for the logits of the next one.
//
// The caller is StepScheduler, which decides who gets pages; nothing here takes a page from anybody.
#pragma once

#include <cstdint>
#include <vector>

#include "engine/page_pool.h"
#include "engine/prefix_cache.h"

namespace mote::engine {

struct Sequence {
  // Leading pages found at the last look into the cache; good as long as the serial numbers are.
  struct Hit {
    int32_t page;
    uint64_t serial;
  };
  std::vector<Hit> hits;
  uint64_t salt = 0, experts = 0;
  std::vector<PageKey> keys;  // of leading full pages, as far as they were needed

  // What every step needs stands together: a step is as long as the memory it touches.
  std::vector<Token> tokens;
  std::vector<int32_t> pages;  // at least as many as num_computed needs
  int64_t num_computed = 0;    // leading tokens whose keys and values are in memory
  int64_t num_writable = 0;    // tokens from num_computed up to here may be written; not to be asked at every step
  bool may_share = true;       // false once its memory is not what its tokens say

  int64_t num_tokens() const { return static_cast<int64_t>(tokens.size()); }
  int64_t num_left() const { return num_tokens() - num_computed; }
};

class KvPages {
 public:
  // A page to be copied before the forward; until commit or abandon the source stays as it is.
  struct Copy {
    Sequence* sequence;
    size_t place;  // in its pages
    int32_t from, to;
  };

  KvPages(int32_t num_pages, int32_t page_size, bool share, int key_bits);

  int32_t page_size() const { return page_size_; }
  // The place among a sequence's pages of its token number `token`.
  int64_t place_of(int64_t token) const { return shift_ >= 0 ? token >> shift_ : token / page_size_; }
  int64_t pages_for(int64_t num_tokens) const { return place_of(num_tokens + page_size_ - 1); }
  const PagePool& pool() const { return pool_; }
  int64_t num_evictions() const { return num_evictions_; }

  // How many leading pages of a sequence without pages are in the cache.
  int64_t find_hits(Sequence& sequence) const;
  // Whether all its tokens find room, `margin` pages left over. After find_hits.
  bool has_room(const Sequence& sequence, int64_t margin) const;
  // Takes its hits and pages for all its tokens. After has_room.
  void admit(Sequence& sequence);
  // Pages for the first num_tokens tokens; false when no page is left, what it got stays.
  bool extend(Sequence& sequence, int64_t num_tokens);
  // Tokens begin .. end-1 may be written; false when no page is left for a copy.
  bool make_writable(Sequence& sequence, int64_t begin, int64_t end);
  // Both at once, for the next `count` tokens.
  bool prepare(Sequence& sequence, int64_t count) {
    const int64_t begin = sequence.num_computed, end = begin + count;
    return end <= sequence.num_writable || (extend(sequence, end) && make_writable(sequence, begin, end));
  }

  // The next `count` tokens are computed; their full pages are entered unless !valid.
  void commit(Sequence& sequence, int64_t count, bool valid);
  // A sequence made as a copy of another shares its pages.
  void share(Sequence& from, Sequence& to);
  // The sequence has only its first tokens any more; tokens and stage ids go too.
  void truncate(Sequence& sequence, int64_t num_tokens);
  // Gives back all pages; entered ones are kept.
  void release(Sequence& sequence);
  // None of its pages is found again.
  void forget(const Sequence& sequence);
  // No page that is in the cache now is found again.
  void forget_all();

  const std::vector<Copy>& copies() const { return copies_; }
  // The copies were made.
  void keep_copies();
  // They were not: every sequence has its page back.
  void undo_copies();

  // Every page is used as often as the sequences say, and the cache and the pool agree. std::logic_error
  void check(const std::vector<const Sequence*>& sequences) const;

 private:
  PageContents contents(const Sequence& sequence, size_t place, uint64_t parent) const;
  PageKey key(Sequence& sequence, size_t place) const;
  int32_t take_page();
  bool is_needed_to_undo(int32_t page, int64_t begin) const;
  void enter(Sequence& sequence, size_t place);
  void drop(int32_t page);
  void release_page(int32_t page) { pool_.release(page, cache_.holds(page)); }
  void drop_copies_of(const Sequence& sequence);

  int32_t page_size_;
  int32_t shift_;  // of a page size that is a power of two, else -1: divisions were half of a step's time
  bool share_;
  PagePool pool_;
  PrefixCache cache_;
  std::vector<Copy> copies_;
  std::vector<int32_t> held_;  // uses of a page by copies_
  int64_t num_evictions_ = 0;
};

}  // namespace mote::engine
