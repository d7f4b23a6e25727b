"""Runs of a store judged by gates: verdicts, comparability, trade-offs, the command and its codes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from eval import gate
from eval.gates import Gates
from eval.metrics.base import Direction, PerSample, Score
from eval.pairing import NotComparable, evidence, movers, rolling
from eval.prompts import Prompt, build_prompts, load_suite
from eval.regression import Verdict
from eval.statistics import bootstrap_mean, normal_interval
from eval.store import RunInfo, Store
from tests.eval.test_store import INFO

N = 200
GATES = {
    "scores": [
        {"suite": "scenes-trained", "metric": "composition", "margin": 3.0},
        {"suite": "scenes-trained", "metric": "reward", "margin": 1.0},
        {"suite": "scenes-trained", "metric": "kid", "margin": 0.1},
    ],
    "costs": [{"suite": "scenes-latency", "metric": "latency", "percent": 25, "floor": 5.0}],
    "guards": [{"up": "scenes-trained/reward", "down": "scenes-trained/composition", "because": "it lies"}],
}


def score(metric: str, values: np.ndarray, direction: Direction = "higher", **more: object) -> Score:
    kind: PerSample = "influence" if metric == "kid" else "value"
    interval = normal_interval(float(more.pop("value", 0.0)), 0.01, N) if metric == "kid" else bootstrap_mean(values)  # type: ignore[arg-type]
    fields = {"protocol": {"weights": "0"}} | more
    return Score(metric, interval, len(values), direction, "", 1, per_sample=values, per_sample_kind=kind, **fields)  # type: ignore[arg-type]


class Nights:
    """Writes runs of made-up scores; better, reward and kid are what a night adds to the same base numbers."""

    def __init__(self, path: Path) -> None:
        self.path = path
        rng = np.random.default_rng(0)
        self.right = (rng.random(N) < 0.9) * 100.0
        self.reward, self.influence = rng.normal(60, 5, N), rng.normal(0, 0.2, N)
        self.prompts = build_prompts(load_suite("scenes-trained"), N)

    def add(
        self, label: str, *, wrong: int = 0, reward: float = 0.0, kid: float = 0.0, ms: float = 40.0,
        trained_on: bool = False, weights: str = "0", seed: int = 0, prompts: list[Prompt] | None = None,
    ) -> None:  # fmt: skip
        rng = np.random.default_rng(seed)
        right = self.right.copy()
        right[np.flatnonzero(right)[:wrong]] = 0
        info: RunInfo = replace(
            INFO, label=label, expected=N, suite_resolved=load_suite("scenes-trained").model_dump(mode="json")
        )
        scores = [
            score("composition", right, protocol={"weights": weights}),
            score("reward", self.reward + reward + rng.normal(0, 1, N), trained_on=trained_on),
            score("kid", self.influence + rng.normal(0, 0.05, N), "lower", value=0.5 + kid),
        ]
        times = ms + rng.normal(size=20)
        with Store(self.path) as store:
            store.complete(store.begin(info), prompts or self.prompts, scores)
            timed = replace(info, suite="scenes-latency", expected=20)
            latency = score("latency", times, "lower", protocol={"warm_up": 2})
            store.complete(store.begin(timed), self.prompts[:20], [latency])


@pytest.fixture
def nights(tmp_path: Path) -> Nights:
    made = Nights(tmp_path / "s.sqlite")
    made.add("baseline")
    return made


def judge(nights: Nights, label: str) -> dict[str, gate.Row]:
    gates = Gates.model_validate(GATES)
    with Store(nights.path) as store:
        runs = [gate.resolve(store, name, gates.suites) for name in (label, "baseline")]
        return {row.gate.metric: row for row in gate.judge(store, gates, *runs)}


def test_the_right_gate_turns_red_and_the_others_do_not(nights: Nights) -> None:
    for label, changes, red in (
        ("same", {}, None),
        ("wrong", {"wrong": 40}, "composition"),
        ("dull", {"reward": -3.0}, "reward"),
        ("unreal", {"kid": 0.2}, "kid"),
        ("slow", {"ms": 80.0}, "latency"),
    ):
        nights.add(label, seed=5, **changes)  # type: ignore[arg-type]
        verdicts = {metric: row.verdict for metric, row in judge(nights, label).items()}
        assert {m for m, v in verdicts.items() if v is Verdict.REGRESSION} == ({red} if red else set()), label
        assert set(verdicts.values()) <= {Verdict.REGRESSION, Verdict.EQUIVALENT}, label


def test_a_reward_that_was_trained_on_is_watched_and_does_not_count(nights: Nights) -> None:
    nights.add("student", reward=-3.0, trained_on=True)
    rows = judge(nights, "student")
    assert rows["reward"].watched and rows["reward"].verdict is not Verdict.REGRESSION
    assert gate.overall([*rows.values()]) is Verdict.EQUIVALENT


def test_a_gain_of_the_reward_at_the_price_of_the_picture_is_named(nights: Nights) -> None:
    nights.add("hacked", reward=2.0, wrong=8, trained_on=True)
    gates = Gates.model_validate(GATES)
    (warning,) = gate.trade_offs([*judge(nights, "hacked").values()], gates.guards)
    assert warning == "scenes-trained/reward is up while scenes-trained/composition is down: it lies"
    nights.add("better", reward=2.0)
    assert gate.trade_offs([*judge(nights, "better").values()], gates.guards) == []


def test_other_weights_of_a_judge_or_other_prompts_are_not_comparable(nights: Nights) -> None:
    nights.add("rejudged", weights="1")
    row = judge(nights, "rejudged")["composition"]
    assert row.verdict is Verdict.NOT_COMPARABLE and "protocol.weights 1 against 0" in row.note
    moved = [replace(prompt, text="another text") for prompt in nights.prompts]
    nights.add("moved", prompts=moved)
    with Store(nights.path) as store:
        a, b = (store.runs(label=name, suite="scenes-trained")[0] for name in ("moved", "baseline"))
        with pytest.raises(NotComparable, match=r"prompt scenes-trained-\S+ is 'another text' against"):
            evidence(store, a, b, "composition")


def test_a_missing_candidate_is_broken_and_a_missing_baseline_not_comparable(nights: Nights) -> None:
    gates = Gates.model_validate(GATES)
    with Store(nights.path) as store:
        runs = gate.resolve(store, "baseline", gates.suites)
        assert {row.verdict for row in gate.judge(store, gates, {}, runs)} == {Verdict.BROKEN}
        assert {row.verdict for row in gate.judge(store, gates, runs, {})} == {Verdict.NOT_COMPARABLE}


def test_the_pictures_that_caused_a_change_are_named(nights: Nights) -> None:
    nights.add("wrong", wrong=3, seed=5)
    with Store(nights.path) as store:
        a, b = (store.runs(label=name, suite="scenes-trained")[0] for name in ("wrong", "baseline"))
        worst, best = movers(store, a, b, "composition", count=5)
        assert {key for key, _ in worst} == {nights.prompts[i].key for i in np.flatnonzero(nights.right)[:3]}
        assert [change for _, change in worst] == [-100.0] * 3 and best == []
        distances, _ = movers(store, a, b, "kid", count=2)
        left, right = (store.per_sample(run["id"], "kid") for run in (a, b))
        assert distances[0] == (max(left, key=lambda k: left[k] - right[k]), min(right[k] - left[k] for k in left))


def test_rolling_is_the_mean_night(nights: Nights) -> None:
    nights.add("second", kid=0.2, seed=4)
    with Store(nights.path) as store:
        runs = [store.runs(label=name, suite="scenes-trained")[0] for name in ("baseline", "second")]
        result, vector = rolling(store, runs, "kid")
        assert result["value"] == pytest.approx(0.6)
        vectors = [store.per_sample(run["id"], "kid") for run in runs]
        assert all(vector[k] == pytest.approx((vectors[0][k] + vectors[1][k]) / 2) for k in vector)


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        ({}, 0, "verdict: equivalent"),
        ({"wrong": 40}, 1, "verdict: regression"),
        ({"weights": "1"}, 4, "verdict: not comparable"),
        ({"reward": 2.0, "wrong": 8}, 0, "suspicious trade-off: scenes-trained/reward is up"),
    ],
)
def test_the_command(
    changes: dict[str, object], code: int, message: str, nights: Nights, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    nights.add("tonight", **changes)  # type: ignore[arg-type]
    path = tmp_path / "g.yaml"
    path.write_text(yaml.safe_dump(GATES))
    command = ["tonight", "baseline", "--gates", str(path), "--store", str(nights.path)]
    assert gate.main(command) == code
    assert message in capsys.readouterr().out


def test_bad_names_are_one_clear_line(nights: Nights, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command, message in (
        (["x", "baseline", "--gates", "scenes-sdxl", "--store", str(nights.path)], "no complete run with id or label"),
        (["x", "y", "--gates", "scenes-sdxl", "--store", str(tmp_path / "none")], "score something first"),
        (["x", "y", "--gates", "none"], "gates 'none' are unknown"),
    ):
        assert gate.main(command) == 3
        assert message in capsys.readouterr().err
