"""The cost model: measured curves, batch sizes that pay, and what is said of what was not measured."""

from __future__ import annotations

import pytest

from service.budget import PROBE_EVERY, PROBE_WIDE_EVERY, BatchKey, Budget

SIZES = (1, 2, 4, 8)
KEY = BatchKey("m", "onnx", (4, 16, 16))
LARGE = KEY._replace(shape=(4, 32, 32))


def budget_of(**step_ms: float) -> Budget:
    budget = Budget()
    budget.know(KEY, SIZES)
    for rows, milliseconds in step_ms.items():
        budget.observe(KEY, int(rows.removeprefix("b")), milliseconds / 1e3)
    return budget


@pytest.mark.parametrize(
    ("step_ms", "sizes"),
    [
        ({"b1": 10, "b2": 20, "b4": 40, "b8": 80}, (1,)),
        ({"b1": 10, "b2": 10, "b4": 20, "b8": 40}, (1, 2)),
        ({"b1": 22, "b2": 37.2, "b4": 66.8, "b8": 130.4}, (1, 2)),
        ({"b1": 10, "b2": 11, "b4": 12, "b8": 14}, SIZES),
        ({"b1": 10, "b2": 25, "b4": 12, "b8": 60}, (1, 2, 4)),
    ],
)
def test_batches_grow_only_as_far_as_it_pays(step_ms: dict[str, float], sizes: tuple[int, ...]) -> None:
    assert budget_of(**step_ms).sizes(KEY) == sizes


def test_measurements_move_the_curve_and_with_it_the_cap() -> None:
    budget = budget_of(b1=10, b2=11, b4=12, b8=14)
    for _ in range(100):
        budget.observe(KEY, 8, 0.2)
    assert budget.step_s(KEY, 8) == pytest.approx(0.2, rel=0.01)
    assert budget.sizes(KEY) == (1, 2, 4)
    assert budget.row_step_s(KEY) == pytest.approx(0.003)


def test_one_slow_call_does_not_decide() -> None:
    budget = budget_of(b1=10, b2=11, b4=12, b8=14)
    budget.observe(KEY, 8, 0.05)
    assert budget.sizes(KEY) == SIZES


def test_a_size_that_was_given_up_is_tried_again_now_and_then() -> None:
    budget = budget_of(b1=10, b2=20)
    tried = []
    for _ in range(2 * PROBE_EVERY):
        tried.append(budget.sizes(KEY)[-1])
        budget.observe(KEY, 1, 0.010)
    assert set(tried) == {1, 2}
    assert tried.count(2) == 2


def test_memory_that_ran_out_halves_the_cap_for_good() -> None:
    budget = budget_of(b1=10, b2=11, b4=12, b8=14)
    assert budget.halve(KEY, 8) == 4
    assert budget.sizes(KEY) == (1, 2, 4)
    assert budget.halve(KEY, 3) == 1
    assert budget.halve(KEY, 1) == 1
    assert budget.sizes(KEY) == (1,)


def test_unmeasured_sizes_and_shapes_are_estimated_in_proportion() -> None:
    budget = budget_of(b1=10, b4=20)
    assert budget.step_s(KEY, 8) == pytest.approx(0.040)
    assert budget.step_s(KEY, 2) == pytest.approx(0.020)
    budget.know(LARGE, SIZES)
    assert budget.step_s(LARGE, 1) == pytest.approx(0.040)
    assert budget.sizes(LARGE) == (1,)


def test_a_solo_picture_is_text_steps_and_decoding() -> None:
    budget = budget_of(b1=10)
    assert budget.solo_s(KEY, 4) == pytest.approx(0.050), "decoding is taken for a step until it is measured"
    budget.observe_text("m", 0.002)
    budget.observe_decode(KEY, 0.007)
    assert budget.solo_s(KEY, 4) == pytest.approx(0.049)
    assert budget.curve(KEY) == {1: pytest.approx(0.010)}


def test_the_decoder_of_an_unknown_shape_costs_in_proportion_to_its_latents() -> None:
    """A clip of a length that nobody asked for before."""
    budget = Budget()
    short, long = KEY._replace(shape=(4, 5, 16, 16)), KEY._replace(shape=(4, 10, 16, 16))
    for key in (short, long):
        budget.know(key, (1,))
    budget.observe(short, 1, 0.1)
    assert budget.decode_s(short) == 0.1, "as long as a step where nothing is known"
    budget.observe_decode(short, 0.3)
    assert budget.decode_s(long) == pytest.approx(0.6)
    budget.observe_decode(long, 0.5)
    assert budget.decode_s(long) == 0.5


def test_batches_shrink_at_once_when_memory_runs_out() -> None:
    budget = budget_of(b1=10, b2=11, b4=12, b8=14)
    assert budget.sizes(KEY) == SIZES
    assert budget.halve(KEY, 8) == 4
    assert budget.sizes(KEY) == (1, 2, 4)


def test_what_pays_for_an_unmeasured_size_follows_the_others() -> None:
    budget = budget_of(b1=10)
    budget.know(LARGE, SIZES)
    before = budget.row_step_s(LARGE)
    budget.observe(KEY, 1, 1.0)
    assert budget.row_step_s(LARGE) > before


def test_an_answer_comes_later_than_its_rows_by_what_others_took_outside_the_engine() -> None:
    budget = budget_of(b1=10)
    assert budget.expected_s("m", 1.0) == 1.0
    budget.observe_text("m", 0.5)
    for _ in range(100):
        budget.observe_answer("m", 0.25)
    assert budget.expected_s("m", 1.0) == pytest.approx(1.75)
    assert budget.expected_s("other", 1.0) == 1.0, "models do not share it"


def test_calls_in_lanes_and_on_all_cores_have_curves_of_their_own() -> None:
    budget = Budget()
    budget.know(KEY, SIZES, lanes=2)
    budget.know(LARGE, SIZES, lanes=2)
    assert budget.wide_s(KEY, 1) == float("inf"), "never measured"
    for rows, seconds in ((1, 0.010), (2, 0.012)):
        budget.observe(KEY, rows, seconds)
    budget.observe(KEY, 1, 0.006, wide=True)
    assert (budget.step_s(KEY, 1), budget.wide_s(KEY, 1)) == (0.010, 0.006)
    assert budget.wide_s(KEY, 2) == float("inf")
    assert budget.sizes(KEY) == (1, 2), "by the rates of lanes"
    assert budget.row_step_s(KEY) == pytest.approx(0.012 / 2 / 2), "two rows in each of two lanes"
    budget.observe_decode(KEY, 0.004)
    assert budget.row_s(KEY, 4) == pytest.approx(4 * 0.003 + 0.002)
    assert budget.solo_s(KEY, 4) == pytest.approx(4 * 0.006 + 0.004), "alone it has all cores"
    assert budget.wide_s(LARGE, 1) == pytest.approx(0.024), "four times the latents, as much faster as the known shape"


def test_without_lanes_no_call_is_wide() -> None:
    budget = budget_of(b1=10)
    assert (budget.lanes(KEY), budget.wide_s(KEY, 1)) == (1, float("inf"))


def test_all_cores_are_tried_again_after_a_bad_moment() -> None:
    budget = Budget()
    budget.know(KEY, SIZES, lanes=2)
    budget.observe(KEY, 1, 0.010)
    assert not any(_lone_calls(budget, 20)), "never measured"
    budget.observe(KEY, 1, 0.030, wide=True)
    wide = _lone_calls(budget, 40 * PROBE_WIDE_EVERY)
    assert sum(wide[: 4 * PROBE_WIDE_EVERY]) == 4, "one call in so many"
    assert all(wide[-PROBE_WIDE_EVERY:]), "they take 0.006 s now"


def _lone_calls(budget: Budget, count: int) -> list[bool]:
    """Which of so many calls of one row were wide."""
    chosen = []
    for _ in range(count):
        chosen.append(budget.wide_pays(KEY, 1))
        budget.observe(KEY, 1, 0.006 if chosen[-1] else 0.010, wide=chosen[-1])
    return chosen
