"""Pictures of folders, tars and Parquet: the same files give the same pictures and conditions through each."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from distill.data.errors import DataError
from distill.data.pictures import cut, decode, open_pictures

CAPTIONS = ["a red cube", "a green ball", "a blue cylinder"]


def encoded(seed: int, size: tuple[int, int] = (40, 24), mode: str = "RGB", kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], len(mode))).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def fill(folder: Path, names: list[str]) -> None:
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encoded(seed, kind="JPEG" if name.endswith("jpg") else "PNG"))


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


# --- folders -------------------------------------------------------------------------------------------------------


def test_captions_lie_beside_pictures(tmp_path: Path) -> None:
    fill(tmp_path, ["b.png", "a.jpg", "more/c.png"])
    for name, caption in zip(("a", "b", "more/c"), CAPTIONS, strict=True):
        (tmp_path / f"{name}.txt").write_text(caption + "\n")
    source = open_pictures(str(tmp_path))
    assert [source.condition(i) for i in range(len(source))] == CAPTIONS
    assert source.read(1) == encoded(0) and source.name(2).endswith("more/c.png")
    (tmp_path / "b.txt").unlink()
    with pytest.raises(DataError, match=r"b\.png has no caption beside it; write b\.txt"):
        open_pictures(str(tmp_path))


def test_captions_are_listed_as_on_the_hub(tmp_path: Path) -> None:
    fill(tmp_path, ["x/1.png", "2.png"])
    lines = [{"file_name": "x/1.png", "text": "one"}, {"file_name": "2.png", "text": "two"}]
    listing = tmp_path / "metadata.jsonl"
    listing.write_text("\n".join(map(json.dumps, lines)) + "\n")
    source = open_pictures(str(tmp_path), "text")
    assert [source.condition(i) for i in range(2)] == ["two", "one"]
    with pytest.raises(DataError, match=r"metadata\.jsonl:1 is no object with 'file_name' and 'caption'"):
        open_pictures(str(tmp_path))
    listing.write_text(json.dumps(lines[0]) + "\n")
    with pytest.raises(DataError, match=r"2\.png is not in .*metadata\.jsonl"):
        open_pictures(str(tmp_path), "text")


def test_subfolders_are_classes(tmp_path: Path) -> None:
    fill(tmp_path, ["n02/b.png", "n01/x.png", "n02/a.png"])
    source = open_pictures(str(tmp_path))
    assert [source.condition(i) for i in range(3)] == [0, 1, 1]
    fill(tmp_path, ["stray.png"])
    with pytest.raises(DataError, match=r"stray\.png has neither a caption nor a class"):
        open_pictures(str(tmp_path))


def test_a_folder_without_pictures_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no pictures"):
        open_pictures(str(tmp_path))


# --- tars ----------------------------------------------------------------------------------------------------------


def test_tars_give_captions_labels_and_json(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "0.tar",
        {"0001.png": encoded(1), "0001.txt": b" a red cube\n", "sub/0001.jpg": encoded(2), "sub/0001.cls": b"7"},
    )
    write_tar(
        tmp_path / "1.tar",
        {"a.b.json": b'{"caption": "a ball"}', "a.b.png": b"", "x.json": b'{"caption": "a ball"}', "x.png": encoded(3)},
    )
    source = open_pictures(str(tmp_path / "*.tar"))
    assert [source.condition(i) for i in range(len(source))] == ["a red cube", 7, "a ball"]
    assert [source.read(i) for i in range(3)] == [encoded(1), encoded(2), encoded(3)]
    assert source.name(2).endswith("1.tar: x.png")


def test_tars_that_are_not_whole_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    write_tar(path, {"1.png": encoded(1)})
    with pytest.raises(DataError, match=r"1\.png has no caption; add 1\.txt, \.cls or \.json"):
        open_pictures(str(path))
    write_tar(path, {"1.txt": b"x"})
    with pytest.raises(DataError, match="holds no pictures"):
        open_pictures(str(path))
    write_tar(path, {"1.txt": b"x", "1.png": encoded(1, (200, 100))})
    path.write_bytes(path.read_bytes()[:6000])
    with pytest.raises(DataError, match=r"is cut off within 1\.png|cannot be read as a tar"):
        open_pictures(str(path))
    path.write_bytes(b"no tar at all" * 100)
    with pytest.raises(DataError, match="cannot be read as a tar"):
        open_pictures(str(path))


def test_json_without_the_caption_is_told(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"1.json": b'{"text": "x"}', "1.png": encoded(1)})
    with pytest.raises(DataError, match=r"1\.json gives no label, and no text under 'caption'; name the caption's key"):
        open_pictures(str(tmp_path / "a.tar")).condition(0)
    assert open_pictures(str(tmp_path / "a.tar"), "text").condition(0) == "x"


# --- Parquet -------------------------------------------------------------------------------------------------------


def test_parquet_gives_pictures_of_every_row_group(tmp_path: Path) -> None:
    for part in range(2):
        rows = [{"bytes": encoded(5 * part + i), "path": None} for i in range(5)]
        table = pyarrow.table({"image": rows, "caption": [f"{part}-{i}" for i in range(5)]})
        pyarrow.parquet.write_table(table, tmp_path / f"{part}.parquet", row_group_size=2)
    source = open_pictures(str(tmp_path / "*.parquet"))
    assert len(source) == 10
    for index in (9, 0, 4, 5, 3):
        assert source.read(index) == encoded(index) and source.condition(index) == f"{index // 5}-{index % 5}"


def test_parquet_pictures_without_pyarrow_name_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"pip install 'leapfrog\[parquet\]'"):
        open_pictures(str(tmp_path / "*.parquet"))


def test_kinds_of_files_are_not_mixed(tmp_path: Path) -> None:
    for name in ("a.tar", "a.parquet"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError, match="matches tars and Parquet files alike; narrow the pattern"):
        open_pictures(str(tmp_path / "*"))


# --- decoding ------------------------------------------------------------------------------------------------------


def one(tmp_path: Path, data: bytes) -> Image.Image:
    (tmp_path / "c").mkdir(exist_ok=True)
    (tmp_path / "c/1.png").write_bytes(data)
    return decode(open_pictures(str(tmp_path)), 0)


def test_pictures_are_cut_from_the_middle_of_the_shorter_side(tmp_path: Path) -> None:
    image = Image.new("RGB", (90, 30), "red")
    image.paste("blue", (30, 0, 60, 30))
    assert np.array_equal(cut(image, (30, 30)), np.array(image.crop((30, 0, 60, 30))).transpose(2, 0, 1))
    wide = cut(image, (60, 20))
    assert wide.shape == (3, 20, 60) and wide.dtype == np.uint8 and wide.flags.c_contiguous
    assert cut(image, (20, 60)).shape == (3, 60, 20)
    half = np.array(image.resize((45, 15), Image.Resampling.LANCZOS).crop((15, 0, 30, 15)))
    assert np.array_equal(cut(image, (15, 15)), half.transpose(2, 0, 1))


def test_transparency_is_white_and_gray_is_rgb(tmp_path: Path) -> None:
    clear = np.array(one(tmp_path, _saved(Image.new("RGBA", (4, 4), (255, 0, 0, 0)))))
    assert clear.shape == (4, 4, 3) and (clear == 255).all()
    assert np.array(one(tmp_path, _saved(Image.new("L", (4, 4), 77)))).tolist()[0][0] == [77, 77, 77]


def test_broken_pictures_are_named(tmp_path: Path) -> None:
    for data in (b"", b"no picture", encoded(1)[:200]):
        with pytest.raises(DataError, match=r"c/1\.png cannot be read as a picture .*; remove or repair it"):
            one(tmp_path, data)


def _saved(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()
