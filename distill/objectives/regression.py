"""DMD's regression to the teacher's own trajectories (arXiv 2311.18828, Eq. 9)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distill.objectives.features import Perception
from distill.objectives.ode import CLEAN, follow
from distill.objectives.plan import Hook, Roles, Rollout, Terms
from distill.parallel.device import moved
from distill.parallel.world import world

CHUNK = 32


class OdeRegression(Hook):
    """λ·E‖G(z, c) − y‖² on pairs (z, y) of noise and the end of the teacher's guided ODE, from a fixed set.

    λ = 0.25 is the paper's (high confidence). It measures LPIPS of decoded pictures; this the mean square in latents
    or, with ``look``, the distance of decoded pictures in the feature maps of a frozen network, in LPIPS' form but
    without its learned weights, which come from elsewhere. G is the student's first step, which all of its grids share.
    Pairs are made in chunks of a fixed composition when they are first drawn, so that a resumed run finds the same, and
    are kept on the host. Several ranks make together what any of them draws, each its share, because a teacher in
    shards runs on all of them or on none. context: ranks that share a sequence, and so a chunk.
    """

    terms = Terms(extra="λ·‖G(z) − y‖² on ODE pairs")

    def __init__(
        self,
        roles: Roles,
        *,
        weight: float,
        pairs: int,
        steps: int,
        guidance: float,
        seed: int,
        look: Perception | None = None,
        context: int = 1,
    ) -> None:
        self.roles, self.weight, self.pairs, self.guidance, self.look = roles, weight, pairs, guidance, look
        self.path = [*(float(t) for t in roles.family.schedule.grid(steps)), CLEAN]
        self.prompts: list[Any] = roles.samples.conditions(0, seed + 1_000_003, pairs)
        rng = torch.Generator().manual_seed(seed)
        self.z = torch.randn(pairs, *roles.family.latent_shape(), generator=rng)
        self.world = world()
        self.sharing = context if self.world.size > 1 else 1
        self._targets: dict[int, Tensor] = {}

    def pair(self, index: int) -> tuple[Tensor, Tensor]:
        """(z, y) of one pair, each (C, h, w)."""
        chunk = index // CHUNK
        if chunk not in self._targets:
            self._make({chunk})
        return self.z[index], self._targets[chunk][index % CHUNK]

    def _make(self, wanted: set[int]) -> None:
        """Make the chunks that any rank wants and none has; all ranks must call it together."""
        if len(self._targets) * CHUNK >= self.pairs:
            return
        missing = sorted(set().union(*self.world.gather(wanted)) - self._targets.keys())
        groups, group = self.world.size // self.sharing, self.world.rank // self.sharing
        for first in range(0, len(missing), groups):
            chunks = missing[first : first + groups]
            chunk = chunks[min(group, len(chunks) - 1)]  # who has none left makes the last again: all run the teacher
            self._targets.update(self.world.gather((chunk, self._follow(chunk))))

    def _follow(self, chunk: int) -> Tensor:
        rows = slice(chunk * CHUNK, (chunk + 1) * CHUNK)
        family, condition = self.roles.family, self.roles.family.encode(self.prompts[rows])
        z = moved(self.z[rows], family.device)
        return follow(family, self.roles.teacher, z, condition, self.path, self.guidance).cpu()

    def extra_student_loss(self, rollout: Rollout) -> Tensor:
        rng, n = rollout.random("pairs"), len(rollout.x)
        index = torch.randint(self.pairs, (n,), generator=rng, device="cpu").tolist()
        self._make({i // CHUNK for i in index})
        pairs, place = zip(*map(self.pair, index), strict=True), rollout.x.device
        z, y = (moved(torch.stack(column), place) for column in pairs)
        family = self.roles.family
        t = torch.full((len(z),), family.schedule.t_first, dtype=torch.float64, device=place)
        x = family.predict(self.roles.student, z, t, family.encode([self.prompts[i] for i in index])).x0
        loss = self._distance(x.float(), y.float())
        rollout.telemetry["regression"] = loss.detach()
        return self.weight * loss

    def _distance(self, x: Tensor, y: Tensor) -> Tensor:
        if self.look is None:
            return (x - y).pow(2).mean()
        with torch.autocast(x.device.type, enabled=False):
            return self.look.distance(self.roles.family.decode(x), self.roles.family.decode(y)).mean()
