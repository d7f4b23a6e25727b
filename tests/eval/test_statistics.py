"""Intervals against closed forms, and their coverage by simulation."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest

from eval.statistics import (
    bootstrap_mean,
    cluster_means,
    clustered_se,
    frechet_influence,
    holm,
    influence_difference,
    kernel_terms,
    paired_difference,
    rank_sum_p,
    root,
    sign_flip_p,
    wilson,
)


def frechet(mean_a: np.ndarray, cov_a: np.ndarray, mean_b: np.ndarray, cov_b: np.ndarray) -> float:
    """|μa − μb|² + tr(Σa + Σb − 2(Σb^½ Σa Σb^½)^½), written independently of what is tested."""
    s = root(cov_b)
    cross = np.sqrt(np.linalg.eigvalsh(s @ cov_a @ s).clip(min=0)).sum()
    return float(np.sum((mean_a - mean_b) ** 2) + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


def test_wilson_equals_published_values() -> None:
    # Newcombe (1998), table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29.
    for successes, n, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)):
        interval = wilson(successes, n)
        assert (interval.low, interval.high) == pytest.approx((low, high), abs=5e-5)
    assert (wilson(1, 29).low, wilson(1, 29).high) == pytest.approx((0.0061, 0.1718), abs=5e-5)


def test_wilson_mirrors_and_refuses_nonsense() -> None:
    a, b = wilson(3, 40), wilson(37, 40)
    assert (a.low, a.high) == pytest.approx((1 - b.high, 1 - b.low))
    assert wilson(40, 40).high == 1.0
    with pytest.raises(ValueError, match="5 successes of 4"):
        wilson(5, 4)
    with pytest.raises(ValueError, match="0 trials"):
        wilson(0, 0)


def test_bootstrap_agrees_with_student_on_normal_data() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.0, 40)
    interval = bootstrap_mean(values)
    t_975 = 2.0227  # 39 degrees of freedom
    se = values.std(ddof=1) / math.sqrt(40)
    assert interval.se == pytest.approx(se)
    assert interval.low == pytest.approx(values.mean() - t_975 * se, abs=0.12 * t_975 * se)
    assert interval.high == pytest.approx(values.mean() + t_975 * se, abs=0.12 * t_975 * se)


def test_bootstrap_over_clusters_covers_and_a_naive_one_does_not() -> None:
    rng = np.random.default_rng(2)
    prompts, seeds, trials = 40, 5, 200
    clusters = np.repeat(np.arange(prompts), seeds)
    covered = naive = 0
    for _ in range(trials):
        values = rng.normal(size=prompts)[clusters] * math.sqrt(0.6) + rng.normal(size=len(clusters)) * math.sqrt(0.4)
        clustered, plain = bootstrap_mean(values, clusters.tolist()), bootstrap_mean(values)
        covered += clustered.low <= 0 <= clustered.high
        naive += plain.low <= 0 <= plain.high
    assert 0.90 <= covered / trials <= 0.99
    assert naive / trials < 0.85


def test_bootstrap_is_seeded_and_handles_extremes() -> None:
    values = np.random.default_rng(3).normal(size=50)
    assert bootstrap_mean(values) == bootstrap_mean(values)
    constant = bootstrap_mean(np.full(5, 2.5))
    assert (constant.value, constant.low, constant.high, constant.se) == (2.5, 2.5, 2.5, 0.0)
    assert math.isnan(bootstrap_mean(np.array([1.0])).low)
    with pytest.raises(ValueError, match="no values"):
        bootstrap_mean(np.array([]))


def test_cluster_means_average_within_prompts_first() -> None:
    assert cluster_means(np.array([1.0, 3.0, 10.0]), ["a", "a", "b"]).tolist() == [2.0, 10.0]
    with pytest.raises(ValueError, match="one cluster per value"):
        cluster_means(np.array([1.0]), ["a", "b"])


def test_paired_difference_uses_shared_pairs_only() -> None:
    rng = np.random.default_rng(4)
    base = {(f"p{i}", 0): float(v) for i, v in enumerate(rng.normal(0, 10, 60))}
    better = {key: value + 1 + float(rng.normal(0, 0.5)) for key, value in base.items()}
    better["alone", 0] = 1e6
    found = paired_difference(better, base)
    assert found.pairs == 60
    assert found.interval.low > 0.8 and found.interval.high < 1.2
    assert found.p < 0.001
    swapped = paired_difference(base, better)
    assert swapped.interval.value == pytest.approx(-found.interval.value)
    with pytest.raises(ValueError, match="share no"):
        paired_difference({("a", 0): 1.0}, {("a", 1): 1.0})


def test_sign_flip_is_exact_for_few_and_uniform_under_the_null() -> None:
    assert sign_flip_p(np.array([1.0, 1.0, 1.0])) == pytest.approx(2 / 8)
    rng = np.random.default_rng(5)
    p = np.array([sign_flip_p(rng.normal(size=10)) for _ in range(400)])
    assert np.mean(p <= 0.05) == pytest.approx(0.05, abs=0.035)
    assert np.mean(p <= 0.5) == pytest.approx(0.5, abs=0.08)


def test_sign_flip_by_its_three_ways_agrees_and_zeros_say_nothing() -> None:
    rng = np.random.default_rng(6)
    few = rng.normal(0.3, 1.0, 12)
    listed = sign_flip_p(few, "above")
    assert sign_flip_p(np.concatenate([few, np.zeros(50)]), "above") == listed
    assert sign_flip_p(-few, "below") == listed and sign_flip_p(few) == pytest.approx(2 * listed)
    normal = NormalDist().cdf(-few.sum() / math.sqrt(np.square(few).sum()))
    assert listed == pytest.approx(normal, rel=0.25)
    assert sign_flip_p(np.repeat([1.0, -1.0], [11, 2]), "above") == pytest.approx((78 + 13 + 1) / 2**13)
    many = np.repeat([2.0, -2.0], [60, 41])  # 101 equal ones: the normal limit of the binomial
    exact = sum(math.comb(101, k) for k in range(60, 102)) / 2**101
    assert sign_flip_p(many, "above") == pytest.approx(exact, rel=0.3)
    assert sign_flip_p(np.zeros(5)) == 1.0


def test_holm_equals_its_published_example_and_is_monotone() -> None:
    # Holm's procedure on 0.01, 0.04, 0.03, 0.005: 4·0.005, 3·0.01, 2·0.03, then never smaller.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == [] and holm([0.5]) == [0.5] and holm([0.9, 0.8]) == [1.0, 1.0]


def test_rank_sum_equals_scipy_and_ignores_monotone_changes() -> None:
    from scipy.stats import mannwhitneyu

    rng = np.random.default_rng(7)
    a, b = rng.normal(0.4, 1, 25).round(1), rng.normal(0, 1, 30).round(1)  # rounded, so that there are ties
    expected = mannwhitneyu(a, b, alternative="greater", method="asymptotic").pvalue
    assert rank_sum_p(a, b) == pytest.approx(expected, rel=1e-9)
    assert rank_sum_p(np.exp(a), np.exp(b)) == rank_sum_p(a, b)
    assert rank_sum_p(np.ones(5), np.ones(6)) == 1.0
    with pytest.raises(ValueError, match="0 and 1 values"):
        rank_sum_p(np.array([]), np.array([1.0]))


def test_clustered_se_equals_closed_forms() -> None:
    values = np.random.default_rng(6).normal(size=200)
    assert clustered_se(values, range(200)) == pytest.approx(values.std(ddof=1) / math.sqrt(200))
    means = values.reshape(50, 4).mean(axis=1)
    clusters = np.repeat(np.arange(50), 4).tolist()
    assert clustered_se(values, clusters) == pytest.approx(means.std(ddof=1) / math.sqrt(50))


def test_frechet_influence_sums_to_zero_and_is_the_derivative() -> None:
    rng = np.random.default_rng(7)
    n, d = 400, 5
    features = rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + 0.3
    mean, cov = rng.normal(size=d), np.diag(rng.uniform(0.5, 2.0, d))
    influence = frechet_influence(features, mean, cov)
    assert influence.sum() == pytest.approx(0, abs=1e-8 * n)
    eps = 1e-6
    for i in (0, 17, 399):
        weights = np.full(n, (1 - eps) / n)
        weights[i] += eps
        mu = weights @ features
        sigma = (features - mu).T @ ((features - mu) * weights[:, None])
        base = np.full(n, 1 / n) @ features
        plain = (features - base).T @ (features - base) / n
        slope = (frechet(mu, sigma, mean, cov) - frechet(base, plain, mean, cov)) / eps
        assert influence[i] == pytest.approx(slope, rel=0.02, abs=0.05)


def test_frechet_influence_finds_planted_outliers() -> None:
    rng = np.random.default_rng(8)
    features = rng.normal(size=(500, 6))
    features[:20] += 4.0
    influence = frechet_influence(features, np.zeros(6), np.eye(6))
    assert set(np.argsort(-influence)[:20]) == set(range(20))


def test_interval_of_the_frechet_distance_covers() -> None:
    """Distance of N(m, I) samples to N(0, I): the bias at n = 800, d = 3 is far below the standard error."""
    rng = np.random.default_rng(9)
    shift, trials, covered, z = np.array([0.5, 0.0, 0.0]), 200, 0, NormalDist().inv_cdf(0.975)
    for _ in range(trials):
        features = rng.normal(size=(800, 3)) + shift
        value = frechet(features.mean(axis=0), np.cov(features.T), np.zeros(3), np.eye(3))
        se = clustered_se(frechet_influence(features, np.zeros(3), np.eye(3)), range(800))
        covered += abs(value - 0.25) <= z * se
    assert 0.90 <= covered / trials <= 0.99


def test_interval_of_a_paired_frechet_difference_covers() -> None:
    rng = np.random.default_rng(10)
    trials, covered = 150, 0
    for _ in range(trials):
        noise = rng.normal(size=(600, 3))
        a = noise + np.array([0.5, 0, 0])
        b = 0.8 * noise + 0.6 * rng.normal(size=(600, 3)) + np.array([0.3, 0, 0])
        values, influences = [], []
        for features in (a, b):
            values.append(frechet(features.mean(axis=0), np.cov(features.T), np.zeros(3), np.eye(3)))
            found = frechet_influence(features, np.zeros(3), np.eye(3))
            influences.append({(str(i), 0): float(v) for i, v in enumerate(found)})
        interval = influence_difference(values[0], values[1], influences[0], influences[1]).interval
        covered += interval.low <= 0.25 - 0.09 <= interval.high
    assert 0.90 <= covered / trials <= 0.995


def test_influence_difference_needs_the_same_samples() -> None:
    with pytest.raises(ValueError, match="not the same pairs"):
        influence_difference(1.0, 2.0, {("a", 0): 0.1}, {("b", 0): 0.1})


def test_kernel_terms_match_brute_force_and_the_spread_of_the_estimate() -> None:
    rng = np.random.default_rng(11)
    reference = rng.normal(size=(600, 4))

    def mmd(features: np.ndarray) -> float:
        n, m = len(features), len(reference)
        own, cross = ((x @ y.T / 4 + 1) ** 3 for x, y in ((features, features), (features, reference)))
        theirs = (reference @ reference.T / 4 + 1) ** 3
        value = (own.sum() - np.trace(own)) / (n * (n - 1)) - 2 * cross.mean()
        return float(value + (theirs.sum() - np.trace(theirs)) / (m * (m - 1)))

    features = rng.normal(size=(150, 4)) + 0.4
    terms = kernel_terms(features, reference, block=64)
    own, cross = (features @ features.T / 4 + 1) ** 3, (features @ reference.T / 4 + 1) ** 3
    expected = 2 * (own.mean(axis=1) - cross.mean(axis=1))
    np.testing.assert_allclose(terms.influence, expected - expected.mean(), atol=1e-9)
    centred = own - own.mean(0) - own.mean(1)[:, None] + own.mean()
    assert terms.second_order == pytest.approx(float(np.square(centred).mean()))
    spread = np.std([mmd(rng.normal(size=(150, 4)) + 0.4) for _ in range(200)])
    assert terms.se(range(150)) == pytest.approx(spread, rel=0.35)


def test_three_prompts_have_a_bounded_interval_and_a_mean_that_is_not_finite_has_none() -> None:
    """One resample of nine repeats a single prompt, whose spread is rounding alone."""
    found = bootstrap_mean(np.array([0.9952, 0.9961, 0.9938]))
    assert 0.9 < found.low < found.value < found.high < 1.1
    broken = bootstrap_mean(np.array([1.0, math.nan, 2.0]))
    assert math.isnan(broken.value) and math.isnan(broken.low) and broken.n == 3
