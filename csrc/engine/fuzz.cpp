// Tests only: random operations on the scheduler, with everything that must hold checked after each one.
//
//   engine_fuzz [operations=100000] [seed=1]
//
// Small schedulers one after the other, of random sizes: submissions whose prompts share prefixes, steps, failed rows,
// forwards that raise, cancels at any time, roll-backs, retrained experts; keys of pages that collide. Now and then
// nothing is submitted any more until all is done: everybody must finish within a number of steps that is bounded by
// their tokens, and all pages must be back.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <set>
#include <utility>

#include "engine/fake_memory.h"
#include "engine/random_requests.h"

namespace mote::engine {
namespace {

class Fuzz {
 public:
  Fuzz(Random& random, SchedulerOptions options)
      : random_(random), options_(options), scheduler_(options), memory_(options.num_pages, options.page_size) {}

  void operate() {
    const int64_t choice = random_.below(100);
    if (choice < 20) return submit();
    if (choice < 24) return cancel();
    if (choice < 25) return drop_cache();
    if (plan_ != nullptr) return close_plan();
    if (choice < 94) return plan(/*one_alone=*/random_.one_in(20));
    roll_back();
  }

  void check() const {
    scheduler_.check();
    const SchedulerStats stats = scheduler_.stats();
    require(stats.pages_free + stats.pages_used + stats.pages_cached == options_.num_pages, "a page is lost");
    require(stats.num_running <= options_.max_running, "too many requests are running");
    require(stats.submitted == stats.finished + stats.cancelled + stats.failed + stats.num_running + stats.num_waiting,
            "a request is lost");
    require(stats.num_running + stats.num_waiting == static_cast<int64_t>(known_.size()), "a request is unknown");
  }

  // Everybody finishes, soon enough, and gives everything back.
  void drain() {
    if (plan_ != nullptr) close_plan();
    int64_t steps_left = 20;
    for (const auto& [id, known] : known_) steps_left += known.most_steps;
    while (scheduler_.has_work()) {
      require(--steps_left >= 0, "a request starves");
      plan(false);
      close_plan();
    }
    check();
    require(known_.empty() && scheduler_.stats().pages_used == 0, "a page is used by nobody");
  }

  SchedulerStats stats() const { return scheduler_.stats(); }

 private:
  struct Known {
    std::vector<int64_t> tokens;  // reported so far
    int64_t prompt_length;
    int64_t most_steps;
    int64_t most_tokens;  // generated in one attempt
  };

  void submit() {
    Submission given = random_submission(random_);
    if (!seen_.empty() && random_.one_in(3)) continue_one(seen_[random_.below(seen_.size())], random_, given);
    const int64_t num_samples = random_.one_in(4) ? random_.between(2, 3) : 1;
    for (int64_t i = 0; i < num_samples; ++i) given.ids.push_back(num_ids_++);
    Known known{given.tokens, static_cast<int64_t>(given.tokens.size()), 4, 0};
    for (const PathRules& rules : given.attempts) {
      known.most_tokens = std::max(known.most_tokens, rules.max_new_tokens());
      known.most_steps += 4 * (known.prompt_length + rules.max_new_tokens());
    }
    const std::vector<int64_t> ids = given.ids;
    try {
      scheduler_.submit(std::move(given));
    } catch (const QueueFull&) {
      return;
    } catch (const std::invalid_argument&) {  // too large for this scheduler
      return;
    }
    for (const int64_t id : ids) known_[id] = known;
  }

  void plan(bool one_alone) {
    std::optional<int64_t> only;
    if (one_alone && !known_.empty()) only = any();
    const Request* const first = first_running();
    plan_ = scheduler_.plan(only);
    require(first == nullptr || first->is_running, "the first request lost its pages");
    for (const auto& [id, known] : known_) {
      if (!scheduler_.request(id).is_running) memory_.forget(id);  // what it had was given to others
    }
    if (plan_ == nullptr) {
      require(only || !scheduler_.has_work(), "there is work, but no plan");
      return;
    }
    check_plan();
    will_raise_ = random_.one_in(10);
    if (will_raise_) {
      memory_.raise(*plan_, scheduler_, random_.one_in(2));
    } else {
      memory_.run(*plan_, scheduler_);
    }
  }

  const Request* first_running() const {
    const Request* first = nullptr;
    for (const auto& [id, known] : known_) {
      const Request& request = scheduler_.request(id);
      if (request.is_running && (first == nullptr || ComesFirst()(&request, first))) first = &request;
    }
    return first;
  }

  void check_plan() const {
    const Plan& plan = *plan_;
    const size_t num_rows = plan.request_ids.size();
    require(static_cast<int64_t>(plan.token_ids.size()) <= options_.max_batch_tokens, "a plan is over budget");
    require(std::set<int64_t>(plan.slots.begin(), plan.slots.end()).size() == plan.slots.size(),
            "a slot written twice");
    require(std::set<int64_t>(plan.request_ids.begin(), plan.request_ids.end()).size() == num_rows, "a row twice");
    for (size_t row = 0; row < num_rows; ++row) {
      const int32_t begin = plan.query_starts[row], end = plan.query_starts[row + 1];
      require(begin < end, "an empty row");
      require(row == 0 || plan.stage_ids[plan.query_starts[row - 1]] <= plan.stage_ids[begin], "rows out of order");
      require(plan.lengths[row] == plan.positions[end - 1] + 1, "a length is wrong");
    }
    for (size_t i = 0; i < plan.logits_at.size(); ++i) {
      require(known_.contains(plan.logits_requests[i]), "logits of nobody");
      require(i == 0 || plan.logits_at[i - 1] <= plan.logits_at[i], "logits out of order");
    }
  }

  int64_t sample(const Plan& plan, size_t i) {
    if (random_.one_in(200)) return kFailedRow;
    switch (plan.modes[i]) {
      case kChoose: {
        int64_t stage = random_.below(kStages);
        while (!(plan.choices[i] >> stage & 1)) stage = (stage + 1) % kStages;
        return kMarker + 2 * stage;
      }
      case kText: return plan.end_ids[i] >= 0 && random_.one_in(6) ? plan.end_ids[i] : random_.below(kWords);
      case kVerdict: return random_.one_in(2) ? kSafe : 0;
      default: return random_.one_in(30) ? kMarker + random_.below(2 * kStages) : random_.below(kWords);
    }
  }

  void close_plan() {
    const std::shared_ptr<const Plan> plan = std::move(plan_);
    plan_ = nullptr;
    if (will_raise_) return scheduler_.abandon();
    std::vector<int64_t> tokens;
    for (size_t i = 0; i < plan->logits_at.size(); ++i) tokens.push_back(sample(*plan, i));
    // Samples that fork go on from what the row of the first of them has written.
    std::map<int64_t, int64_t> row_at;
    for (size_t row = 0; row < plan->request_ids.size(); ++row) {
      row_at[plan->query_starts[row + 1] - 1] = plan->request_ids[row];
    }
    for (size_t i = 0; i < plan->logits_at.size(); ++i) {
      memory_.fork(row_at[plan->logits_at[i]], plan->logits_requests[i]);
    }
    for (size_t i = 0; i < tokens.size(); ++i) {
      const bool is_alone = std::count(plan->logits_at.begin(), plan->logits_at.end(), plan->logits_at[i]) == 1;
      if (tokens[i] == kFailedRow && is_alone) memory_.poison(*plan, row_at[plan->logits_at[i]]);
    }
    note(*scheduler_.commit(tokens.data(), static_cast<int64_t>(tokens.size())));
  }

  void note(const Outcome& outcome) {
    for (const int64_t id : outcome.rolled_back) {
      Known& known = known_.at(id);
      known.tokens.resize(known.prompt_length);
      memory_.forget(id, known.prompt_length);
    }
    size_t at = 0;
    for (size_t i = 0; i < outcome.request_ids.size(); ++i) {
      Known& known = known_.at(outcome.request_ids[i]);
      for (const size_t end = at + outcome.counts[i]; at < end; ++at) known.tokens.push_back(outcome.tokens[at]);
      const int64_t generated = static_cast<int64_t>(known.tokens.size()) - known.prompt_length;
      require(generated <= known.most_tokens, "more tokens than the total");
    }
    require(at == outcome.tokens.size() && at == outcome.stage_ids.size(), "tokens of nobody");
    for (const int64_t id : outcome.finished) known_.erase(id);
    for (const auto& [id, known] : known_) {
      const Request& request = scheduler_.request(id);
      require(std::equal(known.tokens.begin(), known.tokens.end(), request.tokens.begin(),
                         [](int64_t id, const Token& token) { return id == token.id; }),
              "a reported token has changed");
      check_stage_ids(request);
      if (!random_.one_in(10)) continue;
      if (seen_.size() > 8) seen_.erase(seen_.begin());
      seen_.push_back({.tokens = ids_of(request),
                       .prompt_id = request.prompt_id,
                       .salt = request.salt,
                       .experts = request.experts});
    }
  }

  // Those of generated tokens are what the markers say, from the first token on.
  void check_stage_ids(const Request& request) const {
    int32_t expected = request.prompt_id;
    for (int64_t i = 0; i < request.num_tokens(); ++i) {
      const int64_t marker = request.tokens[i].id - kMarker;
      if (marker >= 0) expected = static_cast<int32_t>(marker / 2);
      require(i < request.prompt_length || request.tokens[i].stage_id == expected,
              "a stage id is not what the markers say");
      if (marker >= 0 && marker % 2 == 1) expected = request.prompt_id;
    }
  }

  void cancel() {
    if (known_.empty()) return;
    const int64_t id = any();
    const Request& request = scheduler_.request(id);
    if (request.id == id && request.num_samples() > 1) memory_.fork(id, request.other_ids[0]);  // now the first
    scheduler_.cancel(id);
    known_.erase(id);
  }

  void roll_back() {
    if (known_.empty()) return;
    const int64_t id = any();
    const Request& request = scheduler_.request(id);
    const int64_t num_tokens = random_.between(request.prompt_length, request.num_tokens());
    scheduler_.roll_back(id, num_tokens);
    memory_.forget(request.id, num_tokens);
    auto& known = known_.at(id).tokens;
    known.resize(std::min<size_t>(known.size(), num_tokens));
  }

  void drop_cache() {
    scheduler_.drop_cache();
    memory_.retrain();
  }

  int64_t any() {
    auto found = known_.begin();
    std::advance(found, random_.below(known_.size()));
    return found->first;
  }

  Random& random_;
  SchedulerOptions options_;
  StepScheduler scheduler_;
  FakeMemory memory_;
  std::map<int64_t, Known> known_;
  std::shared_ptr<const Plan> plan_;
  bool will_raise_ = false;       // the forward of plan_
  std::vector<Submission> seen_;  // sequences as they once were
  int64_t num_ids_ = 0;
};

void run(int64_t num_operations, uint64_t seed) {
  constexpr int64_t kOfOneScheduler = 2000;
  Random random(seed);
  SchedulerStats sum;
  int64_t done = 0;
  while (done < num_operations) {
    Fuzz fuzz(random, random_options(random));
    for (int64_t i = 0; i < kOfOneScheduler && done < num_operations; ++i, ++done) {
      fuzz.operate();
      fuzz.check();
      if (random.one_in(500)) fuzz.drain();
    }
    fuzz.drain();
    const SchedulerStats stats = fuzz.stats();
    sum.steps += stats.steps, sum.submitted += stats.submitted, sum.finished += stats.finished;
    sum.preemptions += stats.preemptions, sum.evictions += stats.evictions, sum.copies += stats.copies;
    sum.rolled_back += stats.rolled_back, sum.prefix_hit_tokens += stats.prefix_hit_tokens;
  }
  const std::pair<const char*, int64_t> counts[] = {{"requests", sum.submitted},
                                                    {"finished", sum.finished},
                                                    {"steps", sum.steps},
                                                    {"preemptions", sum.preemptions},
                                                    {"evictions", sum.evictions},
                                                    {"copies", sum.copies},
                                                    {"roll-backs", sum.rolled_back},
                                                    {"tokens found in the cache", sum.prefix_hit_tokens}};
  std::printf("%lld operations", static_cast<long long>(done));
  for (const auto& [name, count] : counts) {
    std::printf(", %lld %s", static_cast<long long>(count), name);
    require(count >= done / 1000, std::string("too few to test anything: ") + name);
  }
  std::printf("\n");
}

}  // namespace
}  // namespace mote::engine

int main(int argc, char** argv) {
  const int64_t num_operations = argc > 1 ? std::atoll(argv[1]) : 100000;
  const uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1;
  try {
    mote::engine::run(num_operations, seed);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "engine_fuzz, seed %llu: %s\n", static_cast<unsigned long long>(seed), error.what());
    return 1;
  }
  return 0;
}
