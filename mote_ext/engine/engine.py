"""MoTEEngine: the loop of three verbs.

    plan     the scheduler says which tokens of which requests go through the model now      (_C.StepScheduler, C++)
    forward  one flat batch over the paged cache, then the next token of each row            (forward.py, sampling.py)
    commit   the scheduler is told the tokens; it forces markers, rolls back, ends requests

Not thread-safe: one thread owns an engine. A request that fails, fails alone.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import secrets
from collections.abc import Iterator, Sequence

import torch

from mote_ext import _C, keyed
from mote_ext.engine.cache import PagedCache, default_num_pages, page_bytes
from mote_ext.engine.collecting import RequestEvents, collect
from mote_ext.engine.forward import PagedModel
from mote_ext.engine.outputs import RequestOutput, StageEvent, TokenLogprob
from mote_ext.engine.params import SamplingParams
from mote_ext.engine.probe import probe, served_length
from mote_ext.engine.prompts import Prepared, Prompt, prepare
from mote_ext.engine.replay import recorder_for
from mote_ext.engine.requests import Sample, Served
from mote_ext.engine.rules import attempts_of
from mote_ext.engine.sampling import Choice, Sampler
from mote_ext.engine.statistics import readable
from mote_ext.engine.weights import WeightsWatch

NO_NUMBERS = "the model's logits are no numbers (NaN)"
INTERRUPTED = "the engine was interrupted in the middle of a step"


class MoTEEngine:
    """Serves a MoTE model to many requests at once.

    model:            of MoTEForCausalLM or get_mote_model, in eval mode; it stays usable between steps
    tokenizer:        the model's; without one prompts are token ids and outputs have no text
    num_pages:        of the cache, None for as many as all running requests can use, within 1 GiB on a CPU and 0.8 of
                      the free memory of a GPU
    page_size:        tokens a page
    max_batch_tokens: tokens a forward, of decoding and prompts together
    max_running:      samples at once; max_waiting: samples beyond them before submit raises QueueFull
    cache_dtype:      of keys and values, None for the model's
    safety_margin:    share of the pages kept free for running requests when one is admitted
    share_prefixes:   whether prompts that begin alike share pages
    ValueError: a model that cannot be served from a paged cache; numbers that cannot be.
    RuntimeError: a model in training mode, or inside disable_experts().
    """

    def __init__(
        self,
        model,
        tokenizer=None,
        *,
        num_pages: int | None = None,
        page_size: int = 16,
        max_batch_tokens: int = 512,
        max_running: int = 64,
        max_waiting: int = 4096,
        cache_dtype: torch.dtype | None = None,
        safety_margin: float = 0.02,
        share_prefixes: bool = True,
    ) -> None:
        if not hasattr(model, "routing"):
            raise ValueError(
                f"MoTEEngine: model must be a MoTE model (MoTEForCausalLM.from_base, get_mote_model), got "
                f"{type(model).__name__}"
            )
        for name, value in (("page_size", page_size), ("num_pages", num_pages), ("max_running", max_running)):
            if value is not None and value < 1:
                raise ValueError(f"MoTEEngine: {name} must be at least 1, got {value}")
        self.model = model
        self._require_ready()
        routing, device = model.routing, model.get_input_embeddings().weight.device
        eos = model.generation_config.eos_token_id
        eos_ids = [] if eos is None else list(eos) if isinstance(eos, list | tuple) else [int(eos)]
        self._served = Served(routing.config, routing.table, tokenizer, eos_ids)
        self.context_length = served_length(model.config)
        cache_dtype = cache_dtype or model.dtype
        if not cache_dtype.is_floating_point:
            raise ValueError(f"MoTEEngine: cache_dtype must be a floating-point dtype, got {cache_dtype}")
        probed = probe(model, page_size, cache_dtype, device)
        if num_pages is None:
            most = max_running * -(-(self.context_length or 4096) // page_size)
            num_pages = default_num_pages(page_bytes(probed.shapes, page_size, cache_dtype), device, most)
        self._cache = PagedCache(probed.shapes, num_pages, page_size, cache_dtype, device)
        self._paged = PagedModel(model, self._cache, probed.kernel, recorder_for(device))
        markers = routing.table.marker_ids or ()
        self._sampler = Sampler(markers, eos_ids, device)
        self._scheduler = _C.StepScheduler(
            num_pages=num_pages,
            page_size=page_size,
            max_batch_tokens=max_batch_tokens,
            max_running=max_running,
            max_waiting=max_waiting,
            marker_ids=list(markers),
            safety_margin=safety_margin,
            share_prefixes=share_prefixes,
        )
        self._most_samples, self._num_tokens = min(max_running, max_waiting), num_pages * page_size
        self._weights = WeightsWatch(model)
        self._samples: dict[int, Sample] = {}
        self._requests: dict[str, list[int]] = {}
        self._ready: list[StageEvent] = []  # events that wait for the next step
        self._num_submitted, self._num_keys, self._secret = 0, 0, secrets.token_hex(16)
        self._is_stepping = False  # true at the beginning of a step: the last one was interrupted
        self._counts = dict.fromkeys(("finished", "cancelled", "failed", "prompt_tokens", "prompt_hit_tokens"), 0)

    # ---- requests

    def submit(self, prompt: Prompt, params: SamplingParams | None = None, *, request_id: str | None = None) -> str:
        """Puts a request into the queue and returns its id.

        prompt: a text, messages [{"role": …, "content": …}, …], or token ids
        ValueError: what can never run: a path, check or limit without sense, markers in ids that are not trusted, more
        tokens than the context or the cache has, an id that is in use. QueueFull: later it may be taken.
        """
        return self.enqueue(self._prepare(prompt, params), request_id, streams=True)

    def enqueue(self, prepared: Prepared, request_id: str | None, *, streams: bool) -> str:
        """submit's second half; with streams=False only last events come, and no text is decoded before them."""
        self._num_submitted += 1
        if request_id is None:
            free = (f"request-{number}" for number in itertools.count(self._num_submitted))
            request_id = next(name for name in free if name not in self._requests)
        if request_id in self._requests:
            raise ValueError(f"submit: request_id {request_id!r} is in use by an unfinished request")
        self._watch_weights()
        ids, params, plans = prepared
        seed = keyed.bits(self._secret, self._num_submitted) if params.seed is None else params.seed
        keys = list(range(self._num_keys, self._num_keys + params.n))
        self._num_keys += params.n
        samples = {
            key: Sample(
                self._served, request_id, number, ids, params, plans, seed,
                functools.partial(self._scheduler.tokens, key), streams=streams,
            )
            for number, key in enumerate(keys)
        }  # fmt: skip
        try:
            self._scheduler.submit(
                keys,
                ids,
                self._served.prompt_id,
                attempts_of(plans, params, self._served.eos_ids),
                salt=keyed.bits("salt", params.cache_salt),
                experts=self._weights.key,
                priority=params.priority,
            )
            self._samples |= samples
            self._requests[request_id] = keys
        except BaseException:
            self._forget(keys)
            self._requests.pop(request_id, None)
            raise
        return request_id

    def put_back(self, events: list[StageEvent]) -> None:
        """Events for whoever calls step() next."""
        self._ready = events + self._ready

    def drop(self, request_id: str) -> None:
        """Cancels a request, if it is unfinished, and all that was to be said about it."""
        if request_id in self._requests:
            self.cancel(request_id)
        self._ready = [event for event in self._ready if event.request_id != request_id]

    def cancel(self, request_id: str) -> None:
        """Ends a request with what it has; its last events come with the next step. KeyError: no such request."""
        if request_id not in self._requests:
            raise KeyError(f"cancel: no unfinished request {request_id!r}")
        for key in list(self._requests[request_id]):
            self._ready += self._end(key, "cancelled")

    def is_unfinished(self, request_id: str) -> bool:
        return request_id in self._requests

    @property
    def has_work(self) -> bool:
        return bool(self._samples or self._ready)

    def step(self) -> list[StageEvent]:
        """One forward: what came of it, and of what was cancelled or failed since. Nothing to do gives nothing.

        RuntimeError: the model is in training mode or its experts are switched off; nothing is lost.
        """
        events, self._ready = self._ready, []
        if not self._samples:
            return events
        try:
            return events + self._step()
        except BaseException:
            self.put_back(events)
            raise

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = False,
    ) -> list[RequestOutput]:
        """All outputs in the order of the prompts, the samples of a prompt after each other.

        params: one for all, or one a prompt; progress: a bar on the terminal
        ValueError: as submit, before any has begun. A request that fails later says so in its output.
        """
        if params is None or isinstance(params, SamplingParams):
            params = [params] * len(prompts)
        if len(params) != len(prompts):
            raise ValueError(f"generate: params must be one, or one a prompt: {len(prompts)}, got {len(params)}")
        waiting = [self._prepare(prompt, of) for prompt, of in zip(prompts, params)]
        return collect(self, waiting, progress)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[StageEvent]:
        """Events of one request as they come; leaving the loop early cancels it. Other requests go on meanwhile, their
        events come with the next step()."""
        return RequestEvents(self, self.submit(prompt, params))

    def stats(self) -> dict:
        """The scheduler's counts, and what they come to: see docs/serving.md."""
        return readable({**self._scheduler.stats(), **self._counts}, self._cache, self._served.table.names)

    def reset_cache(self) -> None:
        """Forgets all cached pages and reads the weights again, as after a training step it is done by itself."""
        self._weights.renew()
        self._paged.weights_changed()
        self._scheduler.drop_cache()

    # ---- plan, forward, commit

    def _step(self) -> list[StageEvent]:
        self._require_ready()
        if self._is_stepping:
            return self._recover()
        self._watch_weights()
        self._is_stepping = True
        events = self._one_step()
        self._is_stepping = False
        return events

    def _one_step(self) -> list[StageEvent]:
        plan = self._scheduler.plan()
        if plan is None:
            return []
        try:
            choice = self._choose(plan)
        except Exception:
            self._scheduler.abandon()
            return self._step_one_by_one(plan.request_ids.tolist())
        except BaseException:
            self._take_back()
            raise
        return self._commit(plan, choice)

    def _take_back(self) -> None:
        """An interrupt (Ctrl-C) where a step spends its time, in the forward and in sampling: it did not happen."""
        self._scheduler.abandon()
        self._is_stepping = False

    def _recover(self) -> list[StageEvent]:
        """The last step was interrupted elsewhere, nobody knows where: what it knew of the unfinished requests may be
        lost, so they fail."""
        with contextlib.suppress(RuntimeError):  # unless a plan is open
            self._scheduler.abandon()
        events = [event for key in list(self._samples) for event in self._end(key, "failed", INTERRUPTED)]
        self._is_stepping = False
        return events

    def _choose(self, plan) -> Choice:
        logits, _ = self._paged(plan)
        keys = plan.logits_requests.tolist()
        rows = [self._samples[key] for key in keys]
        for key, row in zip(keys, rows):
            if row.num_cached is None:
                row.num_cached = self._scheduler.num_cached(key)
                if row.number == 0:  # the other samples share its prompt
                    self._counts["prompt_tokens"] += len(row.prompt)
                    self._counts["prompt_hit_tokens"] += row.num_cached
        return self._sampler.choose(logits, plan, rows)

    def _step_one_by_one(self, keys: list[int]) -> list[StageEvent]:
        """A forward raised: each of its requests alone, so that only whose own forward raises has failed."""
        events = []
        for key in keys:
            plan = self._scheduler.plan(only=key) if key in self._samples else None
            if plan is None:
                continue
            try:
                choice = self._choose(plan)
            except Exception as error:
                self._scheduler.abandon()
                events += self._end(key, "failed", f"{type(error).__name__}: {error}")
                continue
            except BaseException:
                self._take_back()
                self._ready += events
                raise
            events += self._commit(plan, choice)
        return events

    def _commit(self, plan, choice: Choice) -> list[StageEvent]:
        outcome = self._scheduler.commit(choice.tokens)
        logprobs = {int(plan.logits_requests[i]): logprob for i, logprob in choice.logprobs.items()}
        reasons = dict(zip(outcome.finished.tolist(), outcome.reasons.tolist()))
        rolled_back = dict(zip(outcome.rolled_back.tolist(), outcome.attempts.tolist()))
        events, begin, tokens = [], 0, outcome.tokens.tolist()
        for key, count in zip(outcome.request_ids.tolist(), outcome.counts.tolist()):
            given, begin = tokens[begin : begin + count], begin + count
            events += self._advance(key, given, logprobs.get(key), rolled_back.get(key), key in reasons)
        for key, reason in reasons.items():
            if reason == _C.FAILED:
                events += self._end(key, "failed", NO_NUMBERS)
        return events

    def _advance(
        self, key: int, tokens: list[int], logprob: TokenLogprob | None, attempt: int | None, is_last: bool
    ) -> list[StageEvent]:
        """One sample takes its tokens; what raises in its own text or stop texts ends it alone."""
        sample = self._samples[key]
        try:
            if attempt is not None:  # the tokens are those after the roll-back
                sample.restart(attempt)
                logprob = None
            events = sample.take(tokens, logprob)
            return events + (self._end(key, "finished") if is_last or sample.stopped else [])
        except Exception as error:
            return self._end(key, "failed", f"{type(error).__name__}: {error}")

    def _end(self, key: int, status: str, error: str | None = None) -> list[StageEvent]:
        """Takes a sample out of the scheduler, if it is still in it, and gives its last events."""
        sample = self._samples.pop(key)
        own = self._requests[sample.request_id]
        own.remove(key)
        if not own:
            del self._requests[sample.request_id]
        self._forget([key])
        try:
            events = sample.finish(status, error)
        except Exception as failure:
            events = sample.finish("failed", f"{type(failure).__name__}: {failure}")
        self._counts[events[-1].output.status] += 1
        return events

    def _forget(self, keys: Sequence[int]) -> None:
        """Takes samples out of the scheduler, unless it ended them itself."""
        for key in keys:
            self._samples.pop(key, None)
            with contextlib.suppress(KeyError):
                self._scheduler.cancel(key)

    def _prepare(self, prompt: Prompt, params: SamplingParams | None) -> Prepared:
        embedding = self.model.get_input_embeddings()
        num_base_ids = getattr(embedding, "base", embedding).weight.shape[0]
        prepared = prepare(prompt, params, self._served, num_base_ids, self.context_length)
        num_tokens, n = len(prepared.ids) + prepared.params.max_new_tokens, prepared.params.n
        if num_tokens > self._num_tokens:
            raise ValueError(
                f"MoTEEngine: prompt and max_new_tokens must fit into the cache of {self._num_tokens} tokens, got "
                f"{len(prepared.ids)} + {prepared.params.max_new_tokens}; build the engine with more num_pages"
            )
        if n > self._most_samples:
            raise ValueError(
                f"MoTEEngine: n must be at most max_running and max_waiting, {self._most_samples} here, got {n}"
            )
        return prepared

    def _watch_weights(self) -> None:
        if self._weights.changed():
            self.reset_cache()

    def _require_ready(self) -> None:
        if self.model.training:
            raise RuntimeError(
                "MoTEEngine: the model is in training mode, where dropout would change its answers; call model.eval()"
            )
        if not self.model.routing.context.experts_enabled:
            raise RuntimeError("MoTEEngine: the model's experts are switched off; leave disable_experts() first")
