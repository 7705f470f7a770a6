#include "engine/kv_pages.h"

#include <algorithm>
#include <bit>
#include <stdexcept>
#include <string>

namespace mote::engine {

KvPages::KvPages(int32_t num_pages, int32_t page_size, bool share, int key_bits)
    : page_size_(page_size),
      shift_(std::has_single_bit(static_cast<uint32_t>(page_size)) ? std::countr_zero(static_cast<uint32_t>(page_size))
                                                                   : -1),
      share_(share),
      pool_(num_pages),
      cache_(num_pages, page_size, key_bits),
      held_(num_pages) {}

PageContents KvPages::contents(const Sequence& sequence, size_t place, uint64_t parent) const {
  const size_t begin = place * page_size_;
  return {&sequence.tokens[begin], sequence.salt, sequence.experts, parent};
}

PageKey KvPages::key(Sequence& sequence, size_t place) const {
  while (sequence.keys.size() <= place) {
    const PageKey before = sequence.keys.empty() ? cache_.root(sequence.salt) : sequence.keys.back();
    sequence.keys.push_back(cache_.extend(before, contents(sequence, sequence.keys.size(), 0)));
  }
  return sequence.keys[place];
}

int64_t KvPages::find_hits(Sequence& sequence) const {
  if (!share_) return 0;
  auto& hits = sequence.hits;
  // The page of the last token is never one: that token is left to compute.
  const size_t most = static_cast<size_t>(place_of(sequence.num_tokens() - 1));
  size_t num_good = 0;
  while (num_good < std::min(hits.size(), most) && cache_.serial(hits[num_good].page) == hits[num_good].serial) {
    ++num_good;
  }
  hits.resize(num_good);
  while (hits.size() < most) {
    const size_t place = hits.size();
    const int32_t page =
        cache_.find(key(sequence, place), contents(sequence, place, place == 0 ? 0 : hits.back().serial));
    if (page < 0) break;
    hits.push_back({page, cache_.serial(page)});
  }
  return static_cast<int64_t>(hits.size());
}

bool KvPages::has_room(const Sequence& sequence, int64_t margin) const {
  int64_t needed = pages_for(sequence.num_tokens()) - static_cast<int64_t>(sequence.hits.size());
  for (const auto& hit : sequence.hits) needed += pool_.is_kept(hit.page);  // it stops being available
  return needed + margin <= pool_.num_available();
}

void KvPages::admit(Sequence& sequence) {
  for (const auto& hit : sequence.hits) {
    pool_.acquire(hit.page);
    sequence.pages.push_back(hit.page);
  }
  sequence.num_computed = static_cast<int64_t>(sequence.hits.size()) * page_size_;
  sequence.may_share = true;
  sequence.hits.clear();
  extend(sequence, sequence.num_tokens());
}

int32_t KvPages::take_page() {
  if (pool_.num_free() == 0) {
    const int32_t oldest = pool_.least_recent();
    if (oldest < 0) return -1;
    cache_.forget(oldest);
    pool_.discard(oldest);
    ++num_evictions_;
  }
  return pool_.take_free();
}

bool KvPages::extend(Sequence& sequence, int64_t num_tokens) {
  while (static_cast<int64_t>(sequence.pages.size()) * page_size_ < num_tokens) {
    const int32_t page = take_page();
    if (page < 0) return false;
    sequence.pages.push_back(page);
  }
  return true;
}

bool KvPages::make_writable(Sequence& sequence, int64_t begin, int64_t end) {
  const size_t last = static_cast<size_t>(place_of(end - 1));
  for (size_t place = static_cast<size_t>(place_of(begin)); place <= last; ++place) {
    const int32_t page = sequence.pages[place];
    if (pool_.uses(page) - held_[page] > 1 || is_needed_to_undo(page, begin)) {
      const int32_t to = take_page();
      if (to < 0) return false;
      // The sequence's use of the source passes to the copy, so that it stays until the copy is made or undone.
      copies_.push_back({&sequence, place, page, to});
      ++held_[page];
      sequence.pages[place] = to;
    } else if (cache_.holds(page)) {
      cache_.forget(page);
    }
  }
  sequence.num_writable = static_cast<int64_t>(last + 1) * page_size_;
  return true;
}

// Whether a sequence that would get this page back has computed tokens in it from `begin` on.
bool KvPages::is_needed_to_undo(int32_t page, int64_t begin) const {
  return held_[page] > 0 && std::any_of(copies_.begin(), copies_.end(), [&](const Copy& copy) {
           return copy.from == page && copy.sequence->num_computed > begin;
         });
}

void KvPages::commit(Sequence& sequence, int64_t count, bool valid) {
  const int64_t first = place_of(sequence.num_computed);
  sequence.num_computed += count;
  sequence.may_share &= valid;
  if (!share_ || !sequence.may_share) return;
  for (int64_t place = first; place < place_of(sequence.num_computed); ++place) enter(sequence, place);
}

void KvPages::enter(Sequence& sequence, size_t place) {
  const int32_t page = sequence.pages[place];
  const uint64_t parent = place == 0 ? 0 : cache_.serial(sequence.pages[place - 1]);
  if ((place > 0 && parent == 0) || cache_.holds(page)) return;
  const PageKey key = this->key(sequence, place);
  const PageContents contents = this->contents(sequence, place, parent);
  const int32_t other = cache_.with_key(key);
  if (other >= 0 && cache_.find(key, contents) == other) {
    // Two sequences computed the same page; from here on they have one.
    pool_.acquire(other);
    release_page(page);
    sequence.pages[place] = other;
    return;
  }
  if (other >= 0) drop(other);  // it continues a page that is gone, so nobody would ever find it
  cache_.add(page, key, contents);
}

void KvPages::drop(int32_t page) {
  cache_.forget(page);
  if (pool_.is_kept(page)) pool_.discard(page);
}

void KvPages::share(Sequence& from, Sequence& to) {
  for (const int32_t page : to.pages) pool_.acquire(page);
  from.num_writable = to.num_writable = 0;
}

void KvPages::truncate(Sequence& sequence, int64_t num_tokens) {
  sequence.tokens.resize(num_tokens);
  const size_t num_full = static_cast<size_t>(place_of(num_tokens));
  sequence.keys.resize(std::min(sequence.keys.size(), num_full));
  sequence.hits.resize(std::min(sequence.hits.size(), num_full));
  sequence.num_computed = std::min(sequence.num_computed, num_tokens);
  sequence.num_writable = 0;
  while (static_cast<int64_t>(sequence.pages.size()) > pages_for(num_tokens)) {
    release_page(sequence.pages.back());
    sequence.pages.pop_back();
  }
}

void KvPages::release(Sequence& sequence) {
  drop_copies_of(sequence);
  for (; !sequence.pages.empty(); sequence.pages.pop_back()) release_page(sequence.pages.back());
  sequence.num_computed = sequence.num_writable = 0;
}

void KvPages::forget(const Sequence& sequence) {
  for (const int32_t page : sequence.pages) {
    if (cache_.holds(page)) drop(page);
  }
}

void KvPages::forget_all() {
  for (int32_t page = 0; page < pool_.num_pages(); ++page) {
    if (cache_.holds(page)) drop(page);
  }
}

void KvPages::drop_copies_of(const Sequence& sequence) {
  std::erase_if(copies_, [&](const Copy& copy) {
    if (copy.sequence != &sequence) return false;
    --held_[copy.from];
    release_page(copy.from);
    return true;
  });
}

void KvPages::keep_copies() {
  for (const Copy& copy : copies_) {
    --held_[copy.from];
    release_page(copy.from);
  }
  copies_.clear();
}

void KvPages::undo_copies() {
  for (const Copy& copy : copies_) {
    --held_[copy.from];
    copy.sequence->pages[copy.place] = copy.from;
    copy.sequence->num_writable = 0;
    release_page(copy.to);
  }
  copies_.clear();
}

void KvPages::check(const std::vector<const Sequence*>& sequences) const {
  const auto fail = [](const std::string& what) { throw std::logic_error("KvPages: " + what); };
  pool_.check();
  cache_.check();
  std::vector<int32_t> uses(pool_.num_pages()), held(pool_.num_pages());
  for (const Sequence* sequence : sequences) {
    for (const int32_t page : sequence->pages) ++uses[page];
    if (sequence->num_computed >= sequence->num_tokens()) fail("a sequence has no token left to compute");
    if (pages_for(sequence->num_computed) > static_cast<int64_t>(sequence->pages.size())) fail("pages are missing");
  }
  for (const Copy& copy : copies_) ++uses[copy.from], ++held[copy.from];
  for (int32_t page = 0; page < pool_.num_pages(); ++page) {
    if (uses[page] != pool_.uses(page) || held[page] != held_[page]) fail("uses of a page are miscounted");
    if (pool_.is_kept(page) && !cache_.holds(page)) fail("a kept page cannot be found");
  }
  // Of the kept pages none goes before one that continues it.
  std::vector<uint64_t> gone;
  for (int32_t page = pool_.least_recent(); page >= 0; page = pool_.after(page)) {
    const uint64_t parent = cache_.parent(page);
    if (std::binary_search(gone.begin(), gone.end(), parent) && parent != 0) fail("a head goes before its tail");
    gone.insert(std::upper_bound(gone.begin(), gone.end(), cache_.serial(page)), cache_.serial(page));
  }
}

}  // namespace mote::engine
