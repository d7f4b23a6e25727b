"""What a request body means, and which ones are refused with which words."""

from __future__ import annotations

import json
from typing import Any

import pytest

from distill.bundle import Manifest, Sampler
from distill.sampling import ScaledLinear, student_table
from service.errors import ApiError
from service.schemas import ImageRequest, Plan, parse, plan, steps_of_quality
from service.settings import LARGEST_SEED, Settings


@pytest.fixture(scope="module")
def manifest() -> Manifest:
    schedule = ScaledLinear()
    return Manifest(
        name="toy",
        family="sdxl",
        task="text-to-image",
        prediction="epsilon",
        latent_channels=1,
        latent_stride=4,
        sizes=((64, 64), (96, 64)),
        max_tokens=16,
        samplers={n: Sampler.of(student_table(schedule, "epsilon", schedule.grid(n))) for n in (1, 2, 4, 8)},
        default_steps=2,
        preview=((0.0, 0.0, 0.0),) * 2,
    )


def planned(manifest: Manifest, **body: Any) -> Plan:
    return plan(parse(json.dumps({"prompt": "a red cube", **body}).encode(), ImageRequest), manifest, Settings())


def test_defaults(manifest: Manifest) -> None:
    result = planned(manifest)
    assert (result.steps, result.size, result.output_format, result.ignored) == (2, (64, 64), "png", ())
    assert len(result.seeds) == 1


def test_seed_is_drawn_anew_when_unset(manifest: Manifest) -> None:
    assert len({planned(manifest).seeds[0] for _ in range(8)}) > 1
    assert planned(manifest, seed=None).seeds != planned(manifest, seed=None).seeds


def test_each_picture_has_the_next_seed(manifest: Manifest) -> None:
    assert planned(manifest, seed=7, n=3).seeds == (7, 8, 9)
    assert planned(manifest, seed=LARGEST_SEED).seeds == (LARGEST_SEED,)


@pytest.mark.parametrize(
    ("quality", "steps"),
    [("auto", 2), ("low", 1), ("medium", 2), ("standard", 2), ("high", 4), ("hd", 4), ("xhigh", 8), ("max", 8)],
)
def test_quality_is_a_number_of_steps(manifest: Manifest, quality: str, steps: int) -> None:
    assert steps_of_quality(quality, manifest) == steps
    assert planned(manifest, quality=quality).steps == steps


def test_fields_without_effect_are_listed(manifest: Manifest) -> None:
    result = planned(manifest, user="me", style="vivid", steps=4, quality="hd", output_compression=50)
    assert set(result.ignored) == {"user", "style", "quality", "output_compression"}
    assert result.steps == 4
    assert planned(manifest, partial_images=2, progress=True).ignored == ("partial_images", "progress")
    assert planned(manifest, partial_images=2, progress=True, stream=True).ignored == ()
    assert planned(manifest, output_format="jpeg", output_compression=50).ignored == ()


def test_aliases_and_sizes(manifest: Manifest) -> None:
    assert planned(manifest, num_inference_steps=8).steps == 8
    assert planned(manifest, size="96x64").size == (96, 64)
    assert planned(manifest, prompt="  a cube \n").prompt == "a cube"


@pytest.mark.parametrize(
    ("body", "param", "code", "words"),
    [
        ({"prompt": ""}, "prompt", "invalid_value", "prompt is ''"),
        ({"prompt": " \n\t"}, "prompt", "invalid_value", "describe the picture"),
        ({"prompt": "x" * 2001}, "prompt", "prompt_too_long", "2001 characters; give at most 2000"),
        ({"prompt": 5}, "prompt", "invalid_value", "prompt is 5; give a text"),
        ({"prompt": ["a"]}, "prompt", "invalid_value", "give a text"),
        ({"prompt": None}, "prompt", "invalid_value", "prompt is None"),
        ({"prompt": "\ud800"}, "prompt", "invalid_value", "surrogate"),
        ({"sead": 1}, "sead", "unknown_parameter", "did you mean seed?"),
        ({"num_steps": 1}, "num_steps", "unknown_parameter", "did you mean steps?"),
        ({"zzz": 1}, "zzz", "unknown_parameter", "remove it"),
        ({"\ud800": 1}, "\\ud800", "unknown_parameter", "remove it"),
        ({"seed": -1}, "seed", "invalid_value", "seed is -1"),
        ({"seed": 2**53}, "seed", "invalid_value", "2**53 - 1"),
        ({"seed": 10**30}, "seed", "invalid_value", "2**53 - 1"),
        ({"seed": "7"}, "seed", "invalid_value", "seed is '7'"),
        ({"seed": 7.5}, "seed", "invalid_value", "seed is 7.5"),
        ({"seed": True}, "seed", "invalid_value", "seed is True"),
        ({"seed": LARGEST_SEED, "n": 2}, "seed", "invalid_value", "picture i uses seed + i"),
        ({"n": 0}, "n", "invalid_value", "n is 0"),
        ({"n": 5}, "n", "invalid_value", "from 1 to 4"),
        ({"n": -3}, "n", "invalid_value", "n is -3"),
        ({"n": 10**18}, "n", "invalid_value", "from 1 to 4"),
        ({"steps": 3}, "steps", "invalid_value", "steps is 3; toy takes 1, 2, 4, 8"),
        ({"steps": 0}, "steps", "invalid_value", "takes 1, 2, 4, 8"),
        ({"steps": 1, "num_inference_steps": 2}, "num_inference_steps", "invalid_value", "send one of them"),
        ({"size": "1024x1024"}, "size", "unsupported_size", "toy takes auto, 64x64, 96x64"),
        ({"size": "big"}, "size", "unsupported_size", "size is 'big'"),
        ({"size": "-64x64"}, "size", "unsupported_size", "takes auto"),
        ({"size": "99999999999x1"}, "size", "unsupported_size", "takes auto"),
        ({"size": 64}, "size", "invalid_value", "size is 64"),
        ({"quality": "best"}, "quality", "invalid_value", "quality is 'best'"),
        ({"output_format": "gif"}, "output_format", "invalid_value", "png, jpeg or webp"),
        ({"output_compression": 101}, "output_compression", "invalid_value", "from 0 to 100"),
        ({"stream": True, "n": 2}, "n", "unsupported_operation", "a stream carries one picture"),
        ({"priority": "urgent"}, "priority", "invalid_value", "high, normal or low"),
        ({"deadline_ms": 0}, "deadline_ms", "invalid_value", "deadline_ms is 0"),
        ({"partial_images": 4}, "partial_images", "invalid_value", "from 0 to 3"),
        ({"response_format": "url"}, "response_format", "unsupported_operation", "b64_json"),
        ({"background": "transparent"}, "background", "unsupported_operation", "opaque"),
    ],
)
def test_wrong_fields_are_named(manifest: Manifest, body: dict[str, Any], param: str, code: str, words: str) -> None:
    with pytest.raises(ApiError) as refused:
        planned(manifest, **body)
    error = refused.value
    assert (error.status, error.param, error.code) == (400, param, code)
    assert words in error.message
    error.response()


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "is not JSON"),
        (b'{"prompt": "a"', "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        (b'{"prompt": "a", "seed": NaN}', "NaN is not a JSON number"),
        (b'["a"]', "the body is a JSON list"),
        (b"null", "the body is a JSON NoneType"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"prompt": "a", "seed": ' + b"9" * 10_000 + b"}", "is not JSON"),
    ],
)
def test_bodies_that_are_no_object_are_refused(body: bytes, words: str) -> None:
    with pytest.raises(ApiError) as refused:
        parse(body, ImageRequest)
    assert (refused.value.status, refused.value.code) == (400, "invalid_json")
    assert words in refused.value.message


def test_a_missing_prompt_is_named() -> None:
    with pytest.raises(ApiError) as refused:
        parse(b"{}", ImageRequest)
    assert refused.value.body()["error"] == {
        "message": "prompt is missing; give a text",
        "type": "invalid_request_error",
        "param": "prompt",
        "code": "missing_required_parameter",
    }
