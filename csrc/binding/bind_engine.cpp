#include "binding/bind_engine.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "engine/step_scheduler.h"

namespace py = pybind11;

namespace mote {
namespace {

using engine::Outcome;
using engine::PathRules;
using engine::Plan;
using engine::Request;

// A property that shows a vector of the object without a copy. The array keeps the object alive.
template <typename Owner, typename T>
auto shown(std::vector<T> Owner::* member) {
  return [member](const py::object& self) {
    const std::vector<T>& values = self.cast<const Owner&>().*member;
    return py::array_t<T>({values.size()}, {sizeof(T)}, values.data(), self);
  };
}

// The same in rows of `width` values.
template <typename Owner, typename Width>
auto shown_in_rows(std::vector<int32_t> Owner::* member, Width width) {
  return [member, width](const py::object& self) {
    const Owner& owner = self.cast<const Owner&>();
    const std::vector<int32_t>& values = owner.*member;
    const size_t columns = width(owner);
    const size_t rows = columns == 0 ? 0 : values.size() / columns;
    return py::array_t<int32_t>({rows, columns}, {columns * sizeof(int32_t), sizeof(int32_t)}, values.data(), self);
  };
}

using Integers = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;

// One dimension of any integer dtype. A float is no token: numpy would cut it off without a word.
Integers integers(const py::handle& given, const char* name) {
  const py::array array = py::array::ensure(given);
  if (!array) throw py::type_error(std::string(name) + " must be an array or a list of integers");
  const char kind = array.dtype().kind();
  if (kind != 'i' && kind != 'u' && array.size() > 0) {
    throw py::type_error(std::string(name) + " must be integers, got an array of " +
                         py::str(array.dtype()).cast<std::string>());
  }
  if (array.ndim() != 1) throw std::invalid_argument(std::string(name) + " must have one dimension");
  return Integers(array);
}

std::vector<int64_t> to_vector(const Integers& array) { return {array.data(), array.data() + array.size()}; }

// One field of every token of a request.
template <typename T>
auto tokens_as(T engine::Token::* field) {
  return [field](const Request& request) {
    py::array_t<T> values(request.tokens.size());
    for (size_t i = 0; i < request.tokens.size(); ++i) values.mutable_data()[i] = request.tokens[i].*field;
    return values;
  };
}

// plan and commit release the GIL, so another thread could enter in the middle of one: an error instead of chaos.
class Scheduler {
 public:
  explicit Scheduler(const engine::SchedulerOptions& options) : scheduler_(options) {}

  template <typename Call>
  auto enter(Call call) {
    if (is_entered_.test_and_set()) {
      throw std::logic_error("StepScheduler: two threads use it at once; one thread must own it");
    }
    struct Leave {
      std::atomic_flag& flag;
      ~Leave() { flag.clear(); }
    } leave{is_entered_};
    return call(scheduler_);
  }

  template <typename Call>
  auto enter_without_gil(Call call) {
    py::gil_scoped_release released;
    return enter(call);
  }

 private:
  engine::StepScheduler scheduler_;
  std::atomic_flag is_entered_;
};

py::dict to_dict(const engine::SchedulerStats& stats) {
  using namespace py::literals;
  return py::dict(
      "num_running"_a = stats.num_running, "num_waiting"_a = stats.num_waiting, "pages_total"_a = stats.pages_total,
      "pages_used"_a = stats.pages_used, "pages_cached"_a = stats.pages_cached, "pages_free"_a = stats.pages_free,
      "prefix_hit_tokens"_a = stats.prefix_hit_tokens, "prefix_query_tokens"_a = stats.prefix_query_tokens,
      "preemptions"_a = stats.preemptions, "rolled_back"_a = stats.rolled_back, "evictions"_a = stats.evictions,
      "copies"_a = stats.copies, "steps"_a = stats.steps, "planned_tokens"_a = stats.planned_tokens,
      "stage_tokens"_a = stats.stage_tokens, "submitted"_a = stats.submitted, "finished"_a = stats.finished,
      "cancelled"_a = stats.cancelled, "failed"_a = stats.failed);
}

void bind_errors(py::module_& m) {
  py::register_exception<engine::QueueFull>(m, "QueueFull", PyExc_RuntimeError);
  py::register_exception_translator([](std::exception_ptr thrown) {
    try {
      if (thrown) std::rethrow_exception(thrown);
    } catch (const engine::UnknownRequest& error) {
      PyErr_SetString(PyExc_KeyError, error.what());
    }
  });
}

void bind_rules(py::module_& m) {
  const auto stages_of = [](uint64_t bits) {
    std::vector<int> stages;
    for (int stage = 0; bits >> stage != 0; ++stage) {
      if (bits >> stage & 1) stages.push_back(stage);
    }
    return stages;
  };
  const auto check = [](const PathRules& rules, int stage, int least, int64_t num_tokens) {
    if (num_tokens < 0) throw std::invalid_argument("PathRules: counts of tokens must not be negative");
    if (stage < least || stage >= rules.num_stages()) {
      throw std::invalid_argument("PathRules: there is no stage " + std::to_string(stage) + " in these rules");
    }
  };
  py::class_<PathRules>(m, "PathRules", "Which stages a request goes through and how long they may be.")
      .def(py::init<std::vector<uint64_t>, std::vector<int64_t>, std::vector<int64_t>, std::vector<int64_t>, int64_t,
                    int, int, int64_t>(),
           py::arg("following"), py::arg("whole"), py::arg("tail"), py::arg("limits"), py::arg("max_new_tokens"),
           py::arg("last_stage"), py::arg("check_stage") = -1, py::arg("safe_id") = -1)
      .def_static("free", &PathRules::free, py::arg("max_new_tokens"), py::arg("eos_ids"))
      .def(
          "choices",
          [=](const PathRules& rules, int stage, int64_t used) {
            check(rules, stage, engine::kStart, used);
            return stages_of(rules.choices(stage, used));
          },
          py::arg("stage"), py::arg("used"))
      .def(
          "must_end",
          [=](const PathRules& rules, int stage, int64_t in_stage, int64_t used) {
            check(rules, stage, 0, std::min(in_stage, used));
            return rules.must_end(stage, in_stage, used);
          },
          py::arg("stage"), py::arg("in_stage"), py::arg("used"));
}

void bind_plan(py::module_& m) {
  const auto table_width = [](const Plan& plan) { return static_cast<size_t>(plan.table_width); };
  py::class_<Plan, std::shared_ptr<Plan>>(m, "Plan", "What one forward computes, as flat arrays.")
      .def_property_readonly("request_ids", shown(&Plan::request_ids))
      .def_property_readonly("token_ids", shown(&Plan::token_ids))
      .def_property_readonly("positions", shown(&Plan::positions))
      .def_property_readonly("stage_ids", shown(&Plan::stage_ids))
      .def_property_readonly("slots", shown(&Plan::slots))
      .def_property_readonly("query_starts", shown(&Plan::query_starts))
      .def_property_readonly("lengths", shown(&Plan::lengths))
      .def_property_readonly("page_tables", shown_in_rows(&Plan::page_tables, table_width))
      .def_property_readonly("copies", shown_in_rows(&Plan::copies, [](const Plan&) { return size_t{2}; }))
      .def_property_readonly("logits_at", shown(&Plan::logits_at))
      .def_property_readonly("logits_requests", shown(&Plan::logits_requests))
      .def_property_readonly("modes", shown(&Plan::modes))
      .def_property_readonly("end_ids", shown(&Plan::end_ids))
      .def_property_readonly("choices", shown(&Plan::choices))
      .def_property_readonly("preempted", shown(&Plan::preempted))
      .def_property_readonly("num_tokens", [](const Plan& plan) { return plan.token_ids.size(); });
  py::class_<Outcome, std::shared_ptr<Outcome>>(m, "Outcome", "What the sampled tokens of a plan came to.")
      .def_property_readonly("request_ids", shown(&Outcome::request_ids))
      .def_property_readonly("counts", shown(&Outcome::counts))
      .def_property_readonly("tokens", shown(&Outcome::tokens))
      .def_property_readonly("stage_ids", shown(&Outcome::stage_ids))
      .def_property_readonly("finished", shown(&Outcome::finished))
      .def_property_readonly("reasons", shown(&Outcome::reasons))
      .def_property_readonly("rolled_back", shown(&Outcome::rolled_back))
      .def_property_readonly("attempts", shown(&Outcome::attempts));
}

std::unique_ptr<Scheduler> make_scheduler(int64_t num_pages, int64_t page_size, int64_t max_batch_tokens,
                                          int64_t max_running, int64_t max_waiting, std::vector<int64_t> marker_ids,
                                          double safety_margin, bool share_prefixes, int64_t max_passed_over,
                                          int key_bits) {
  return std::make_unique<Scheduler>(engine::SchedulerOptions{num_pages, page_size, max_batch_tokens, max_running,
                                                              max_waiting, std::move(marker_ids), safety_margin,
                                                              share_prefixes, max_passed_over, key_bits});
}

void submit(Scheduler& scheduler, std::vector<int64_t> ids, const py::object& tokens, int32_t prompt_id,
            std::vector<PathRules> attempts, const py::object& stage_ids, uint64_t salt, uint64_t experts,
            int32_t priority) {
  engine::Submission given{.ids = std::move(ids),
                           .tokens = to_vector(integers(tokens, "submit: tokens")),
                           .prompt_id = prompt_id,
                           .attempts = std::move(attempts),
                           .salt = salt,
                           .experts = experts,
                           .priority = priority};
  if (!stage_ids.is_none()) given.stage_ids = to_vector(integers(stage_ids, "submit: stage_ids"));
  scheduler.enter([&](auto& core) { core.submit(std::move(given)); });
}

// Python objects of a class cannot be const; nobody but them reads what they show.
std::shared_ptr<Plan> plan(Scheduler& scheduler, std::optional<int64_t> only) {
  return std::const_pointer_cast<Plan>(scheduler.enter_without_gil([&](auto& core) { return core.plan(only); }));
}

std::shared_ptr<Outcome> commit(Scheduler& scheduler, const py::object& sampled) {
  const Integers tokens = integers(sampled, "commit: tokens");
  const int64_t* const begin = tokens.data();
  const int64_t count = tokens.size();
  return std::const_pointer_cast<Outcome>(
      scheduler.enter_without_gil([&](auto& core) { return core.commit(begin, count); }));
}

// A method of the core, under the rule of one thread.
template <typename Call>
auto entered(Call call) {
  return [call](Scheduler& scheduler) { return scheduler.enter(call); };
}

template <typename Call>
auto of_request(Call call) {
  return [call](Scheduler& scheduler, int64_t id) {
    return scheduler.enter([&](auto& core) { return call(core.request(id)); });
  };
}

void bind_scheduler(py::module_& m) {
  py::class_<Scheduler>(m, "StepScheduler", "Decides what each forward computes; see csrc/engine/step_scheduler.h.")
      .def(py::init(&make_scheduler), py::kw_only(), py::arg("num_pages"), py::arg("page_size"),
           py::arg("max_batch_tokens"), py::arg("max_running"), py::arg("max_waiting"), py::arg("marker_ids"),
           py::arg("safety_margin") = 0.02, py::arg("share_prefixes") = true, py::arg("max_passed_over") = 16,
           py::arg("_key_bits") = 64)
      .def("submit", &submit, py::arg("request_ids"), py::arg("tokens"), py::arg("prompt_id"), py::arg("attempts"),
           py::kw_only(), py::arg("stage_ids") = py::none(), py::arg("salt") = 0, py::arg("experts") = 0,
           py::arg("priority") = 0)
      .def("plan", &plan, py::arg("only") = py::none())
      .def("commit", &commit, py::arg("tokens"))
      .def("abandon", entered([](auto& core) { core.abandon(); }))
      .def(
          "cancel", [](Scheduler& s, int64_t id) { s.enter([&](auto& core) { core.cancel(id); }); },
          py::arg("request_id"))
      .def(
          "roll_back",
          [](Scheduler& s, int64_t id, int64_t num_tokens) {
            s.enter([&](auto& core) { core.roll_back(id, num_tokens); });
          },
          py::arg("request_id"), py::arg("num_tokens"))
      .def("tokens", of_request(tokens_as(&engine::Token::id)), py::arg("request_id"))
      .def("stage_ids", of_request(tokens_as(&engine::Token::stage_id)), py::arg("request_id"))
      .def("num_cached", of_request([](const Request& request) { return request.num_cached; }), py::arg("request_id"))
      .def_property_readonly("has_work", entered([](auto& core) { return core.has_work(); }))
      .def("stats", entered([](auto& core) { return to_dict(core.stats()); }))
      .def("check", entered([](auto& core) { core.check(); }))
      .def("drop_cache", entered([](auto& core) { core.drop_cache(); }));
}

}  // namespace

void bind_engine(py::module_& m) {
  bind_errors(m);
  bind_rules(m);
  bind_plan(m);
  bind_scheduler(m);
  m.attr("TEXT") = static_cast<int>(engine::kText);
  m.attr("FREE") = static_cast<int>(engine::kFree);
  m.attr("CHOOSE") = static_cast<int>(engine::kChoose);
  m.attr("VERDICT") = static_cast<int>(engine::kVerdict);
  m.attr("ENDED") = static_cast<int>(engine::kEnded);
  m.attr("TOTAL") = static_cast<int>(engine::kTotal);
  m.attr("EOS") = static_cast<int>(engine::kEos);
  m.attr("FAILED") = static_cast<int>(engine::kFailed);
}

}  // namespace mote
