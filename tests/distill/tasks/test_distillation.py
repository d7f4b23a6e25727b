"""The update plan as the trainer runs it: who learns when, from what, and that micro-batches change nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import distill.tasks.distillation as module
from distill.bundle import Bundle
from distill.config import load_recipe
from distill.objectives.plan import Hook, Rollout
from distill.objectives.safeguards import RewardGap
from distill.run import main
from distill.sampling import Flow, ode_table
from distill.tasks.distillation import DistillationTask
from distill.telemetry.sink import summary
from distill.trainer import Trainer, generator

RECIPES = Path(__file__).parents[3] / "recipes"
SMALL = ["batch_size=8", "log_every=1", "save_every=100", "preview_every=100", "ema=0.9"]
EVERYTHING = [
    "adaptation.strength=0.3", "sharpening.normalised=false", "regression={pairs: 8, steps: 2}", "gan={r1: 0.1}",
    "divergence={}", "decoupled={}", "reward_weighting={kappa: 0.1}", "reward_gradient={weight: 0.01}",
    "reward_tilt={beta: 0.01}", "shared_teacher={anneal: 50}", "implicit_alignment={}",
    "segment_guidance={margin: 0.01}", "sub_interval={}", "sampler=deterministic", "step_aware_fake=true",
    "consistency={}",
    "first_step_anchor={anchor: 1, steps: 2, matching: true}",
    "safeguards={guidance_ceiling: 1.5, coherence: 0.0, two_key: 1, ramp: 2}",
    "safeguards.reward_gap.window=2", "safeguards.diversity.window=1",
]  # fmt: skip

STOCHASTIC = [
    "steps=[2]", "policy_gradient={weight: 0.5}", "consistency={weight: 1.0}", "adaptation.strength=0.3",
    "sharpening={}", "advantage.shrinkage=0.5", "advantage.when=student", "foundation_gan={features: REWARD}",
    "regression={pairs: 8, steps: 2, features: REWARD}",
]  # fmt: skip
"""What EVERYTHING cannot hold beside the rest."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a teacher and two rewards of digits, trained for two iterations."""
    folder = tmp_path_factory.mktemp("models")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LEAPFROG_RUNS", str(folder / "runs"))
        for name, more in (
            ("digits-teacher", ["model.width=16", "model.layers=2", "model.heads=2", "sampling_steps=2"]),
            ("digits-reward", []),
            ("digits-reward", ["seed=1", "name=judge"]),
        ):
            target = "judge" if more[-1:] == ["name=judge"] else name
            overrides = [f"output={folder}/{target}", "iterations=2", "optimizer.warmup=0", *more, *SMALL]
            assert main([str(RECIPES / f"{name}.yaml"), "--quiet", *overrides]) == 0
        yield folder


def trainer(models: Path, folder: Path, *overrides: str, recipe: str = "digits-dmd2") -> Trainer:
    settings = [
        f"teacher={models}/digits-teacher", "iterations=6", "fake_warmup=1", "fake_per_student=2", "steps=[2]",
        f"output={folder}/out", *SMALL, *overrides,
    ]  # fmt: skip
    return Trainer(DistillationTask(load_recipe(RECIPES / f"{recipe}.yaml", settings)), folder, quiet=True)


def rewarded(models: Path, *, group: int = 4) -> list[str]:
    return [f"advantage={{reward: {models}/digits-reward, group: {group}}}"]


def vectors(t: Trainer) -> dict[str, Tensor]:
    return {r: nn.utils.parameters_to_vector(m.parameters()).detach().clone() for r, m in t.task.roles.items()}


def step(t: Trainer) -> tuple[set[str], dict[str, Any]]:
    """Run one iteration; the roles that it moved, and its telemetry."""
    before = vectors(t)
    telemetry = t._step()
    t.iteration += 1
    after = vectors(t)
    return {role for role in after if not torch.equal(after[role], before[role])}, telemetry


# --- rewards are logged --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [1, 4])
def test_a_control_without_hooks_groups_its_prompts_and_logs_its_rewards(
    models: Path, tmp_path: Path, group: int
) -> None:
    t = trainer(models, tmp_path, *rewarded(models, group=group), f"heldout_rewards=[{models}/judge]", "iterations=2")
    assert [type(hook) for hook in t.task.hooks] == [RewardGap]
    prompts = t.task._rollout(0, 0, graph=False).prompts
    assert [prompts[i] == prompts[i + 1] for i in (0, 1, 2)] == [True] * 3 or group == 1
    t.run()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    for line in lines:
        assert line["reward"] < 0 and line["heldout/judge"] < 0 and line["reward_not_finite"] == 0
        assert line["reward_gap"] == 0 and line["trust"] == 1
        assert line["reward"] != line["heldout/judge"] and ("reward_group_std" in line) == (group > 1)


def test_a_control_with_grouped_prompts_differs_from_its_reward_alone(models: Path, tmp_path: Path) -> None:
    """Scoring draws nothing: the same prompts without the reward give the same weights to the last bit."""
    scored, plain = trainer(models, tmp_path / "a", *rewarded(models, group=1)), trainer(models, tmp_path / "b")
    for _ in range(3):
        step(scored)
        step(plain)
    for role, vector in vectors(plain).items():
        assert torch.equal(vector, vectors(scored)[role])


class Failing:
    """A judge that gives these scores, and so a number of scores that are not finite in each micro-batch."""

    def __init__(self, name: str, scores: Sequence[float]) -> None:
        self.name, self.scores = name, torch.tensor(scores)

    def score(self, images: Tensor, conditions: Sequence[Any]) -> Tensor:
        return self.scores


def test_scores_that_are_not_finite_are_counted_over_micro_batches_iterations_and_judges(
    models: Path, tmp_path: Path
) -> None:
    """Per micro-batch one of the training reward's and two of the held-out reward's; four micro-batches per line."""
    more = ["accumulate=2", "log_every=2", "iterations=2", "adaptation={}", f"heldout_rewards=[{models}/judge]"]
    t = trainer(models, tmp_path, *rewarded(models), *more)
    t.task.reward = Failing("reward", [1.0, torch.nan, 2.0, 3.0])
    t.task.heldout = [Failing("judge", [1.0, torch.nan, torch.inf, 3.0])]
    t.run()
    (line,) = logged(tmp_path)
    assert line["reward_not_finite"] == 12 and line["heldout/judge"] == 2.0


@pytest.mark.parametrize(
    ("scores", "floor", "share"), [([0.0, 1.0], 0.0, 1.0), ([0.0, 1.0], 5.0, 0.0), ([1.0, 1.0], 0.0, 0.0)]
)
def test_advantages_at_their_bound_count_as_clipped(
    models: Path, tmp_path: Path, scores: list[float], floor: float, share: float
) -> None:
    """In groups of two |a| is 1 − 1e-6 wherever rewards differ and σ has no floor: nothing more bang-bang."""
    more = ["adaptation={}", f"advantage.sigma_floor={floor}"]
    t = trainer(models, tmp_path, *rewarded(models, group=2), *more)
    t.task.reward = Failing("reward", scores * 4)
    assert float(t.task._rollout(0, 0, graph=False).telemetry["advantage_clipped"]) == share


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ([], [-0.4, -0.2, 0.0, 0.6]),  # 0, 1, 2, 5 over the floor of 5
        (["advantage.baseline=leave-one-out"], [-1.6 / 3, -0.8 / 3, 0.0, 0.8]),
        (["advantage.sigma_floor=0"], [-2 / 3.5**0.5, -1 / 3.5**0.5, 0.0, 3 / 3.5**0.5]),
    ],
)
def test_the_advantage_has_the_recipes_baseline_and_floor(
    models: Path, tmp_path: Path, more: list[str], expected: list[float]
) -> None:
    t = trainer(models, tmp_path, *rewarded(models), "advantage.sigma_floor=5", *more, "adaptation={}")
    t.task.reward = Failing("reward", [0.0, 1.0, 2.0, 5.0] * 2)
    torch.testing.assert_close(t.task._rollout(0, 0, graph=False).advantage(), torch.tensor(expected * 2))


# --- cheaper rewards -----------------------------------------------------------------------------------------------


class Counting:
    """A judge that counts what it is given."""

    def __init__(self, judge: Any) -> None:
        self.judge, self.seen, self.name = judge, list[int](), judge.name

    def score(self, images: Tensor, conditions: Sequence[Any]) -> Tensor:
        self.seen.append(len(images))
        scores: Tensor = self.judge.score(images, conditions)
        return scores


@pytest.mark.parametrize(
    ("when", "steps", "expected"),
    [
        ("always", "[2]", [16] * 6),
        ("student", "[2]", [16, 16]),
        ("reuse", "[2]", [16, 16]),
        ("last-step", "[1]", [16] * 6),
        ("last-step", "[2]", None),
    ],
)
def test_only_what_the_recipe_asks_for_is_scored(
    models: Path, tmp_path: Path, when: str, steps: str, expected: list[int] | None
) -> None:
    """Students learn in iterations 1 and 4; what is not scored has no reward, and advantage 0 or a kept one."""
    more = [f"advantage.when={when}", f"steps={steps}", "fake_per_student=3", "batch_size=16", "adaptation={}"]
    t = trainer(models, tmp_path, *rewarded(models), *more, "sharpening={}", f"heldout_rewards=[{models}/judge]")
    t.task.reward = judge = Counting(t.task.reward)
    last = []
    for _ in range(6):
        scored = len(judge.seen)
        step(t)
        (rollout,) = t.task._rollouts.values()
        last.append(rollout.index == rollout.steps - 1)
        got = len(judge.seen) > scored
        kept = when == "reuse" and rollout.iteration > 1
        assert bool((rollout.advantage() != 0).any()) == (got or kept)
        assert bool(rollout.rewards().isfinite().all()) == got
        assert bool(rollout.heldout["judge"].isfinite().all()) == got
    assert judge.seen == ([16] * sum(last) if expected is None else expected)


REUSE = ["advantage.when=reuse", "fake_per_student=3", "steps=[4]", "adaptation={}", "sharpening={}"]
"""The student learns in iterations 1 and 4."""


@pytest.mark.parametrize("convention", ["every", "alternating"])
def test_the_fake_scores_own_iterations_repeat_the_students_draws_and_advantages(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, convention: str
) -> None:
    """The roll-out is that of the present student from the last student iteration's draws; re-noising is fresh."""
    more = [*rewarded(models), *REUSE, f"ttur={convention}", "accumulate=2"]
    t, other = trainer(models, tmp_path / "a", *more), trainer(models, tmp_path / "b", *more, "advantage.when=always")
    advantages = {}
    for iteration, source in enumerate((0, 1, 1, 1, 4, 4)):
        with monkeypatch.context() as patch:
            seen = drawn(t, patch, 1)
        other.task.student.load_state_dict(t.task.student.state_dict())
        for micro, rollout in t.task._rollouts.items():
            expected = other.task._rollout(source, micro, graph=False)
            assert (rollout.prompts, rollout.steps, rollout.index) == (expected.prompts, 4, expected.index)
            assert rollout.iteration == iteration
            if iteration != source or not iteration:  # the student has not moved since the roll-out
                torch.testing.assert_close(rollout.x, expected.x, rtol=0, atol=0)
            if iteration == source:
                advantages[micro] = rollout.advantage() if iteration else torch.zeros(4)
            assert torch.equal(rollout.advantage(), advantages[micro])
        for micro, d in enumerate(seen["fake_loss"]):
            fresh = generator(0, iteration, micro, "fake")
            assert torch.equal(d.t, torch.rand(4, generator=fresh, dtype=torch.float64))
            assert torch.equal(d.noise, torch.randn(d.rollout.x.shape, generator=fresh))
    assert all(float(a.abs().max()) > 0.5 for a in advantages.values())


def test_a_student_that_stands_still_would_have_been_given_the_advantages_that_it_keeps(
    models: Path, tmp_path: Path
) -> None:
    more = [*rewarded(models), *REUSE[1:], "batch_size=16", "student.learning_rate=1e-30"]
    kept, scored = trainer(models, tmp_path / "a", *more, REUSE[0]), trainer(models, tmp_path / "b", *more)
    step(kept)
    for _ in range(3):
        step(kept)
        (rollout,) = kept.task._rollouts.values()
        expected = scored.task._rollout(1, 0, graph=False)
        assert bool(rollout.rewards().isfinite().all()) == (rollout.iteration == 1)
        torch.testing.assert_close(rollout.advantage(), expected.advantage(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("more", [["batch_size=16"], ["accumulate=2"], ["batch_size=16", "accumulate=2"]])
def test_kept_advantages_of_another_batch_or_split_count_as_none(models: Path, tmp_path: Path, more: list[str]) -> None:
    """The checkpoint is read, and the next iteration with the student keeps its own."""
    t = trainer(models, tmp_path, *rewarded(models), *REUSE)
    step(t)
    step(t)
    t.save()
    resumed = trainer(models, tmp_path, *rewarded(models), *REUSE, *more)
    assert resumed.resume() == 2
    found = []
    for _ in range(4):
        step(resumed)
        found.append({float(r.advantage().abs().max()) > 0 for r in resumed.task._rollouts.values()})
    assert found == [{False}, {False}, {True}, {True}]


@pytest.mark.parametrize(("share", "count"), [(0.01, 4), (0.5, 8), (0.6, 12), (1.0, 16)])
def test_a_share_of_the_prompts_is_scored_in_whole_groups(
    models: Path, tmp_path: Path, share: float, count: int
) -> None:
    t = trainer(models, tmp_path, *rewarded(models), f"advantage.share={share}", "batch_size=16", "sharpening={}")
    t.task.reward = judge = Counting(t.task.reward)
    full = trainer(models, tmp_path, *rewarded(models), "batch_size=16", "sharpening={}").task
    some, whole = t.task._rollout(0, 0, graph=False), full._rollout(0, 0, graph=False)
    assert judge.seen == [count]
    torch.testing.assert_close(some.advantage()[:count], whole.advantage()[:count])
    assert float(some.advantage()[count:].abs().sum()) == 0.0 and bool(some.rewards()[count:].isnan().all())
    assert summary({"n": [some.telemetry["reward_not_finite"]]})[0] == {"n": 0.0}
    _, telemetry = step(t)
    assert {"reward", "w_ess"} <= telemetry.keys()


def test_judging_in_bfloat16_changes_rewards_by_rounding_only(models: Path, tmp_path: Path) -> None:
    recipe = [*rewarded(models), "batch_size=16", "adaptation={}"]
    exact, rounded = (
        trainer(models, tmp_path, *recipe, *more).task._rollout(0, 0, graph=False)
        for more in ([], ["advantage.precision=bfloat16"])
    )
    assert torch.equal(exact.x, rounded.x) and not torch.equal(exact.rewards(), rounded.rewards())
    torch.testing.assert_close(rounded.rewards(), exact.rewards(), rtol=0.02, atol=0.02)


# --- where samples are re-noised -------------------------------------------------------------------------------------


@dataclass
class Drawn:
    """What a loss was given: a rollout, its times and noise, and those of the alignment's part."""

    rollout: Rollout
    t: Tensor
    noise: Tensor
    ca: tuple[Tensor, Tensor] | None = None


def drawn(t: Trainer, patch: pytest.MonkeyPatch, iterations: int) -> dict[str, list[Drawn]]:
    """What the losses of both phases get in some iterations."""
    found: dict[str, list[Drawn]] = {"student_loss": [], "fake_loss": []}
    for name, told in found.items():
        loss, after = getattr(module, name), 3 if name == "student_loss" else 2

        def telling(*given: Any, loss: Any = loss, told: Any = told, after: int = after, **named: Any) -> Any:
            told.append(Drawn(*given[after : after + 3], named.get("ca")))
            return loss(*given, **named)

        patch.setattr(module, name, telling)
    for _ in range(iterations):
        step(t)
    return found


def within(times: Tensor, low: float, high: float) -> bool:
    """Inside of [low, high] and in its outer thirds: 32 uniform times miss one in 1 of 200,000 cases."""
    third = (high - low) / 3
    return bool((times >= low).all() and (times <= high).all()) and float(
        times.min()
    ) < low + third < high - third < float(times.max())


def test_what_hooks_choose_is_where_both_losses_re_noise(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Uniform in time_range for matching and in [0, 1] for the fake score, but where a section says otherwise."""
    plain = ["batch_size=32", "steps=[4]", "fake_warmup=0", "fake_per_student=1"]
    seen = {}
    for more in ("reuse_rollout=true", "decoupled={}", "sub_interval={}", "dynamic_renoising={anneal: 10000}"):
        with monkeypatch.context() as patch:
            seen[more.partition("=")[0]] = drawn(trainer(models, tmp_path / more[:3], *plain, more), patch, 4)
    indices = [d.rollout.index for d in seen["decoupled"]["student_loss"]]
    assert len(set(indices)) > 2  # several steps of the grid
    for one, other in zip(seen["reuse_rollout"]["student_loss"], seen["decoupled"]["student_loss"], strict=True):
        assert one.ca is None and other.ca is not None
        assert torch.equal(one.t, other.t) and torch.equal(one.noise, other.noise) and within(one.t, 0.02, 0.98)
        assert within(other.ca[0], 0.02, min(0.98, 1 - other.rollout.index / 4))
        assert other.ca[1].shape == other.noise.shape and not torch.equal(other.ca[1], other.noise)
    for name, (low, high) in (("student_loss", (0.02, 0.98)), ("fake_loss", (0.0, 1.0))):
        assert all(within(d.t, low, high) for d in seen["reuse_rollout"][name])
        for d in seen["sub_interval"][name]:
            assert within(d.t, max(low, d.rollout.until), min(high, d.rollout.level)) and d.ca is None
        late = torch.cat([d.t for d in seen["dynamic_renoising"][name]])  # Beta(4, 1.5) has mean 0.73
        assert float(late.mean()) == pytest.approx(low + (high - low) * 4 / 5.5, abs=0.06)
    for d in seen["sub_interval"]["student_loss"]:  # and where a safeguard draws once more
        again, noise = d.rollout.renoise(d.rollout, generator(7, "again"))
        assert within(again, max(0.02, d.rollout.until), d.rollout.level) and not torch.equal(noise, d.noise)


def test_both_losses_see_the_noise_that_a_deterministic_student_carries(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ε' = (own·ε_θ + fresh·ε)/σ_t with own = (1 − t)/(1 − s)·s, which fresh noise of 32 · 64 values is not like."""
    plain = ["batch_size=32", "steps=[4]", "fake_warmup=0", "fake_per_student=1", "sampler=deterministic"]
    seen = drawn(trainer(models, tmp_path, *plain, "sub_interval={}"), monkeypatch, 4)
    assert any(d.rollout.index < 3 for d in seen["student_loss"])
    for d in [*seen["student_loss"], *seen["fake_loss"]]:
        s, x = d.rollout.until, d.rollout.eps
        assert x is not None
        own = ((1 - d.t) / (1 - s) * s / d.t).float().reshape(-1, 1, 1, 1)
        part = float((own * x * d.noise).sum() / (own * x).square().sum()) if d.rollout.index < 3 else 1.0
        assert part == pytest.approx(1.0, abs=0.15)


# --- who learns when -----------------------------------------------------------------------------------------------

BOTH, FAKE, STUDENT = {"student", "fake"}, {"fake"}, {"student"}


@pytest.mark.parametrize(
    ("convention", "expected"),
    [("every", [FAKE, BOTH, FAKE, FAKE, BOTH, FAKE]), ("alternating", [FAKE, STUDENT, FAKE, FAKE, STUDENT, FAKE])],
)
def test_both_published_update_ratios(models: Path, tmp_path: Path, convention: str, expected: list[set[str]]) -> None:
    t = trainer(models, tmp_path, f"ttur={convention}", "fake_per_student=3")
    assert [step(t)[0] for _ in range(6)] == expected


def test_the_fake_score_may_learn_from_its_own_rollouts(models: Path, tmp_path: Path) -> None:
    shared, own = trainer(models, tmp_path / "a"), trainer(models, tmp_path / "b", "reuse_rollout=false")
    for t, keys in ((shared, [0]), (own, [0, 1])):
        step(t)
        step(t)
        assert sorted(t.task._rollouts) == keys
    first, second = own.task._rollouts.values()
    assert first.prompts != second.prompts and not torch.equal(first.samples, second.samples)


def test_a_discriminator_is_a_role_with_a_phase_of_its_own(models: Path, tmp_path: Path) -> None:
    t = trainer(models, tmp_path, "gan={weight: 0.1}", "discriminator.learning_rate=1e-3")
    assert t.task.optimizers["discriminator"].learning_rate == 1e-3
    moved, telemetry = step(t)
    assert moved == {"fake", "discriminator"}
    assert [phase.role for phase in t.task.phases(1)] == ["student", "fake", "discriminator"]
    moved, telemetry = step(t)
    assert moved == {"student", "fake", "discriminator"}
    assert {"gan/student", "gan/accuracy", "discriminator/grad_norm"} <= telemetry.keys()
    frozen = trainer(models, tmp_path / "teacher", "gan={source: teacher, tap: mid}")
    before = nn.utils.parameters_to_vector(frozen.task.teacher.parameters()).clone()
    assert step(frozen)[0] == {"fake", "discriminator"}
    assert torch.equal(before, nn.utils.parameters_to_vector(frozen.task.teacher.parameters()))


@pytest.mark.parametrize("convention", ["every", "alternating"])
def test_hooks_see_the_rollouts_of_an_iteration_once_at_its_end(models: Path, tmp_path: Path, convention: str) -> None:
    class Watching(Hook):
        def __init__(self) -> None:
            self.seen: list[tuple[int, int]] = []

        def after_iteration(self, rollouts: Sequence[Rollout]) -> None:
            self.seen.append((rollouts[0].iteration, len(rollouts)))

    t, hook = trainer(models, tmp_path, f"ttur={convention}", "gan={}", "accumulate=2"), Watching()
    t.task.hooks.append(hook)
    for _ in range(4):
        step(t)
    assert hook.seen == [(i, 2) for i in range(4)]


def test_safeguards_act_on_the_advantages_of_a_run(models: Path, tmp_path: Path) -> None:
    ramped = [*rewarded(models), "adaptation.strength=0.5", "sharpening={}", "safeguards.ramp=4"]
    t = trainer(models, tmp_path, *ramped)
    assert [t.task._rollout(i, 0, graph=False).trust for i in (0, 1, 3, 5, 9)] == [0.0, 0.0, 0.5, 1.0, 1.0]
    rollout = t.task._rollout(3, 0, graph=False)
    adaptation, sharpening, _ = t.task.hooks
    squashed = rollout.advantage().clamp(-1, 1)
    torch.testing.assert_close(adaptation.student_weights(rollout, t)[0], 1 + 0.25 * squashed)
    weight = torch.exp(-0.5 * squashed).reshape(2, 4)
    expected = (weight / weight.mean(1, keepdim=True)).flatten()
    torch.testing.assert_close(sharpening.fake_weight(rollout, torch.zeros(8)), expected)


def test_real_samples_are_drawn_apart_from_the_prompts(models: Path, tmp_path: Path) -> None:
    t = trainer(models, tmp_path, "gan={}")
    rollout = t.task._rollout(0, 0, graph=False)
    x, condition = rollout.real()
    assert x.shape == rollout.x.shape and condition["labels"].tolist() != list(rollout.prompts)
    assert torch.equal(x, rollout.real()[0])  # the fake score's and the discriminator's phases see the same


def test_each_phase_moves_its_own_role_alone_with_every_hook(models: Path, tmp_path: Path) -> None:
    t = trainer(models, tmp_path, *EVERYTHING, *rewarded(models), f"heldout_rewards=[{models}/judge]")
    teacher = nn.utils.parameters_to_vector(t.task.teacher.parameters()).clone()
    t.iteration = 1
    for phase in t.task.phases(1):
        loss, _ = phase.loss(0)
        loss.backward()
        graded = {r for r, m in t.task.roles.items() if any(p.grad is not None for p in m.parameters())}
        assert graded == {phase.role}
        assert not t.task._rollouts[0].x.requires_grad  # the student's graph does not outlive its phase
        for module_ in t.task.roles.values():
            module_.zero_grad(set_to_none=True)
    assert all(p.grad is None for m in (t.task.teacher, t.task.reward) for p in m.parameters())
    assert torch.equal(teacher, nn.utils.parameters_to_vector(t.task.teacher.parameters()))


def test_optimizers_share_no_parameter_and_leave_none_out(models: Path, tmp_path: Path) -> None:
    t = trainer(models, tmp_path, *EVERYTHING, *rewarded(models), f"heldout_rewards=[{models}/judge]")
    owned = [id(p) for o in t.optimizers.values() for group in o.param_groups for p in group["params"]]
    memories = [hook.memory for hook in t.task.hooks if hook.memory is not None]
    modules = (t.task.student, t.task.fake, t.task.adversary.head, *memories)
    trained = [id(p) for m in modules for p in m.parameters()]
    assert len(owned) == len(set(owned)) and set(owned) == set(trained)


# --- accumulation --------------------------------------------------------------------------------------------------


class Sliced(torch.Generator):
    """A generator whose draws, of as many rows as a micro-batch has, are those rows of the whole batch's draw."""

    rows: slice
    total: int


def sliced_draws(patch: pytest.MonkeyPatch, total: int, parts: int) -> None:
    """Let every draw of a micro-batch be its share of the draw that the whole batch makes."""
    size = total // parts

    def keyed(seed: int, iteration: int, micro: int, purpose: str) -> Sliced:
        rng = Sliced()
        rng.set_state(generator(seed, iteration, micro // parts, purpose).get_state())
        share = micro % parts
        rng.rows, rng.total = slice(share * size, (share + 1) * size), total
        return rng

    def sharing(draw: Any) -> Any:
        def drawn(*arguments: Any, generator: Any = None, **options: Any) -> Tensor:
            if not isinstance(generator, Sliced):
                return draw(*arguments, generator=generator, **options)  # type: ignore[no-any-return]
            *limits, shape = arguments if isinstance(arguments[-1], (tuple, torch.Size)) else ((arguments),)
            shape = tuple(shape)
            scale = len(range(generator.total)[generator.rows])
            if shape[0] == 1:  # one draw for all rows
                return draw(*limits, shape, generator=generator, **options)  # type: ignore[no-any-return]
            factor = generator.total // scale
            whole = draw(*limits, (shape[0] * factor, *shape[1:]), generator=generator, **options)
            start = generator.rows.start * shape[0] // scale
            return whole[start : start + shape[0]]  # type: ignore[no-any-return]

        return drawn

    patch.setattr(module, "generator", keyed)
    for name in ("rand", "randn", "randint"):
        patch.setattr(torch, name, sharing(getattr(torch, name)))


def gradients(t: Trainer, patch: pytest.MonkeyPatch, parts: int, iterations: int) -> list[dict[str, Tensor]]:
    """The gradient of every phase of some iterations, and the memories at the end, without an optimizer's step."""
    samples, found = t.task.samples, []
    batch = samples.batch

    def some(iteration: int, micro: int, size: int) -> Any:
        return batch(iteration, micro // parts, size * parts)[1][(micro % parts) * size :][:size]

    def real(iteration: int, micro: int, size: int) -> Any:
        x, labels = batch(iteration, 99, size * parts)
        share = (micro % parts) * size
        return x[share : share + size], labels[share : share + size]

    patch.setattr(samples, "conditions", some)
    patch.setattr(samples, "batch", real)
    for iteration in range(iterations):
        for phase in t.task.phases(iteration):
            for micro in range(parts):
                (phase.loss(micro)[0] / parts).backward()
            role = t.task.roles[phase.role]
            found.append(
                {f"{phase.role}/{n}": p.grad.clone() for n, p in role.named_parameters() if p.grad is not None}
            )
            role.zero_grad(set_to_none=True)
            if phase.after is not None:
                phase.after()
    found.append({n: b.clone() for hook in t.task.hooks if hook.memory for n, b in hook.memory.named_buffers()})
    return found


FAKE_PHASES, ALL_PHASES = ["fake", "discriminator"], ["student", "fake", "discriminator"]


@pytest.mark.parametrize(
    ("hooks", "parts", "plan", "expected"),
    [
        (EVERYTHING, 2, [], [FAKE_PHASES, ALL_PHASES, FAKE_PHASES, ALL_PHASES]),
        (STOCHASTIC, 2, [], [FAKE_PHASES, ALL_PHASES, FAKE_PHASES, ALL_PHASES]),
        (EVERYTHING, 4, ["fake_per_student=1", "fake_warmup=0"], [ALL_PHASES, ALL_PHASES]),
        (STOCHASTIC, 4, ["fake_per_student=3", "fake_warmup=0"], [ALL_PHASES, FAKE_PHASES]),
        (EVERYTHING, 4, ["ttur=alternating"], [FAKE_PHASES, ["student"], FAKE_PHASES]),
        (EVERYTHING, 4, ["reuse_rollout=false"], [FAKE_PHASES, ALL_PHASES]),
        (STOCHASTIC, 2, ["advantage.when=reuse", "fake_warmup=0"], [ALL_PHASES, FAKE_PHASES]),
    ],
    ids=["everything", "stochastic", "every iteration", "every third", "alternating", "own rollouts", "reused"],
)
def test_micro_batches_give_every_phase_the_gradient_of_the_batch(
    models: Path, tmp_path: Path, hooks: list[str], parts: int, plan: list[str], expected: list[list[str]]
) -> None:
    """With every hook at once, over iterations with and without the student; memories agree as well.

    Micro-batches of two groups: of a single row nobody could tell whether it was drawn for a group or for all.
    """
    results, told = [], [word.replace("REWARD", f"{models}/digits-reward") for word in hooks]
    for k in (1, parts):
        with pytest.MonkeyPatch.context() as patch:
            more = [*rewarded(models), *told, f"heldout_rewards=[{models}/judge]", f"accumulate={k}", *plan]
            t = trainer(models, tmp_path / str(k), *more, f"batch_size={8 * parts}")
            sliced_draws(patch, 8 * parts, k)
            results.append(gradients(t, patch, k, len(expected)))
    whole, halves = results
    phases = [sorted({name.split("/")[0] for name in phase}) for phase in whole[:-1]]
    assert phases == [[role] for iteration in expected for role in iteration]
    for one, two in zip(whole, halves, strict=True):
        assert one.keys() == two.keys() and one
        scale = max(float(v.abs().max()) for v in one.values())
        for name in one:
            torch.testing.assert_close(two[name], one[name], rtol=2e-3, atol=2e-5 * scale, msg=name)


# --- states and results --------------------------------------------------------------------------------------------


def test_memories_are_resumed(models: Path, tmp_path: Path) -> None:
    """A run with every hook that is interrupted equals one that is not, to the last bit."""
    more = [*EVERYTHING, *rewarded(models), f"heldout_rewards=[{models}/judge]"]
    whole, parts = trainer(models, tmp_path / "whole", *more), trainer(models, tmp_path / "parts", *more)
    for _ in range(3):
        step(whole)
        step(parts)
    parts.save()
    resumed = trainer(models, tmp_path / "parts", *more)
    assert resumed.resume() == 3
    gaps = []
    for t in (whole, resumed):
        for _ in range(2):
            step(t)
        gaps.append(next(hook.gap() for hook in t.task.hooks if isinstance(hook, RewardGap)))
    a, b = whole._tensors(), resumed._tensors()
    assert any("RewardGap" in name for name in a) and any("discriminator/optimizer" in name for name in a)
    assert a.keys() == b.keys() and [n for n in a if not torch.equal(a[n], b[n])] == []
    assert gaps[0] == gaps[1] != 0.0


@pytest.mark.parametrize(
    "more", [STOCHASTIC, REUSE, ["shared_teacher={}", "dynamic_renoising={}", "reward_gradient={weight: 0.01}"]]
)
def test_what_excludes_other_hooks_is_resumed_alike(models: Path, tmp_path: Path, more: list[str]) -> None:
    features = [text.replace("REWARD", f"{models}/digits-reward") for text in more]
    recipe = [*rewarded(models), *features]
    whole, parts = trainer(models, tmp_path / "whole", *recipe), trainer(models, tmp_path / "parts", *recipe)
    for _ in range(3):
        step(whole)
        step(parts)
    parts.save()
    resumed = trainer(models, tmp_path / "parts", *recipe)
    assert resumed.resume() == 3
    for t in (whole, resumed):
        for _ in range(2):
            step(t)
    a, b = whole._tensors(), resumed._tensors()
    assert a.keys() == b.keys() and [n for n in a if not torch.equal(a[n], b[n])] == []


def test_states_of_runs_without_memories_keep_their_names(models: Path, tmp_path: Path) -> None:
    assert not any("network" in name for name in trainer(models, tmp_path)._tensors())


def test_a_deterministic_student_is_sampled_as_it_was_trained(models: Path, tmp_path: Path) -> None:
    t = trainer(models, tmp_path, "sampler=deterministic", "iterations=1", "steps=[4]")
    with torch.no_grad():
        rollouts = [t.task._rollout(i, 0, graph=False) for i in range(8)]
        rollout = next(r for r in rollouts if r.index > 0)
        x = torch.randn(8, 1, 8, 8, generator=generator(0, rollout.iteration, 0, "rollout"))
        for k in range(rollout.index):
            level = 1 - k / 4
            flow = t.task.student(x, timestep=torch.full((8,), 1000 * level), class_labels=rollout.condition["labels"])
            x = x - 0.25 * flow.sample
    torch.testing.assert_close(rollout.start, x, rtol=1e-4, atol=1e-5)
    t.run()
    table = ode_table(Flow(), "flow", 4)
    sampler = Bundle.open(tmp_path / "out").manifest.samplers[4]
    assert [tuple(row) for row in sampler.rows] == [pytest.approx(tuple(row)) for row in table.rows.tolist()]


# --- telemetry -----------------------------------------------------------------------------------------------------


def logged(folder: Path) -> list[dict[str, Any]]:
    """Lines of the log without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "time" and "second" not in k} for line in lines]


PROBED = "telemetry={every: 2, prompts: 2, samples: 2, teacher_steps: 2}"


def test_telemetry_changes_no_weight(models: Path, tmp_path: Path) -> None:
    """With probes and without, with every hook: the same weights, averages and moments, and the same random stream."""
    more = [*EVERYTHING, *rewarded(models), f"heldout_rewards=[{models}/judge]"]
    runs = [trainer(models, tmp_path / str(i), *more, probes) for i, probes in enumerate((PROBED, "telemetry.every="))]
    streams = []
    for t in runs:
        torch.manual_seed(3)
        t.run()
        streams.append(torch.get_rng_state())
    probed, plain = (t._tensors() for t in runs)
    assert probed.keys() == plain.keys() and [n for n in plain if not torch.equal(probed[n], plain[n])] == []
    assert torch.equal(*streams)
    assert sorted(p.name for p in (tmp_path / "0/probes").iterdir())[:3] == [
        "0000002.json",
        "0000004.json",
        "0000006.json",
    ]
    assert not (tmp_path / "1/probes").exists()
    with_probes, without = logged(tmp_path / "0"), logged(tmp_path / "1")
    assert [{k: v for k, v in a.items() if k in b} for a, b in zip(with_probes, without, strict=True)] == without


def test_a_resumed_log_equals_an_uninterrupted_one(models: Path, tmp_path: Path) -> None:
    more = [*rewarded(models), "adaptation={}", "sharpening={}", PROBED]
    assert trainer(models, tmp_path / "whole", *more).run()
    stopped = trainer(models, tmp_path / "parts", *more)
    phases = stopped.task.phases

    def stopping(iteration: int) -> Any:
        stopped._stop = 2 if iteration == 2 else None
        return phases(iteration)

    stopped.task.phases = stopping
    assert not stopped.run()
    resumed = trainer(models, tmp_path / "parts", *more)
    assert resumed.resume() == 3 and resumed.run()
    assert logged(tmp_path / "parts") == logged(tmp_path / "whole")
    assert any("zone/entered" in line or "zone/escaped" in line for line in logged(tmp_path / "parts")[3:])


def test_a_probe_stands_where_the_fake_score_has_learned(models: Path, tmp_path: Path) -> None:
    """With sub_interval the last of four steps lies in [0, ¼] of the time axis; hooks hear that it is the last."""

    class Hearing(Hook):
        heard: tuple[int, int] = (0, 0)

        def attend(self, rollout: Rollout) -> None:
            self.heard = (rollout.steps, rollout.index)

    for more, expected in (([], 0.5), (["sub_interval={}"], 0.125)):
        t, hook = trainer(models, tmp_path / str(len(more)), "steps=[1, 4]", PROBED, *more), Hearing()
        t.task.hooks.append(hook)
        t._probe()
        assert t.task._probe.options.level == expected and hook.heard == (4, 3)


def test_a_shared_teachers_passes_are_the_teachers(models: Path, tmp_path: Path) -> None:
    """Both guided halves of 8 samples; the blend of teacher and fake score is a network of its own."""
    for more in ([], ["shared_teacher={}"]):
        t = trainer(models, tmp_path / str(len(more)), "fake_warmup=0", *more)
        assert sum(step(t)[1]["forwards/teacher"]) == 16


def test_a_log_tells_of_weights_noise_levels_passes_and_the_zone(models: Path, tmp_path: Path) -> None:
    more = [*rewarded(models), "adaptation.strength=0.5", "sharpening={}", "guidance=3", PROBED, "fake_warmup=0"]
    trainer(models, tmp_path, *more, "iterations=2", "log_every=2", "fake_per_student=2").run()
    (line,) = logged(tmp_path)
    assert {"advantage", "alpha", "beta", "omega", "w"} == line["histograms"].keys()
    assert sum(line["histograms"]["w"][2]) == 16 and sum(line["histograms"]["alpha"][2]) == 8
    low, high, _ = line["histograms"]["alpha"]
    for mean, edges in ((line["alpha"], (0.5, 1.5)), (line["w"], (0.0, 4.0))):
        assert edges[0] <= mean <= edges[1]
    assert line["histograms"]["omega"][:2] == [pytest.approx(1 + 2 * a / (2 - a)) for a in (low, high)]
    bins = [value for name, value in line.items() if name.startswith("fake_error/t")]
    assert len(bins) >= 3 and min(bins) < line["fake_error"] < max(bins)
    # rows: the student's rollouts of 1 or 2 steps, both guided halves of the teacher, the fake in both phases
    assert line["forwards/teacher"] == 16 and line["forwards/fake"] == 24 and line["forwards/reward"] == 16
    assert line["forwards/student"] in (16, 24, 32)
    assert {
        "zone/share",
        "zone/lost",
        "zone/flat",
        "probe/diversity",
        "probe/alignment",
        "zone/low_reward",
    } <= line.keys()
    assert 0 <= line["zone/low_reward"] <= 1
