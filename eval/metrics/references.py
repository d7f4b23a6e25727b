"""What distances compare with: pictures of the truth, as features of an extractor."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from eval import judges
from eval.errors import EvalError
from eval.metrics.extractors import Extractor
from eval.prompts import EVALUATION_SEEDS


class Truth(Protocol):
    """A set of pictures that samples should be like."""

    @property
    def protocol(self) -> dict[str, Any]:
        """What must be equal for two scores against it to be compared."""
        ...

    def features(self, extractor: Extractor, size: int) -> NDArray[np.float64]:
        """(count, D). size: of the samples; a reference that can be made at any size is made at that one."""
        ...


class Reference:
    """Held-out renders of scenes: never a training stream. Features are kept on disk by extractor and size."""

    def __init__(self, seed: int, count: int) -> None:
        if seed not in EVALUATION_SEEDS:
            raise EvalError(
                f"reference_seed is {seed}, which may be a training stream; use one from {EVALUATION_SEEDS}"
            )
        self.seed, self.count = seed, count

    @property
    def protocol(self) -> dict[str, Any]:
        from distill.data.cache import WORLD_VERSION

        return {"world": "scenes", "version": WORLD_VERSION, "seed": self.seed, "count": self.count}

    def features(self, extractor: Extractor, size: int) -> NDArray[np.float64]:
        """(count, D) features of renders at size × size."""
        from distill.data.cache import WORLD_VERSION, cached_array, scene_images

        images = scene_images(self.seed, self.count, size)
        width = extractor(images[:1]).shape[1]
        name = f"features-scenes-{self.seed}-{self.count}-{size}-v{WORLD_VERSION}-{extractor.digest[:16]}"
        found = cached_array(name, (self.count, width), np.float32, lambda a, b: extractor(images[a:b]))
        return np.asarray(found, dtype=np.float64)


class ClipReference:
    """Held-out true clips of moving scenes: never a training stream. Features are kept on disk as those of stills."""

    def __init__(self, seed: int, count: int, frames: int) -> None:
        if seed not in EVALUATION_SEEDS:
            raise EvalError(
                f"reference_seed is {seed}, which may be a training stream; use one from {EVALUATION_SEEDS}"
            )
        self.seed, self.count, self.frames = seed, count, frames

    @property
    def protocol(self) -> dict[str, Any]:
        from distill.data.cache import CLIP_VERSION

        shown = {"seed": self.seed, "count": self.count, "frames": self.frames}
        return {"world": "moving-scenes", "version": CLIP_VERSION, **shown}

    def clips(self, size: int, start: int, stop: int) -> NDArray[np.uint8]:
        """(stop − start, F, 3, size, size); all of them are rendered once and kept."""
        from distill.data.cache import scene_clips

        found = scene_clips(self.seed, self.count, self.frames, size)[start:stop]
        return np.ascontiguousarray(found.transpose(0, 2, 1, 3, 4))

    def features(self, extractor: Extractor, size: int) -> NDArray[np.float64]:
        """(count, D) features of clips of size × size."""
        from distill.data.cache import CLIP_VERSION, cached_array

        width = extractor(self.clips(size, 0, 1)).shape[1]
        shape = f"{self.seed}-{self.count}-{self.frames}-{size}"
        name = f"features-clips-{shape}-v{CLIP_VERSION}-{extractor.digest[:16]}"
        found = cached_array(name, (self.count, width), np.float32, lambda a, b: extractor(self.clips(size, a, b)))
        return np.asarray(found, dtype=np.float64)


class DigitsReference:
    """All 1,797 scans of the digits, which is what their generators learn: too few to keep some of them out."""

    protocol: ClassVar[dict[str, Any]] = {"world": "digits", "count": 1797}

    def features(self, extractor: Extractor, size: int) -> NDArray[np.float64]:
        """(1797, D) features; the extractor of digits has refused any other size."""
        from distill.data.digits import load_digits
        from eval.metrics.digits import as_pictures

        return extractor(as_pictures(load_digits("all")[0])).astype(np.float64)


class FolderReference:
    """Pictures of a folder, of any sizes and in subfolders too, such as COCO's. Features are kept on disk."""

    def __init__(self, folder: Path) -> None:
        self.files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
        if len(self.files) < 2:
            raise EvalError(f"{folder} holds {len(self.files)} pictures; give the folder of the reference's")
        self._digest = judges.digest(folder)

    @property
    def protocol(self) -> dict[str, Any]:
        return {"pictures": self._digest, "count": len(self.files)}

    def features(self, extractor: Extractor, size: int) -> NDArray[np.float64]:
        """(count, D); every picture enters at its own size, whatever the size of the samples."""
        from distill.data.cache import cached_array

        width = extractor(_picture(self.files[0])).shape[1]

        def fill(start: int, stop: int) -> NDArray[np.float32]:
            return np.concatenate([extractor(_picture(file)) for file in self.files[start:stop]])

        name = f"features-folder-{self._digest[:16]}-{extractor.digest[:16]}"
        found = cached_array(name, (len(self.files), width), np.float32, fill)
        return np.asarray(found, dtype=np.float64)


def _picture(file: Path) -> NDArray[np.uint8]:
    """(1, 3, H, W) uint8."""
    try:
        with Image.open(file) as opened:
            return np.asarray(opened.convert("RGB")).transpose(2, 0, 1)[None].copy()
    except OSError as error:
        raise EvalError(f"{file} is no picture ({error}); remove it from the reference") from None
