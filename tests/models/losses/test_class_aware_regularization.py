"""CAR's three losses: the authors' code, the equations as loops, finite differences, hard input."""

from __future__ import annotations

import copy
import math
import pickle
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmengine.runner import load_checkpoint, save_checkpoint
from mmseg.registry import MODELS
from torch import Tensor

from mmseg_fusion.models.losses import ClassAwareRegularization
from mmseg_fusion.models.losses.class_aware_regularization import class_sums, resample_label

GOLDEN = Path(__file__).parents[2] / 'data' / 'golden'
NAMES = ('intra_c2p', 'inter_c2c', 'inter_c2p')
IGNORED = 255


def build(num_classes: int, **kwargs) -> ClassAwareRegularization:
    return MODELS.build(dict(type='ClassAwareRegularization', num_classes=num_classes, **kwargs))


def values(losses: dict[str, Tensor]) -> list[float]:
    assert list(losses) == [f'loss_car_{name}' for name in NAMES]
    return [losses[f'loss_car_{name}'].item() for name in NAMES]


def gradients(losses: dict[str, Tensor], feat: Tensor) -> list[Tensor]:
    return [torch.autograd.grad(loss, feat, retain_graph=True)[0] for loss in losses.values()]


def scene(n=2, channels=4, size=(5, 3), classes=4, ignored=0.2, dtype=torch.float64):
    feat = torch.randn(n, channels, *size, dtype=dtype)
    label = torch.randint(classes, (n, *size))
    label[torch.rand(label.shape) < ignored] = IGNORED
    return feat, label


# --- the equations, one entry at a time ----------------------------------------------------------


def nearest(label: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Corner pixels aligned, halves up; a single cell takes the first."""

    def places(old: int, new: int) -> list[int]:
        step = Fraction(old - 1, new - 1) if new > 1 else Fraction(0)
        return [math.floor(i * step + Fraction(1, 2)) for i in range(new)]

    rows, columns = (places(o, n) for o, n in zip(label.shape[1:], size))
    return label[:, rows][:, :, columns]


def naive(
    moving: np.ndarray,
    still: np.ndarray,
    label: np.ndarray,
    classes: int,
    inter_c2c_margin=0.5,
    inter_c2p_margin=0.25,
    centers='batch',
    reduction='squared_mean',
    count_ignored=True,
    count_absent=True,
    scale_c2p=True,
) -> list[float]:
    """Equations 4.1 to 4.14 on (N, C, H, W) and (N, H, W) of the same size, in float64.

    ``still`` holds the same features as ``moving``: what the authors shield from the gradient is
    computed from it, so that finite differences in ``moving`` are the gradient meant.
    """
    n, channels, height, width = moving.shape
    places = [(i, j) for i in range(height) for j in range(width)]

    def center(x: np.ndarray, image: int, k: int) -> np.ndarray | None:
        images = range(n) if centers == 'batch' else [image]
        own = [x[m, :, i, j] for m in images for i, j in places if label[m, i, j] == k]
        return np.mean(own, axis=0) if own else None

    def reduce(entries: list[float]) -> float:
        if not entries:
            return 0.0
        if reduction == 'mean_squared':
            return float(np.mean(np.square(entries)))
        return float(np.mean(entries)) ** 2

    def others(energies: dict[int, float], own: int, margin: float) -> float:
        top = max(energies.values())
        weights = {k: math.exp(e - top) for k, e in energies.items()}
        total = sum(weights.values())
        if len(energies) == 1:
            return 1e-7
        threshold = margin / (len(energies) - 1)
        excess = sum(max(w / total - threshold, 0) for k, w in weights.items() if k != own)
        return min(max(excess, 1e-7), 1 - 1e-7)

    mu = {
        (m, k): (center(moving, m, k), center(still, m, k))
        for m in range(n)
        for k in range(classes)
    }
    counted = {
        m: [k for k in range(classes) if count_absent or mu[m, k][0] is not None] for m in range(n)
    }
    zero = np.zeros(channels)
    mu = {key: tuple(zero if x is None else x for x in pair) for key, pair in mu.items()}

    intra, rows, pixels = [], [], []
    for m in range(n):
        for i, j in places:
            y, x = label[m, i, j], moving[m, :, i, j]
            if y == IGNORED:
                if count_ignored:
                    intra += [0.0] * channels
            else:
                intra += list(np.abs(mu[m, y][1] - x))
            if y == IGNORED and not count_ignored:
                continue
            energies = {}
            for k in counted[m]:
                fixed = mu[m, k][1]
                energies[k] = float(fixed @ (fixed if k == y else x))
                if scale_c2p:
                    energies[k] /= math.sqrt(channels)
            pixels.append(others(energies, y, inter_c2p_margin) if energies else 1e-7)
    for m in range(n if centers == 'image' else 1):
        for a in counted[m]:
            energies = {
                b: float(mu[m, a][0] @ mu[m, b][1]) / math.sqrt(channels) for b in counted[m]
            }
            rows.append(others(energies, a, inter_c2c_margin))
    return [max(reduce(intra), 1e-5), reduce(rows), reduce(pixels)]


# --- golden --------------------------------------------------------------------------------------


def golden(case: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f'car_{case}.npz') as file:
        return dict(file)


CASES = ('a_base', 'd_pool2', 'e2_structured', 'g_all_ignored_img_batchcenters')


@pytest.mark.stack
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=['float32', 'float64'])
@pytest.mark.parametrize('case', CASES)
def test_authors_losses_and_gradients(case, dtype):
    data = golden(case)
    loss = build(
        int(data['num_classes']), ignore_index=int(data['ignore_label']), pool=int(data['pool'])
    )
    feat = torch.from_numpy(data['features']).permute(0, 3, 1, 2).to(dtype).requires_grad_()
    losses = loss(feat, torch.from_numpy(data['label_full']))
    prefix, rtol = ('loss64', 1e-12) if dtype == torch.float64 else ('loss', 1e-5)
    for name, value, gradient in zip(NAMES, values(losses), gradients(losses, feat)):
        np.testing.assert_allclose(value, data[f'{prefix}_{name}'], rtol=rtol, atol=1e-7 * rtol)
        expected = torch.from_numpy(data[f'grad_{name}']).permute(0, 3, 1, 2).to(dtype)
        torch.testing.assert_close(
            gradient, expected, rtol=0, atol=3e-5 * expected.abs().max().item()
        )


@pytest.mark.parametrize('case', CASES)
def test_authors_labels_and_centres(case):
    data = golden(case)
    full = torch.from_numpy(data['label_full']).long()
    head = resample_label(full, data['features'].shape[1:3])
    np.testing.assert_array_equal(head, data['label_head'])
    used = resample_label(head, data['label_used'].shape[1:])
    np.testing.assert_array_equal(used, data['label_used'])

    x = torch.from_numpy(data.get('features_pooled', data['features'])).flatten(1, 2)
    classes = int(data['num_classes'])
    index = used.flatten(1).masked_fill(used.flatten(1) == IGNORED, classes)
    sums = class_sums(x.transpose(1, 2), index, classes)
    counts = torch.from_numpy(data['counts'])
    assert torch.equal(torch.stack([(index == k).sum(1) for k in range(classes)], 1), counts.long())
    centers = sums.sum(0) / counts.sum(0).clamp_min(1)[:, None]
    torch.testing.assert_close(centers, torch.from_numpy(data['centers'][0]), rtol=1e-5, atol=1e-6)


def test_the_thesis_mean_of_squares_on_the_authors_input():
    data = golden('a_base')
    feat = torch.from_numpy(data['features']).permute(0, 3, 1, 2)
    label = torch.from_numpy(data['label_full'])
    squared_mean = build(5)(feat, label)['loss_car_intra_c2p'].item()
    mean_squared = build(5, reduction='mean_squared')(feat, label)['loss_car_intra_c2p'].item()
    assert (round(squared_mean, 4), round(mean_squared, 4)) == (0.5215, 0.8749)


# --- the equations -------------------------------------------------------------------------------

OPTIONS = {
    'default': dict(),
    'thesis': dict(reduction='mean_squared', scale_c2p=False),
    'image centres': dict(centers='image'),
    'image centres, present only': dict(centers='image', count_absent=False),
    'present only': dict(count_absent=False),
    'known only': dict(count_ignored=False),
    'known and present, mean of squares': dict(
        count_ignored=False, count_absent=False, reduction='mean_squared'
    ),
    'margins': dict(inter_c2c_margin=0.25, inter_c2p_margin=0.0),
    'margin 0, present only': dict(inter_c2c_margin=0.0, count_absent=False),
}


@pytest.mark.parametrize('options', OPTIONS.values(), ids=OPTIONS)
def test_equations(options):
    # Class 5 is absent from the batch, others from an image.
    feat, label = scene(n=3, size=(3, 4), classes=5)
    label[0] = label[0].where(label[0] != 1, torch.tensor(2))
    expected = naive(feat.numpy(), feat.numpy(), label.numpy(), 6, **options)
    found = values(build(6, **options)(feat, label))
    np.testing.assert_allclose(found, expected, rtol=1e-10)


@pytest.mark.parametrize('options', OPTIONS.values(), ids=OPTIONS)
def test_gradients_are_finite_differences(options):
    feat, label = scene(channels=2, size=(3, 4), classes=3)
    feat.requires_grad_()
    found = gradients(build(4, **options)(feat, label), feat)
    still, label = feat.detach().numpy(), label.numpy()
    expected, step = np.zeros((3, *still.shape)), 1e-6
    for place in np.ndindex(still.shape):
        ends = []
        for sign in (1, -1):
            moving = still.copy()
            moving[place] += sign * step
            ends.append(np.array(naive(moving, still, label, 4, **options)))
        expected[(slice(None), *place)] = (ends[0] - ends[1]) / (2 * step)
    assert np.abs(expected).max((1, 2, 3, 4)).min() > 1e-4, 'a loss is flat here: nothing is tested'
    for f, e in zip(found, expected):
        np.testing.assert_allclose(f, e, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize('name', ['intra_c2p', 'inter_c2p'])
def test_gradcheck_with_fixed_centres(name):
    loss = build(3)
    feat, label = scene(channels=3, size=(2, 3), classes=3)
    index = label.flatten(1).masked_fill(label.flatten(1) == IGNORED, 3)
    centers, present = loss._centers(feat.flatten(2), index)
    x = feat.flatten(2).requires_grad_()
    if name == 'intra_c2p':
        assert torch.autograd.gradcheck(lambda x: loss._intra_c2p(x, index, centers), (x,))
    else:
        assert torch.autograd.gradcheck(lambda x: loss._inter_c2p(x, index, centers, present), (x,))


@settings(max_examples=40)
@given(
    data=st.data(),
    n=st.integers(1, 3),
    channels=st.integers(1, 4),
    size=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    label_size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    classes=st.integers(1, 5),
    centers=st.sampled_from(['batch', 'image']),
    count_absent=st.booleans(),
    count_ignored=st.booleans(),
)
def test_any_shape(
    data, n, channels, size, label_size, classes, centers, count_absent, count_ignored
):
    ids = st.sampled_from([*range(classes), IGNORED])
    number = n * label_size[0] * label_size[1]
    label = data.draw(st.lists(ids, min_size=number, max_size=number))
    label = np.array(label).reshape(n, *label_size)
    seed = data.draw(st.integers(0, 2**31))
    feat = np.random.default_rng(seed).normal(size=(n, channels, *size))
    options = dict(centers=centers, count_absent=count_absent, count_ignored=count_ignored)
    loss, x = build(classes, **options), torch.from_numpy(feat).requires_grad_()
    losses = loss(x, torch.from_numpy(label))
    expected = naive(feat, feat, nearest(label, size), classes, **options)
    np.testing.assert_allclose(values(losses), expected, rtol=1e-9, atol=1e-13)
    assert all(g.isfinite().all() for g in gradients(losses, x))


@settings(max_examples=200)
@given(
    old=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    new=st.tuples(st.integers(1, 70), st.integers(1, 70)),
)
def test_labels_of_any_size(old, new):
    label = np.arange(2 * old[0] * old[1]).reshape(2, *old)
    found = resample_label(torch.from_numpy(label), new)
    np.testing.assert_array_equal(found, nearest(label, new))


def test_names_of_classes_do_not_matter():
    feat, label = scene(classes=5)
    order = torch.tensor([3, 0, 4, 1, 2])
    renamed = label.where(label == IGNORED, order[label.clamp_max(4)])
    np.testing.assert_allclose(
        values(build(5)(feat, label)), values(build(5)(feat, renamed)), rtol=1e-12
    )


@pytest.mark.parametrize('classes', [1, 2, 7])
def test_sums_are_the_same_either_way(classes):
    x, label = scene(n=3, classes=classes)
    x, index = (
        x.flatten(2).requires_grad_(),
        label.flatten(1).masked_fill(label.flatten(1) == IGNORED, classes),
    )
    weight = torch.randn(3, classes, 4, dtype=torch.float64)
    found = {}
    for way in ('scatter', 'one_hot'):
        sums = class_sums(x, index, classes, way)
        found[way] = sums, torch.autograd.grad((sums * weight).sum(), x)[0]
        assert torch.autograd.gradcheck(lambda x, way=way: class_sums(x, index, classes, way), (x,))
    for a, b in zip(*found.values()):
        torch.testing.assert_close(a, b)


# --- hard input ----------------------------------------------------------------------------------


@pytest.mark.parametrize('options', OPTIONS.values(), ids=OPTIONS)
def test_nothing_but_ignored_pixels(options):
    feat, label = scene()
    feat.requires_grad_()
    losses = build(4, **options)(feat, torch.full_like(label, IGNORED))
    assert losses['loss_car_intra_c2p'].item() == pytest.approx(1e-5)
    assert all(math.isfinite(value) for value in values(losses))
    assert not any(gradient.any() for gradient in gradients(losses, feat))


@pytest.mark.parametrize('options', OPTIONS.values(), ids=OPTIONS)
def test_one_class_only(options):
    feat, label = scene()
    feat.requires_grad_()
    losses = build(4, **options)(feat, torch.full_like(label, 2))
    assert all(math.isfinite(value) for value in values(losses))
    assert all(gradient.isfinite().all() for gradient in gradients(losses, feat))
    assert gradients(losses, feat)[0].any()


@pytest.mark.parametrize('ignored', [0.0, 0.5])
def test_a_single_class_has_no_others(ignored):
    feat, label = scene(classes=1, ignored=ignored)
    feat.requires_grad_()
    losses = build(1)(feat, label)
    intra, c2c, c2p = values(losses)
    assert intra > 1e-3
    assert [c2c, c2p] == pytest.approx([1e-14, 1e-14], rel=1e-6, abs=0)
    assert not any(gradient.any() for gradient in gradients(losses, feat)[1:])


def test_batch_of_one_and_map_of_one_cell():
    for size in ((5, 3), (1, 1)):
        feat, label = scene(n=1, size=size, ignored=0)
        feat.requires_grad_()
        losses = build(4)(feat, label)
        assert all(math.isfinite(value) for value in values(losses))
        assert all(gradient.isfinite().all() for gradient in gradients(losses, feat))


@pytest.mark.parametrize('wrong', [4, 7, -1, 254])
def test_label_that_is_no_class(wrong):
    feat, label = scene()
    label[1, 2, 0] = wrong
    with pytest.raises(ValueError, match=rf'label {wrong} .*0 to 3.*ignore_index=255.*num_classes'):
        build(4)(feat, label)
    build(4, ignore_index=wrong)(feat, label.where(label != IGNORED, torch.tensor(wrong)))


def test_label_that_is_no_class_is_found_where_it_is_not_sampled():
    label = torch.zeros(1, 9, 9, dtype=torch.long)
    label[0, 1, 1] = 9
    assert not (resample_label(label, (3, 3)) == 9).any()
    with pytest.raises(ValueError, match='label 9 '):
        build(4)(torch.randn(1, 2, 3, 3), label)


def test_ignore_index_may_be_a_number_among_the_classes():
    feat, label = scene(classes=4, ignored=0)
    found = values(build(4, ignore_index=0)(feat, label))
    expected = values(build(4)(feat, label.where(label != 0, torch.tensor(IGNORED))))
    assert found == expected


@pytest.mark.parametrize(
    ('feat', 'label', 'message'),
    [
        ((2, 4, 3), (2, 3, 3), r'feat must be \(N, C, H, W\)'),
        ((2, 4, 0, 3), (2, 3, 3), 'not empty'),
        ((2, 4, 3, 3), (3, 3, 3), r'N=2 .*got \(3, 3, 3\)'),
        ((2, 4, 3, 3), (2, 2, 3, 3), r'got \(2, 2, 3, 3\)'),
        ((2, 4, 3, 3), (2, 9), r'got \(2, 9\)'),
    ],
)
def test_shapes_that_do_not_fit(feat, label, message):
    with pytest.raises(ValueError, match=message):
        build(4)(torch.randn(feat), torch.zeros(label, dtype=torch.long))


def test_label_with_a_channel_and_labels_of_any_integer_type():
    feat, label = scene()
    expected = values(build(4)(feat, label))
    assert values(build(4)(feat, label[:, None])) == expected
    for dtype in (torch.uint8, torch.int16, torch.int32):
        assert values(build(4)(feat, label.to(dtype))) == expected
    with pytest.raises(ValueError, match=r'integers, got torch\.float32'):
        build(4)(feat, label.float())


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(num_classes=0), 'num_classes'),
        (dict(pool=0), 'pool'),
        (dict(pool=1.5), 'pool'),
        (dict(intra_c2p_weight=-1.0), 'intra_c2p_weight'),
        (dict(inter_c2c_margin=math.inf), 'inter_c2c_margin'),
        (dict(inter_c2p_margin=-0.1), 'inter_c2p_margin'),
        (dict(centers='class'), r"centers must be one of .*'image'"),
        (dict(reduction='mean'), r"reduction must be one of .*'mean_squared'"),
        (dict(moving_average=1.0, channels=4), 'moving_average'),
        (dict(moving_average=0.9), 'set channels'),
        (dict(moving_average=0.9, channels=4, centers='image'), "centers='batch'"),
        (
            dict(intra_c2p_weight=0, inter_c2c_weight=0, inter_c2p_weight=0),
            'car.loss=None',
        ),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        ClassAwareRegularization(**{'num_classes': 4, **options})


def test_channels_are_checked():
    feat, label = scene(channels=4)
    with pytest.raises(ValueError, match='feat has 4 channels, but channels=6'):
        build(4, channels=6)(feat, label)


# --- large maps ----------------------------------------------------------------------------------


@pytest.mark.parametrize('way', ['scatter', 'one_hot'])
def test_sums_of_a_large_map_keep_their_digits(way):
    """A million float32 numbers added one after the other are 1e-2 off."""
    side, kept = 1024, 1024 * 1024 - 3
    x = torch.full((1, 2, side * side), 0.1)
    index = torch.zeros(1, side * side, dtype=torch.long)
    index[0, kept:] = 2  # of no class
    index[0, 5::7] = 1
    sums = class_sums(x, index, 2, way).double()
    counts = torch.stack([(index == k).sum() for k in range(2)])
    expected = torch.tensor(0.1).double() * counts
    assert sums.shape == (1, 2, 2)
    assert ((sums / expected[:, None] - 1).abs() < 3e-5).all()


@pytest.mark.parametrize('way', ['scatter', 'one_hot'])
@pytest.mark.parametrize('pixels', [1023, 1024, 1025, 8191, 8193, 20000])
def test_sums_over_parts_are_those_of_the_whole(way, pixels):
    x = torch.randn(2, 3, pixels, dtype=torch.float64, requires_grad=True)
    index = torch.randint(6, (2, pixels))
    sums = class_sums(x, index, 5, way)
    member = (index[:, None] == torch.arange(5)[:, None]).double()
    torch.testing.assert_close(sums, member @ x.transpose(1, 2))
    weight = torch.randn_like(sums)
    (gradient,) = torch.autograd.grad((sums * weight).sum(), x)
    torch.testing.assert_close(gradient, weight.transpose(1, 2) @ member)


# --- precision -----------------------------------------------------------------------------------


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('size', [1.0, 3e4])
def test_half_precision_counts_in_float32(dtype, size):
    feat, label = scene(n=2, channels=64, size=(17, 13), dtype=torch.float32)
    half = (size * feat.clamp(-2, 2)).to(dtype)
    full, half = half.float().requires_grad_(), half.requires_grad_()
    expected = build(4)(full, label)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        found = build(4)(half, label)
    assert all(loss.dtype == torch.float32 for loss in found.values())
    assert values(found) == values(expected)
    for f, e in zip(gradients(found, half), gradients(expected, full)):
        assert f.isfinite().all()
        assert torch.equal(f, e.to(dtype))


def test_autocast_of_a_whole_layer():
    layer = torch.nn.Conv2d(4, 8, 1)
    feat, label = scene(dtype=torch.float32)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        losses = build(4)(layer(feat), label)
    sum(losses.values()).backward()
    assert layer.weight.grad.isfinite().all()
    assert layer.weight.grad.any()


# --- options -------------------------------------------------------------------------------------


def test_weights_are_factors_and_zero_leaves_a_loss_out():
    feat, label = scene()
    plain = build(4)(feat, label)
    for name in NAMES:
        key = f'loss_car_{name}'
        tripled = build(4, **{f'{name}_weight': 3.0})(feat, label)
        expected = {k: v * (3 if k == key else 1) for k, v in plain.items()}
        torch.testing.assert_close(tripled, expected)
        without = build(4, **{f'{name}_weight': 0.0})(feat, label)
        assert without == {k: v for k, v in plain.items() if k != key}


def test_pooling_averages_features_and_resamples_labels():
    feat, label = scene(size=(5, 4))
    pooled = torch.stack(
        [
            feat[:, :, i : i + 2, j : j + 2].mean((2, 3))
            for i in range(0, 5, 2)
            for j in range(0, 4, 2)
        ],
        dim=2,
    ).view(2, 4, 3, 2)
    sampled = label[:, ::2][:, :, [0, 3]]
    np.testing.assert_allclose(
        values(build(4, pool=2)(feat, label)), values(build(4)(pooled, sampled)), rtol=1e-12
    )


def test_moving_average_tracks_the_centres_of_present_classes():
    decay, expected = 0.9, np.zeros((4, 3))
    loss = build(4, moving_average=decay, channels=3)
    # The last batch lacks a class that has been seen; class 3 never comes.
    for present in (3, 3, 2):
        feat, label = scene(channels=3, classes=present)
        losses = loss(feat, label)
        pixels = {k: feat.movedim(1, -1)[label == k].numpy() for k in range(present)}
        for k, own in pixels.items():
            expected[k] = decay * expected[k] + (1 - decay) * own.mean(0)
    assert expected[2].all()
    np.testing.assert_allclose(loss.moving_centers, expected, rtol=1e-6, atol=1e-7)
    distance = sum(np.abs(expected[k] - own).sum() for k, own in pixels.items())
    assert losses['loss_car_intra_c2p'].item() == pytest.approx(
        (distance / feat.numel()) ** 2, rel=1e-5
    )


def test_moving_average_stays_in_eval_mode():
    loss = build(4, moving_average=0.9, channels=4)
    loss(*scene())
    kept = loss.moving_centers.clone()
    loss.eval()
    found = loss(*scene())
    assert torch.equal(loss.moving_centers, kept)
    assert all(math.isfinite(value) for value in values(found))


def test_gradient_of_the_moving_average():
    feat, label = scene()
    feat.requires_grad_()
    authors = build(4, moving_average=0.9, channels=4)(feat, label)
    assert not authors['loss_car_inter_c2c'].requires_grad
    assert authors['loss_car_intra_c2p'].requires_grad
    ours = build(4, moving_average=0.9, channels=4, moving_average_gradient=True)(feat, label)
    assert ours['loss_car_inter_c2c'] == authors['loss_car_inter_c2c']
    (gradient,) = torch.autograd.grad(ours['loss_car_inter_c2c'], feat)
    assert gradient.any()


def test_state_is_the_moving_average_alone(tmp_path):
    assert not build(4).state_dict()
    loss = build(4, moving_average=0.9, channels=4)
    loss(*scene())
    save_checkpoint(dict(state_dict=loss.state_dict()), str(tmp_path / 'saved.pth'))
    other = build(4, moving_average=0.9, channels=4)
    load_checkpoint(other, str(tmp_path / 'saved.pth'), strict=True)
    assert list(loss.state_dict()) == ['moving_centers']
    assert torch.equal(other.moving_centers, loss.moving_centers)


# --- surroundings --------------------------------------------------------------------------------


@pytest.mark.parametrize('options', [dict(), dict(moving_average=0.9, channels=4)])
def test_copies_and_pickles_after_use(options):
    loss = build(4, **options)
    feat, label = scene()
    feat.requires_grad_()
    sum(loss(feat, label).values()).backward()
    twins = copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))
    expected = values(loss(feat, label))
    for twin in twins:
        assert values(twin(feat, label)) == expected


def test_feature_and_label_are_left_alone():
    feat, label = scene()
    before = feat.clone(), label.clone()
    build(4)(feat.requires_grad_(), label)
    assert torch.equal(feat, before[0])
    assert torch.equal(label, before[1])


def test_compiles():
    feat, label = scene()
    loss = build(4)
    torch._dynamo.reset()
    compiled = torch.compile(loss, backend='eager')
    one, two = feat.clone().requires_grad_(), feat.clone().requires_grad_()
    expected, found = loss(one, label), compiled(two, label)
    np.testing.assert_allclose(values(found), values(expected), rtol=1e-12)
    for f, e in zip(gradients(found, two), gradients(expected, one)):
        torch.testing.assert_close(f, e)


def test_memory_formats_and_views_give_the_same():
    feat, label = scene(size=(6, 4))
    expected = values(build(4)(feat, label))
    for other in (
        feat.contiguous(memory_format=torch.channels_last),
        torch.cat([feat, feat], dim=3)[..., :4],
    ):
        np.testing.assert_allclose(values(build(4)(other, label)), expected, rtol=1e-12)


@pytest.mark.gpu
def test_cuda_gives_the_same_twice_and_what_the_cpu_gives():
    feat, label = scene(n=4, channels=64, size=(33, 33), classes=19, dtype=torch.float32)
    loss = build(19)
    cpu = feat.clone().requires_grad_()
    expected = loss(cpu, label)
    torch.use_deterministic_algorithms(True)
    try:
        runs = []
        for _ in range(2):
            gpu = feat.cuda().requires_grad_()
            found = loss(gpu, label.cuda())
            runs.append([*values(found), *gradients(found, gpu)])
    finally:
        torch.use_deterministic_algorithms(False)
    np.testing.assert_allclose(runs[0][:3], values(expected), rtol=1e-4)
    for a, b, e in zip(runs[0][3:], runs[1][3:], gradients(expected, cpu)):
        assert torch.equal(a, b)
        torch.testing.assert_close(a.cpu(), e, rtol=1e-3, atol=1e-4 * e.abs().max().item())


@pytest.mark.gpu
def test_cuda_label_that_is_no_class_is_found_in_the_first_call():
    feat, label = scene(dtype=torch.float32)
    label[0, 0, 0] = 9
    with pytest.raises(ValueError, match='label 9 '):
        build(4)(feat.cuda(), label.cuda())
