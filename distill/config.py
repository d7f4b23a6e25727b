"""Recipes: one strict, typed YAML file per trained thing; the only place where hyper-parameters live.

    recipe = load_recipe("recipes/scenes-amd.yaml", ["iterations=200", "student.learning_rate=1e-5"])

Unknown keys are refused with the nearest spelling; values are checked against their types before any work begins.
"""

from __future__ import annotations

import contextlib
import difflib
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, Discriminator, Field, Tag, TypeAdapter, ValidationError, model_validator

from distill.objectives import options
from distill.parallel.options import Parallel
from distill.strict import Decay, Fraction, Steps, Strict
from distill.telemetry.options import Probing


class RecipeError(ValueError):
    """A recipe that cannot be used; the message names the key, the value and the way out."""


class Optimizer(Strict):
    """AdamW with a linear warm-up; ``decay`` cosine ends at zero with the run."""

    learning_rate: float = Field(gt=0)
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    weight_decay: float = Field(0.0, ge=0)
    warmup: int = Field(0, ge=0, description="iterations")
    decay: Literal["constant", "cosine"] = "constant"
    clip: float = Field(10.0, gt=0, description="largest gradient norm of the role")


class SceneData(Strict):
    """The first ``count`` scenes of the stream ``seed``, and scenes beyond them for nothing: pictures are cached."""

    seed: int = 1
    count: int = Field(50_000, gt=0)
    size: int = Field(64, ge=16)
    frames: int | None = Field(
        None, ge=1, description="of clips of moving scenes, 4·n + 1 at 8 per second; None: stills"
    )
    held_out_prompts: Fraction | None = Field(
        None, description="share of a distillation's prompts that name held-out combinations; pictures never show them"
    )


class FileData(Strict):
    """Prompts and pictures of one's own (distill.tasks.files). Prompts alone are enough where nothing needs pictures.

    Without prompts, students are prompted with the captions or labels of the pictures.
    """

    prompts: str | None = Field(None, description=".txt, .jsonl or .parquet, or a pattern of them")
    prompt_key: str = Field("prompt", description="what holds the prompt in JSON or Parquet")
    pictures: str | None = Field(None, description="a folder, or a pattern of .tar (webdataset) or .parquet files")
    caption_key: str = Field("caption", description="what holds the caption or label in JSON or Parquet")
    cache_text: bool = Field(False, description="keep the text encoders' states of all prompts on disk")

    @model_validator(mode="after")
    def _something(self) -> FileData:
        if self.prompts is None and self.pictures is None:
            raise ValueError("names neither prompts nor pictures; add one, such as prompts: prompts.txt")
        return self


def _kind_of_data(value: Any) -> str:
    if isinstance(value, str):
        return "literal[name]"
    own = value if isinstance(value, dict) else getattr(type(value), "model_fields", {})
    return "FileData" if any(key in own for key in FileData.model_fields) else "SceneData"


DistillData = Annotated[
    Annotated[SceneData, Tag("SceneData")]
    | Annotated[FileData, Tag("FileData")]
    | Annotated[Literal["digits", "labels"], Tag("literal[name]")],
    Discriminator(_kind_of_data),
]


class Base(Strict):
    """What every run has."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9.-]*$")
    seed: int = Field(0, ge=0)
    iterations: int = Field(gt=0)
    batch_size: int = Field(gt=0, description="samples per optimizer step; accumulate splits it")
    accumulate: int = Field(1, gt=0, description="micro-batches per optimizer step, over all ranks")
    parallel: Parallel = Parallel()
    precision: Literal["float32", "bfloat16"] = "float32"
    ema: float = Field(0.0, ge=0, lt=1, description="decay of the averaged weights; 0 keeps none")
    log_every: int = Field(50, gt=0)
    preview_every: int = Field(500, gt=0)
    save_every: int = Field(500, gt=0)
    keep_checkpoints: int = Field(2, gt=0)
    output: str = Field(description="folder of the result; runs/<name> holds logs and checkpoints")
    initialise_from: str | None = Field(
        None,
        description="folder of another run, such as an earlier stage, whose weights this one starts from; optimizers, "
        "averages and iterations start anew (--resume goes on with this run's own)",
    )

    @model_validator(mode="after")
    def _divisible(self) -> Base:
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of accumulate {self.accumulate}")
        return self


class Denoising(Base):
    """What trainings of diffusion networks have."""

    compile: bool = Field(
        False, description="torch.compile the blocks of all networks: minutes at first, then faster (distill.compiled)"
    )


class VaeModel(Strict):
    block_out_channels: tuple[int, ...]
    layers_per_block: int = 1
    latent_channels: int = 4
    norm_num_groups: int = 8


class Reconstruction(Base):
    """What autoencoders of pictures and of clips minimise."""

    kl_weight: float = Field(1e-6, ge=0)
    gradient_weight: float = Field(1.0, ge=0, description="L1 on finite differences, against blur")
    detail_weight: float = Field(0.0, ge=0, description="λ of the weight 1 + λ·(local deviation) on errors")


class VaeRecipe(Reconstruction):
    task: Literal["vae"]
    data: SceneData = SceneData()
    model: VaeModel
    optimizer: Optimizer


class VideoVaeModel(Strict):
    base_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4)
    latent_channels: int = 8
    res_blocks: int = 1


class VideoVaeRecipe(Reconstruction):
    task: Literal["video-vae"]
    data: SceneData = SceneData(count=4_000, frames=17)
    decoder_of: str | None = Field(
        None, description="folder of an autoencoder whose decoder alone is trained on; its latents stay as they are"
    )
    window: int = Field(9, ge=5, description="frames of a clip that one sample sees, 4·n + 1")
    single_frames: int = Field(0, ge=0, description="first iterations, which see single frames of as many more clips")
    crop: int | None = Field(None, ge=16, description="side of the part of the frames that a sample sees; None: all")
    p_whole: float = Field(0.1, ge=0, le=1, description="of an iteration with whole frames in the place of parts")
    model: VideoVaeModel = VideoVaeModel()
    optimizer: Optimizer

    @model_validator(mode="after")
    def _crop_fits(self) -> VideoVaeRecipe:
        if self.crop is not None and self.crop > self.data.size:
            raise ValueError(f"crop is {self.crop} and frames are {self.data.size} pixels high; use at most that")
        return self


class ClipTower(Strict):
    width: int
    layers: int
    heads: int


class TextRecipe(Base):
    """A UMT5 encoder of moving scenes' captions; heads read every fact from the state of its end token."""

    task: Literal["text"]
    data: SceneData = SceneData(frames=17)
    tower: ClipTower
    max_tokens: int = 64
    optimizer: Optimizer


class ClipRecipe(Base):
    """Contrastive training of transformers' CLIPModel; hard negatives are captions with one fact changed."""

    task: Literal["clip"]
    data: SceneData = SceneData()
    vision: ClipTower
    text: ClipTower
    text_small: ClipTower
    patch: int = 8
    projection: int = 128
    max_tokens: int = 40
    hard_negatives: int = Field(1, ge=0, description="wrong captions per picture")
    facts_weight: float = Field(1.0, ge=0, description="of the loss that reads the facts from each tower")
    optimizer: Optimizer


class RewardRecipe(Base):
    """Preference fine-tuning of a CLIPModel: clean against degraded or wrongly captioned renders (Bradley–Terry)."""

    task: Literal["reward"]
    data: SceneData | Literal["digits"] = SceneData()
    clip: str | None = Field(
        None, description="where the CLIPModel starts from; None for digits, whose reward is a classifier"
    )
    temperature: float = Field(4.0, gt=0, description="points of 100 × cosine that make odds of e")
    wrong_captions: int = Field(1, ge=1, description="per picture; texts cost less than pictures")
    optimizer: Optimizer

    @model_validator(mode="after")
    def _has_start(self) -> RewardRecipe:
        if self.data != "digits" and self.clip is None:
            raise ValueError("a reward on scenes needs clip, the folder of a CLIPModel")
        return self


class LatentRewardRecipe(Base):
    """A reward of latents that imitates a CLIP-like reward of pictures; a sample is a scene, whole and damaged."""

    task: Literal["latent-reward"]
    data: SceneData = SceneData(count=8_000)
    reward: str = Field(description="what is imitated: folder or name of a CLIP-like reward")
    vae: str = Field(description="folder of the AutoencoderKL whose latents are scored")
    width: int = Field(64, ge=1, description="channels of the convolutions in the place of the patch embedding")
    stem_iterations: int = Field(
        0, ge=0, description="first iterations, which fit these convolutions to the patch embedding: cheap"
    )
    optimizer: Optimizer


class VideoRewardRecipe(Base):
    """Preferences between clips: clean against damaged or wrongly captioned ones (Bradley–Terry)."""

    task: Literal["video-reward"]
    data: SceneData = SceneData(count=4_000, frames=17)
    text_encoder: str = Field(description="folder of a UMT5 encoder, with its tokenizer in tokenizer/")
    width: int = Field(32, multiple_of=8)
    layers: int = 2
    projection: int = 128
    temperature: float = Field(4.0, gt=0, description="points of 100 × cosine that make odds of e")
    wrong_captions: int = Field(2, ge=1, description="per clip; texts cost less than clips")
    facts_weight: float = Field(1.0, ge=0, description="of the loss that reads facts and motions from a clip")
    optimizer: Optimizer


class LabellerRecipe(Base):
    task: Literal["labeller"]
    data: SceneData = SceneData()
    width: int = 48
    optimizer: Optimizer


class MotionRecipe(Base):
    """A network that says what moves in a clip and how, trained on exact labels."""

    task: Literal["motion"]
    data: SceneData = SceneData(count=4_000, frames=17)
    width: int = Field(32, multiple_of=4)
    optimizer: Optimizer


class UnetModel(Strict):
    block_out_channels: tuple[int, ...] = (64, 128)
    attention: tuple[bool, ...] = (False, True)
    layers_per_block: int = 1
    transformer_layers: int = 1
    head_dim: int = 16
    norm_num_groups: int = 16


class SdxlSource(Strict):
    """The sdxl family from its parts (a fresh UNet) — for training a teacher."""

    family: Literal["sdxl"]
    vae: str
    text_encoder: str
    text_encoder_2: str
    unet: UnetModel = UnetModel()
    prediction: Literal["epsilon", "x0", "v"] = "epsilon"
    zero_terminal_snr: bool = Field(False, description="the last timestep is pure noise; needs prediction v or x0")

    @model_validator(mode="after")
    def _noise_is_predictable(self) -> SdxlSource:
        if self.zero_terminal_snr and self.prediction == "epsilon":
            raise ValueError("zero_terminal_snr needs prediction: v or x0, because ε says nothing of x0 in pure noise")
        return self


class WanModel(Strict):
    """Sizes of a WanTransformer3DModel."""

    width: int = 192
    layers: int = 8
    heads: int = 4
    feed_forward: int = 768
    patch: int = Field(2, ge=1, description="latents on a side of what becomes one token")


class WanSource(Strict):
    """The wan family from its parts (a fresh transformer) — for training a teacher."""

    family: Literal["wan"]
    vae: str
    text_encoder: str = Field(description="folder of a UMT5 encoder, with its tokenizer in tokenizer/")
    transformer: WanModel = WanModel()
    shift: float = Field(3.0, gt=0, description="of the flow's time")


class SitModel(Strict):
    """A class-conditional DiT in pixel space on 8 × 8 digits."""

    family: Literal["sit"]
    width: int = 128
    layers: int = 4
    heads: int = 4
    patch: int = 2


Source = Annotated[SdxlSource | WanSource | SitModel, Field(discriminator="family")]


class DiffusionRecipe(Denoising):
    """Teacher training: denoising loss at uniform times, the condition dropped for classifier-free guidance."""

    task: Literal["diffusion"]
    model: Source
    data: SceneData | Literal["digits"] = SceneData()
    optimizer: Optimizer
    drop_condition: float = Field(0.1, ge=0, lt=1)
    guidance: float = Field(4.0, ge=1, description="standard form u + ω(c − u); the teacher's own sampler uses it")
    sampling_steps: Steps = 50

    @model_validator(mode="after")
    def _data_fits(self) -> DiffusionRecipe:
        if (self.model.family == "sit") != (self.data == "digits"):
            raise ValueError(
                f"the {self.model.family} family does not learn these data; sit takes digits, others scenes"
            )
        frames = None if self.data == "digits" else self.data.frames
        if (self.model.family == "wan") != (frames is not None):
            raise ValueError(f"data.frames is {frames}; the wan family learns clips, of 17 frames say, others stills")
        return self


class Adapters(Strict):
    """LoRA: these roles are adapters of one frozen base, the teacher; the others have weights of their own."""

    roles: tuple[Literal["student", "fake"], ...] = Field(("student", "fake"), min_length=1)
    rank: int = Field(64, ge=1)
    alpha: int = Field(64, ge=1, description="an adapter acts with alpha / rank; DMD2's SDXL has 8 for rank 64")
    base: Literal["float32", "bfloat16"] = Field(
        "float32", description="of the base's matrices; under precision bfloat16 both compute the same"
    )


class DistillRecipe(Denoising):
    """Few-step distillation. Without any of the optional sections it is DMD2 (without its GAN)."""

    task: Literal["distill"]
    teacher: str = Field(description="a bundle, a diffusers folder or a hub id")
    family: Literal["sdxl", "sd15", "sd3", "flux", "sit", "wan"] | None = Field(
        None, description="of the teacher; None: as its folder or hub id says"
    )
    size: tuple[int, int] | None = Field(None, description="(width, height) in pixels; None: the teacher's own")
    frames: int | None = Field(None, ge=1, description="of a video; None: the teacher's own")
    shift: float | None = Field(None, gt=0, description="time shift of a flow; None: as the teacher's scheduler says")
    embedded_guidance: float | None = Field(
        None, ge=0, description="the scale that FLUX.1-dev reads as an input, in all roles; None: 3.5"
    )
    data: DistillData = Field(SceneData(), description="labels: the teacher's classes, drawn alike, without pictures")
    steps: tuple[Steps, ...] = Field(
        (4,), min_length=1, description="numbers of steps that the student learns; each grid is trailing"
    )
    timesteps: tuple[Annotated[float, Field(ge=0)], ...] | None = Field(
        None, description="of the only grid, latest first, in the model's own time; None: trailing"
    )
    step_weights: tuple[Annotated[float, Field(gt=0)], ...] | None = Field(
        None, description="how often each is trained; None: equally"
    )
    guidance: float = Field(4.0, ge=1, description="ω of the teacher, standard form u + ω(c − u)")
    fake_per_student: int = Field(5, ge=1, description="iterations per student update (TTUR)")
    ttur: Literal["every", "alternating"] = Field(
        "every", description="the fake is updated in every iteration (DMD2) or in those without the student (FastGen)"
    )
    reuse_rollout: bool = Field(
        True, description="the fake learns from the student's samples of that iteration (DMD2) or from its own draw"
    )
    step_aware_fake: bool = Field(False, description="the fake is told which of the student's steps made a sample")
    fake_warmup: int = Field(0, ge=0, description="iterations before the student's first update")
    time_range: tuple[Fraction, Fraction] = Field(
        (0.02, 0.98), description="of re-noising, as fractions of the time axis"
    )
    sampler: Literal["stochastic", "deterministic"] = Field(
        "stochastic", description="between steps, fresh noise (DMD2) or the student's own estimate of it (TDM)"
    )
    adapters: Adapters | None = Field(None, description="None: teacher, student and fake score are three networks")
    activation_checkpointing: bool = Field(
        False, description="compute trained blocks twice instead of keeping what is inside: less memory, more time"
    )
    student: Optimizer
    fake: Optimizer
    discriminator: Optimizer | None = Field(None, description="with gan or foundation_gan; None: as the fake's")
    advantage: options.Advantage | None = None
    adaptation: options.Adaptation | None = None
    sharpening: options.Sharpening | None = None
    safeguards: options.Safeguards = options.Safeguards()
    regression: options.Regression | None = None
    gan: options.Gan | None = None
    foundation_gan: options.FoundationGan | None = None
    decoupled: options.Decoupled | None = None
    reward_weighting: options.RewardWeighting | None = None
    reward_gradient: options.RewardGradient | None = None
    reward_tilt: options.RewardTilt | None = None
    policy_gradient: options.PolicyGradient | None = None
    consistency: options.Consistency | None = None
    dynamic_renoising: options.DynamicRenoising | None = None
    shared_teacher: options.SharedTeacher | None = None
    implicit_alignment: options.ImplicitAlignment | None = None
    segment_guidance: options.SegmentGuidance | None = None
    sub_interval: options.SubInterval | None = None
    first_step_anchor: options.FirstStepAnchor | None = None
    divergence: options.Divergence | None = None
    heldout_rewards: tuple[str, ...] = ()
    telemetry: Probing = Probing()

    @model_validator(mode="after")
    def _coherent(self) -> DistillRecipe:
        guards, grouped = self.safeguards, self.advantage is not None and self.advantage.group > 1
        if (self.adaptation or self.sharpening) and not grouped:
            raise ValueError(
                "adaptation and sharpening need an advantage; add advantage.reward, and advantage.group of 2 or more"
            )
        if (guards.two_key or guards.diversity) and not grouped:
            raise ValueError("safeguards.two_key and diversity compare the samples of a prompt; add an advantage")
        if guards.reward_gap and not self.heldout_rewards:
            raise ValueError("safeguards.reward_gap compares with held-out rewards; name heldout_rewards")
        for key in ("reward_weighting", "reward_gradient", "reward_tilt"):
            if getattr(self, key) and self.advantage is None:
                raise ValueError(f"{key} needs a reward; add advantage.reward, with advantage.group 1 if alone")
        if self.policy_gradient and (not grouped or self.sampler != "stochastic" or max(self.steps) == 1):
            raise ValueError(
                "policy_gradient compares the ends of a prompt's roll-outs through a noisy step; add an advantage with "
                "a group of 2 or more, sampler: stochastic, and a number of steps above 1"
            )
        if self.advantage and self.advantage.when == "student" and self.sharpening and self.ttur == "alternating":
            raise ValueError(
                "advantage.when student leaves the fake score without rewards under ttur alternating, so sharpening "
                "would do nothing; use when: always or reuse, or ttur: every"
            )
        if self.advantage and self.advantage.when == "reuse" and not grouped:
            raise ValueError(
                "advantage.when reuse keeps the advantages of groups, and advantage.group is 1; use a group of 2 or "
                "more, or when: student"
            )
        if self.advantage and self.advantage.when == "reuse" and not self.reuse_rollout:
            raise ValueError(
                "advantage.when reuse gives the fake score the student's draws and their advantages, and reuse_rollout "
                "false draws of its own; drop one of them"
            )
        if self.discriminator and not (self.gan or self.foundation_gan):
            raise ValueError("discriminator is an optimizer without a role; add gan or foundation_gan, or drop it")
        if self.gan and self.foundation_gan:
            raise ValueError("gan and foundation_gan would share one discriminator; drop one")
        if (self.gan or self.foundation_gan) and isinstance(self.data, FileData) and self.data.pictures is None:
            raise ValueError("gan and foundation_gan compare with real pictures; add data.pictures")
        if self.divergence and not self.gan:
            raise ValueError("divergence reads the discriminator's density ratio; add gan")
        if self.sub_interval and self.dynamic_renoising:
            raise ValueError("sub_interval and dynamic_renoising both choose where samples are re-noised; drop one")
        if self.heldout_rewards and self.advantage is None:
            raise ValueError("heldout_rewards are read beside the training reward; add advantage.reward, or drop them")
        if self.ttur == "alternating" and self.fake_per_student < 2:
            raise ValueError("ttur alternating never updates the fake with fake_per_student 1; use 2 or more")
        if self.advantage and (self.batch_size // self.accumulate) % self.advantage.group:
            raise ValueError(
                f"micro-batches of {self.batch_size // self.accumulate} do not hold whole groups of "
                f"{self.advantage.group}; change batch_size, accumulate or advantage.group"
            )
        if self.timesteps is not None and self.steps != (len(self.timesteps),):
            raise ValueError(f"timesteps has {len(self.timesteps)} entries for steps {list(self.steps)}; name one grid")
        if self.timesteps is not None and list(self.timesteps) != sorted(set(self.timesteps), reverse=True):
            raise ValueError(f"timesteps is {self.timesteps}; give different times, the latest first")
        self._sharable()
        if self.step_weights is not None and len(self.step_weights) != len(self.steps):
            raise ValueError(f"step_weights has {len(self.step_weights)} entries for {len(self.steps)} steps")
        if self.time_range[0] >= self.time_range[1]:
            raise ValueError(f"time_range is {self.time_range}; give the smaller time first, such as (0.02, 0.98)")
        if self.advantage and self.advantage.reward in self.heldout_rewards:
            raise ValueError(f"{self.advantage.reward} is both the training reward and held out; use another")
        return self

    def _sharable(self) -> None:
        """What networks in shards or adapters of one base cannot do."""
        if self.adapters:
            if self.adapters.base == "bfloat16" and self.precision != "bfloat16":
                raise ValueError("adapters.base bfloat16 computes in bfloat16; use precision: bfloat16")
            for key in ("shared_teacher", "implicit_alignment", "step_aware_fake"):
                if getattr(self, key):
                    raise ValueError(f"{key} needs a fake score with a network of its own; drop it or adapters")
        whole = self.parallel.strategy == "ddp" and self.parallel.context == 1
        if not whole and self.gan and self.gan.r1 and self.gan.r1_form == "exact":
            raise ValueError("gan.r1_form exact needs a second backward pass; use finite, or ddp without context")
        if self.compile and self.gan and self.gan.r1 and self.gan.r1_form == "exact":
            raise ValueError("gan.r1_form exact differentiates twice, which compiled blocks cannot; use finite")


Recipe = Annotated[
    VaeRecipe
    | VideoVaeRecipe
    | ClipRecipe
    | TextRecipe
    | RewardRecipe
    | LatentRewardRecipe
    | VideoRewardRecipe
    | LabellerRecipe
    | MotionRecipe
    | DiffusionRecipe
    | DistillRecipe,
    Field(discriminator="task"),
]
_RECIPE: TypeAdapter[Any] = TypeAdapter(Recipe)
_CLASSES: dict[str, type[Base]] = {
    "vae": VaeRecipe,
    "video-vae": VideoVaeRecipe,
    "clip": ClipRecipe,
    "text": TextRecipe,
    "reward": RewardRecipe,
    "latent-reward": LatentRewardRecipe,
    "video-reward": VideoRewardRecipe,
    "labeller": LabellerRecipe,
    "motion": MotionRecipe,
    "diffusion": DiffusionRecipe,
    "distill": DistillRecipe,
}


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Any:
    """Read a recipe and apply dotted overrides ``key.sub=value`` (values are YAML). Raises RecipeError."""
    file = Path(path)
    if not file.is_file():
        near = difflib.get_close_matches(file.stem, [p.stem for p in Path("recipes").glob("*.yaml")], n=1)
        hint = f"; did you mean recipes/{near[0]}.yaml?" if near else "; recipes/ holds ours"
        raise RecipeError(f"there is no recipe {str(path)!r}{hint}")
    try:
        tree = yaml.safe_load(file.read_text())
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not YAML: {error}") from None
    if not isinstance(tree, dict):
        raise RecipeError(f"{path} holds {type(tree).__name__}, not keys and values; see recipes/ for examples")
    for override in overrides or []:
        _apply(tree, override)
    return parse_recipe(tree, str(path))


def parse_recipe(tree: dict[str, Any], origin: str = "recipe") -> Any:
    """Validate a tree of plain values. Raises RecipeError with every fault, each on its own line."""
    try:
        return _RECIPE.validate_python(tree)
    except ValidationError as error:
        # Keys in the place of the word "digits" have their own faults, beside which "not digits" says nothing.
        faults = [f for f in error.errors() if f["type"] != "literal_error" or not isinstance(f["input"], dict)]
        lines = [_explain(fault) for fault in faults]
        raise RecipeError("\n".join(f"{origin}: {line}" for line in lines)) from None


def _apply(tree: dict[str, Any], override: str) -> None:
    key, found, value = override.partition("=")
    if not found or not key:
        raise RecipeError(f"override {override!r} is not key=value; for example iterations=200")
    parts = key.split(".")
    node = tree
    for part in parts[:-1]:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise RecipeError(f"override {key!r}: {part!r} holds a value, not keys")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        raise RecipeError(
            f"override {override!r}: {value!r} is no YAML value; an example: student.betas=[0,0.999]"
        ) from None
    if isinstance(parsed, str):
        with contextlib.suppress(ValueError):
            parsed = float(parsed)  # YAML reads 1e-5 as text
    node[parts[-1]] = parsed


def _explain(fault: Any) -> str:
    keys, holders, inner = _resolve(fault["loc"])
    where = ".".join(keys)
    if fault["type"] == "extra_forbidden":
        known = sorted({name for model in holders for name in model.model_fields})
        near = difflib.get_close_matches(keys[-1], known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(known)}"
        return f"{where} is unknown; {hint}"
    if fault["type"] in ("union_tag_not_found", "union_tag_invalid"):
        name = fault["ctx"]["discriminator"].strip("'")
        choices = [tag for model in inner for tag in _tags(model, name)] if keys else list(_CLASSES)
        value = fault["input"].get(name) if isinstance(fault["input"], dict) else None
        return f"{'.'.join([*keys, name])} is {value!r}; use one of {', '.join(choices)}"
    seen = "" if fault["type"] == "missing" or isinstance(fault["input"], dict) else f" (got {fault['input']!r})"
    return f"{where or 'recipe'}: {fault['msg'].removeprefix('Value error, ')}{seen}"


def _resolve(location: tuple[str | int, ...]) -> tuple[list[str], list[type[BaseModel]], list[type[BaseModel]]]:
    """The keys of a fault's location without the tags of unions, and the models that hold the last key and lie in it.

    The first element is the task; a key whose value is a union is followed by the tag of one of its members.
    """
    keys: list[str] = []
    holders: list[type[BaseModel]] = []
    inner: list[type[BaseModel]] = [_CLASSES[str(location[0])]] if location else []
    after_key = False
    for part in location[1:]:
        tagged = [model for model in inner if part in (model.__name__, *_tags(model, "family"))]
        if after_key and (tagged or str(part).startswith("literal[")):
            inner, after_key = tagged, False
            continue
        keys.append(str(part))
        holders, after_key = inner, True
        fields = [model.model_fields[str(part)] for model in holders if part in model.model_fields]
        inner = [model for field in fields for model in _models_of(field.annotation)]
    return keys, holders, inner


def _tags(model: type[BaseModel], name: str) -> tuple[str, ...]:
    """The values of the literal field ``name`` that tells a union's models apart."""
    field = model.model_fields.get(name)
    return get_args(field.annotation) if field else ()


def _models_of(annotation: Any) -> list[type[BaseModel]]:
    """The models that a field may hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models_of(argument)]
