"""The autoscaling recipes, over recorded metrics of a real worker (tests/recorded): more workers in a burst, one worker
after it.

Prometheus' own promtool runs the queries of the recipes. The documented rule of an HPA is written out here: ceil of
value / target, bounds, the highest of all metrics, the stabilisation window.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import promtool

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "examples/kubernetes"

RECORDED: dict[str, Any] = json.loads((ROOT / "tests/recorded/autoscaling.json").read_text("utf-8"))
STEP = RECORDED["interval_s"]
#: Seconds for which the last recorded values are repeated, so that the number of workers can fall to one again.
IDLE_S = 700
SERIES: promtool.Series = {
    name: [*values, *[values[-1]] * (IDLE_S // STEP)] for name, values in RECORDED["series"].items()
}
END = STEP * (max(map(len, SERIES.values())) - 1)


def recipe(name: str) -> list[dict[str, Any]]:
    """Return the documents of a recipe."""
    documents: list[dict[str, Any]] = list(yaml.safe_load_all((RECIPES / name).read_text("utf-8")))
    return documents


def adapter_queries() -> dict[str, str]:
    """Return prometheus-adapter's queries by metric."""
    rules = yaml.safe_load(recipe("hpa.yaml")[1]["data"]["config.yaml"])["externalRules"]
    return {rule["name"]["as"]: rule["metricsQuery"] for rule in rules}


def keda_triggers() -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Return KEDA's triggers: the one that starts the first worker, the lag, the wait."""
    kafka, lag, wait = recipe("keda.yaml")[0]["spec"]["triggers"]
    assert [each["type"] for each in (kafka, lag, wait)] == ["kafka", "prometheus", "prometheus"]
    return kafka, lag, wait


def keda_queries() -> dict[str, str]:
    """Return KEDA's queries, under the names of prometheus-adapter's queries."""
    _, lag, wait = keda_triggers()
    return {"jobledger_mail_lag": lag["metadata"]["query"], "jobledger_mail_wait_p95": wait["metadata"]["query"]}


def evaluated(tmp_path: Path, query: str, series: promtool.Series) -> list[float]:
    """Return the result of the query at each scrape of the series."""
    at = range(0, END + 1, STEP)
    test = {
        "rule_files": [],
        "evaluation_interval": f"{STEP}s",
        "tests": [
            {
                "interval": f"{STEP}s",
                "input_series": promtool.told(series),
                # No sample is expected, so promtool prints the samples that it got.
                "promql_expr_test": [{"expr": query, "eval_time": f"{t}s", "exp_samples": []} for t in at],
            }
        ],
    }
    _, output = promtool.run(tmp_path, test)
    got: dict[int, float] = {}
    time_s = -1
    for line in output.splitlines():
        if "time:" in line and "expr:" in line:
            time_s = _seconds(line.rsplit("time:", 1)[1].strip(" ,"))
        elif line.strip().startswith("got:"):
            text = line.split("got:", 1)[1].strip()
            got[time_s] = float(text.rsplit(" ", 1)[1].strip('"')) if text != "nil" else math.nan
    assert got, output[-3000:]
    return [got.get(t, math.nan) for t in at]  # promtool prints nothing where the query has no result


def _seconds(text: str) -> int:
    """Parse a duration as Prometheus writes it, as far as needed here."""
    total, digits = 0, ""
    for char in text:
        if char.isdigit():
            digits += char
        else:
            total += int(digits or 0) * {"m": 60, "s": 1, "h": 3600}[char]
            digits = ""
    return total


def replicas(wanted: Callable[[int, int], int], spec: dict[str, Any]) -> list[int]:
    """Return the number of workers that an HPA sets after each scrape. It goes down only to the highest number that was
    wanted within the window, and goes up and down by no more than its policies allow in their period. ``spec``: the
    HPA's."""
    up, down = spec["behavior"]["scaleUp"], spec["behavior"]["scaleDown"]
    (doubling,), (leaving,) = up["policies"], down["policies"]
    assert (up["stabilizationWindowSeconds"], doubling["type"], leaving["type"]) == (0, "Percent", "Pods")
    window, counts, history = down["stabilizationWindowSeconds"] // STEP, [spec["minReplicas"]], []
    for number in range(END // STEP + 1):
        now = counts[-1]
        history.append(min(spec["maxReplicas"], max(spec["minReplicas"], wanted(number, now))))
        want = history[-1] if history[-1] > now else min(now, max(history[-window - 1 :]))
        most = counts[max(0, number - doubling["periodSeconds"] // STEP)] * (100 + doubling["value"]) // 100
        least = counts[max(0, number - leaving["periodSeconds"] // STEP)] - leaving["value"]
        counts.append(max(min(want, max(now, most)), min(now, least)))
    return counts[1:]


def test_both_recipes_have_the_same_queries_bounds_and_targets() -> None:
    """KEDA's recipe and the HPA's recipe scale alike."""
    assert keda_queries() == adapter_queries()
    keda, hpa = recipe("keda.yaml")[0]["spec"], recipe("hpa.yaml")[0]["spec"]
    assert (keda["minReplicaCount"], keda["maxReplicaCount"]) == (hpa["minReplicas"], hpa["maxReplicas"])
    assert keda["advanced"]["horizontalPodAutoscalerConfig"]["behavior"] == hpa["behavior"]
    _, lag, wait = keda_triggers()
    assert (lag.get("metricType"), lag["metadata"]["threshold"]) == (None, "400"), "AverageValue is the default"
    assert (wait["metricType"], wait["metadata"]["threshold"]) == ("Value", "10")
    assert hpa["metrics"][0]["external"]["target"] == {"type": "AverageValue", "averageValue": "400"}
    assert hpa["metrics"][1]["external"]["target"] == {"type": "Value", "value": "10"}


def test_a_burst_raises_the_number_of_workers_and_its_end_lowers_it(tmp_path: Path, say: Callable[[str], None]) -> None:
    """The recording has one worker and 3,000 jobs at once. The lag and the wait ask for more workers; the HPA sets at
    most six, and one again after the backlog is gone."""
    queries = adapter_queries()
    lag = evaluated(tmp_path, queries["jobledger_mail_lag"], SERIES)
    assert math.isnan(lag[0]), "the worker had no partition yet: unknown is not 0"
    lag[0] = 0.0
    whole = [
        sum(v or 0.0 for name, row in SERIES.items() if "_lag{" in name for v in (row[n],)) for n in range(len(lag))
    ]
    assert lag == whole
    wait = evaluated(tmp_path, queries["jobledger_mail_wait_p95"], SERIES)
    burst = RECORDED["burst_at_s"] // STEP
    assert (max(lag[:burst]), max(wait[:burst])) == (0, 0)
    assert max(lag) > 2_000
    assert max(wait) > 20
    by_lag = [math.ceil(value / 400) for value in lag]
    assert max(by_lag[burst + 1 : burst + 4]) >= 6
    first = next(n for n, value in enumerate(wait) if value > 10)
    assert first > burst
    assert (lag[-1], wait[-1]) == (0, 0)

    def wanted(number: int, now: int) -> int:
        return max(by_lag[number], math.ceil(now * wait[number] / 10))

    spec = recipe("hpa.yaml")[0]["spec"]
    workers = replicas(wanted, spec)
    assert set(workers[:burst]) == {1}
    assert max(workers) == spec["maxReplicas"] == 6
    full = workers.index(6)
    assert (full - burst) * STEP <= 90, "1, 2, 4, 6: half a minute between each"
    last_wish = max(n for n in range(len(workers)) if wanted(n, 6) > 1)
    down = next(n for n in range(full, len(workers)) if workers[n] < 6)
    assert (down - last_wish) * STEP >= spec["behavior"]["scaleDown"]["stabilizationWindowSeconds"] == 300
    assert workers[-1] == 1, "for one again"
    one = workers.index(1, full)
    assert (one - down) * STEP >= 4 * 60, "one a minute"
    say(
        f"autoscaling, recorded: lag {max(lag):.0f}, wait p95 {max(wait):.0f} s; workers {workers[0]} → {max(workers)} "
        f"→ {workers[-1]}, the wait asks for more {(first - burst) * STEP} s after the burst; {(full - burst) * STEP} s to "
        f"six, {(one - last_wish) * STEP} s from the last wish to one"
    )


def test_a_paused_queue_asks_for_no_worker(tmp_path: Path) -> None:
    """More workers would not help a paused queue, so no query of either recipe asks for a worker. KEDA also asks the
    broker, which does not know of the pause; that trigger asks for one worker at most."""
    paused = {
        name: [1.0 if 'kind="queue"' in name and "paused" in name else v for v in values]
        for name, values in SERIES.items()
    }
    for name, query in (*keda_queries().items(), *adapter_queries().items()):
        assert {value for value in evaluated(tmp_path, query, paused) if not math.isnan(value)} == {0.0}, name
    kafka, _, _ = keda_triggers()
    assert math.ceil(1_000_000_000 / int(kafka["metadata"]["lagThreshold"])) == 1


def test_the_wait_is_0_before_the_first_worker_is_scraped(tmp_path: Path) -> None:
    """KEDA would treat an empty result as an error."""
    assert set(evaluated(tmp_path, keda_queries()["jobledger_mail_wait_p95"], {"up": [1.0] * (END // STEP + 1)})) == {
        0.0
    }
