import itertools
import math

import numpy as np
import pytest
from scipy import stats

from experiments.comparing import statistics as s

MARGINS = {"parity": 0.25, "strict": 0.1}
INF, NAN = math.inf, math.nan

# Student's t with 1 and 2 degrees of freedom, and chi-square with 2, in closed form.
T1 = lambda p: math.tan(math.pi * (p - 0.5))
T2 = lambda p: (2 * p - 1) / math.sqrt(2 * p * (1 - p))
T2_CDF = lambda t: 0.5 + t / (2 * math.sqrt(2 + t * t))
CHI2_2 = lambda p: -2 * math.log(1 - p)


def compare(percent, baseline=1.0):
    """Of a candidate whose loss is so many percent above its baseline's."""
    percent = np.asarray(percent, np.float64)
    return s.compare(baseline * (1 + percent / 100), np.full(len(percent), baseline), MARGINS)


def test_three_pairs_by_hand():
    found = s.compare(np.array([2.002, 4.008, 5.015]), np.array([2.0, 4.0, 5.0]), MARGINS)
    # 0.1, 0.2 and 0.3 % of each seed's own baseline: mean 0.2, standard deviation 0.1.
    assert found.seeds == 3 and found.diverged == found.baseline_diverged == 0
    assert found.delta_nats == pytest.approx(0.025 / 3)
    assert found.delta_percent == pytest.approx(0.2) and found.sd_percent == pytest.approx(0.1)
    error = 0.1 / math.sqrt(3)
    assert found.ci90 == pytest.approx((0.2 - T2(0.95) * error, 0.2 + T2(0.95) * error))
    assert found.ci95 == pytest.approx((0.2 - T2(0.975) * error, 0.2 + T2(0.975) * error))
    assert found.ci95 == pytest.approx((-0.0484, 0.4484), abs=1e-4)  # with 4.3027 of a printed table
    assert (found.lower95, found.upper95) == found.ci90
    assert found.noninferiority["parity"] == {"margin": 0.25, "p": pytest.approx(T2_CDF(-0.05 / error))}
    assert found.noninferiority["strict"] == {"margin": 0.1, "p": pytest.approx(T2_CDF(0.1 / error))}
    assert found.equivalence["strict"]["p"] == found.noninferiority["strict"]["p"]
    assert found.equivalence["parity"]["verdict"] == "not shown"
    assert found.verdict == "not enough evidence"


def test_two_pairs_by_hand():
    found = compare([0.0, 0.02])
    error = 0.01  # the standard deviation is 0.02 / √2
    assert found.ci90 == pytest.approx((0.01 - T1(0.95) * error, 0.01 + T1(0.95) * error))
    assert found.upper95 == pytest.approx(0.01 + 6.3138 * error, abs=1e-6)
    assert found.verdict == "strict parity"
    assert found.equivalence["strict"]["p"] == pytest.approx(0.5 + math.atan(-0.09 / error) / math.pi)


@pytest.mark.parametrize(
    ("percent", "verdict"),
    [
        ([0.01, 0.03], "strict parity"),
        ([0.08, 0.10, 0.12], "parity"),  # 0.1 + 2.92 · 0.02 / √3 is 0.134
        ([0.1, 0.2, 0.3], "not enough evidence"),
        ([0.5, 0.6, 0.7], "worse"),  # 0.6 − 2.92 · 0.1 / √3 is 0.43
        ([0.2, 0.6, 0.7], "not enough evidence"),  # 0.5 − 2.92 · 0.265 / √3 is 0.054
        ([-5.0, -4.0, -6.0], "strict parity"),  # better is no worse
    ],
)
def test_verdict_by_hand(percent, verdict):
    assert compare(percent).verdict == verdict


def test_a_much_better_loss_is_not_inferior_but_not_equivalent_either():
    found = compare([-5.0, -4.0, -6.0])
    assert found.noninferiority["strict"]["p"] < 0.01 < 0.99 < found.equivalence["parity"]["p"]
    assert found.equivalence["parity"]["verdict"] == "not shown"


def test_numbers_agree_with_scipy():
    rng = np.random.default_rng(0)
    baseline = 1.5 + 0.02 * rng.standard_normal(8)
    candidate = baseline + 0.002 * rng.standard_normal(8)
    x = 100 * (candidate - baseline) / baseline
    found = s.compare(candidate, baseline, MARGINS)
    assert found.ci90 == pytest.approx(tuple(stats.ttest_1samp(x, 0).confidence_interval(0.90)))
    assert found.ci95 == pytest.approx(tuple(stats.ttest_1samp(x, 0).confidence_interval(0.95)))
    low, high = s.t_interval(candidate - baseline, 0.95)
    assert (low, high) == pytest.approx(tuple(stats.ttest_rel(candidate, baseline).confidence_interval(0.95)))
    for name, margin in MARGINS.items():
        below = stats.ttest_1samp(x, margin, alternative="less").pvalue
        above = stats.ttest_1samp(x, -margin, alternative="greater").pvalue
        assert found.noninferiority[name]["p"] == pytest.approx(below)
        assert found.equivalence[name]["p"] == pytest.approx(max(below, above))
    assert (found.noninferiority["parity"]["p"] < 0.05) == (found.upper95 < 0.25)


def test_no_and_one_pair_decide_nothing():
    none, one = compare([]), compare([0.125], baseline=100.0)
    assert none.delta_percent is None and one.delta_percent == 0.125 and (none.seeds, one.seeds) == (0, 1)
    for found in (none, one):
        assert found.sd_percent is found.ci90 is found.ci95 is found.upper95 is found.lower95 is None
        assert found.bootstrap90 is found.bootstrap95 is found.seeds_needed is found.seeds_needed_strict is None
        assert found.noninferiority["parity"]["p"] is found.equivalence["parity"]["p"] is None
        assert found.equivalence["parity"]["verdict"] == "not shown"
        assert found.verdict == "not enough evidence"


# Exact in binary, so that no rounding moves a mean off the margin.
@pytest.mark.parametrize(
    ("value", "verdict", "p"), [(0.125, "parity", 0.0), (0.25, "not enough evidence", 0.5), (0.5, "worse", 1.0)]
)
def test_equal_differences_are_certain_but_at_the_margin(value, verdict, p):
    baseline = np.array([100.0, 200.0, 400.0])
    found = s.compare(baseline + value * baseline / 100, baseline, MARGINS)
    assert found.sd_percent == 0 and found.verdict == verdict
    assert found.ci90 == found.ci95 == found.bootstrap90 == found.bootstrap95 == (value, value)
    assert found.noninferiority["parity"]["p"] == found.equivalence["parity"]["p"] == p
    assert found.seeds_needed is found.seeds_needed_strict is None


def test_a_mean_at_the_margin_is_never_settled():
    found = s.compare(np.array([100.0, 100.5]), np.array([100.0, 100.0]), MARGINS)
    assert found.delta_percent == 0.25 and found.verdict == "not enough evidence" and found.seeds_needed is None


def test_bootstrap_is_near_all_resamples_and_always_the_same():
    # Of values that lie evenly about their mean, BCa corrects nothing.
    x = np.array([7.0, 9.0, 11.0, 13.0])
    means = [np.mean(sample) for sample in itertools.product(x, repeat=4)]
    for confidence in (0.9, 0.95):
        wanted = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
        found = s.bootstrap_interval(x, confidence)
        np.testing.assert_allclose(found, wanted, atol=0.5)  # the step between two means
        assert found == s.bootstrap_interval(x.copy(), confidence)
    skewed = s.bootstrap_interval(np.array([0.0, 0.0, 0.1, 0.1, 0.2, 4.0]), 0.9)
    assert skewed[0] > 0 and skewed[1] - 0.7333 > 0.7333 - skewed[0]


@pytest.mark.parametrize("x", [[0.3, 0.3, 0.3], [1.0, 1.0 + 2.3e-16, 1.0], [0.0, 0.0, 0.0, 1.0], [1.0, 2.0]])
def test_bootstrap_of_degenerate_data_neither_warns_nor_fails(x):
    low, high = s.bootstrap_interval(np.array(x), 0.95)
    assert min(x) <= low <= high <= max(x)


def test_interval_of_a_standard_deviation_by_hand():
    low, high = s.sd_interval(0.1, 3, 0.95)
    assert low == pytest.approx(0.1 * math.sqrt(2 / CHI2_2(0.975)))
    assert high == pytest.approx(0.1 * math.sqrt(2 / CHI2_2(0.025)))
    assert s.sd_interval(0.0, 3, 0.95) == (0.0, 0.0) and s.sd_interval(0.1, 1, 0.95) is None


def test_holm_by_hand():
    assert s.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert s.holm([0.6, 0.9]) == [1.0, 1.0] and s.holm([]) == []


# A one-sided t test of one sample at 5 % with 80 % power, as tables and G*Power have it.
@pytest.mark.parametrize(("effect", "n"), [(0.2, 156), (0.5, 27), (0.8, 12)])
def test_seeds_needed_as_printed(effect, n):
    assert s.seeds_needed(0.25 - effect * 0.3, 0.3, 0.25) == n
    assert s.seeds_needed(0.25 + effect * 0.3, 0.3, 0.25) == n


def test_seeds_needed_at_the_ends():
    assert s.seeds_needed(0.0, 0.0, 0.25) == 2 == s.seeds_needed(0.0, 1e-9, 0.25)
    assert s.seeds_needed(0.24, 1.0, 0.25) is None  # about 62,000
    assert s.seeds_needed(0.225, 1.0, 0.25) == pytest.approx(((1.6449 + 0.8416) / 0.025) ** 2, abs=2)


def test_plans_are_made_with_the_upper_bound_of_the_deviation():
    assert s.sd_to_plan_with(0.1, 3) == pytest.approx(0.1 * math.sqrt(2 / CHI2_2(0.2)))
    assert math.isnan(s.sd_to_plan_with(math.nan, 1))
    sds = np.std(draws(4), axis=1, ddof=1)
    assert np.mean([s.sd_to_plan_with(sd, 4) > 1 for sd in sds[:4000]]) == pytest.approx(0.8, abs=0.03)


def test_what_is_needed_is_asked_of_the_margin_that_is_open():
    open_, parity = compare([0.1, 0.2, 0.3]), compare([0.07, 0.09, 0.11])
    wider = s.sd_to_plan_with(1.0, 3)
    assert (open_.seeds_needed, open_.seeds_needed_strict) == (s.seeds_needed(0.2, 0.1 * wider, 0.25), None)
    assert parity.verdict == "parity"
    assert (parity.seeds_needed, parity.seeds_needed_strict) == (None, s.seeds_needed(0.09, 0.02 * wider, 0.1))
    beyond = compare([0.13, 0.15, 0.17])  # whose mean is not strict
    assert beyond.verdict == "parity" and beyond.seeds_needed_strict is None


def draws(n, *, heavy_tails=False, count=20_000, seed=0):
    """Differences with mean 0 and standard deviation 1, [count, n]."""
    rng = np.random.default_rng(seed)
    return rng.standard_t(4, (count, n)) / math.sqrt(2) if heavy_tails else rng.standard_normal((count, n))


def rate(x, verdict):
    return np.mean(np.isin(s.verdicts(*s.t_interval(x, 0.9), MARGINS), verdict))


TOLERANCE = 4 * math.sqrt(0.05 * 0.95 / 20_000)


@pytest.mark.parametrize("n", [3, 8])
def test_at_the_margin_false_parity_is_seen_in_five_percent(n):
    x = 0.1 * draws(n)
    assert rate(0.25 + x, ["parity", "strict parity"]) == pytest.approx(0.05, abs=TOLERANCE)
    assert rate(0.10 + x, "strict parity") == pytest.approx(0.05, abs=TOLERANCE)
    assert rate(0.25 + x, "worse") == pytest.approx(0.05, abs=TOLERANCE)
    heavy = 0.1 * draws(n, heavy_tails=True)
    assert rate(0.25 + heavy, ["parity", "strict parity"]) <= 0.05 + TOLERANCE
    # Beyond the margin it is rarer.
    assert rate(0.30 + x, ["parity", "strict parity"]) < 0.05 - TOLERANCE


@pytest.mark.parametrize("n", [3, 8])
def test_intervals_cover_the_mean_as_often_as_they_say(n):
    for confidence in (0.9, 0.95):
        low, high = s.t_interval(0.2 + 0.3 * draws(n), confidence)
        assert np.mean((low < 0.2) & (high > 0.2)) == pytest.approx(confidence, abs=1.4 * TOLERANCE)


@pytest.mark.parametrize(("mean", "verdict"), [(0.05, ["parity", "strict parity"]), (0.4, ["worse"])])
def test_the_planned_seeds_decide_four_times_in_five(mean, verdict):
    n = s.seeds_needed(mean, 0.2, 0.25)
    enough, fewer = (rate(mean + 0.2 * draws(k), verdict) for k in (n, n - 1))
    assert 0.8 - 0.012 < enough < 0.86 and fewer < 0.8 + 0.012


def test_one_verdict_is_that_of_many_at_once():
    x = 0.2 + 0.2 * draws(4, count=60)
    many = s.verdicts(*s.t_interval(x, 0.9), MARGINS)
    assert set(many) == set(s.VERDICTS)
    np.testing.assert_array_equal([compare(row).verdict for row in x], many)


@pytest.mark.parametrize(
    ("candidate", "baseline", "verdict"),
    [
        ([1.0, 1.0, INF, INF], [1.0] * 4, "not enough evidence"),  # half is not more than half
        ([1.0, INF, INF], [1.0] * 3, "not enough evidence"),
        ([INF], [1.0], "not enough evidence"),
        ([1.0, 1.0, INF, INF, INF], [1.0] * 5, "worse"),
        ([1.0, INF, INF, INF, INF], [1.0] * 4 + [INF], "not enough evidence"),
        ([1.0] * 12 + [INF] * 4, [1.0] * 16, "not enough evidence"),  # 1 / 16
        ([1.0] * 11 + [INF] * 5, [1.0] * 16, "worse"),  # 1 / 32
        ([1.0] * 11 + [INF] * 5, [INF] + [1.0] * 15, "not enough evidence"),  # 7 / 64
        ([1.0, 1.0, INF, INF, INF], [1.0, 1.0, INF, INF, INF], "not enough evidence"),  # matched by the baseline
        ([1.01, 1.011, 1.012, INF], [1.0, 1.0, 1.0, INF], "worse"),  # what is left is 1 % worse
        ([1.0, 1.0, INF], [1.0, 1.0, NAN], "not enough evidence"),  # its baseline is still running
    ],
)
def test_a_diverged_run_rules_out_parity_and_many_are_worse(candidate, baseline, verdict):
    found = s.compare(np.array(candidate), np.array(baseline), MARGINS)
    assert found.verdict == verdict
    assert found.diverged == candidate.count(INF) and found.baseline_diverged == baseline.count(INF)
    assert found.seeds == sum(math.isfinite(a) and math.isfinite(b) for a, b in zip(candidate, baseline))
    assert found.noninferiority["parity"]["p"] == found.equivalence["strict"]["p"] == 1.0


def test_what_is_left_of_diverged_runs_is_reported():
    found = s.compare(np.array([2.002, INF, 4.008, 5.015]), np.array([2.0, 3.0, 4.0, 5.0]), MARGINS)
    assert found.seeds == 3 and found.delta_percent == pytest.approx(0.2)
    assert found.ci90[1] == pytest.approx(0.2 + T2(0.95) * 0.1 / math.sqrt(3))


def test_a_pair_without_its_baseline_tells_nothing_of_the_loss():
    found = s.compare(np.array([1.0, 1.0, 1.0]), np.array([1.0, INF, 1.0]), MARGINS)
    assert (found.seeds, found.diverged, found.baseline_diverged) == (2, 0, 1) and found.verdict == "strict parity"


def test_seeds_to_show_divergence_by_hand():
    # Five of the candidate alone are significant, being 1 / 32; a quarter of the pairs are such.
    tail = lambda n: 1 - sum(math.comb(n, k) * 0.25**k * 0.75 ** (n - k) for k in range(5))
    n = s.seeds_to_show_divergence(2, 0, 8)
    assert tail(n) >= 0.8 > tail(n - 1)
    found = s.compare(np.array([1.0] * 6 + [INF] * 2), np.ones(8), MARGINS)
    assert found.seeds_needed == n and found.verdict == "not enough evidence"
    assert s.seeds_to_show_divergence(2, 2, 8) is s.seeds_to_show_divergence(0, 0, 8) is None
    assert s.p_diverges_more(5, 0) == pytest.approx(1 / 32) and s.p_diverges_more(5, 1) == pytest.approx(7 / 64)
    assert s.p_diverges_more(0, 3) == 1.0


def test_divergence_that_both_share_is_rarely_called_worse():
    rng = np.random.default_rng(0)
    candidate, baseline = rng.random((2, 20_000, 40)) < 0.2
    alone, spared = np.sum(candidate & ~baseline, -1), np.sum(baseline & ~candidate, -1)
    p = {pair: s.p_diverges_more(*pair) for pair in set(zip(alone.tolist(), spared.tolist()))}
    assert 0.01 < np.mean([p[pair] <= 0.05 for pair in zip(alone.tolist(), spared.tolist())]) <= 0.05 + TOLERANCE


@pytest.mark.parametrize("share", [0.1, 0.2, 0.3])
def test_no_number_of_seeds_makes_chance_divergence_worse(share):
    rng = np.random.default_rng(1)
    for n in (1, 2, 3, 5, 8):
        draws = np.where(rng.random((4000, 2, n)) < share, INF, 1.0)
        ours, others = np.isinf(draws[:, 0]), np.isinf(draws[:, 1])
        kinds = np.stack([np.sum(found, axis=1) for found in (ours & ~others, ~ours & others, ours & others)], axis=1)
        kinds, counts = np.unique(kinds, axis=0, return_counts=True)
        worse = 0
        for (alone, spared, both), count in zip(kinds.tolist(), counts.tolist()):
            rest = n - alone - spared - both
            candidate = [INF] * alone + [1.0] * spared + [INF] * both + [1.0] * rest
            baseline = [1.0] * alone + [INF] * spared + [INF] * both + [1.0] * rest
            worse += count * (s.compare(np.array(candidate), np.array(baseline), MARGINS).verdict == "worse")
        assert worse / 4000 <= 0.05 + TOLERANCE, n
