// StepScheduler::commit(): the tokens of a step are in memory, and every request with a sampled one moves on: to its
// next token, past the markers that the rules force, to its next attempt, or out.
#include <algorithm>

#include "engine/step_scheduler.h"

namespace mote::engine {

std::shared_ptr<const Outcome> StepScheduler::commit(const int64_t* tokens, int64_t count) {
  if (!is_open_) throw std::logic_error("commit: there is no plan to commit");
  check_tokens(tokens, count);
  const std::shared_ptr<Outcome> made = outcomes_.take();
  outcome_ = made.get();
  outcome_->clear();
  stats_.copies += static_cast<int64_t>(kv_.copies().size());
  ++stats_.steps;
  for (size_t i = 0; i < stage_tokens_.size(); ++i) {
    stats_.stage_tokens[i] += stage_tokens_[i];
    stats_.planned_tokens += stage_tokens_[i];
  }
  kv_.keep_copies();
  for (const Row& row : rows_) {
    if (row.request != nullptr) settle(row, tokens + row.first_logits);
  }
  close_plan();
  return made;
}

void StepScheduler::abandon() {
  if (!is_open_) throw std::logic_error("abandon: there is no plan to abandon");
  kv_.undo_copies();
  close_plan();
}

void StepScheduler::close_plan() {
  is_open_ = false;
  rows_.clear();
  wanted_.clear();
}

void StepScheduler::check_tokens(const int64_t* tokens, int64_t count) const {
  if (count != static_cast<int64_t>(wanted_.size())) {
    throw std::invalid_argument("commit: tokens must be one for each of logits_at, " + std::to_string(wanted_.size()) +
                                ", got " + std::to_string(count));
  }
  for (const Row& row : rows_) {
    for (int64_t i = row.first_logits; i < row.first_logits + row.num_logits; ++i) {
      if (row.request != nullptr && wanted_[i].is_live) check_token(*row.request, wanted_[i].id, tokens[i]);
    }
  }
}

// Else a step of sampling gone wrong would end in a chain that no rules describe.
void StepScheduler::check_token(const Request& request, int64_t id, int64_t token) const {
  if (token == kFailedRow) return;
  const Next& next = request.next;
  const int marker = next.mode == kFree ? -1 : markers_.find(token);
  bool is_legal = token >= 0;
  if (next.mode == kText) is_legal &= marker < 0 || token == next.end_id;
  if (next.mode == kVerdict) is_legal &= marker < 0;
  if (next.mode == kChoose) is_legal = marker >= 0 && marker % 2 == 0 && (next.choices >> (marker / 2) & 1) != 0;
  if (!is_legal) {
    throw std::invalid_argument("commit: token " + std::to_string(token) + " of request " + std::to_string(id) +
                                " is not one that its plan allowed (mode " + std::to_string(next.mode) + ")");
  }
}

// tokens: those of the row's own logits.
void StepScheduler::settle(const Row& row, const int64_t* tokens) {
  Request& request = *row.request;
  bool has_failed = false;
  for (int64_t i = 0; i < row.num_logits; ++i) {
    has_failed |= wanted_[row.first_logits + i].is_live && tokens[i] == kFailedRow;
  }
  kv_.commit(request, row.count, !has_failed);
  // What made the logits NaN may lie in any of its pages; nobody shall find it there.
  if (has_failed) kv_.forget(request);
  if (row.num_logits == 0) return;
  request.is_decoding = true;
  if (row.num_logits == 1) return take_token(request, tokens[0]);
  const std::vector<Request*> samples = fork(request);
  size_t sample = 0;
  for (int64_t i = 0; i < row.num_logits; ++i) {
    if (wanted_[row.first_logits + i].is_live) take_token(*samples[sample++], tokens[i]);
  }
}

// The prompt is computed: a request for every sample, all with its pages.
std::vector<Request*> StepScheduler::fork(Request& request) {
  std::vector<Request*> samples{&request};
  const std::vector<int64_t> ids = std::move(request.other_ids);
  request.other_ids.clear();
  num_running_ -= static_cast<int64_t>(ids.size());
  for (size_t i = 0; i < ids.size(); ++i) {
    Request& sample = requests_.take();
    sample = request;
    sample.id = ids[i];
    sample.arrival = request.arrival + static_cast<int64_t>(i) + 1;
    kv_.share(request, sample);
    start_running(sample);
    by_id_[ids[i]] = &sample;
    samples.push_back(&sample);
  }
  return samples;
}

void StepScheduler::take_token(Request& request, int64_t token) {
  if (token == kFailedRow) return finish(request, kFailed);
  if (request.num_plain > 0 && markers_.find(token) < 0) {
    --request.num_plain;
    ++request.path.in_stage, ++request.path.used;
    request.tokens.push_back({token, request.text_id});
    return report(request);
  }
  const bool is_verdict = request.next.mode == kVerdict;
  append(request, token);
  const bool has_another = request.attempt + 1 < static_cast<int32_t>(request.attempts->size());
  if (is_verdict && has_another && !request.rules().is_safe(token)) {
    ++request.attempt;
    rewind(request, request.prompt_length);
    outcome_->rolled_back.push_back(request.id);
    outcome_->attempts.push_back(request.attempt);
  } else {
    append_forced(request);
  }
  report(request);
  if (request.next.kind == Next::kFinished) finish(request, request.next.reason);
}

void StepScheduler::report(Request& request) {
  const int64_t begin = request.num_reported, end = request.num_tokens();
  outcome_->request_ids.push_back(request.id);
  outcome_->counts.push_back(static_cast<int32_t>(end - begin));
  for (int64_t place = begin; place < end; ++place) {
    outcome_->tokens.push_back(request.tokens[place].id);
    outcome_->stage_ids.push_back(request.tokens[place].stage_id);
  }
  request.num_reported = end;
}

void StepScheduler::finish(Request& request, Reason reason) {
  outcome_->finished.push_back(request.id);
  outcome_->reasons.push_back(reason);
  ++(reason == kFailed ? stats_.failed : stats_.finished);
  remove(request);
}

SchedulerStats StepScheduler::stats() const {
  SchedulerStats stats = stats_;
  stats.num_running = num_running_;
  stats.num_waiting = num_waiting_;
  stats.pages_total = options_.num_pages;
  stats.pages_cached = kv_.pool().num_kept();
  stats.pages_free = kv_.pool().num_free();
  stats.pages_used = stats.pages_total - stats.pages_cached - stats.pages_free;
  stats.evictions = kv_.num_evictions();
  return stats;
}

void StepScheduler::check() const {
  const auto fail = [](const char* what) { throw std::logic_error(what); };
  std::vector<const Sequence*> sequences;
  int64_t num_running = 0, num_waiting = 0;
  for (const auto& [id, request] : by_id_) {
    if (request->id != id) {
      const auto& others = request->other_ids;
      if (std::find(others.begin(), others.end(), id) == others.end()) fail("StepScheduler: an id is another's");
      continue;
    }
    sequences.push_back(request);
    (request->is_running ? num_running : num_waiting) += request->num_samples();
    if (request->is_running == waiting_.contains(request)) fail("StepScheduler: a request is lost or queued twice");
    if (!request->is_running && !request->pages.empty()) fail("StepScheduler: a waiting request has pages");
    if (request->next.kind != Next::kSampled) fail("StepScheduler: a request stands still");
  }
  if (num_running != num_running_ || num_waiting != num_waiting_) fail("StepScheduler: samples are miscounted");
  if (running_.size() + waiting_.size() != sequences.size() || requests_.num_taken() != sequences.size())
    fail("StepScheduler: a request is lost");
  if (!std::is_sorted(running_.begin(), running_.end(), ComesFirst())) fail("StepScheduler: running out of order");
  if (!is_open_ && !kv_.copies().empty()) fail("StepScheduler: copies of no plan");
  kv_.check(sequences);
}

}  // namespace mote::engine
