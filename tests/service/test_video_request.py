"""Requests for videos: JSON and forms mean the same, lengths become 4k + 1 frames, limits hold."""

from __future__ import annotations

import json
from typing import Any

import pytest

from distill.bundle import Manifest, Sampler
from distill.sampling import Flow, student_table
from service.errors import ApiError
from service.settings import Settings
from service.video_request import VideoPlan, parse, parse_form, plan

SCHEDULE = Flow(5.0)


@pytest.fixture
def manifest() -> Manifest:
    grids = {n: SCHEDULE.grid(n) for n in (1, 2, 4)}
    return Manifest(
        name="wan",
        family="wan",
        task="text-to-video",
        prediction="flow",
        latent_channels=1,
        latent_stride=8,
        sizes=((64, 64), (96, 64)),
        frames=(17,),
        frame_stride=4,
        fps=8.0,
        max_tokens=512,
        samplers={n: Sampler.of(student_table(SCHEDULE, "flow", grid)) for n, grid in grids.items()},
        default_steps=4,
        preview=((0.0, 0.0, 0.0), (0.0, 0.0, 0.0)),
    )


def planned(manifest: Manifest, **fields: Any) -> VideoPlan:
    body = json.dumps({"prompt": "a red cube", **fields}).encode()
    return plan(parse(body), manifest, Settings(max_frames=49))


def refused(manifest: Manifest, **fields: Any) -> ApiError:
    with pytest.raises(ApiError) as error:
        planned(manifest, **fields)
    assert error.value.status == 400
    return error.value


@pytest.mark.parametrize(
    ("asked", "frames", "seconds"),
    [
        ({}, 17, "2.125"),
        ({"num_frames": 17}, 17, "2.125"),
        ({"num_frames": 18}, 17, "2.125"),
        ({"num_frames": 19}, 21, "2.625"),
        ({"num_frames": 1}, 1, "0.125"),
        ({"num_frames": 48}, 49, "6.125"),
        ({"seconds": "4"}, 33, "4.125"),
        ({"seconds": 2}, 17, "2.125"),
        ({"seconds": 0.01}, 1, "0.125"),
        ({"seconds": 2, "fps": 16}, 33, "2.062"),
        ({"fps": 17}, 17, "1"),
        ({"seconds": 1, "num_frames": 17}, 17, "2.125"),
    ],
)
def test_lengths_become_frames_that_the_model_can_make(
    manifest: Manifest, asked: dict[str, Any], frames: int, seconds: str
) -> None:
    found = planned(manifest, **asked)
    assert (found.frames, found.seconds) == (frames, seconds)
    assert bool(found.warnings) == (frames != 17)
    assert found.ignored == (("seconds",) if len(asked) == 2 and "num_frames" in asked else ())


@pytest.mark.parametrize(
    ("asked", "param", "code"),
    [
        ({"num_frames": 50}, "num_frames", "cost_too_high"),
        ({"seconds": 1e300}, "seconds", "cost_too_high"),
        ({"seconds": "long"}, "seconds", "invalid_value"),
        ({"seconds": -1}, "seconds", "invalid_value"),
        ({"seconds": "nan"}, "seconds", "invalid_value"),
        ({"seconds": True}, "seconds", "invalid_value"),
        ({"num_frames": 0}, "num_frames", "invalid_value"),
        ({"fps": 0.5}, "fps", "invalid_value"),
        ({"fps": 61}, "fps", "invalid_value"),
        ({"size": "32x32"}, "size", "unsupported_size"),
        ({"steps": 3}, "steps", "invalid_value"),
        ({"prompt": "  "}, "prompt", "invalid_value"),
        ({"input_reference": "data:image/png;base64,"}, "input_reference", "unsupported_operation"),
        ({"output_format": "avi"}, "output_format", "invalid_value"),
        ({"frames": 17}, "frames", "unknown_parameter"),
        ({"num_inference_steps": 4, "steps": 4}, "num_inference_steps", "invalid_value"),
    ],
)
def test_wrong_requests_name_the_field(manifest: Manifest, asked: dict[str, Any], param: str, code: str) -> None:
    error = refused(manifest, **asked)
    assert (error.param, error.code) == (param, code)
    assert len(error.message) < 200


def test_a_form_means_what_the_same_json_means(manifest: Manifest) -> None:
    fields = {"seconds": "4", "seed": "7", "num_inference_steps": "2", "fps": "8", "cache": "false", "size": "64x64"}
    form = plan(parse_form({"prompt": "a red cube", **fields}), manifest, Settings(max_frames=49))
    typed = {"seconds": "4", "seed": 7, "steps": 2, "fps": 8, "cache": False, "size": "64x64"}
    assert form == planned(manifest, **typed)
    assert (form.seed, form.steps, form.cache) == (7, 2, False)
    for wrong in ({"seed": "seven"}, {"seed": "-1"}, {"cache": "perhaps"}, {"sead": "7"}):
        with pytest.raises(ApiError) as error:
            parse_form({"prompt": "a red cube", **wrong})
        assert error.value.param == next(iter(wrong))


def test_a_form_names_loras_in_json(manifest: Manifest) -> None:
    loras = [{"name": "ink", "scale": 0.5}, {"name": "oil"}]
    form = parse_form({"prompt": "a red cube", "seed": "7", "loras": json.dumps(loras)})
    assert form == parse(json.dumps({"prompt": "a red cube", "seed": 7, "loras": loras}).encode())
    assert plan(form, manifest, Settings()).loras == (("ink", 0.5), ("oil", 1.0))


@pytest.mark.parametrize(
    ("loras", "param"),
    [
        ("ink", "loras"),
        ('{"name": "ink"}', "loras"),
        ("[" * 100_000, "loras"),
        ('[{"name": "ink", "scale": NaN}]', "loras"),
        ('[{"name": "ink", "scale": "1"}]', "loras.0.scale"),
        ('[{"name": "ink", "scales": 1}]', "loras.0.scales"),
    ],
)
def test_loras_of_a_form_are_as_strict_as_those_of_json(loras: str, param: str) -> None:
    with pytest.raises(ApiError, match=r"give up to 4 of GET /v1/loras, such as .* which a form has as JSON") as error:
        parse_form({"prompt": "a red cube", "loras": loras})
    assert (error.value.param, error.value.status) == (param, 400)


def test_json_is_typed_strictly() -> None:
    with pytest.raises(ApiError) as error:
        parse(b'{"prompt": "a red cube", "seed": "7"}')
    assert error.value.param == "seed"
    assert parse(b'{"prompt": "a red cube", "seed": null, "fps": 8.0}').fps == 8.0


def test_a_plan_comes_back_from_the_store_as_it_was(manifest: Manifest) -> None:
    found = planned(manifest, num_frames=21, output_format="webm", user="me", deadline_ms=1500)
    assert VideoPlan.of(json.loads(json.dumps(found.kept()))) == found
    assert found.deadline_s == 1.5 and found.ignored == ("user",)


def test_a_seed_is_drawn_where_none_is_given(manifest: Manifest) -> None:
    assert planned(manifest).seed != planned(manifest).seed
