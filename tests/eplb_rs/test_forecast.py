"""Estimates of the next window: held to a plain account of what each one is, and to real loads."""

import pickle
import threading
from itertools import permutations

import numpy as np
import pytest
from eplb_rs import InvalidInputError
from eplb_rs.forecast import BACKTESTED, Forecaster, forecast, total_variation
from eplb_rs.loads import read_loads
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from recordings import ESFT

ESTIMATORS = [*BACKTESTED, "backtest", "average", "exponential", "trend", "average:3", "trend:2"]

traces = st.integers(1, 12).flatmap(
    lambda num: arrays(np.float32, (num, 2, 5), elements=st.integers(0, 500).map(float))
)


@pytest.fixture(scope="module")
def esft():
    """26 layers x 64 experts, 32 windows of 1,024 tokens, over four domains of eight windows."""
    loads = read_loads(ESFT).loads[:128]
    return loads.reshape(32, 4, 26, 64).sum(axis=1).astype(np.float32)


def fed(trace, estimator, **settings):
    forecaster = Forecaster(
        num_layers=trace.shape[1], num_experts=trace.shape[2], estimator=estimator, **settings
    )
    for window in trace:
        forecaster.observe(window)
    return forecaster


def plain(trace, estimator):
    """The same in plain NumPy, without shifts of the domain."""
    trace = np.array([window for window in trace if window.any()], dtype=np.float64)
    name, _, number = estimator.partition(":")
    if name == "last":
        return trace[-1]
    if name == "mean":
        return trace.mean(axis=0)
    if name == "average":
        return trace[-int(number or 8) :].mean(axis=0)
    if name == "exponential":
        span = int(number or 7)
        weights = ((span - 1) / (span + 1)) ** np.arange(len(trace))[::-1]
        return np.tensordot(weights / weights.sum(), trace, axes=1)
    if name == "trend":
        recent = trace[-int(number or 4) :]
        if len(recent) == 1:
            return recent[0]
        line = np.polyfit(np.arange(len(recent)), recent.reshape(len(recent), -1), 1)
        return np.maximum(line[0] * len(recent) + line[1], 0).reshape(recent.shape[1:])
    assert name == "shrinkage"
    total = trace.sum(axis=2, keepdims=True)
    shares = np.divide(trace, total, out=np.zeros_like(trace), where=total > 0)
    pull = np.zeros((2, trace.shape[1], 1))
    for t in range(1, len(trace)):
        mean = trace[:t].sum(axis=0)
        mass = mean.sum(axis=1, keepdims=True)
        off = shares[t - 1] - np.divide(mean, mass, out=np.zeros_like(mean), where=mass > 0)
        pull[0] += (off * (shares[t - 1] - shares[t])).sum(axis=1, keepdims=True)
        pull[1] += (off * off).sum(axis=1, keepdims=True)
    half = np.full_like(pull[0], 0.5)
    amount = np.clip(np.divide(pull[0], pull[1], out=half, where=pull[1] > 0), 0, 1)
    mean = trace.sum(axis=0)
    mass = mean.sum(axis=1, keepdims=True)
    mean = np.divide(mean, mass, out=np.zeros_like(mean), where=mass > 0) * total[-1]
    return trace[-1] + amount * (mean - trace[-1])


@given(trace=traces, estimator=st.sampled_from([one for one in ESTIMATORS if one != "backtest"]))
def test_an_estimate_is_what_plain_arithmetic_gives(trace, estimator):
    if not trace.any():
        return
    estimate = fed(trace, estimator, shift_threshold=None).estimate()
    assert estimate.dtype == np.float32
    np.testing.assert_allclose(estimate, plain(trace, estimator), rtol=1e-5, atol=1e-2)


@given(trace=traces)
def test_the_back_test_goes_by_past_scores_alone(trace):
    forecaster = Forecaster(num_layers=2, num_experts=5, shift_threshold=None)
    rivals = [
        Forecaster(num_layers=2, num_experts=5, estimator=one, shift_threshold=None)
        for one in BACKTESTED
    ]
    scores = np.zeros((len(BACKTESTED), 2))
    for window in trace:
        if not window.any():
            continue
        seen = forecaster.num_windows
        if seen:
            best = scores.argmin(axis=0)
            assert forecaster.chosen == [BACKTESTED[one] for one in best]
            for layer in range(2):
                row = rivals[best[layer]].estimate()[layer]
                np.testing.assert_array_equal(forecaster.estimate()[layer], row)
            apart = [total_variation(window, one.estimate()) for one in rivals]
            scored = window.any(axis=1)
            scores[:, scored] = scores[:, scored] * (15 / 17) + np.array(apart)[:, scored]
        for one in (forecaster, *rivals):
            one.observe(window)


@given(trace=traces, estimator=st.sampled_from(ESTIMATORS))
def test_one_at_a_time_and_all_at_once_are_the_same(trace, estimator):
    if not trace.any():
        return
    forecaster = fed(trace, estimator)
    once = forecast(trace, estimator)
    np.testing.assert_array_equal(once.estimate, forecaster.estimate())
    np.testing.assert_array_equal(once.uncertainty, forecaster.uncertainty())
    np.testing.assert_array_equal(forecast(iter(trace.tolist()), estimator).estimate, once.estimate)


@given(trace=traces, estimator=st.sampled_from(ESTIMATORS), power=st.integers(-8, 8))
def test_the_unit_plays_no_part_but_for_shifts(trace, estimator, power):
    if not trace.any():
        return
    scaled, plain_one = (
        forecast(trace * 2.0**exp, estimator, shift_threshold=None) for exp in (power, 0)
    )
    np.testing.assert_array_equal(scaled.estimate, plain_one.estimate * np.float32(2.0**power))
    np.testing.assert_allclose(scaled.uncertainty, plain_one.uncertainty * 2.0**power, rtol=1e-6)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_constant_loads_are_reproduced_and_certain(estimator):
    window = np.arange(1, 11, dtype=np.float32).reshape(2, 5)
    estimate, uncertainty = forecast([window] * 20, estimator)
    np.testing.assert_array_equal(estimate, window)
    assert (uncertainty <= 1e-6 * window).all()


@pytest.mark.parametrize("estimator", ["last", "average:8", "mean", "backtest"])
def test_the_uncertainty_is_calibrated(estimator):
    """Of errors over their uncertainty, the variance is 1 and 95 % are within 2."""
    rng = np.random.default_rng(5)
    shares = rng.dirichlet(np.full(64, 2.0), size=4)
    scaled = []
    forecaster = Forecaster(num_layers=4, num_experts=64, estimator=estimator)
    for t in range(60):
        window = np.array([rng.multinomial(6144, row) for row in shares], dtype=np.float32)
        if t >= 8:
            error = window - forecaster.estimate()
            scaled.append(error / forecaster.uncertainty())
        assert not forecaster.observe(window)
    scaled = np.array(scaled)
    assert 0.95 < np.sqrt((scaled**2).mean()) < 1.08
    assert 0.93 < (np.abs(scaled) < 2).mean() < 0.97


def test_real_loads(esft):
    """Every shift of the domain is seen and nothing else; back-test and averages beat the last
    window; within a domain, errors are what was announced."""
    errors, scaled = {}, []
    for estimator in ("last", "mean", "backtest"):
        forecaster = Forecaster(num_layers=26, num_experts=64, estimator=estimator)
        shifts, apart = [], []
        for number, window in enumerate(esft):
            known = None
            if number:
                estimate = forecaster.estimate()
                known = (window - estimate) / np.maximum(forecaster.uncertainty(), 1e-6)
                apart.append(total_variation(window, estimate).mean())
            if forecaster.observe(window):
                shifts.append(number)
            elif number > 4 and estimator == "backtest":
                scaled.append(known)
        assert shifts == [8, 16, 24]
        errors[estimator] = np.mean(apart)
    assert errors["backtest"] < 0.92 * errors["last"]
    assert errors["mean"] < 0.92 * errors["last"]
    # Windows soon after a shift are less certain than is known; the usual one is right.
    usual = np.median([np.sqrt((one**2).mean()) for one in scaled])
    assert 0.75 < usual < 1.1


@pytest.mark.parametrize("merge", [1, 2, 4, 8])
def test_shifts_are_told_from_noise_in_every_order_of_the_domains(merge):
    """72 shifts for each size of windows: none is missed, and there is no false alarm."""
    loads = read_loads(ESFT).loads[:128].reshape(4, 32 // merge, merge, 26, 64)
    domains = loads.sum(axis=2).astype(np.float32)
    starts = [32 // merge * number for number in (1, 2, 3)]
    for order in permutations(range(4)):
        forecaster = Forecaster(num_layers=26, num_experts=64, estimator="last")
        trace = domains[list(order)].reshape(-1, 26, 64)
        assert [t for t, window in enumerate(trace) if forecaster.observe(window)] == starts


def test_total_variation():
    load, other = [[3, 1], [0, 0]], [[2, 2], [1, 0]]
    assert total_variation(load, other).tolist() == [0.25, 1.0]
    assert total_variation(other, load).tolist() == [0.25, 1.0]
    assert total_variation(load, np.multiply(load, 7)).tolist() == [0.0, 0.0]
    with pytest.raises(InvalidInputError) as caught:
        total_variation(load, [[1, 2]])
    assert (caught.value.code, caught.value.argument) == ("wrong_shape", "other")


def test_buffers_are_written_to():
    forecaster = fed(np.ones((3, 2, 5), dtype=np.float32), "mean")
    out = np.empty((2, 5), dtype=np.float32)
    assert forecaster.estimate(out) is out
    assert (out == 1).all()
    assert forecaster.uncertainty(out) is out
    assert (out == 0).all()


def test_threads_take_turns():
    forecaster = Forecaster(num_layers=2, num_experts=5, estimator="mean")
    window = np.ones((2, 5), dtype=np.float32)

    def feed():
        for _ in range(200):
            forecaster.observe(window)

    threads = [threading.Thread(target=feed) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert forecaster.num_windows == 800
    assert (forecaster.estimate() == 1).all()


@pytest.mark.parametrize(
    ("settings", "code", "argument"),
    [
        ({"num_layers": 0}, "not_positive", "num_layers"),
        ({"num_experts": 2.5}, "not_integer", "num_experts"),
        ({"num_layers": 2**62}, "too_large", "num_layers"),
        ({"num_layers": 10**5, "num_experts": 10**5}, "too_large", "num_layers"),
        ({"estimator": "median"}, "unknown", "estimator"),
        ({"estimator": "last:3"}, "unknown", "estimator"),
        ({"estimator": "\ud800"}, "unknown", "estimator"),
        ({"estimator": 3}, "wrong_type", "estimator"),
        ({"estimator": "average:x"}, "not_integer", "estimator"),
        ({"estimator": "average:0"}, "not_integer", "estimator"),
        ({"estimator": "trend:1"}, "out_of_range", "estimator"),
        ({"estimator": "average:9999"}, "out_of_range", "estimator"),
        ({"estimator": f"average:{2**70}"}, "not_integer", "estimator"),
        ({"shift_threshold": "x"}, "wrong_type", "shift_threshold"),
        ({"shift_threshold": float("nan")}, "out_of_range", "shift_threshold"),
        ({"shift_threshold": 2}, "out_of_range", "shift_threshold"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, code, argument):
    with pytest.raises(InvalidInputError) as caught:
        Forecaster(**{"num_layers": 2, "num_experts": 5} | settings)
    assert (caught.value.code, caught.value.argument) == (code, argument)
    assert pickle.loads(pickle.dumps(caught.value)).code == code


@pytest.mark.parametrize(
    ("window", "code"),
    [
        (np.ones((2, 4)), "wrong_shape"),
        (np.ones(5), "wrong_shape"),
        (np.full((2, 5), np.nan), "not_finite"),
        (np.full((2, 5), -1.0), "negative"),
        (np.full((2, 5), "a"), "wrong_dtype"),
        ([[1, 2], [3]], "ragged"),
    ],
)
def test_windows_that_are_none_are_refused_and_change_nothing(window, code):
    forecaster = fed(np.ones((3, 2, 5), dtype=np.float32), "backtest")
    with pytest.raises(InvalidInputError) as caught:
        forecaster.observe(window)
    assert (caught.value.code, caught.value.argument) == (code, "window")
    assert forecaster.num_windows == 3
    assert (forecaster.estimate() == 1).all()


def test_nothing_is_known_before_the_first_window():
    forecaster = Forecaster(num_layers=2, num_experts=5)
    for ask in (forecaster.estimate, forecaster.uncertainty):
        with pytest.raises(InvalidInputError) as caught:
            ask()
        assert caught.value.code == "too_small"
    for windows, code in (([], "too_small"), ([[[0, 0]]], "too_small"), (3, "wrong_type")):
        with pytest.raises(InvalidInputError) as caught:
            forecast(windows)
        assert caught.value.code == code


def test_what_it_says_of_itself():
    forecaster = fed(np.ones((3, 2, 5), dtype=np.float32), "average")
    assert forecaster.estimator == "average:8"
    assert repr(forecaster) == ("<Forecaster of 2 layers x 5 experts by average:8, 3 windows seen>")
    assert forecaster.chosen == ["average:8"] * 2
    assert forecaster.windows_since_shift == 3
    assert forecaster.distance.tolist() == [0.0, 0.0]
