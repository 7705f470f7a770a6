#include "engine/prefix_cache.h"

#include <algorithm>
#include <bit>
#include <stdexcept>

#include "core/stage_ids.h"

namespace mote::engine {
namespace {

// Two lanes that mix differently; each step is a bijection of its lane, so no input is lost on the way.
void absorb(PageKey& key, uint64_t word) {
  key.low = (key.low ^ word) * 0x9E3779B97F4A7C15u;
  key.low ^= key.low >> 32;
  key.high = (std::rotl(key.high, 23) + word) * 0xD6E8FEB86659FD93u;
  key.high ^= key.high >> 29;
}

}  // namespace

PrefixCache::PrefixCache(int32_t num_pages, int32_t page_size, int key_bits)
    : page_size_(page_size),
      mask_(key_bits >= 64 ? ~uint64_t{0} : (uint64_t{1} << key_bits) - 1),
      entries_(num_pages),
      buckets_(std::bit_ceil(2 * static_cast<size_t>(num_pages)), -1),
      // Not initialised: memory of pages that are never used is never touched.
      tokens_(std::make_unique_for_overwrite<Token[]>(static_cast<size_t>(num_pages) * page_size)) {}

PageKey PrefixCache::root(uint64_t salt) const {
  PageKey key{0x243F6A8885A308D3u, 0x13198A2E03707344u};
  absorb(key, salt);
  return key;
}

PageKey PrefixCache::extend(PageKey parent, const PageContents& contents) const {
  PageKey key = parent;
  for (int32_t i = 0; i < page_size_; ++i) {
    absorb(key, static_cast<uint64_t>(contents.tokens[i].id));
    absorb(key, static_cast<uint64_t>(contents.tokens[i].stage_id));
  }
  const bool with_experts = uses_experts(contents.tokens);
  absorb(key, with_experts ? 1 : 0);  // says what kind of word comes next
  absorb(key, with_experts ? contents.experts : 0);
  return {key.low & mask_, key.high & mask_};
}

int32_t PrefixCache::with_key(PageKey key) const {
  int32_t page = buckets_[bucket_of(key)];
  while (page >= 0 && entries_[page].key != key) page = entries_[page].next;
  return page;
}

int32_t PrefixCache::find(PageKey key, const PageContents& contents) const {
  const int32_t page = with_key(key);
  return page >= 0 && is_same(page, contents) ? page : -1;
}

void PrefixCache::add(int32_t page, PageKey key, const PageContents& contents) {
  int32_t& first = buckets_[bucket_of(key)];
  const size_t begin = static_cast<size_t>(page) * page_size_;
  std::copy_n(contents.tokens, page_size_, &tokens_[begin]);
  entries_[page] = {key, ++num_serials_, contents.parent, contents.salt, contents.experts, first};
  first = page;
}

void PrefixCache::forget(int32_t page) {
  int32_t* place = &buckets_[bucket_of(entries_[page].key)];
  while (*place != page) place = &entries_[*place].next;
  *place = entries_[page].next;
  entries_[page] = {};
}

bool PrefixCache::uses_experts(const Token* tokens) const {
  return std::any_of(tokens, tokens + page_size_, [](const Token& token) { return token.stage_id != kBaseOnly; });
}

bool PrefixCache::is_same(int32_t page, const PageContents& contents) const {
  const Entry& entry = entries_[page];
  const size_t begin = static_cast<size_t>(page) * page_size_;
  return entry.parent == contents.parent && entry.salt == contents.salt &&
         std::equal(contents.tokens, contents.tokens + page_size_, &tokens_[begin]) &&
         (entry.experts == contents.experts || !uses_experts(contents.tokens));
}

void PrefixCache::check() const {
  const auto fail = [](const char* what) { throw std::logic_error(what); };
  size_t num_found = 0, num_entries = 0;
  for (size_t bucket = 0; bucket < buckets_.size(); ++bucket) {
    for (int32_t page = buckets_[bucket]; page >= 0; page = entries_[page].next, ++num_found) {
      if (num_found > entries_.size()) fail("PrefixCache: a chain of pages is a ring");
      if (!holds(page) || bucket_of(entries_[page].key) != bucket) fail("PrefixCache: a page is in a wrong chain");
      if (entries_[page].parent >= entries_[page].serial) fail("PrefixCache: a page is older than what it continues");
    }
  }
  for (const Entry& entry : entries_) num_entries += entry.serial != 0;
  if (num_found != num_entries) fail("PrefixCache: an entry is not in its chain");
}

}  // namespace mote::engine
