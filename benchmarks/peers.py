"""Other projects' DMD2 on our networks: drivers for checkouts that the caller has, of which nothing is copied here.

Each runs the peer's own model, losses and optimizers in float32 on the networks of a recipe's teacher, without a GAN
and without averaged weights, for students of one step, where the peers' roll-outs and ours are the same work. ``plan``
gives our recipe the peer's schedule of updates. A checkout's requirements must be importable.
"""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from diffusers import DDIMScheduler
from diffusers.optimization import get_scheduler
from torch import Tensor, nn
from transformers import CLIPTokenizer

from distill.bundle import Bundle
from distill.config import DistillRecipe
from distill.families.sit import TIME_SCALE, Sit

_COMMON = ("steps=[1]", "step_weights=null", "accumulate=1", "precision=float32", "ema=0", "fake_warmup=0")


class Contender(Protocol):
    """One way to train, iteration by iteration.

    period: iterations after which the updates repeat; spent: seconds of processor time by what they were spent on.
    """

    period: int

    @property
    def spent(self) -> dict[str, float]: ...

    def step(self, iteration: int) -> None: ...


class FastGen:
    """NVlabs/FastGen's DMD2Model on the DiT of the sit family, as its trainer runs it on one process.

    Student and fake score take turns (1 to k − 1). Its trainer's clipping callback is called for the student, for
    which its DMD2 experiments configure it, and not for the fake score, which they leave unclipped.
    """

    family = "sit"

    @staticmethod
    def plan(recipe: DistillRecipe) -> tuple[str, ...]:
        return (*_COMMON, "ttur=alternating", f"fake_per_student={max(2, recipe.fake_per_student)}")

    def __init__(self, recipe: DistillRecipe, folder: Path) -> None:
        base: Any = import_module("fastgen.networks.network").FastGenNetwork
        config = import_module("fastgen.configs.methods.config_dmd2").ModelConfig()
        clip = import_module("fastgen.callbacks.grad_clip").GradClipCallback
        lazily = import_module("fastgen.utils").LazyCall
        import_module("fastgen.utils.logging_utils").logger.remove()
        family, teacher = Sit.from_folder(recipe.teacher)

        class Network(base):  # type: ignore[misc]
            """Our DiT behind its interface; both write x_t = (1 − t)·x0 + t·ε and predict ε − x0."""

            def __init__(self) -> None:
                super().__init__(net_pred_type="flow", schedule_type="rf")
                self.dit = copy.deepcopy(teacher)

            def forward(self, x_t: Tensor, t: Tensor, condition: Tensor, fwd_pred_type: str | None = None) -> Tensor:
                flow = self.dit(x_t, timestep=TIME_SCALE * t.float(), class_labels=condition, return_dict=False)[0]
                kind = fwd_pred_type or self.net_pred_type
                x: Tensor = self.noise_scheduler.convert_model_output(
                    x_t, flow, t, src_pred_type="flow", target_pred_type=kind
                )
                return x

        config.device, config.precision, config.input_shape = "cpu", "float32", list(family.latent_shape())
        config.net, config.gan_loss_weight_gen = lazily(Network)(), 0.0
        config.guidance_scale, config.student_update_freq = recipe.guidance, self.period_of(recipe)
        config.sample_t_cfg.min_t, config.sample_t_cfg.max_t = recipe.time_range
        for settings, ours in ((config.net_optimizer, recipe.student), (config.fake_score_optimizer, recipe.fake)):
            settings.lr, settings.betas, settings.weight_decay = ours.learning_rate, ours.betas, ours.weight_decay
        self.period, self.spent, self.batch = self.period_of(recipe), defaultdict[str, float](float), recipe.batch_size
        self.model, self.family_ = import_module("fastgen.methods").DMD2Model(config), family
        self.model.on_train_begin()
        self.model.init_optimizers()
        self.clip = clip(grad_norm=recipe.student.clip, model_key="net")
        self.rng = torch.Generator().manual_seed(recipe.seed)

    @staticmethod
    def period_of(recipe: DistillRecipe) -> int:
        return max(2, recipe.fake_per_student)

    def step(self, iteration: int) -> None:
        labels = torch.randint(10, (self.batch,), generator=self.rng)
        data = {
            "real": torch.zeros(self.batch, *self.family_.latent_shape()),  # read for its shape alone without a GAN
            "condition": labels,
            "neg_condition": self.family_.unconditional(self.batch)["labels"],
        }
        student = iteration % self.period == 0
        with timed(self.spent, "student" if student else "fake"):
            losses, _ = self.model.single_train_step(data, iteration)
            self.model.grad_scaler.scale(losses["total_loss"]).backward()
            if student:
                self.clip.on_optimizer_step_begin(self.model, iteration=iteration)
            self.model.optimizers_schedulers_step(iteration)
            self.model.optimizers_zero_grad(iteration)


class Dmd2:
    """tianweiy/DMD2's SDUniModel on the UNet of the sdxl family, in the order of updates of its trainer.

    Its trainer class itself cannot be made without a database of latents and an account for logging; the lines that
    train (two calls of the model, two backward passes, clipping, two optimizers, two schedules) are called as there.
    It knows ε-prediction alone, so the weights are read as such: the work is the same, the pictures are not.
    """

    family = "sdxl"

    @staticmethod
    def plan(recipe: DistillRecipe) -> tuple[str, ...]:
        return (*_COMMON, "ttur=every", "reuse_rollout=true")

    def __init__(self, recipe: DistillRecipe, folder: Path) -> None:
        theirs = import_module("main.sd_unified_model").SDUniModel
        model = folder / "stable-diffusion-xl"
        shutil.copytree(recipe.teacher, model, ignore=shutil.ignore_patterns("scheduler"))
        scheduler: Any = DDIMScheduler
        scheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").save_pretrained(
            model / "scheduler"
        )
        low, high = recipe.time_range
        arguments = SimpleNamespace(
            model_id=str(model), revision=None, sdxl=True, use_fp16=False, gan_alone=False, tiny_vae=False,
            grid_size=1, resolution=json.loads((model / "vae" / "config.json").read_text())["sample_size"],
            conditioning_timestep=999, num_train_timesteps=1000, denoising=True, denoising_timestep=1000,
            num_denoising_step=1, backward_simulation=True, initialie_generator=True, generator_lora=False,
            gradient_checkpointing=False, cls_on_clean_image=False, gen_cls_loss=False, diffusion_gan=False,
            diffusion_gan_max_timestep=0, min_step_percent=low, max_step_percent=high,
            real_guidance_scale=recipe.guidance, fake_guidance_scale=1.0,
        )  # fmt: skip
        accelerator = SimpleNamespace(device=torch.device("cpu"), is_local_main_process=False)
        self.model = theirs(arguments, accelerator)
        self.period, self.spent, self.recipe = recipe.fake_per_student, defaultdict[str, float](float), recipe
        pairs = ((self.model.feedforward_model, recipe.student), (self.model.guidance_model, recipe.fake))
        self.optimizers, self.schedules = [], []
        for module, ours in pairs:
            optimizer = torch.optim.AdamW(
                [p for p in module.parameters() if p.requires_grad],
                lr=ours.learning_rate,
                betas=ours.betas,
                weight_decay=ours.weight_decay,
            )
            self.optimizers.append(optimizer)
            self.schedules.append(get_scheduler("constant_with_warmup", optimizer=optimizer, num_warmup_steps=0))
        self.tokenizer = CLIPTokenizer.from_pretrained(model / "tokenizer")
        self.prompts = Bundle.open(recipe.teacher).manifest.examples
        unet = self.model.feedforward_model.config
        self.shape = (unet.in_channels, unet.sample_size, unet.sample_size)
        self.rng = torch.Generator().manual_seed(recipe.seed)
        torch.manual_seed(recipe.seed)

    def step(self, iteration: int) -> None:
        n = self.recipe.batch_size
        texts = [self.prompts[i % len(self.prompts)] for i in range(n)]
        ids = self.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        noise = torch.randn(n, *self.shape, generator=self.rng)
        given: dict[str, Any] = {"denoising_dict": {"text_input_ids_one": ids, "text_input_ids_two": ids}}
        student = iteration % self.period == 0
        with timed(self.spent, "student" if student else "fake"):
            losses, log = self.model(
                noise, None, None, compute_generator_gradient=student, generator_turn=True, guidance_turn=False, **given
            )
            if student:
                self._descend(losses["loss_dm"], self.model.feedforward_model, 0, self.recipe.student.clip)
            self.schedules[0].step()
        with timed(self.spent, "fake"):
            losses, _ = self.model(
                noise, None, None, compute_generator_gradient=student, generator_turn=False, guidance_turn=True,
                guidance_data_dict=log["guidance_data_dict"], **given,
            )  # fmt: skip
            self._descend(losses["loss_fake_mean"], self.model.guidance_model, 1, self.recipe.fake.clip)
            self.schedules[1].step()

    def _descend(self, loss: Tensor, module: nn.Module, which: int, clip: float) -> None:
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(module.parameters(), clip)
        self.optimizers[which].step()
        for optimizer in self.optimizers:
            optimizer.zero_grad()


PEERS: dict[str, Any] = {"fastgen": FastGen, "dmd2": Dmd2}


@dataclass(frozen=True)
class Checkout:
    """A peer and where its code lies."""

    name: str
    path: Path

    @property
    def peer(self) -> Any:
        return PEERS[self.name]

    @property
    def commit(self) -> str | None:
        """What is checked out; None outside of git."""
        found = subprocess.run(["git", "-C", str(self.path), "rev-parse", "HEAD"], capture_output=True, text=True)
        return found.stdout.strip() or None

    def plan(self, recipe: DistillRecipe, family: str) -> tuple[str, ...]:
        """Overrides that give our recipe the peer's plan. Raises ValueError where the peer is not driven."""
        if family != self.peer.family:
            raise ValueError(
                f"{self.name} is driven on networks of the {self.peer.family} family, not of {family}; give a recipe "
                f"whose teacher is one"
            )
        plan: tuple[str, ...] = self.peer.plan(recipe)
        return plan

    def open(self, recipe: DistillRecipe, folder: Path) -> Contender:
        """The peer, ready to train. Raises ValueError where its code or its requirements are missing."""
        sys.path.insert(0, str(self.path))
        try:
            driver: Contender = self.peer(recipe, folder)
        except ModuleNotFoundError as error:
            raise ValueError(
                f"{self.name} in {self.path} needs the module {error.name!r}, which is not there; give the root of a "
                "checkout, and install its requirements"
            ) from None
        finally:
            sys.path.remove(str(self.path))
        return driver


def checkouts(words: Sequence[str]) -> list[Checkout]:
    """From NAME=PATH, one per word."""
    found = []
    for word in words:
        name, _, path = word.partition("=")
        if name not in PEERS or not Path(path).is_dir() or not path:
            raise ValueError(f"--against is {word!r}; give {' or '.join(f'{n}=PATH' for n in PEERS)} of a checkout")
        found.append(Checkout(name, Path(path).resolve()))
    return found


@contextlib.contextmanager
def timed(spent: dict[str, float], name: str) -> Iterator[None]:
    """Add the processor time of the block to ``spent[name]``."""
    start = time.process_time()
    try:
        yield
    finally:
        spent[name] += time.process_time() - start
