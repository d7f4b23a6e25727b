"""Train from a recipe.

python -m distill.run recipes/digits-teacher.yaml                      # minutes on two cores
python -m distill.run recipes/scenes-amd.yaml student.learning_rate=1e-5 --resume
python -m distill.run recipes/sdxl-amd-4step.yaml --dry-run            # the resolved recipe and what it will need
python -m distill.run recipes/sdxl-amd-4step.yaml --shrink iterations=2   # a rehearsal with tiny networks
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import yaml

from distill.config import FileData, RecipeError, load_recipe
from distill.data.prompts import check_files
from distill.hub import is_hub_id
from distill.provenance import provenance
from distill.reward_names import KINDS, parse_reward

TASKS = {
    "vae": "distill.tasks.vae:VaeTask",
    "video-vae": "distill.tasks.video_vae:VideoVaeTask",
    "clip": "distill.tasks.clip:ClipTask",
    "text": "distill.tasks.text:TextTask",
    "reward": "distill.tasks.reward:reward_task",
    "latent-reward": "distill.tasks.latent_reward:LatentRewardTask",
    "video-reward": "distill.tasks.video_reward:VideoRewardTask",
    "labeller": "distill.tasks.labeller:LabellerTask",
    "motion": "distill.tasks.motion:MotionTask",
    "diffusion": "distill.tasks.diffusion:DiffusionTask",
    "distill": "distill.tasks.distillation:DistillationTask",
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m distill.run",
        description="Train a model from a recipe: autoencoders, rewards, teachers and few-step students alike.",
        formatter_class=argparse.RawDescriptionHelpFormatter,  # keeps the example on one line
        epilog="example: python -m distill.run recipes/digits-teacher.yaml iterations=500 seed=1",
    )
    parser.add_argument("recipe", help="a YAML file, such as recipes/scenes-amd.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides, such as student.clip=1")
    parser.add_argument(
        "--resume", action="store_true", help="continue from this run's newest checkpoint, if there is one"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved recipe and, of a distillation, what it will need"
    )
    parser.add_argument(
        "--assume", default="", metavar="KEY=VALUE,…", help="for --dry-run: gpus, tflops, mfu, gib, dollars"
    )
    parser.add_argument(
        "--shrink",
        action="store_true",
        help="rehearse the recipe: tiny random networks, few data, and all that it reads made small beside the run",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    options = parser.parse_intermixed_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    try:
        recipe = load_recipe(options.recipe, options.overrides)
        if options.shrink:
            recipe = _shrunk(recipe, options)
        if options.dry_run:
            return _dry_run(recipe, options.assume)
        _check_inputs(recipe)
        return train(recipe, resume=options.resume, quiet=options.quiet)
    except RecipeError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; what was saved is in checkpoints, if anything: --resume goes on with it", file=sys.stderr)
        return 130


def _dry_run(recipe: Any, assume: str) -> int:
    """Print the resolved recipe as YAML and, as its comments, what a distillation will need."""
    print(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True), end="")
    if recipe.task == "distill":
        from distill.dryrun import Machine, plan, table

        for line in table(plan(recipe, Machine.parse(assume))):
            print(f"# {line}".rstrip())
    return 0


def _shrunk(recipe: Any, options: argparse.Namespace) -> Any:
    """The recipe on tiny networks; what it reads lies beside its run."""
    from distill.shrink import shrunk

    folder, beside = run_folder(f"{recipe.name}-shrunk") / "inputs", Path(options.recipe).parent
    return shrunk(recipe, folder, beside, write=not options.dry_run, overrides=options.overrides)


def run_folder(name: str) -> Path:
    """Where a run keeps its logs and checkpoints."""
    return Path(os.environ.get("LEAPFROG_RUNS", "runs")) / name


def train(recipe: Any, *, resume: bool = False, quiet: bool = False) -> int:
    """Run a recipe to its end. Returns 0 when complete, 1 when training failed, 130 when it was interrupted."""
    from distill.bundle import BundleError
    from distill.rewards.weights import WeightsError
    from distill.trainer import Trainer, TrainingError

    folder = run_folder(recipe.name)
    module, _, name = TASKS[recipe.task].partition(":")
    try:
        trainer = Trainer(getattr(importlib.import_module(module), name)(recipe), folder, quiet=quiet)
        leader = trainer.world.leader
        begun = any(p.suffix != ".tmp" for p in (folder / "checkpoints").glob("step-*"))
        if begun and not resume:
            raise TrainingError(f"{folder} holds checkpoints of an earlier run; add --resume, or delete the folder")
        if begun:
            _say(f"resuming {recipe.name} at iteration {trainer.resume()}", leader)
        if leader:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))
            (folder / "provenance.json").write_text(json.dumps(provenance(recipe), indent=1))
        complete = trainer.run()
    except (TrainingError, RecipeError, BundleError, WeightsError) as error:
        print(error, file=sys.stderr)
        return 1
    if not complete:
        return 130
    _say(f"wrote {recipe.output} (logs, previews and checkpoints in {folder})", leader)
    return 0


def _say(line: str, leader: bool) -> None:
    """Several ranks say a thing once."""
    if leader:
        print(line)


def _check_inputs(recipe: Any) -> None:
    """What a recipe reads and where it writes must exist before any work; what the hub has is asked for later."""
    for key, value in _inputs(recipe):
        if not Path(value).is_dir() and not (key == "teacher" and is_hub_id(value)):
            raise RecipeError(
                f"{key}: there is no folder {value!r}; train it first (recipes/ has one recipe per folder)"
            )
    for key, value in _rewards(recipe):
        try:
            kind, source = parse_reward(value)
        except ValueError as error:
            raise RecipeError(f"{key}: {error}") from None
        if source and not Path(source).exists() and not (kind and is_hub_id(source)):
            raise RecipeError(
                f"{key}: there is no folder {source!r}; train it first (recipes/ has one recipe per folder), or name "
                f"a published reward: {', '.join(KINDS)}"
            )
    data = getattr(recipe, "data", None)
    if isinstance(data, FileData):
        check_files(data)
    for key, folder in (("output", Path(recipe.output)), ("LEAPFROG_RUNS", run_folder(recipe.name))):
        _check_writable(key, folder.absolute())


def _check_writable(key: str, folder: Path) -> None:
    """What is written at a run's end must have a place at its beginning."""
    there = next(place for place in (folder, *folder.parents) if place.exists())
    if not there.is_dir():
        raise RecipeError(f"{key}: {there} is a file; name another folder")
    if not os.access(there, os.W_OK):
        raise RecipeError(f"{key}: {there} cannot be written to by this user; name another folder")


def _inputs(recipe: Any) -> list[tuple[str, str]]:
    owners = ((recipe, ""), (getattr(recipe, "model", None), "model."))
    found = []
    for owner, prefix in owners:
        for key in ("clip", "teacher", "vae", "text_encoder", "text_encoder_2"):
            value = getattr(owner, key, None)
            if isinstance(value, str):
                found.append((prefix + key, value))
    return found


def _rewards(recipe: Any) -> list[tuple[str, str]]:
    advantage = getattr(recipe, "advantage", None)
    trained = [("advantage.reward", advantage.reward)] if advantage else []
    return trained + [("heldout_rewards", name) for name in getattr(recipe, "heldout_rewards", ())]


if __name__ == "__main__":
    sys.exit(main())
