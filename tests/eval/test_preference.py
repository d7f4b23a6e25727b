"""Published scorers as metrics: what they score, of which style, under which weights, and who was trained on them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from eval import run
from eval.errors import EvalError
from eval.metrics import create
from eval.metrics.base import Samples
from eval.metrics.preference import KINDS, load_published
from eval.prompts import Prompt, build_prompts, load_suite
from eval.sources import open_source
from eval.store import Store

STYLES = {"anime": ["a cat", "a dog", "a fox"], "photo": ["a street", "a tree", "a hill", "left over"]}


class Loudness:
    """A scorer without a network: how bright a picture is, plus how long its prompt."""

    name, digest = "loudness", "d1"

    def score(self, images: Any, conditions: Sequence[str]) -> Any:
        return images.float().mean((1, 2, 3)) + torch.tensor([float(len(text)) for text in conditions])


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    for style, texts in STYLES.items():
        (tmp_path / f"{style}.json").write_text(json.dumps(texts))
    tree = {
        "name": "styles",
        "description": "for tests",
        "world": "text",
        "prompts": {
            "seed": 7_950_000,
            "count": 6,
            "files": {style: str(tmp_path / f"{style}.json") for style in STYLES},
        },
        "metrics": {"hpsv2.1": {}},
    }
    path = tmp_path / "styles.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def samples(prompts: Sequence[Prompt]) -> Samples:
    levels = np.arange(len(prompts), dtype=np.uint8) * 10
    return Samples(np.broadcast_to(levels[:, None, None, None], (len(prompts), 3, 4, 4)).copy(), tuple(prompts))


def test_prompts_come_from_each_style_in_turn(suite: Path) -> None:
    """So the first n prompts hold the styles in equal parts, and what lies beyond the count is left alone."""
    prompts = build_prompts(load_suite(str(suite)))
    assert [(p.id, p.text, p.style) for p in prompts[:3]] == [
        ("anime-00000", "a cat", "anime"),
        ("photo-00000", "a street", "photo"),
        ("anime-00001", "a dog", "anime"),
    ]
    assert [p.seed for p in prompts] == list(range(7_950_000, 7_950_006))
    assert "left over" not in {p.text for p in prompts}
    assert build_prompts(load_suite(str(suite)), 4) == prompts[:4]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"world": "scenes"}, "use files with the world text alone"),
        ({"prompts": {"seed": 7_950_000, "count": 6}}, "prompts.files missing"),
        ({"prompts": {"seed": 1, "count": 6, "files": {"a": "b.json"}}}, "may be a training stream"),
    ],
)
def test_suites_that_mix_worlds_are_refused(suite: Path, changes: dict[str, Any], message: str) -> None:
    suite.write_text(yaml.safe_dump(yaml.safe_load(suite.read_text()) | changes))
    with pytest.raises(EvalError, match=message):
        load_suite(str(suite))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is missing, so its prompts cannot be drawn"),
        ('["a"]', "holds 1 prompts and 3 are wanted"),
        ('{"a": 1}', "is no list of prompts"),
        ('["a", ""]', "is no list of prompts"),
        ("[", "cannot be read"),
    ],
)
def test_files_of_prompts_that_cannot_be_used_are_named(suite: Path, content: str | None, message: str) -> None:
    file = suite.parent / "anime.json"
    file.unlink() if content is None else file.write_text(content)
    with pytest.raises(EvalError, match=rf"anime\.json {message}"):
        build_prompts(load_suite(str(suite)))


def test_a_score_is_the_mean_with_the_mean_of_each_style_beside_it(suite: Path) -> None:
    prompts = build_prompts(load_suite(str(suite)))
    metric = create("hpsv2.1", scorer=Loudness(), trained_on=True)
    made = samples(prompts)
    for start in (0, 4):  # in batches of any size
        metric.update(Samples(made.images[start : start + 4], made.prompts[start : start + 4]))
    score = metric.compute()
    expected = np.array([10.0 * i + len(p.text) for i, p in enumerate(prompts)])
    np.testing.assert_allclose(score.per_sample, expected, rtol=1e-6)
    assert score.value == pytest.approx(expected.mean())
    assert score.parts == pytest.approx({"anime": expected[::2].mean(), "photo": expected[1::2].mean()})
    assert score.protocol == {"reward": "loudness", "weights": "d1"} and score.trained_on
    assert score.metric == "hpsv2.1" and score.direction == "higher"


def test_each_metric_has_weights_of_its_own() -> None:
    assert {"hpsv2", "hpsv2.1", "pickscore", "imagereward"} <= set(KINDS)
    for kind in KINDS.values():
        with pytest.raises(EvalError, match=rf"^{kind} was not run: .*no/where"):
            load_published(kind, "./no/where")


def test_missing_weights_end_a_run_before_a_picture_is_made(
    suite: Path, tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = yaml.safe_load(suite.read_text()) | {"metrics": {"hpsv2.1": {"source": "./no/where"}}}
    suite.write_text(yaml.safe_dump(tree))
    places = ["--store", str(tmp_path / "s.sqlite"), "--cache", str(tmp_path / "cache"), "--quiet"]
    assert run.main([str(tiny_bundle), "--suite", str(suite), "--threads", "1", *places]) == 3
    assert "hpsv2.1 was not run" in capsys.readouterr().err
    assert not (tmp_path / "s.sqlite").exists() and not (tmp_path / "cache").exists()


def test_a_scored_run_keeps_prompts_styles_and_whether_the_reward_was_trained_on(
    suite: Path, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eval.metrics.preference.load_published", lambda kind, source="": Loudness())
    where = open_source(str(tiny_bundle), steps=2, threads=1)
    where.about["provenance"] = {"recipe": {"advantage": {"reward": "hpsv2.1:/models/hps"}}}
    resolved = load_suite(str(suite)).model_copy(update={"metrics": {"hpsv2.1": {}, "pickscore": {}}})
    store = tmp_path / "s.sqlite"
    identifier, scores = run.run(where, resolved, store=store, cache=tmp_path / "cache", quiet=True)
    assert [(score.metric, score.trained_on) for score in scores] == [("hpsv2.1", True), ("pickscore", False)]
    with Store(store) as kept:
        assert kept.texts(identifier)["photo-00001", 7_950_003] == "a tree"
        assert set(kept.results(identifier)["hpsv2.1"]["parts"]) == set(STYLES)
