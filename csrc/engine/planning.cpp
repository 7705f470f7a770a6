// StepScheduler::plan(): who takes part in the next forward, with how many tokens, and the arrays that say so.
//
// Decodes come first and take pages from others when there are none; then prefills, whose pages are all reserved; then
// admissions, which leave a margin for what the running need next. In a step that took pages from somebody nobody is
// admitted: the pages would go back and forth. The first of the running is never a victim, so it always gets on, and
// with it, one after the other, everybody.
#include <algorithm>
#include <cmath>
#include <tuple>

#include "engine/step_scheduler.h"

namespace mote::engine {
namespace {

// As many of the oldest waiting requests are looked at for the longest prefix in the cache.
constexpr int kWindow = 32;

// So many requests ahead memory is asked for what a step needs of them.
constexpr size_t kAhead = 8;

void prefetch(const Request& request) {
  const char* const begin = reinterpret_cast<const char*>(&request.tokens);
  for (size_t offset = 0; offset < 192; offset += 64) __builtin_prefetch(begin + offset);
}

// After prefetch, what it points to.
void prefetch_arrays(const Request& request) {
  __builtin_prefetch(&request.tokens[request.num_computed]);
  __builtin_prefetch(request.pages.data());
}

}  // namespace

std::shared_ptr<const Plan> StepScheduler::plan(std::optional<int64_t> only) {
  if (is_open_) throw std::logic_error("plan: commit or abandon the last plan first");
  Request* const chosen = only ? find(*only) : nullptr;
  rows_.clear();
  const size_t num_preempted = preempted_.size();
  budget_ = options_.max_batch_tokens;
  plan_running(/*decoding=*/true, chosen);
  plan_running(/*decoding=*/false, chosen);
  if (preempted_.size() == num_preempted) plan_admissions(chosen);
  std::erase_if(rows_, [](const Row& row) { return !row.request->is_running; });
  if (rows_.empty()) return nullptr;

  const std::shared_ptr<Plan> made = plans_.take();
  order_rows();
  write_plan(*made);
  is_open_ = true;
  return made;
}

void StepScheduler::plan_running(bool decoding, const Request* only) {
  candidates_.clear();
  for (size_t place = 0; place < running_.size(); ++place) {
    // The model has pushed them out of the processor's caches, and they lie scattered over memory.
    if (place + kAhead < running_.size()) prefetch(*running_[place + kAhead]);
    Request* const request = running_[place];
    if (request->is_decoding == decoding && (only == nullptr || request == only)) candidates_.push_back(request);
  }
  for (size_t place = 0; place < candidates_.size(); ++place) {
    if (budget_ == 0) return;
    if (place + kAhead < candidates_.size()) prefetch_arrays(*candidates_[place + kAhead]);
    Request* const request = candidates_[place];
    if (!request->is_running) continue;  // preempted by one before it
    const int64_t count = chunk(*request);
    if (secure(*request, count)) add_row(*request, count);
  }
}

void StepScheduler::plan_admissions(Request* only) {
  while (budget_ > 0 && !waiting_.empty()) {
    if (num_running_ >= options_.max_running || (only != nullptr && only->is_running)) return;
    Request& request = only != nullptr ? *only : choose_waiting();
    if (num_running_ + request.num_samples() > options_.max_running) return;
    const int64_t num_hits = kv_.find_hits(request);
    if (!kv_.has_room(request, running_.empty() ? 0 : margin())) return;
    if (only == nullptr) pass_over(request);
    take_from_waiting(request);
    kv_.admit(request);
    start_running(request);
    stats_.prefix_query_tokens += request.num_tokens();
    stats_.prefix_hit_tokens += num_hits * kv_.page_size();
    if (!request.was_admitted) request.num_cached = std::min(request.num_computed, request.prompt_length);
    request.was_admitted = true;
    add_row(request, chunk(request));
  }
}

void StepScheduler::add_row(Request& request, int64_t count) {
  rows_.push_back({&request, count, 0, 0, request.tokens[request.num_computed].stage_id});
  budget_ -= count;
}

// Pages for its next tokens, if need be from others; false when its own were taken.
bool StepScheduler::secure(Request& request, int64_t count) {
  while (!kv_.prepare(request, count)) {
    preempt(choose_victim());
    if (!request.is_running) return false;
  }
  return true;
}

void StepScheduler::preempt(Request& request) {
  for (const Row& row : rows_) {
    if (row.request == &request) budget_ += row.count;
  }
  kv_.release(request);
  stop_running(request);
  put_to_waiting(request);
  preempted_.push_back(request.id);
  preempted_.insert(preempted_.end(), request.other_ids.begin(), request.other_ids.end());
  ++stats_.preemptions;
}

Request& StepScheduler::choose_victim() const {
  Request* victim = nullptr;
  std::tuple<int64_t, bool, double, int64_t> best;
  for (size_t place = 1; place < running_.size(); ++place) {
    Request* request = running_[place];
    const double left =
        request->rules().expected_remaining(request->path, lengths_) + static_cast<double>(request->num_left());
    const std::tuple cost(-int64_t{request->priority}, !request->rules().in_last_stage(request->path), left,
                          request->arrival);
    if (victim == nullptr || cost > best) victim = request, best = cost;
  }
  if (victim == nullptr) throw std::logic_error("StepScheduler: the first request alone is out of pages");
  return *victim;
}

Request& StepScheduler::choose_waiting() const {
  Request* const oldest = *waiting_.begin();
  Request* best = nullptr;
  int64_t most = -1;
  int num_seen = 0;
  for (Request* request : waiting_) {
    if (request->priority != oldest->priority || ++num_seen > kWindow) break;
    if (request->passed_over >= options_.max_passed_over) return *request;
    const int64_t num_hits = kv_.find_hits(*request);
    if (num_hits > most) best = request, most = num_hits;
  }
  return *best;
}

void StepScheduler::pass_over(const Request& admitted) {
  for (Request* request : waiting_) {
    if (request == &admitted) return;
    ++request->passed_over;
  }
}

// Pages that an admission leaves: what the running need for one more token each, and a share of all.
int64_t StepScheduler::margin() const {
  double pages = std::ceil(options_.safety_margin * static_cast<double>(options_.num_pages));
  for (const Request* request : running_) {
    const bool is_full = kv_.pages_for(request->num_tokens() + 1) > static_cast<int64_t>(request->pages.size());
    pages += is_full ? static_cast<double>(request->num_samples()) : 0;
  }
  return static_cast<int64_t>(pages);
}

// How many tokens it computes in this step. Where a prefill must be cut it is at a change of stage, so that a tile of
// the kernels holds one stage, or else at the end of a page; but not for more than a quarter of the chunk.
int64_t StepScheduler::chunk(const Request& request) const {
  const int64_t left = request.num_left(), begin = request.num_computed;
  if (left <= budget_) return left;
  const int64_t end = begin + budget_, least = begin + budget_ - budget_ / 4;
  for (int64_t cut = end; cut >= least; --cut) {
    if (request.tokens[cut].stage_id != request.tokens[cut - 1].stage_id) return cut - begin;
  }
  const int64_t page_end = end - end % kv_.page_size();
  return page_end >= least && page_end > begin ? page_end - begin : budget_;
}

// By the stage of the first token, otherwise as they are: one pass to count, one to place.
void StepScheduler::order_rows() {
  size_t begins[kMaxPathStages + 3] = {};
  for (const Row& row : rows_) ++begins[row.stage_id + 3];
  for (size_t i = 1; i < std::size(begins); ++i) begins[i] += begins[i - 1];
  ordered_rows_.resize(rows_.size());
  for (const Row& row : rows_) ordered_rows_[begins[row.stage_id + 2]++] = row;
  rows_.swap(ordered_rows_);
}

void StepScheduler::write_plan(Plan& plan) {
  const size_t num_rows = rows_.size();
  const size_t num_tokens = static_cast<size_t>(options_.max_batch_tokens - budget_);
  size_t num_logits = 0;
  plan.table_width = 0;
  for (Row& row : rows_) {
    row.first_logits = static_cast<int64_t>(num_logits);
    row.num_logits = row.count == row.request->num_left() ? row.request->num_samples() : 0;
    num_logits += static_cast<size_t>(row.num_logits);
    plan.table_width = std::max(plan.table_width, kv_.pages_for(row.request->num_computed + row.count));
  }
  plan.request_ids.resize(num_rows);
  plan.token_ids.resize(num_tokens);
  plan.positions.resize(num_tokens);
  plan.stage_ids.resize(num_tokens);
  plan.slots.resize(num_tokens);
  plan.query_starts.resize(num_rows + 1);
  plan.lengths.resize(num_rows);
  plan.page_tables.resize(num_rows * plan.table_width);
  for (auto* array : {&plan.logits_at, &plan.logits_requests, &plan.end_ids, &plan.choices}) array->resize(num_logits);
  plan.modes.resize(num_logits);
  wanted_.resize(num_logits);

  stage_tokens_.assign(stats_.stage_tokens.size(), 0);
  int64_t begin = 0;
  for (size_t row = 0; row < num_rows; ++row) {
    write_row(plan, row, begin);
    begin += rows_[row].count;
    write_logits(plan, rows_[row], begin - 1);
  }
  plan.query_starts[num_rows] = static_cast<int32_t>(begin);
  plan.preempted.swap(preempted_);
  preempted_.clear();
  plan.copies.clear();
  for (const auto& copy : kv_.copies()) plan.copies.insert(plan.copies.end(), {copy.from, copy.to});
}

void StepScheduler::write_row(Plan& plan, size_t row, int64_t begin) {
  const Request& request = *rows_[row].request;
  const int64_t count = rows_[row].count, first = request.num_computed, page_size = kv_.page_size();
  plan.request_ids[row] = request.id;
  plan.query_starts[row] = static_cast<int32_t>(begin);
  plan.lengths[row] = static_cast<int32_t>(first + count);
  int64_t place = kv_.place_of(first), within = first - place * page_size;
  for (int64_t i = 0; i < count; ++i) {
    const Token token = request.tokens[first + i];
    plan.token_ids[begin + i] = token.id;
    plan.positions[begin + i] = first + i;
    plan.stage_ids[begin + i] = token.stage_id;
    plan.slots[begin + i] = request.pages[place] * page_size + within;
    if (++within == page_size) within = 0, ++place;
    ++stage_tokens_[token.stage_id + 2];
  }
  const int64_t num_pages = kv_.pages_for(first + count);
  int32_t* const table = &plan.page_tables[row * plan.table_width];
  std::copy_n(request.pages.data(), num_pages, table);
  std::fill(table + num_pages, table + plan.table_width, 0);
}

void StepScheduler::write_logits(Plan& plan, const Row& row, int64_t at) {
  const Request& request = *row.request;
  for (int64_t i = 0; i < row.num_logits; ++i) {
    const size_t place = static_cast<size_t>(row.first_logits + i);
    const int64_t id = i == 0 ? request.id : request.other_ids[i - 1];
    wanted_[place] = {id, true};
    plan.logits_at[place] = at;
    plan.logits_requests[place] = id;
    plan.modes[place] = request.next.mode;
    plan.end_ids[place] = request.next.end_id;
    plan.choices[place] = request.next.choices;
  }
}

}  // namespace mote::engine
