"""A run of chain building that is killed, cut off, out of disk, interrupted or on many actors gives the same file."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")

import models

from mote_ext.chains import ModelChecker, Prompt, Settings, Templates, build_chains
from mote_ext.chains.build import groups_of, stage_table_of
from mote_ext.chains.group import GroupBuilder, GroupResult
from mote_ext.chains.journal import Journal
from mote_ext.chains.writer import TextWriter
from mote_ext.keyed import uniform

LIMITS = {"analysis": 4, "guidance": 3, "response": 5}


class DrawnChecker:
    """Safe by a draw of prompt and answer: every way is taken, and some prompts are dropped."""

    name = "drawn"

    def accept(self, prompts):
        pass

    def scores(self, prompts, answers):
        return [uniform(prompt.id, answer) * 0.8 for prompt, answer in zip(prompts, answers)]


def tiny_model():
    tokenizer = models.make_tokenizer()
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return models.make_base(vocab_size=len(tokenizer), max_position_embeddings=1024, **ids), tokenizer


def make_prompts(num):
    labels = ("harmful", "benign", None)
    return [Prompt(f"p-{i}", f"question {i}", label=labels[i % 3]) for i in range(num)]


def run(out, num=24, prompts=None, **changes):
    """build_chains on the tiny model; changes go to Settings, or to build_chains."""
    model, tokenizer = tiny_model()
    of_call = {
        name: changes.pop(name) for name in ("progress", "run_groups", "exemplars", "templates") if name in changes
    }
    settings = Settings(**{"batch_size": 8, "max_tokens": LIMITS, "temperature": 1.0, **changes})
    prompts = make_prompts(num) if prompts is None else prompts
    return build_chains(model, tokenizer, prompts, DrawnChecker(), settings, out, **of_call)


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def contents(out):
    """Bytes of the chains, and of the dropped."""
    return out.read_bytes(), out.with_name(out.name + ".dropped.jsonl").read_bytes()


def require_each_once(out, num):
    kept = [row["id"] for row in rows_of(out)]
    dropped = [row["id"] for row in rows_of(out.with_name(out.name + ".dropped.jsonl"))]
    assert len(set(kept)) == len(kept)
    prompts = [name for name in kept if "/rejected-" not in name]
    assert sorted(prompts + dropped) == sorted(f"p-{i}" for i in range(num))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run: its file, and the two files' bytes."""
    out = tmp_path_factory.mktemp("whole") / "chains.jsonl"
    summary = run(out)
    return SimpleNamespace(out=out, contents=contents(out), summary=summary)


def test_a_run_takes_every_way_and_counts_it(whole):
    require_each_once(whole.out, 24)
    mix = whole.summary.mix
    found = [row for row in rows_of(whole.out) if row["check"] == "safe"]
    total = sum(mix.ways.values(), start=type(mix.rejected)())
    assert mix.num_chains == len(found) == sum(total.values())
    assert total["full"] == sum("guidance" in row for row in found) > 0
    assert total["analysis"] == sum("analysis" in row and "guidance" not in row for row in found) > 0
    assert total["answer"] > 0 and mix.dropped.total() == 24 - len(found) > 0
    assert mix.rejected.total() == len(rows_of(whole.out)) - len(found)
    assert set(mix.ways) == {"harmful", "benign", "unlabelled"}
    lengths = [len(models.make_tokenizer()(row["response"])["input_ids"]) for row in found]
    assert mix.mean_tokens["response"] == pytest.approx(sum(lengths) / len(lengths))
    shown = "\n".join(mix.lines())
    assert "28.5 %" in shown and "61.4 %" in shown and "question" not in shown
    assert (whole.summary.num_built, whole.summary.num_found) == (24, 0)


def test_a_finished_run_builds_nothing_more(whole):
    seen = []
    summary = run(whole.out, progress=lambda done, result: seen.append((done, result)))
    assert seen == [(24, None)] and (summary.num_built, summary.num_found) == (0, 24)
    assert contents(whole.out) == whole.contents


def test_texts_depend_on_the_seed_and_on_no_neighbour(whole, tmp_path):
    run(tmp_path / "other-batches.jsonl", batch_size=5)
    assert contents(tmp_path / "other-batches.jsonl") == whole.contents
    run(tmp_path / "other-seed.jsonl", seed=1)
    assert contents(tmp_path / "other-seed.jsonl") != whole.contents


class Recorded:
    """The groups of a finished run, given without a model."""

    def __init__(self, out, batch_size=8):
        kept, dropped = rows_of(out), rows_of(out.with_name(out.name + ".dropped.jsonl"))
        self.groups = groups_of(make_prompts(24), batch_size)
        self.results = []
        for group in self.groups:
            ids = {prompt.id for prompt in group}
            self.results.append(
                GroupResult(
                    [row for row in kept if row["id"].split("/")[0] in ids],
                    [row for row in dropped if row["id"] in ids],
                    len(group),
                )
            )

    def go_on(self, out):
        """Which groups were built."""
        built = []
        with Journal(out, {"a": 1}) as journal:
            for number, (group, result) in enumerate(zip(self.groups, self.results)):
                if not journal.is_done(group):
                    journal.append(result)
                    built.append(number)
        return built


def test_wherever_a_kill_cuts_the_files_the_rest_is_added(whole, tmp_path, monkeypatch):
    """Prefixes of what reached the disk, byte by byte in the order of the writes."""
    recorded, out, real, writes = Recorded(whole.out), tmp_path / "c.jsonl", os.write, []
    dropped = tmp_path / "c.jsonl.dropped.jsonl"

    def write(descriptor, data):
        writes.append((os.path.samestat(os.fstat(descriptor), dropped.stat()), len(data)))
        return real(descriptor, data)

    monkeypatch.setattr("os.write", write)
    recorded.go_on(out)
    monkeypatch.undo()
    assert contents(out) == whole.contents
    cuts, sizes = [], [0, 0]
    for which, size in writes:
        cuts += [(sizes[0] + n * (not which), sizes[1] + n * which) for n in range(size)]
        sizes[which] += size
    assert sizes == [len(part) for part in whole.contents]
    assert len(writes) <= 2 * len(recorded.groups), "one write a group and file"
    for kept_size, dropped_size in random.Random(0).sample(cuts, 150):
        out.write_bytes(whole.contents[0][:kept_size])
        dropped.write_bytes(whole.contents[1][:dropped_size])
        recorded.go_on(out)
        assert contents(out) == whole.contents, (kept_size, dropped_size)


def test_groups_that_are_done_are_not_built_again(whole, tmp_path):
    recorded, out = Recorded(whole.out), tmp_path / "c.jsonl"
    assert recorded.go_on(out) == [0, 1, 2] and recorded.go_on(out) == []
    out.write_bytes(out.read_bytes()[:-1])
    assert recorded.go_on(out) in ([2], [0, 2], [1, 2])
    assert contents(out) == whole.contents


def program(out, num):
    """A process that builds; the tests' own functions, so that the run is the same."""
    code = f"import test_chains_resume as t, pathlib; t.run(pathlib.Path({str(out)!r}), {num})"
    folder = os.path.dirname(__file__)
    path = os.pathsep.join([folder, os.path.dirname(folder), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.DEVNULL)


def wait_for(process, out, num_lines):
    """Until that many lines are written."""
    end = time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
        if out.exists() and out.read_bytes().count(b"\n") >= num_lines:
            return
        time.sleep(0.002)
    raise AssertionError(f"the process ended, or wrote nothing: {process.poll()}")


def test_200_prompts_survive_kill_9_at_a_random_moment(tmp_path):
    num, out, other = 200, tmp_path / "c.jsonl", tmp_path / "uninterrupted.jsonl"
    process = program(out, num)
    wait_for(process, out, random.randrange(1, 150))
    time.sleep(random.random() * 0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = out.read_bytes()
    found = sum("/rejected-" not in row["id"] for row in map(json.loads, before.splitlines()[:-1]))
    assert 0 < found < num
    summary = run(out, num)
    assert out.read_bytes().startswith(before[: before.rfind(b"\n") + 1]), "what was written is not written again"
    assert 0 < summary.num_built < num
    require_each_once(out, num)
    run(other, num)
    assert contents(out) == contents(other)


def test_ctrl_c_leaves_a_file_that_goes_on(whole, tmp_path):
    out = tmp_path / "c.jsonl"

    def interrupt(done, result):
        if done == 16:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(out, progress=interrupt)
    assert run(out).num_found == 16
    assert contents(out) == whole.contents


@pytest.mark.parametrize("partly", [False, True])
def test_a_full_disk_is_an_error_and_the_file_stays_whole(whole, tmp_path, monkeypatch, partly):
    out, real, taken = tmp_path / "c.jsonl", os.write, []

    def write(descriptor, data):
        if len(taken) < 2:
            taken.append(len(data))
            return real(descriptor, data)
        if partly and len(taken) == 2:  # a part still fits
            taken.append(0)
            return real(descriptor, data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.write", write)
    with pytest.raises(OSError, match="what is written stays valid; make room and run the same again") as caught:
        run(out)
    assert caught.value.errno == 28 and "question" not in str(caught.value)
    monkeypatch.undo()
    rows_of(out)  # each line is whole
    assert out.read_bytes().endswith(b"\n") and whole.contents[0].startswith(out.read_bytes())
    run(out)
    assert contents(out) == whole.contents


def test_a_limit_on_file_sizes_is_an_error_too(whole, tmp_path):
    resource = pytest.importorskip("resource")
    recorded, out = Recorded(whole.out), tmp_path / "c.jsonl"
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole.contents[0]) - 40, before[1]))
    try:
        with pytest.raises(OSError, match="stays valid"):
            recorded.go_on(out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert 0 < out.stat().st_size < len(whole.contents[0])
    recorded.go_on(out)
    assert contents(out) == whole.contents


def test_a_run_with_other_settings_is_refused_with_what_differs(whole):
    other = make_prompts(24)
    other[3] = Prompt("p-3", "another question")
    changes = [
        ({"seed": 1}, "seed was 0, is 1"),
        ({"temperature": 0.5}, "temperature was 1.0, is 0.5"),
        ({"max_tokens": {"response": 3}}, "max_tokens was"),
        ({"num": 23}, "num_prompts was 24, is 23"),
        ({"prompts": other}, "prompts was"),
        ({"exemplars": []}, None),
        ({"start": {"benign": 1}, "batch_size": 4}, "batch_size was 8, is 4; .*start was"),
    ]
    for change, message in changes:
        if message is None:
            run(whole.out, **change)
            continue
        with pytest.raises(ValueError, match=message) as caught:
            run(whole.out, **change)
        assert "another question" not in str(caught.value)
    assert contents(whole.out) == whole.contents


def test_files_of_others_are_refused(tmp_path):
    out = tmp_path / "c.jsonl"
    out.write_text('{"mine": 1}\n')
    with pytest.raises(ValueError, match="there is no c.jsonl.meta.json beside it"):
        Journal(out, {})
    out.write_text("")
    with Journal(out, {"a": 1}) as journal, pytest.raises(ValueError, match="being written by another run"):
        Journal(journal.out, {"a": 1})
    out.write_text('{"id": "a"}\n{"mine": 1}\n')
    with pytest.raises(ValueError, match="c.jsonl:2: not a line of a journal"):
        Journal(out, {"a": 1})
    (tmp_path / "c.jsonl.meta.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        Journal(out, {"a": 1})


@pytest.mark.parametrize("removed", [["c.jsonl", "c.jsonl.meta.json"], ["c.jsonl"], ["c.jsonl.meta.json"]])
def test_a_dropped_file_left_over_is_refused_and_no_prompt_is_lost_to_it(whole, tmp_path, removed):
    out, prompts = tmp_path / "c.jsonl", make_prompts(2)
    with Journal(out, {"a": 1}) as journal:
        journal.append(GroupResult([], [{"id": prompt.id} for prompt in prompts], 2))
    for name in removed:
        (tmp_path / name).unlink()
    for _ in range(2):  # the refusal leaves nothing behind that a second try would take for a run
        with pytest.raises(ValueError, match="c.jsonl is gone|there is no c.jsonl.meta.json beside it"):
            Journal(out, {"a": 1})
    (tmp_path / "c.jsonl.dropped.jsonl").unlink()
    with Journal(out, {"a": 1}) as journal:
        assert not journal.is_done(prompts)


def test_a_prompt_that_cannot_be_encoded_is_named_before_anything_is_written(tmp_path, monkeypatch):
    def refuse(tokenizer, prompt, **options):
        if "question 5" in str(prompt):
            raise ValueError("the chat template refuses this")
        return [1, 2]

    monkeypatch.setattr("mote_ext.chains.writer.encode_prompt", refuse)
    with pytest.raises(ValueError, match="^prompt p-5: the chat template refuses this"):
        run(tmp_path / "c.jsonl", 8)
    assert not any(tmp_path.iterdir())


def test_a_mote_model_writes_with_its_own_stages(tmp_path):
    tokenizer = models.make_tokenizer()
    base = models.make_base(vocab_size=len(tokenizer), max_position_embeddings=1024)
    stages = [
        {"name": "analysis", "next": ["response"]},
        {"name": "response", "role": "response"},
        {"name": "check", "role": "check"},
    ]
    model = models.make_model(base=base, tokenizer=tokenizer, marker_ids=None, verdict_ids=None, stages=stages)
    settings = Settings(batch_size=4, max_tokens={"analysis": 4, "response": 5}, temperature=1.0)
    summary = build_chains(model, tokenizer, make_prompts(8), DrawnChecker(), settings, tmp_path / "c.jsonl")
    require_each_once(summary.out, 8)
    assert summary.mix.names == ["answer", "analysis"] and not any("guidance" in row for row in rows_of(summary.out))
    markers = set(stage_table_of(model).markers)
    assert not any(marker in line for marker in markers for line in summary.out.read_text().splitlines())


def tiny_builder(**settings):
    """For Ray's actors."""
    model, tokenizer = tiny_model()
    table = stage_table_of(model)
    made = Settings(**{"batch_size": 8, "max_tokens": LIMITS, "temperature": 1.0, **settings})
    writer = TextWriter(model, tokenizer, made.temperature, made.top_p)
    return GroupBuilder(writer, DrawnChecker(), table, Templates.read(table), made)


def test_actors_of_ray_give_the_same_file(whole, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    from mote_ext.chains.distributed import run_on_ray

    folder = os.path.dirname(__file__)
    path = os.pathsep.join([folder, os.path.dirname(folder), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path)
    out = tmp_path / "c.jsonl"
    with Journal(out, {}):
        pass
    out.with_name("c.jsonl.meta.json").unlink()
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        run(out, run_groups=lambda groups: run_on_ray(partial(tiny_builder), groups, 2))
    finally:
        ray.shutdown()
    assert contents(out) == whole.contents


def test_ray_is_an_extra(monkeypatch):
    from mote_ext.chains.distributed import run_on_ray

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install 'mote_ext\[ray\]'"):
        next(run_on_ray(tiny_builder, [], 1))


def test_the_models_own_check_runs_in_a_loop(tmp_path):
    model, tokenizer = tiny_model()
    checker = ModelChecker(model, tokenizer, Templates.read(stage_table_of(model)))
    settings = Settings(batch_size=4, max_tokens=LIMITS)
    summary = build_chains(model, tokenizer, make_prompts(4), checker, settings, tmp_path / "c.jsonl")
    require_each_once(summary.out, 4)
