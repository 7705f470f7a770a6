#include "engine/page_pool.h"

#include <stdexcept>
#include <string>

namespace mote::engine {

PagePool::PagePool(int32_t num_pages) : pages_(num_pages) {
  free_.reserve(num_pages);
  for (int32_t page = num_pages - 1; page >= 0; --page) free_.push_back(page);  // page 0 is taken first
}

int32_t PagePool::take_free() {
  if (free_.empty()) return -1;
  const int32_t page = free_.back();
  free_.pop_back();
  pages_[page].uses = 1;
  return page;
}

void PagePool::acquire(int32_t page) {
  if (pages_[page].is_kept) unlink(page);
  ++pages_[page].uses;
}

void PagePool::release(int32_t page, bool keep) {
  Page& released = pages_[page];
  if (--released.uses > 0) return;
  if (!keep) {
    free_.push_back(page);
    return;
  }
  released.is_kept = true;
  released.earlier = newest_;
  released.later = -1;
  (newest_ < 0 ? oldest_ : pages_[newest_].later) = page;
  newest_ = page;
  ++num_kept_;
}

void PagePool::discard(int32_t page) {
  unlink(page);
  free_.push_back(page);
}

void PagePool::unlink(int32_t page) {
  Page& kept = pages_[page];
  (kept.earlier < 0 ? oldest_ : pages_[kept.earlier].later) = kept.later;
  (kept.later < 0 ? newest_ : pages_[kept.later].earlier) = kept.earlier;
  kept.earlier = kept.later = -1;
  kept.is_kept = false;
  --num_kept_;
}

void PagePool::check() const {
  const auto fail = [](const std::string& what) { throw std::logic_error("PagePool: " + what); };
  std::vector<bool> seen(pages_.size());
  for (const int32_t page : free_) {
    if (seen[page] || pages_[page].uses != 0 || pages_[page].is_kept) fail("page is free and more");
    seen[page] = true;
  }
  int32_t num_kept = 0;
  for (int32_t page = oldest_, earlier = -1; page >= 0; earlier = page, page = pages_[page].later) {
    if (seen[page] || pages_[page].uses != 0 || !pages_[page].is_kept) fail("page is kept and more");
    if (pages_[page].earlier != earlier) fail("list of kept pages is torn");
    seen[page] = true;
    ++num_kept;
  }
  if (num_kept != num_kept_) fail("count of kept pages is wrong");
  for (size_t page = 0; page < pages_.size(); ++page) {
    if (seen[page] == (pages_[page].uses > 0)) fail("page " + std::to_string(page) + " is lost or owned twice");
  }
}

}  // namespace mote::engine
