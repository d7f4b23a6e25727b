"""Settings come from LEAPFROG_* variables, and wrong ones are named."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.settings import REPOSITORY, Settings, SettingsError


def test_defaults_point_at_the_bundles_of_the_repository() -> None:
    settings = Settings.from_env({})
    assert settings.bundles == REPOSITORY / "bundles"
    assert settings.api_keys == ()
    assert settings.threads >= 1


def test_variables_are_typed() -> None:
    settings = Settings.from_env(
        {
            "LEAPFROG_BUNDLES": "/srv/b",
            "LEAPFROG_API_KEYS": " alpha, beta,",
            "LEAPFROG_MAX_BATCH": "4",
            "LEAPFROG_PRECISION": "auto",
        }
    )
    assert settings.bundles == Path("/srv/b")
    assert settings.api_keys == ("alpha", "beta")
    assert settings.max_batch == 4
    assert (settings.runtime, settings.precision) == ("auto", "auto")


def test_keys_do_not_show_in_logs() -> None:
    assert "alpha" not in repr(Settings.from_env({"LEAPFROG_API_KEYS": "alpha"}))


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"LEAPFROG_BUNDELS": "x"}, "LEAPFROG_BUNDELS is not a setting; did you mean LEAPFROG_BUNDLES?"),
        ({"LEAPFROG_API_KEY": "x"}, "did you mean LEAPFROG_API_KEYS?"),
        ({"LEAPFROG_MAX_BATCH": "many"}, "LEAPFROG_MAX_BATCH is 'many'"),
        (
            {"LEAPFROG_RUNTIME": "vulkan"},
            "LEAPFROG_RUNTIME is 'vulkan': "
            "input should be 'auto', 'onnx', 'openvino', 'tensorrt', 'torch' or 'fastest'",
        ),
        ({"LEAPFROG_MAX_N": "0"}, "LEAPFROG_MAX_N is '0'"),
        ({"LEAPFROG_MAX_N": "4", "LEAPFROG_MAX_QUEUE": "2"}, "max_n is 4 and max_queue 2"),
        ({"LEAPFROG_MAX_N": "4", "LEAPFROG_MAX_KEY_ROWS": "2"}, "max_n is 4 and max_key_rows 2"),
        ({"LEAPFROG_RESULT_CACHE_MB": "-1"}, "LEAPFROG_RESULT_CACHE_MB is '-1'"),
    ],
)
def test_wrong_variables_are_named(variables: dict[str, str], message: str) -> None:
    with pytest.raises(SettingsError) as refused:
        Settings.from_env(variables)
    assert message in str(refused.value)


def test_empty_and_foreign_variables_are_left_alone() -> None:
    assert Settings.from_env({"LEAPFROG_MAX_N": "", "LEAPFROG_SOMETHING_ELSE": "1", "HOME": "/"}) == Settings.from_env(
        {}
    )


def test_every_lane_needs_a_thread() -> None:
    assert Settings(threads=4).lanes_each == 4
    assert Settings(threads=4, lanes=1).lanes_each == 1
    with pytest.raises(SettingsError, match="lanes is 3 and there are 2 threads"):
        Settings.from_env({"LEAPFROG_THREADS": "2", "LEAPFROG_LANES": "3"})
