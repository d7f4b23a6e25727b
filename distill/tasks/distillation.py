"""Few-step distillation of a teacher bundle into a student bundle: DMD2's update plan with the recipe's hooks.

    python -m distill.run recipes/scenes-amd.yaml

Per iteration a number of steps K and a step k of its grid are drawn, the student's earlier steps are simulated without
a graph (backward simulation, DMD2 §4.5), and the sample x of step k serves the student's phase (every
``fake_per_student`` iterations), the fake score's phase (always) and the reward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill.bundle import Manifest, Sampler, write_manifest
from distill.compiled import compile_blocks
from distill.config import DistillRecipe, RecipeError
from distill.families.base import Condition, coefficients
from distill.families.load import Teacher, load_teacher
from distill.families.tiny import tiny_decoder
from distill.math import add_noise, group_advantage, squash
from distill.objectives.build import hooks_of
from distill.objectives.dmd import fake_loss, student_loss
from distill.objectives.gan import Adversary
from distill.objectives.plan import Part, Roles, Rollout, claimed_times, fraction_of, trust
from distill.objectives.safeguards import group_diversity
from distill.objectives.weak_to_strong import SharedTeacher
from distill.parallel.device import device, moved, normal
from distill.parallel.hollow import hollow
from distill.parallel.shard import full, whole
from distill.parallel.world import world
from distill.provenance import provenance
from distill.rewards import load_reward
from distill.rewards.judges import check_judges
from distill.rewards.latent import LatentReward, scores_of
from distill.roles import ADAPTER, Networks, View, adapted, checkpoint_activations, merge, save_adapter, separate
from distill.sampling import ode_table, student_table
from distill.tasks.common import autocast, to_uint8
from distill.tasks.diffusion import draw_times, sample
from distill.tasks.gathering import everyones
from distill.tasks.probing import finished, new_probe
from distill.tasks.reusing import KeptAdvantages
from distill.tasks.samples import samples_for
from distill.tasks.video import judge_for, stills
from distill.telemetry.counters import Passes
from distill.telemetry.probe import LOW, Probe
from distill.telemetry.sink import Count, Some
from distill.trainer import Phase, Telemetry, generator, seeded

AT_BOUND = 0.99
"""Of the bound: an advantage counts as clipped from here on. In a group of two |a| = σ/(σ + ε) never passes 1."""


class DistillationTask:
    """The roles are the student and the fake score, copies of the teacher at first, and a recipe's discriminator."""

    def __init__(
        self,
        recipe: DistillRecipe,
        *,
        teacher: Callable[[DistillRecipe], Teacher] = load_teacher,
        judge: Callable[[str], Any] = load_reward,
    ) -> None:
        """teacher, judge: what loads them; benchmarks make networks without trained weights instead."""
        self.recipe, self._load_judge = recipe, judge
        self.world = world()
        with hollow(not self.world.leader):
            self.loaded = teacher(recipe)
        self.family = self.loaded.family.to(device())
        if self.world.leader and not self._in_shards:  # the host holds what is cut, so it need not fit
            self.loaded.network.to(device())
        self.held = self._roles(self.loaded.network)
        self.teacher, self.student, self.fake = self.held.teacher, self.held.student, self.held.fake
        self.roles: dict[str, nn.Module] = {"student": self.student, "fake": self.fake}
        self.optimizers = {"student": recipe.student, "fake": recipe.fake}
        self.samples = samples_for(recipe.data, recipe.seed, self.family, recipe.precision)
        self.reward = self._judge(recipe.advantage.reward) if recipe.advantage else None
        self.heldout = [self._judge(name) for name in recipe.heldout_rewards]
        small = recipe.advantage.decoder if recipe.advantage else None
        if small and all(isinstance(judge, LatentReward) for judge in (self.reward, *self.heldout)):
            raise RecipeError(f"advantage.decoder is {small}, and nothing is decoded: rewards read latents; drop it")
        self.decode = tiny_decoder(small, self.family) if small else self.family.decode
        if recipe.advantage:
            check_judges(recipe.advantage.reward, self.reward, recipe.heldout_rewards, self.heldout)
        roles = Roles(self.family, self.teacher, self.student, self.fake, self.samples)
        self.hooks = hooks_of(recipe, roles, self.reward, tuple(judge.name for judge in self.heldout))
        self.adversary = next((hook for hook in self.hooks if isinstance(hook, Adversary)), None)
        if self.adversary:
            self.roles["discriminator"] = self.adversary.head.train()
            self.optimizers["discriminator"] = recipe.discriminator or recipe.fake
        reuses = recipe.advantage is not None and recipe.advantage.when == "reuse"
        self.kept = KeptAdvantages(recipe.batch_size) if reuses else None
        memories = {type(hook).__name__: hook.memory for hook in self.hooks if hook.memory is not None}
        memories |= {} if self.kept is None else {"KeptAdvantages": self.kept}
        if memories:  # in the checkpoint, but not in the student's bundle
            self.roles["fake"] = nn.ModuleDict({"network": self.fake, **memories})
        if recipe.compile:
            compile_blocks(self.networks(), self.blocks())
        self._rollouts: dict[int, Rollout] = {}
        self.passes = Passes({"teacher": self.teacher, **self.roles, "fake": self.fake})
        for hook in self.hooks:
            if isinstance(hook, SharedTeacher):
                self.passes.watch("teacher", hook.network)
        self.probe_every = recipe.telemetry.every
        self._probe: Probe | None = None

    @property
    def _in_shards(self) -> bool:
        return self.world.size > 1 and self.recipe.parallel.strategy != "ddp"

    def _judge(self, name: str) -> Any:
        return judge_for(self.family, self._load_judge(name).to(device()))

    def _roles(self, network: Any) -> Networks:
        """Three networks, or a base with adapters; trained ones compute their blocks again if the recipe says so."""
        r = self.recipe
        adapters = r.adapters
        held = adapted(network, adapters, self.family.lora_targets(), r.seed) if adapters else separate(network)
        if r.activation_checkpointing:
            for one in held.held:
                if any(p.requires_grad for p in one.parameters()):
                    checkpoint_activations(one)
        return held

    def networks(self) -> list[nn.Module]:
        """What is sharded: the networks that hold the roles, and those that hooks keep."""
        return [*self.held.held, *(hook.network for hook in self.hooks if isinstance(hook, SharedTeacher))]

    def blocks(self) -> tuple[type[nn.Module], ...]:
        plan: tuple[type[nn.Module], ...] = self.family.wrap_plan()
        return plan

    # --- one iteration ---------------------------------------------------------------------------------------------

    def phases(self, iteration: int) -> list[Phase]:
        self._rollouts = {}
        r = self.recipe
        trains_student = self._trains_student(iteration)
        phases = []
        if trains_student:
            phases.append(
                Phase(
                    "student",
                    lambda micro: self._student(iteration, micro),
                    lambda: self._after_student_step(iteration),
                )
            )
        if not trains_student or r.ttur == "every":
            phases.append(Phase("fake", lambda micro: self._fake(iteration, micro)))
            if self.adversary:
                phases.append(Phase("discriminator", self._discriminator))
        last = phases.pop()
        return [*phases, replace(last, after=lambda: self._after_iteration(last.after))]

    def _trains_student(self, iteration: int) -> bool:
        since = iteration - self.recipe.fake_warmup
        return since >= 0 and since % self.recipe.fake_per_student == 0

    def _drawn(self, iteration: int) -> int:
        """The iteration whose prompts, K, k and noise the roll-outs of one have: its own, unless advantages are reused.

        Then it is the last one that trained the student, if there was any.
        """
        since = iteration - self.recipe.fake_warmup
        return iteration if self.kept is None or since < 0 else iteration - since % self.recipe.fake_per_student

    def _after_student_step(self, iteration: int) -> None:
        if self.kept is not None:
            advantages = {micro: rollout.advantage() for micro, rollout in self._rollouts.items()}
            self.kept.keep(iteration, advantages, self.world)
        for hook in self.hooks:
            hook.after_student_step()

    def _after_iteration(self, after: Callable[[], None] | None) -> None:
        if after is not None:
            after()
        rollouts = everyones(self._rollouts, self.hooks, self.world)
        for hook in self.hooks:
            hook.after_iteration(rollouts)

    def _student(self, iteration: int, micro: int) -> tuple[Tensor, Telemetry]:
        r = self.recipe
        rollout = self._attend(self._rollout(iteration, micro, graph=True))
        rng = generator(r.seed, iteration, micro, "student")
        with autocast(r.precision):
            t, noise = self._renoise(rollout, "dm", rng, r.time_range)
            ca = self._apart(rollout, rng)
            loss, telemetry = student_loss(
                self.family, self.teacher, self.fake, rollout, t, noise, guidance=r.guidance, hooks=self.hooks, ca=ca
            )
        rollout.x = rollout.x.detach()  # the fake's phase re-uses the sample, not its graph
        return loss, self._told(telemetry, rollout)

    def _fake(self, iteration: int, micro: int) -> tuple[Tensor, Telemetry]:
        r = self.recipe
        own = self._own(micro)
        rollout = self._attend(self._rollouts.get(own) or self._rollout(iteration, own, graph=False))
        rng = generator(r.seed, iteration, micro, "fake")
        with autocast(r.precision):
            t, noise = self._renoise(rollout, "fake", rng, (0.0, 1.0))
            loss, telemetry = fake_loss(self.family, self.fake, rollout, t, noise, hooks=self.hooks)
        return loss, self._told(telemetry, rollout)

    def _discriminator(self, micro: int) -> tuple[Tensor, Telemetry]:
        assert self.adversary is not None
        with autocast(self.recipe.precision):
            return self.adversary.discriminator_loss(self._attend(self._rollouts[self._own(micro)]))

    def _attend(self, rollout: Rollout) -> Rollout:
        for hook in self.hooks:
            hook.attend(rollout)
        return rollout

    def _told(self, telemetry: Telemetry, rollout: Rollout) -> Telemetry:
        """A phase's telemetry with the rollout's own, which is told once, and the passes since the last."""
        own, rollout.telemetry = rollout.telemetry, {}
        return {**telemetry, **own, **self.passes.take()}

    def _own(self, micro: int) -> int:
        """The key of the rollout that the fake score learns from in a micro-batch."""
        return micro if self.recipe.reuse_rollout else micro + self.recipe.accumulate

    def _real(self, iteration: int, micro: int) -> tuple[Tensor, Condition]:
        """Real latents and their conditions, drawn apart from the prompts of the rollouts."""
        size = self.recipe.batch_size // self.recipe.accumulate
        x, prompts = self.samples.batch(iteration, micro + 2 * self.recipe.accumulate, size)
        return moved(x, device()), self.family.encode(prompts)

    def _renoise(
        self, rollout: Rollout, part: Part, rng: torch.Generator, bounds: tuple[float, float]
    ) -> tuple[Tensor, Tensor]:
        """Times (B,) and noise like x for one part; uniform times where no hook claims it."""
        schedule = self.family.schedule
        t = claimed_times(self.hooks, schedule, rollout, part, rng, bounds)
        if t is None:
            t = moved(draw_times(schedule, len(rollout.x), rng, *bounds), rollout.x.device)
        noise = normal(rollout.x.shape, rng, rollout.x.device)
        for hook in self.hooks:
            noise = hook.noise(rollout, part, t, noise)
        return t, noise

    def _apart(self, rollout: Rollout, rng: torch.Generator) -> tuple[Tensor, Tensor] | None:
        """Times and noise of the alignment's part if a hook re-noises it apart from matching."""
        t = claimed_times(self.hooks, self.family.schedule, rollout, "ca", rng, self.recipe.time_range)
        return None if t is None else (t, normal(rollout.x.shape, rng, rollout.x.device))

    def _rollout(self, iteration: int, micro: int, *, graph: bool) -> Rollout:
        """Draw prompts, K and k, simulate the steps before k, and predict the clean sample of step k."""
        r, family, drawn = self.recipe, self.family, self._drawn(iteration)
        size = r.batch_size // r.accumulate
        group = r.advantage.group if r.advantage else 1
        distinct = self.samples.conditions(drawn, micro, size // group)
        prompts = [prompt for prompt in distinct for _ in range(group)]
        condition = {name: rows.repeat_interleave(group, 0) for name, rows in family.encode(distinct).items()}
        choice = seeded(r.seed, drawn, "step")
        weights = r.step_weights or (1.0,) * len(r.steps)
        steps = int(choice.choice(r.steps, p=[w / sum(weights) for w in weights]))
        index = int(choice.integers(steps))
        rng = generator(r.seed, drawn, micro, "rollout")
        grid = family.schedule.grid(steps)
        times = moved(torch.from_numpy(grid), device())[:, None].expand(-1, size)
        x = normal((size, *family.latent_shape()), rng, device())
        with autocast(r.precision):
            with torch.no_grad():
                for i in range(index):
                    step = family.predict(self.student, x, times[i], condition)
                    alpha, sigma = coefficients(family.schedule, times[i + 1])
                    fresh = r.sampler == "stochastic"
                    x = add_noise(step.x0, normal(x.shape, rng, x.device) if fresh else step.eps, alpha, sigma)
            with torch.set_grad_enabled(graph):
                prediction = family.predict(self.student, x, times[index], condition)
        levels = [fraction_of(family.schedule, float(t)) for t in grid] + [0.0]
        rollout = Rollout(
            prediction.x0,
            condition,
            prompts,
            steps,
            index,
            start=x,
            t=float(grid[index]),
            level=levels[index],
            until=levels[index + 1],
            eps=prediction.eps.detach(),
            iteration=iteration,
            trust=trust(self.hooks, iteration),
            random=lambda purpose: generator(r.seed, iteration, micro, purpose),
            real=lambda: self._real(iteration, micro),
            renoise=lambda rollout, rng: self._renoise(rollout, "dm", rng, r.time_range),
        )
        if self.reward is not None:
            self._score(rollout, micro)
        self._rollouts[micro] = rollout
        return rollout

    @torch.no_grad()
    def _score(self, rollout: Rollout, micro: int) -> None:
        """Give a rollout its rewards, raw group advantages and held-out scores.

        A reward that is not finite is counted, and its advantage is 0. Samples that the recipe does not score have NaN
        for a reward, and advantage 0 or the one that was kept for them.
        """
        settings = self.recipe.advantage
        if settings is None or self.reward is None:
            raise ValueError("this recipe has no reward; add advantage.reward")
        count = self._scored(rollout)
        rewards = self._rewards(rollout, count)
        rollout.rewards = lambda: rewards
        if settings.group < 2:
            return
        advantage = self._advantage(rollout, count) if count else self._unscored(rollout, micro)
        rollout.advantage = lambda: advantage

    def _rewards(self, rollout: Rollout, count: int) -> Tensor:
        """Rewards (B,) of the first ``count`` samples, NaN where not finite or not scored; held-out scores likewise."""
        settings = self.recipe.advantage
        assert settings is not None
        judges = (self.reward, *self.heldout)
        scores = torch.full((len(judges), len(rollout.x)), torch.nan, device=rollout.x.device)
        if count:
            self.passes.count("reward", count)
            with autocast(settings.precision or "float32"):
                scores[:, :count] = scores_of(judges, rollout.samples[:count], rollout.prompts[:count], self._pictures)
        rollout.heldout = {judge.name: row for judge, row in zip(self.heldout, scores[1:], strict=True)}
        rewards = torch.where(scores[0].isfinite(), scores[0], torch.nan)
        if count:
            told = scores[:, :count].isfinite()
            rollout.telemetry |= {"reward": rewards.nanmean(), "reward_not_finite": Count(~told)}
            for name, values in rollout.heldout.items():
                rollout.telemetry[f"heldout/{name}"] = Some(values, values.isfinite())
            for judge in judges:
                for axis, values in getattr(judge, "axes", {}).items():
                    rollout.telemetry[f"{judge.name}/{axis}"] = values.mean()
        return rewards

    def _pictures(self, latents: Tensor) -> Tensor:
        """What judges see of latents, uint8."""
        assert self.recipe.advantage is not None
        with autocast(self.recipe.advantage.precision or self.recipe.precision):
            return to_uint8(self.decode(latents))

    def _unscored(self, rollout: Rollout, micro: int) -> Tensor:
        """Advantages (B,) of a micro-batch of which nothing is scored."""
        total, place = len(rollout.x), rollout.x.device
        if self.kept is None:
            return torch.zeros(total, device=place)
        return moved(self.kept.of(self._drawn(rollout.iteration), micro, self.recipe.accumulate, total), place)

    def _advantage(self, rollout: Rollout, count: int) -> Tensor:
        """Raw advantages (B,) of a rollout's rewards within its groups, with the telemetry of them.

        A reward that is not finite takes the mean of its own group, so that it does not move the others' advantages.
        """
        settings, rewards = self.recipe.advantage, rollout.rewards()
        assert settings is not None
        finite, grouped = rewards.isfinite(), rewards.reshape(-1, settings.group)
        filled = torch.where(grouped.isfinite(), grouped, grouped.nanmean(1, keepdim=True)).flatten()
        advantage = group_advantage(
            filled,
            settings.group,
            sigma_floor=settings.sigma_floor,
            leave_one_out=settings.baseline == "leave-one-out",
        )
        advantage = torch.where(finite, advantage, 0.0)
        for hook in self.hooks:
            advantage = hook.judge(rollout, advantage)
        squashed = squash(advantage[:count], settings.squash, settings.bound)
        rollout.telemetry |= {
            "advantage": squashed,
            "zone/low_reward": (squashed < -LOW).float().mean(),
            "reward_group_std": grouped.std(1, unbiased=False).nanmean(),
            "advantage_clipped": (advantage[:count].abs() >= AT_BOUND * settings.bound).float().mean(),
        }
        if rollout.index == rollout.steps - 1:  # earlier steps are blurred
            rollout.telemetry["diversity"] = group_diversity(rollout.samples, settings.group).mean()
        return advantage

    def _scored(self, rollout: Rollout) -> int:
        """How many of a rollout's samples, from the first on and in whole groups, the recipe wants scored."""
        settings = self.recipe.advantage
        assert settings is not None
        last = rollout.index == rollout.steps - 1
        student = self._trains_student(rollout.iteration)
        wanted = {"always": True, "student": student, "reuse": student, "last-step": last}
        prompts = len(rollout.x) // settings.group
        return settings.group * ceil(settings.share * prompts) if wanted[settings.when] else 0

    # --- results ---------------------------------------------------------------------------------------------------

    def probe(self, folder: Path, iteration: int) -> Telemetry:
        """The forbidden zone at the present weights (distill.telemetry.probe)."""
        r = self.recipe
        if self._probe is None:
            judges = {f"heldout/{judge.name}": judge for judge in self.heldout}
            judges |= {} if self.reward is None else {"reward": self.reward}
            roles = Roles(self.family, self.teacher, self.student, self.fake, self.samples)
            self._probe = new_probe(r, roles, self._table(max(r.steps)), judges)
        self._attend(finished(r))
        with self.passes.uncounted(), autocast(r.precision):
            return self._probe.measure(folder, iteration)

    @torch.no_grad()
    def preview(self) -> Tensor:
        """One row of pictures per number of steps."""
        with self.passes.uncounted():
            return self._preview()

    def _preview(self) -> Tensor:
        conditions = self.samples.preview_conditions()
        encoded, pictures = self.family.encode(conditions), []
        for steps in self.recipe.steps:
            table = self._table(steps)
            with autocast(self.recipe.precision):
                latents = sample(self.family, self.student, table, encoded, list(range(len(conditions))))
                pictures.append(stills(to_uint8(self.family.decode(latents.float()))))
        return torch.cat(pictures)

    def _table(self, steps: int) -> Any:
        schedule, prediction = self.family.schedule, self.family.prediction
        if self.recipe.sampler == "deterministic":
            return ode_table(schedule, prediction, steps)
        return student_table(schedule, prediction, schedule.grid(steps))

    def finish(self, output: Path) -> None:
        adapter: dict[str, Tensor] = {}
        if isinstance(self.student, View):
            adapter = {name: full(tensor).cpu() for name, tensor in self.student.state_dict().items()}
        student = self._plain_student(adapter)
        if not self.world.leader:
            return
        self.family.to("cpu").save(student, output)
        (output / ADAPTER).unlink(missing_ok=True)  # of an earlier student in this place
        if self.recipe.adapters and adapter:
            save_adapter(adapter, self.recipe.adapters, output)
        manifest = Manifest(
            name=output.name,
            samplers={n: Sampler.of(self._table(n)) for n in sorted(self.recipe.steps)},
            default_steps=max(self.recipe.steps),
            examples=self.loaded.examples,
            provenance={**provenance(self.recipe), "teacher": self.loaded.source},
            **self.family.describe(),
        )
        write_manifest(output, manifest)

    def _plain_student(self, adapter: Mapping[str, Tensor]) -> nn.Module:
        """The student as one network on the leader's CPU, its adapter merged into the teacher's own weights."""
        if not isinstance(self.student, View):
            return whole(self.student).cpu()
        assert self.recipe.adapters is not None
        if not self.world.leader:
            return self.student
        return merge(load_teacher(self.recipe).network, adapter, self.recipe.adapters.alpha / self.recipe.adapters.rank)
