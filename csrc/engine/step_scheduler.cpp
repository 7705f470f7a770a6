#include "engine/step_scheduler.h"

#include <algorithm>
#include <utility>

#include "core/stage_ids.h"

namespace mote::engine {
namespace {

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument(what); }

const SchedulerOptions& checked(const SchedulerOptions& options) {
  const auto at_least = [](const char* name, int64_t value, int64_t least, int64_t most) {
    if (value < least || value > most) {
      refuse(std::string("StepScheduler: ") + name + " must be from " + std::to_string(least) + " to " +
             std::to_string(most) + ", got " + std::to_string(value));
    }
  };
  at_least("num_pages", options.num_pages, 1, INT32_MAX / 2);
  at_least("page_size", options.page_size, 1, 1 << 20);
  at_least("max_batch_tokens", options.max_batch_tokens, 1, INT32_MAX);
  at_least("max_running", options.max_running, 1, INT32_MAX);
  at_least("max_waiting", options.max_waiting, 1, INT32_MAX);
  at_least("max_passed_over", options.max_passed_over, 0, INT32_MAX);
  if (!(options.safety_margin >= 0 && options.safety_margin < 1)) {
    refuse("StepScheduler: safety_margin must be from 0 to less than 1, got " + std::to_string(options.safety_margin));
  }
  return options;
}

std::string of_request(int64_t id) { return "submit: request " + std::to_string(id); }

}  // namespace

StepScheduler::StepScheduler(const SchedulerOptions& options)
    : options_(checked(options)),
      markers_(options.marker_ids),
      kv_(static_cast<int32_t>(options.num_pages), static_cast<int32_t>(options.page_size), options.share_prefixes,
          options.key_bits),
      lengths_(markers_.num_stages()) {
  stats_.stage_tokens.resize(markers_.num_stages() + 2);
}

Request* StepScheduler::find(int64_t id) const {
  const auto found = by_id_.find(id);
  if (found == by_id_.end()) throw UnknownRequest("no request " + std::to_string(id) + " is waiting or running");
  return found->second;
}

void StepScheduler::check_submission(const Submission& given) const {
  if (given.ids.empty()) refuse("submit: request_ids must hold an id a sample, got none");
  const std::string of = of_request(given.ids[0]);
  std::set<int64_t> ids(given.ids.begin(), given.ids.end());
  for (const int64_t id : given.ids) {
    if (by_id_.contains(id)) refuse("submit: request id " + std::to_string(id) + " is in use");
  }
  const int64_t num_samples = static_cast<int64_t>(given.ids.size());
  if (ids.size() != given.ids.size()) refuse(of + " names an id twice");
  if (num_samples > options_.max_running) {
    refuse(of + " has " + std::to_string(num_samples) +
           " samples, more than max_running=" + std::to_string(options_.max_running));
  }
  if (given.tokens.empty()) refuse(of + " has an empty prompt; at least one token is needed");
  if (*std::min_element(given.tokens.begin(), given.tokens.end()) < 0) refuse(of + " has a negative token id");
  if (given.stage_ids && given.stage_ids->size() != given.tokens.size()) {
    refuse(of + ": stage_ids must be one a token, " + std::to_string(given.tokens.size()) + ", got " +
           std::to_string(given.stage_ids->size()));
  }
  const auto check_stage_id = [&](const char* name, int64_t id) {
    if (id < kBaseOnly || id >= markers_.num_stages()) {
      refuse(of + ": " + name + " must be from -2 to " + std::to_string(markers_.num_stages() - 1) + ", got " +
             std::to_string(id));
    }
  };
  check_stage_id("prompt_id", given.prompt_id);
  if (given.stage_ids) {
    for (const int64_t id : *given.stage_ids) check_stage_id("stage_ids", id);
  }
  if (given.attempts.empty()) refuse(of + " has no rules: attempts must hold at least one PathRules");
  for (const PathRules& rules : given.attempts) {
    if (!rules.is_free() && rules.num_stages() != markers_.num_stages()) {
      refuse(of + ": its rules are for " + std::to_string(rules.num_stages()) +
             " stages, the scheduler has markers for " + std::to_string(markers_.num_stages()));
    }
    const int64_t most = static_cast<int64_t>(given.tokens.size()) + rules.max_new_tokens();
    if (kv_.pages_for(most) > options_.num_pages || most > INT32_MAX) {
      refuse(of + " needs " + std::to_string(kv_.pages_for(most)) + " pages for " +
             std::to_string(given.tokens.size()) + " prompt tokens and max_new_tokens=" +
             std::to_string(rules.max_new_tokens()) + ", the cache has " + std::to_string(options_.num_pages));
    }
  }
  if (num_waiting_ + num_samples > options_.max_waiting) {
    throw QueueFull(of + " would be one too many: " + std::to_string(num_waiting_) +
                    " of max_waiting=" + std::to_string(options_.max_waiting) + " are waiting");
  }
}

void StepScheduler::submit(Submission given) {
  check_submission(given);
  Request& request = requests_.take();
  request.id = given.ids[0];
  request.other_ids.assign(given.ids.begin() + 1, given.ids.end());
  request.arrival = num_arrived_;
  request.priority = given.priority;
  request.salt = given.salt;
  request.experts = given.experts;
  request.prompt_id = request.text_id = given.prompt_id;
  request.prompt_length = request.num_reported = static_cast<int64_t>(given.tokens.size());
  request.attempts = std::make_shared<const std::vector<PathRules>>(std::move(given.attempts));
  request.tokens.reserve(given.tokens.size() + 1);
  for (size_t i = 0; i < given.tokens.size(); ++i) {
    const int32_t stage_id = advance(request, given.tokens[i]);
    request.tokens.push_back(
        {given.tokens[i], given.stage_ids ? static_cast<int32_t>((*given.stage_ids)[i]) : stage_id});
  }
  request.text_id_after_prompt = request.text_id;
  request.path = PathState();
  append_forced(request);

  const int64_t num_samples = request.num_samples();
  num_arrived_ += num_samples;
  stats_.submitted += num_samples;
  for (const int64_t id : given.ids) by_id_[id] = &request;
  put_to_waiting(request);
}

int32_t StepScheduler::advance(Request& request, int64_t token) const {
  const int marker = markers_.find(token);
  const int32_t stage_id = marker < 0 ? request.text_id : marker / 2;
  if (marker >= 0) request.text_id = marker % 2 == 0 ? stage_id : request.prompt_id;
  request.rules().advance(request.path, token, marker);
  return stage_id;
}

void StepScheduler::append(Request& request, int64_t token) {
  const PathState before = request.path;
  request.tokens.push_back({token, advance(request, token)});
  if (before.in_stage >= 0 && request.path.in_stage < 0) lengths_.add(before.stage, before.in_stage);
}

void StepScheduler::append_forced(Request& request) {
  for (;;) {
    request.next = request.rules().next(request.path, markers_);
    if (request.next.kind != Next::kForced) break;
    append(request, request.next.token);
  }
  request.num_plain = request.next.end_id >= 0 ? request.rules().num_plain(request.path) : 0;
}

void StepScheduler::rewind(Request& request, int64_t num_tokens) {
  kv_.truncate(request, num_tokens);
  request.path = PathState();
  request.text_id = request.text_id_after_prompt;
  for (int64_t place = request.prompt_length; place < num_tokens; ++place) advance(request, request.tokens[place].id);
  append_forced(request);
  request.num_reported = std::min(request.num_reported, num_tokens);
  // Its logits are gone, so without a forced token the last one goes through the model once more.
  if (request.num_left() == 0) --request.num_computed;
  ++stats_.rolled_back;
}

void StepScheduler::start_running(Request& request) {
  request.is_running = true;
  num_running_ += request.num_samples();
  running_.insert(std::upper_bound(running_.begin(), running_.end(), &request, ComesFirst()), &request);
}

void StepScheduler::stop_running(Request& request) {
  request.is_running = request.is_decoding = false;
  num_running_ -= request.num_samples();
  running_.erase(std::lower_bound(running_.begin(), running_.end(), &request, ComesFirst()));
}

void StepScheduler::put_to_waiting(Request& request) {
  waiting_.insert(&request);
  num_waiting_ += request.num_samples();
}

void StepScheduler::take_from_waiting(Request& request) {
  waiting_.erase(&request);
  num_waiting_ -= request.num_samples();
}

void StepScheduler::remove(Request& request) {
  request.is_running ? stop_running(request) : take_from_waiting(request);
  kv_.release(request);
  by_id_.erase(request.id);
  for (const int64_t id : request.other_ids) by_id_.erase(id);
  requests_.give_back(request);
}

void StepScheduler::cancel(int64_t id) {
  Request& request = *find(id);
  ++stats_.cancelled;
  for (Wanted& wanted : wanted_) wanted.is_live &= wanted.id != id;
  if (request.num_samples() > 1) {
    --(request.is_running ? num_running_ : num_waiting_);
    if (request.id == id) std::swap(request.id, request.other_ids[0]);  // the next one is the first now
    std::erase(request.other_ids, id);
    by_id_.erase(id);
    return;
  }
  for (Row& row : rows_) {
    if (row.request == &request) row.request = nullptr;
  }
  remove(request);
}

void StepScheduler::roll_back(int64_t id, int64_t num_tokens) {
  if (is_open_) throw std::logic_error("roll_back: commit or abandon the plan first");
  Request& request = *find(id);
  if (num_tokens < request.prompt_length || num_tokens > request.num_tokens()) {
    refuse("roll_back: num_tokens of request " + std::to_string(id) + " must be from its prompt's " +
           std::to_string(request.prompt_length) + " to " + std::to_string(request.num_tokens()) + ", got " +
           std::to_string(num_tokens));
  }
  rewind(request, num_tokens);
}

void StepScheduler::drop_cache() {
  // What runs was computed by the experts of before, so none of it may be found later either.
  for (Request* request : running_) request->may_share &= request->num_computed == 0 && !is_open_;
  kv_.forget_all();
}

}  // namespace mote::engine
