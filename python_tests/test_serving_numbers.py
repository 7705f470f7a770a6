"""The server's metrics and its load generator: what is counted and in which format; one seed, one load."""

import pytest

pytest.importorskip("starlette")

from servers import make_model

from mote_ext.engine import MoTEEngine
from mote_ext.serving.load import Load, percentiles
from mote_ext.serving.metrics import Histogram, Metrics
from mote_ext.serving.policy import Policy
from mote_ext.serving.protocol import parse_chat


def test_a_histogram_is_cumulative():
    histogram = Histogram((0.1, 1.0))
    for seconds in (0.05, 0.1, 0.5, 7.0):
        histogram.observe(seconds)
    lines = list(histogram.lines("x"))
    assert lines[:3] == ['x_bucket{le="0.1"} 2', 'x_bucket{le="1.0"} 3', 'x_bucket{le="+Inf"} 4']
    assert lines[4] == "x_count 4"


def test_metrics_are_prometheus_text():
    parser = pytest.importorskip("prometheus_client.parser")
    metrics = Metrics()
    metrics.responses["chat", 200] += 2
    metrics.finished['od"d\\path\n', "stop"] += 1
    metrics.first_token.observe(0.3)
    stats = MoTEEngine(make_model(), num_pages=8).stats()
    text = metrics.text(stats, make_model().routing.config.stage_table.names, num_open=1, is_healthy=True)
    families = {family.name: family for family in parser.text_string_to_metric_families(text)}
    assert families["mote_pages"].type == "gauge"
    assert sum(sample.value for sample in families["mote_pages"].samples) == 8
    assert families["mote_answers"].samples[0].labels == {"path": 'od"d\\path\n', "reason": "stop"}
    assert families["mote_time_to_first_token_seconds"].type == "histogram"
    assert {sample.labels["stage"] for sample in families["mote_stage_tokens"].samples} == {
        "base_only", "shared_only", "analysis", "guidance", "response", "check",
    }  # fmt: skip


def test_a_load_is_the_same_every_time():
    policy = Policy.of(make_model().routing.config)
    load = Load(paths=("answer", "full"), max_tokens=64, seed=7)
    bodies = [load.body(i, "tiny") for i in range(40)]
    assert bodies == [load.body(i, "tiny") for i in range(40)]
    assert bodies != [Load(paths=("answer", "full"), max_tokens=64, seed=8).body(i, "tiny") for i in range(40)]
    assert {body["path"] for body in bodies} == {"answer", "full"}
    assert all(32 <= body["max_tokens"] <= 64 for body in bodies)
    assert all(parse_chat(body, policy, "tiny").stream for body in bodies)


def test_percentiles_take_the_nearest_rank():
    assert percentiles([None, 3, 1, 2, 4]) == {"p50": 2, "p90": 4, "p99": 4}
    assert percentiles(range(1, 101)) == {"p50": 50, "p90": 90, "p99": 99}
    assert percentiles([None])["p50"] is None
