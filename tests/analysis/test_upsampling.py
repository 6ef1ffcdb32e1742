"""Variance under bilinear upsampling: closed forms, measurements, how far theorem 3.2 holds."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from mmseg_fusion.analysis.upsampling import (
    FEATURE_MEAN,
    FEATURE_VARIANCE,
    interior_variance_ratio,
    measure_upsampling,
    variance_ratio,
)


def interpolation_matrix(size: int, out_size: int, align_corners: bool) -> np.ndarray:
    """(out_size, size): torch's own linear interpolation of each unit vector."""
    unit = torch.eye(size, dtype=torch.float64)[:, None]
    rows = F.interpolate(unit, size=out_size, mode='linear', align_corners=align_corners)
    return rows[:, 0].T.numpy()


def upsample(x: np.ndarray, out_size: tuple[int, int], align_corners: bool = False) -> np.ndarray:
    y = F.interpolate(
        torch.from_numpy(x)[None, None], out_size, mode='bilinear', align_corners=align_corners
    )
    return y[0, 0].numpy()


# --- the closed form ---------------------------------------------------------------------------


def test_feature_after_relu() -> None:
    """Equations 6 and 7: moments of max(0, z), z standard normal, by numerical integration."""
    z = np.linspace(0, 12, 200001)
    density = np.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    integrate = np.trapezoid if hasattr(np, 'trapezoid') else np.trapz
    mean = integrate(z * density, z)
    second = integrate(z * z * density, z)
    assert pytest.approx(mean, abs=1e-9) == FEATURE_MEAN
    assert pytest.approx(second - mean**2, abs=1e-9) == FEATURE_VARIANCE


@pytest.mark.parametrize(('ratio', 'expected'), [(2, 0.3906), (4, 0.4307), (8, 0.4410)])
def test_away_from_borders(ratio: int, expected: float) -> None:
    assert round(interior_variance_ratio(ratio), 4) == expected
    # A map so large that its borders are nothing.
    assert variance_ratio(10**5, ratio * 10**5) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ('align_corners', 'expected'),
    [(False, (0.3943, 0.4342, 0.4445)), (True, (0.4462, 0.4453, 0.4449))],
)
def test_with_borders_of_128(align_corners: bool, expected: tuple[float, ...]) -> None:
    found = [variance_ratio(128, 128 * r, align_corners) for r in (2, 4, 8)]
    assert [round(f, 4) for f in found] == list(expected)


@given(size=st.integers(1, 40), ratio=st.integers(1, 9))
def test_whole_ratios_follow_the_formula(size: int, ratio: int) -> None:
    """((n - 1) c + 1) / n per dimension, in whole fractions."""
    r = Fraction(ratio)
    c = Fraction(2, 3) + (-1 / (6 * r**2) if ratio % 2 == 0 else 1 / (3 * r**2))
    one = ((size - 1) * c + 1) / size
    assert variance_ratio(size, ratio * size) == pytest.approx(float(one**2), rel=1e-12)
    assert interior_variance_ratio(ratio) == pytest.approx(float(c**2), rel=1e-12)


@given(size=st.integers(2, 40), out_size=st.integers(2, 160))
def test_aligned_corners_follow_the_formula(size: int, out_size: int) -> None:
    """The positions run through the m-th parts of a pixel equally often, m = (out - 1) / gcd."""
    m = (out_size - 1) // math.gcd(size - 1, out_size - 1)
    one = ((out_size - 1) * (Fraction(2, 3) + Fraction(1, 3 * m * m)) + 1) / out_size
    found = variance_ratio(size, out_size, align_corners=True)
    assert found == pytest.approx(float(one**2), rel=1e-12)


@given(
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    out_size=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    align_corners=st.booleans(),
    num_maps=st.none() | st.integers(2, 5),
)
def test_agrees_with_torchs_interpolation(
    size: tuple[int, int], out_size: tuple[int, int], align_corners: bool, num_maps: int | None
) -> None:
    """Covariance of the upsampled map, from the matrix of the whole linear map."""
    a, b = (interpolation_matrix(s, o, align_corners) for s, o in zip(size, out_size))
    matrix = np.kron(a, b)
    pixel = (matrix**2).sum(1).mean()
    if num_maps is None:
        expected = pixel
    else:
        expected = pixel - (matrix.mean(0) ** 2).sum() / num_maps
        expected /= 1 - 1 / (num_maps * size[0] * size[1])
    found = variance_ratio(size, out_size, align_corners, num_maps)
    assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ('call', 'message'),
    [
        (lambda: interior_variance_ratio(1.5), 'whole ratio of at least 1, got 1.5'),
        (lambda: interior_variance_ratio(0), 'whole ratio of at least 1, got 0'),
        (lambda: variance_ratio(0, 4), 'size: expected a positive'),
        (lambda: variance_ratio((4, 4, 4), 8), r'got \(4, 4, 4\)'),
        (lambda: variance_ratio(4, 8.5), 'out_size'),
        (lambda: variance_ratio(4, 8, num_maps=0), 'num_maps: expected at least 1 or None'),
        (lambda: variance_ratio(1, 2, num_maps=1), 'no variance'),
        (lambda: measure_upsampling(0.0), 'variance: expected a positive'),
        (lambda: measure_upsampling(1.0, ratios=[0.5]), 'at least 1'),
        (lambda: measure_upsampling(1.0, ratios=[]), 'ratios'),
        (lambda: measure_upsampling(1.0, shape=(4, 8, 8)), 'images, channels, height, width'),
    ],
)
def test_bad_arguments(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# --- the measurement ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('align_corners', 'expected'),
    [(False, (0.3943, 0.4342, 0.4445)), (True, (0.4462, 0.4453, 0.4449))],
)
@pytest.mark.parametrize('variance', [0.01, FEATURE_VARIANCE, 0.99])
def test_measured_at_128(align_corners: bool, expected: tuple, variance: float) -> None:
    generator = torch.Generator().manual_seed(7)
    found = measure_upsampling(
        variance, shape=(2, 16, 128, 128), align_corners=align_corners, generator=generator
    )
    for m, ratio in zip(found, expected):
        assert m.variance_before == pytest.approx(variance, rel=0.01)
        # Half a million independent pixels: two thousandths is three standard deviations.
        assert m.variance_after / m.variance_before == pytest.approx(ratio, abs=0.002)
        assert m.mean_after == pytest.approx(m.mean_before, abs=0.002 * math.sqrt(variance))


def test_measured_away_from_borders() -> None:
    x = torch.randn(32, 1, 128, 128)
    for ratio, expected in ((2, 0.3906), (4, 0.4307), (8, 0.4410)):
        y = F.interpolate(x, scale_factor=ratio, mode='bilinear')
        inner = y[..., ratio:-ratio, ratio:-ratio]
        assert float(inner.var() / x.var()) == pytest.approx(expected, abs=0.002)


def test_chunks_measure_the_whole_feature() -> None:
    """Against the moments of the feature in one piece, drawn from the same generator."""
    (found,) = measure_upsampling(
        0.5, [2], (3, 5, 16, 12), generator=torch.Generator().manual_seed(3)
    )
    x = torch.randn(15, 1, 16, 12, generator=torch.Generator().manual_seed(3))
    x = (x * math.sqrt(0.5) + FEATURE_MEAN).double()
    y = F.interpolate(x, size=(32, 24), mode='bilinear')
    assert found.size == (16, 12)
    assert found.out_size == (32, 24)
    expected = [float(v) for t in (x, y) for v in (t.mean(), t.var(correction=0))]
    values = [found.mean_before, found.variance_before, found.mean_after, found.variance_after]
    assert values == pytest.approx(expected, rel=1e-5)


def test_memory_does_not_grow_with_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    from mmseg_fusion.analysis import upsampling

    seen = []
    interpolate = F.interpolate
    monkeypatch.setattr(
        F, 'interpolate', lambda x, *a, **k: seen.append(interpolate(x, *a, **k)) or seen[-1]
    )
    monkeypatch.setattr(upsampling, '_CHUNK', 4096)
    small = measure_upsampling(1.0, [2, 4], (2, 8, 16, 16), generator=torch.Generator())
    large = measure_upsampling(1.0, [2, 4], (8, 8, 16, 16), generator=torch.Generator())
    assert max(y.numel() for y in seen) == 4096
    assert sum(y.numel() for y in seen) == (16 + 64) * 256 * (4 + 16)
    assert small[1].variance_after == pytest.approx(large[1].variance_after, rel=0.1)


# --- theorem 3.2 -------------------------------------------------------------------------------

values = st.floats(-100, 100, allow_nan=False, width=32)
maps = arrays.arrays(np.float64, st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=values)


@given(x=maps, ratio=st.tuples(st.integers(1, 5), st.integers(1, 5)))
def test_whole_ratio_conserves_the_mean_of_every_map(x: np.ndarray, ratio: tuple[int, int]) -> None:
    y = upsample(x, (x.shape[0] * ratio[0], x.shape[1] * ratio[1]))
    assert y.mean() == pytest.approx(x.mean(), rel=1e-9, abs=1e-9)


@settings(max_examples=300)
@given(x=maps, ratio=st.integers(2, 6))
def test_whole_ratio_lowers_the_variance_of_every_map(x: np.ndarray, ratio: int) -> None:
    """Theorem 3.2 as it is stated, whatever the map."""
    assume(np.ptp(x) > 1e-3)
    y = upsample(x, (x.shape[0] * ratio, x.shape[1] * ratio))
    assert y.var() < x.var()


@given(value=values, ratio=st.integers(2, 6), align_corners=st.booleans())
def test_constant_maps_stay(value: float, ratio: int, align_corners: bool) -> None:
    x = np.full((4, 3), value)
    y = upsample(x, (4 * ratio, 3 * ratio), align_corners)
    np.testing.assert_allclose(y, value, rtol=1e-12, atol=1e-12)


def largest_ratio(size: int, out_size: int, align_corners: bool) -> tuple[float, np.ndarray]:
    """The line of pixels whose variance grows most, and by which factor: an eigenvalue problem."""
    a = interpolation_matrix(size, out_size, align_corners)
    centred = a - a.mean(0)
    basis = np.linalg.qr(np.hstack([np.ones((size, 1)), np.eye(size)[:, 1:]]))[0][:, 1:]
    factors, lines = np.linalg.eigh(basis.T @ centred.T @ centred @ basis * (size / out_size))
    return float(factors[-1]), basis @ lines[:, -1]


@pytest.mark.parametrize('ratio', [2, 3, 4, 8])
@pytest.mark.parametrize('size', [2, 3, 8, 33, 64])
def test_no_line_gains_variance_at_a_whole_ratio(size: int, ratio: int) -> None:
    """Over all maps at once: the largest possible factor is below 1."""
    assert largest_ratio(size, size * ratio, align_corners=False)[0] < 1


@pytest.mark.parametrize(
    ('size', 'out_size', 'align_corners', 'factor'),
    [
        (35, 45, False, 1.0124),
        (14, 18, False, 1.0066),
        (31, 46, True, 1.0256),
        (16, 32, True, 1.007),
    ],
)
def test_theorem_has_exceptions_elsewhere(
    size: int, out_size: int, align_corners: bool, factor: float
) -> None:
    """A fractional ratio, or aligned corners: these maps gain variance under upsampling."""
    found, line = largest_ratio(size, out_size, align_corners)
    assert found == pytest.approx(factor, abs=5e-4)
    x = np.repeat(line[:, None], size, axis=1)
    y = upsample(x, (out_size, out_size), align_corners)
    assert y.var() / x.var() == pytest.approx(found, rel=1e-9)
    assert y.var() > x.var()


def test_exceptions_stay_small() -> None:
    """What the module's docstring says of sizes up to 40 and ratios up to 4."""
    largest = {False: 0.0, True: 0.0}
    for align_corners in largest:
        for size in range(2, 41):
            for out_size in range(size + 1, 4 * size + 1):
                factor = largest_ratio(size, out_size, align_corners)[0]
                largest[align_corners] = max(largest[align_corners], factor)
    assert largest[False] == pytest.approx(1.0124, abs=1e-4)
    assert largest[True] == pytest.approx(1.0256, abs=1e-4)


@pytest.mark.parametrize(('size', 'out_size', 'align_corners'), [(8, 13, False), (8, 16, True)])
def test_mean_of_a_map_moves_elsewhere(size: int, out_size: int, align_corners: bool) -> None:
    x = np.zeros((size, size))
    x[0] = 1.0
    y = upsample(x, (out_size, out_size), align_corners)
    assert abs(y.mean() - x.mean()) > 0.01 * x.mean()


@given(
    size=st.tuples(st.integers(1, 12), st.integers(2, 12)),
    more=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    align_corners=st.booleans(),
    num_maps=st.none() | st.integers(1, 5),
)
def test_expected_variance_falls_at_every_ratio(
    size: tuple[int, int], more: tuple[int, int], align_corners: bool, num_maps: int | None
) -> None:
    """Theorem 3.2 for independent pixels: in expectation, both modes, any enlargement."""
    out_size = (size[0] + more[0], size[1] + more[1])
    assert 0 < variance_ratio(size, out_size, align_corners, num_maps) < 1


@given(size=st.integers(1, 12), out_size=st.integers(1, 40), align_corners=st.booleans())
def test_expected_mean_stays_at_every_pixel(size: int, out_size: int, align_corners: bool) -> None:
    """Weights of every output pixel sum to 1."""
    rows = interpolation_matrix(size, out_size, align_corners)
    np.testing.assert_allclose(rows.sum(1), 1, rtol=1e-12)
