// Pages of KV memory and who uses them: each is free, used by one or more sequences, or kept: used by none, but with
// contents that somebody may want again. Kept pages stand in a list by the time of their last use.
//
//   free  --take_free-->  used  --release(keep)-->  kept  --acquire-->  used
//     ^---release---------/                           \----discard-->  free
//
// A sequence releases its last page first, so the tail of a prefix always stands before its head in the list, and a
// page is never given up while one that continues it is kept. Idea: the free list of vLLM's KV cache manager.
#pragma once

#include <cstdint>
#include <vector>

namespace mote::engine {

class PagePool {
 public:
  explicit PagePool(int32_t num_pages);

  int32_t num_pages() const { return static_cast<int32_t>(pages_.size()); }
  int32_t num_free() const { return static_cast<int32_t>(free_.size()); }
  int32_t num_kept() const { return num_kept_; }
  int32_t num_available() const { return num_free() + num_kept_; }
  int32_t uses(int32_t page) const { return pages_[page].uses; }
  bool is_kept(int32_t page) const { return pages_[page].is_kept; }

  // A free page, now used once; -1 when there is none.
  int32_t take_free();
  // One more use of a page that is used or kept.
  void acquire(int32_t page);
  // One use less; with the last one the page is kept, as the last to go, or free.
  void release(int32_t page, bool keep);
  // A kept page becomes free.
  void discard(int32_t page);
  // The kept page that was used least recently, -1 when there is none; after(page) the next one.
  int32_t least_recent() const { return oldest_; }
  int32_t after(int32_t page) const { return pages_[page].later; }

  // Every page is in exactly one of the three states, and the list says what the counts say. std::logic_error
  void check() const;

 private:
  struct Page {
    int32_t uses = 0;
    int32_t earlier = -1, later = -1;  // neighbours among the kept
    bool is_kept = false;
  };

  void unlink(int32_t page);

  std::vector<Page> pages_;
  std::vector<int32_t> free_;
  int32_t oldest_ = -1, newest_ = -1, num_kept_ = 0;
};

}  // namespace mote::engine
