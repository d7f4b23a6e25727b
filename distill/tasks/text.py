"""The text encoder of the embedded video model: transformers' UMT5EncoderModel on captions of moving scenes.

    python -m distill.run recipes/scenes-umt5.yaml

A linear head that is thrown away later reads every fact of a caption, what moves and how included, from the state of
its end token. The output folder holds the encoder, and its tokenizer in tokenizer/.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel

from distill.config import TextRecipe
from distill.data.cache import HELD_OUT_SEED
from distill.data.captions import Caption, describe
from distill.data.tokenizer import build_t5_tokenizer
from distill.data.world import sample_scene
from distill.parallel.device import device, moved
from distill.tasks.common import autocast, batch_indices, save_half
from distill.tasks.facts import CLASSES, MOTION_CLASSES, FactsHead, caption_facts, caption_motions, facts_loss
from distill.trainer import Phase, Telemetry, seeded

FACTS = (*CLASSES, *MOTION_CLASSES)


class TextTask:
    """Cross-entropy over the facts of captions; scenes are drawn without end and never rendered."""

    def __init__(self, recipe: TextRecipe) -> None:
        self.recipe = recipe
        folder = Path(recipe.output) / "tokenizer"
        build_t5_tokenizer(folder, recipe.max_tokens)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        torch.manual_seed(recipe.seed)
        tower = recipe.tower
        config = UMT5Config(
            vocab_size=len(self.tokenizer),
            d_model=tower.width,
            d_kv=tower.width // tower.heads,
            d_ff=2 * tower.width,
            num_layers=tower.layers,
            num_heads=tower.heads,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=self.tokenizer.eos_token_id,
        )
        self.encoder = UMT5EncoderModel(config).train()
        self.head = FactsHead(tower.width, FACTS)
        self.roles: dict[str, nn.Module] = {
            "text": nn.ModuleDict({"encoder": self.encoder, "head": self.head}).to(device())
        }
        self.optimizers = {"text": recipe.optimizer}

    def phases(self, iteration: int) -> list[Phase]:
        return [Phase("text", lambda micro: self._loss(iteration, micro))]

    def _loss(self, iteration: int, micro: int) -> tuple[Tensor, Telemetry]:
        r = self.recipe
        index = batch_indices(r.seed, iteration, micro, r.batch_size // r.accumulate, r.data.count)
        rng = seeded(r.seed, iteration, micro, "captions")
        captions = [describe(sample_scene(r.data.seed, int(i), moving=True), rng) for i in index]
        loss, right = self._read(captions)
        return loss, {"facts": right}

    def _read(self, captions: list[Caption]) -> tuple[Tensor, Tensor]:
        """The loss, and the share of captions with every fact right."""
        tokens = self.tokenizer(
            [caption.text for caption in captions], padding=True, truncation=True, return_tensors="pt"
        )
        ids, mask = moved(tokens.input_ids, device()), moved(tokens.attention_mask, device())
        with autocast(self.recipe.precision):
            states = self.encoder(ids, mask).last_hidden_state
            logits = self.head(states[torch.arange(len(ids), device=ids.device), mask.sum(1) - 1])
        facts = [[*caption_facts(caption), *caption_motions(caption)] for caption in captions]
        return facts_loss(logits, moved(torch.tensor(facts), device()), FACTS)

    def preview(self) -> Tensor:
        """How far the states of 64 held-out captions are apart: one picture of their cosines, in gray."""
        scenes = [sample_scene(HELD_OUT_SEED, i, moving=True) for i in range(64)]
        texts = [describe(scene, seeded(self.recipe.seed, i, "preview")).text for i, scene in enumerate(scenes)]
        tokens = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(device())
        with torch.no_grad():
            states = self.encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
        ends = nn.functional.normalize(states[torch.arange(64), tokens.attention_mask.sum(1) - 1].float(), dim=-1)
        levels = ((ends @ ends.T) * 127.5 + 127.5).clamp(0, 255).to(torch.uint8)
        return levels.expand(1, 3, 64, 64)

    @torch.no_grad()
    def finish(self, output: Path) -> None:
        scenes = [sample_scene(HELD_OUT_SEED, i, moving=True) for i in range(512)]
        captions = [describe(scene, seeded(self.recipe.seed, i, "held-out")) for i, scene in enumerate(scenes)]
        print(
            f"every fact is read from {100 * float(self._read(captions)[1]):.1f} % of {len(captions)} held-out captions"
        )
        save_half(self.encoder, output)
