"""Gates of GFF: against equation 5 written out, hand-made gates, and what is drawn of them."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from torch import Tensor, nn

from mmseg_fusion.analysis.gate_maps import (
    Gate,
    GateMaps,
    check_levels,
    draw_gate_maps,
    find_gates,
    gate_maps,
    gate_rows,
    level_names,
    spoiled,
    zero_gate,
)
from mmseg_fusion.analysis.layer_features import DataInfo, InputError, Observation, Placement
from tests.testers.toys import segmentor_config

CHANNELS, CLASSES = [8, 12, 16], 4
BACKBONE = dict(type='TinyPyramid', channels=CHANNELS, strides=(4, 8, 16))
CONTEXT = dict(type='PSPHead', channels=6, pool_scales=(1, 2))
INFO = DataInfo(
    classes=('a', 'b', 'c', 'd'),
    palette=((200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 0)),
    ignore_index=255,
    label_map=None,
    reduce_zero_label=False,
    suffixes=('.jpg', '.png'),
)


def segmentor(divisor: int = 1, neck: dict | None = None, **head) -> nn.Module:
    """A segmentor with a GFFHead, or with the fusion as its neck, that predicts every class."""
    common = dict(num_classes=CLASSES, norm_cfg=dict(type='BN'), **head)
    if 'type' not in head:
        common.update(type='GFFHead', in_channels=CHANNELS, channels=8, context=CONTEXT)
    cfg = segmentor_config(common, BACKBONE).model
    cfg.neck = neck
    cfg.data_preprocessor.test_cfg = dict(size_divisor=divisor)
    model = MODELS.build(cfg)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=(3 / module.weight[0].numel()) ** 0.5)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias, std=0.5)
    return model.eval()


def batch(height: int = 45, width: int = 70, label: Tensor | None = None) -> dict:
    torch.manual_seed(height * width)
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    shape = (height, width)
    sample = SegDataSample(
        metainfo=dict(ori_shape=shape, img_shape=shape, pad_shape=shape, img_path='a/b.png')
    )
    if label is not None:
        sample.gt_sem_seg = PixelData(data=label[None])
    return dict(inputs=[image], data_samples=[sample])


def logits(model: nn.Module, data: dict) -> Tensor:
    prepared = model.data_preprocessor(copy.deepcopy(data), False)
    metas = [sample.metainfo for sample in prepared['data_samples']]
    with torch.no_grad():
        return model.encode_decode(prepared['inputs'], metas)


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def equation_5(fusion: nn.Module, inputs: list[Tensor], zero: int) -> list[Tensor]:
    """The fused levels, refined, where gate number ``zero`` is 0: sender by sender, in float64."""
    fusion = copy.deepcopy(fusion).double()
    levels = [reduce(x.double()) for reduce, x in zip(fusion.reduce, inputs)]
    gates = []
    for i, (gate, x) in enumerate(zip(fusion.gates, inputs), 1):
        value = 1 / (1 + torch.exp(-F.conv2d(x.double(), gate[0].weight, gate[0].bias)))
        gates.append(value * 0 if i == zero else value)
    outs = []
    for own, (x, gate) in enumerate(zip(levels, gates)):
        total = (1 + gate) * x
        for i, (sender, other) in enumerate(zip(levels, gates)):
            if i != own:
                sent = F.interpolate(other * sender, x.shape[2:], mode='bilinear')
                total = total + (1 - gate) * sent
        outs.append(fusion.refine[own](total))
    return outs


@pytest.mark.stack
@pytest.mark.parametrize('gate', ['map', 'channel'])
def test_a_gate_of_zero_is_equation_5_without_it(gate: str) -> None:
    model, data = segmentor(neck=None), batch()
    model.decode_head.neck = MODELS.build(
        dict(type='GatedFullyFusion', in_channels=CHANNELS, channels=8, gate=gate)
    ).eval()
    fusion = model.decode_head.neck
    nn.init.normal_(fusion.gates[1][0].weight, std=2)
    inputs = model.data_preprocessor(copy.deepcopy(data), False)['inputs']
    with torch.no_grad():
        features = list(model.extract_feat(inputs))
        before = fusion(features)
        for level in (1, 2, 3):
            with zero_gate(fusion, level):
                outs = fusion(features)
            for out, expected in zip(outs, equation_5(fusion, features, level)):
                torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)
            assert any(not torch.allclose(out, full) for out, full in zip(outs, before))
        # No number sets nothing to 0: the reference is that of the full equation.
        for out, expected in zip(before, equation_5(fusion, features, 0)):
            torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.stack
def test_predictions_without_a_gate() -> None:
    label = torch.randint(CLASSES, (45, 70))
    model, data = segmentor(), batch(label=label)
    found = gate_maps(model, data, levels=(3, 1))
    assert list(found.zeroed) == [3, 1]
    np.testing.assert_array_equal(found.seen.prediction, logits(model, data).argmax(1)[0].numpy())
    np.testing.assert_array_equal(found.seen.label, label.numpy())
    for level, prediction in found.zeroed.items():
        other = copy.deepcopy(model)
        gate = other.decode_head.neck.gates[level - 1]
        # exp(-200) is 0 in float32.
        nn.init.zeros_(gate[0].weight)
        nn.init.constant_(gate[0].bias, -200)
        expected = logits(other, data).argmax(1)[0].numpy()
        np.testing.assert_array_equal(prediction, expected)
        assert (prediction != found.seen.prediction).any()


@pytest.mark.parametrize('divisor', [1, 32])
def test_gates_of_known_values(divisor: int) -> None:
    model = segmentor(divisor, fuse_context=True)
    fusion = model.decode_head.neck
    values = (0.1, 0.25, 0.5, 0.9)
    for gate, value in zip(fusion.gates, values):
        nn.init.zeros_(gate[0].weight)
        nn.init.constant_(gate[0].bias, math.log(value / (1 - value)))
    found = gate_maps(model, batch())
    assert found.module == 'decode_head.neck'
    assert [g.name for g in found.gates] == ['level 1', 'level 2', 'level 3', 'context']
    assert [g.stride for g in found.gates] == [4, 8, 16, 16]
    assert [g.mean for g in found.gates] == pytest.approx(values)
    assert {g.channels for g in found.gates} == {1}
    height, width = (45, 70) if divisor == 1 else (64, 96)
    for gate in found.gates:
        cells = -(-height // gate.stride), -(-width // gate.stride)
        assert gate.values.shape == gate.inside.shape == cells
        np.testing.assert_allclose(gate.values, gate.values[0, 0])
    if divisor == 32:
        # Cell centres at 2, 6, ..., of which those below 45 and 70 are in the image.
        assert found.gates[0].inside.sum() == 11 * 17
        assert found.gates[0].inside[:11, :17].all()


def test_gates_are_those_of_the_network_and_padding_does_not_count() -> None:
    model, data = segmentor(32), batch()
    fusion = model.decode_head.neck
    inputs = model.data_preprocessor(copy.deepcopy(data), False)['inputs']
    assert inputs.shape[2:] == (64, 96)
    with torch.no_grad():
        features = model.extract_feat(inputs)
        expected = [gate(x)[0, 0].numpy() for gate, x in zip(fusion.gates, features)]
    found = gate_maps(model, data)
    for gate, values in zip(found.gates, expected):
        np.testing.assert_allclose(gate.values, values, rtol=1e-5, atol=1e-6)
    assert found.gates[0].mean == pytest.approx(expected[0][:11, :17].mean(), rel=1e-5)
    assert found.gates[0].mean != pytest.approx(expected[0].mean(), rel=1e-5)


@pytest.mark.stack
def test_gates_of_channels_in_a_neck_of_the_segmentor() -> None:
    neck = dict(type='GatedFullyFusion', in_channels=CHANNELS, channels=6, gate='channel')
    model = segmentor(neck=neck, type='FCNHead', in_channels=6, in_index=0, channels=6, num_convs=1)
    bias = torch.tensor([-2.0, -1, 0, 0.5, 1, 4])
    for gate in model.neck.gates:
        nn.init.zeros_(gate[0].weight)
        gate[0].bias.data.copy_(bias)
    found = gate_maps(model, batch(), levels=[2])
    assert found.module == 'neck'
    assert [g.name for g in found.gates] == ['level 1', 'level 2', 'level 3']
    assert {g.channels for g in found.gates} == {6}
    mean = float(np.mean(1 / (1 + np.exp(-bias.numpy()))))
    assert [g.mean for g in found.gates] == pytest.approx([mean] * 3)
    assert (found.zeroed[2] != found.seen.prediction).any()


def test_looking_changes_nothing() -> None:
    model, data = segmentor(), batch()
    state = copy.deepcopy(model.state_dict())
    before = logits(model, data)
    gate_maps(model, data, levels=(1, 2, 3))
    assert hooks(model) == 0
    assert not model.training
    assert torch.equal(logits(model, data), before)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize('fail_at', [1, 2])
def test_no_hook_is_left_behind_by_an_error(fail_at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = segmentor(), []
    forward = model.decode_head.cls_seg

    def fails(feature: Tensor) -> Tensor:
        calls.append(None)
        if len(calls) == fail_at:
            raise RuntimeError('out of luck')
        return forward(feature)

    monkeypatch.setattr(model.decode_head, 'cls_seg', fails)
    with pytest.raises(RuntimeError, match='out of luck'):
        gate_maps(model, batch(), levels=(1,))
    assert len(calls) == fail_at
    assert hooks(model) == 0


def test_what_has_no_gates() -> None:
    plain = segmentor(type='FCNHead', in_channels=16, in_index=2, channels=4)
    with pytest.raises(InputError, match=r"decode head FCNHead has no gates: .*type='GFFHead'"):
        find_gates(plain)
    for fusion in ('concat', 'add', 'fpn'):
        model = segmentor()
        model.decode_head.neck = MODELS.build(
            dict(type='GatedFullyFusion', in_channels=CHANNELS, channels=4, fusion=fusion)
        )
        with pytest.raises(
            InputError,
            match=rf"its fusion is '{fusion}'; .* model\.decode_head\.neck\.fusion='gff' or",
        ):
            find_gates(model)
    with pytest.raises(InputError, match=r"'decode_head' \(--layer\) .* are: decode_head\.neck"):
        find_gates(segmentor(), 'decode_head')


def test_several_fusions_have_to_be_named() -> None:
    neck = dict(type='GatedFullyFusion', in_channels=CHANNELS, channels=6)
    model = segmentor()
    # An auxiliary head does not predict.
    model.auxiliary_head = copy.deepcopy(model.decode_head)
    assert find_gates(model) == 'decode_head.neck'
    model.neck = MODELS.build(neck)
    with pytest.raises(InputError, match=r'with --layer: decode_head\.neck, neck$'):
        find_gates(model)
    assert find_gates(model, 'neck') == 'neck'


def test_levels_that_are_not_there() -> None:
    model = segmentor(neck=None, fuse_context=True)
    assert level_names(model, 'decode_head.neck')[-1] == 'context'
    check_levels(model, 'decode_head.neck', [1, 4])
    for level in (0, 5):
        with pytest.raises(
            InputError, match=rf'--zero-gate {level}: .* 1 \(level 1\), .* 4 \(context\), or all'
        ):
            check_levels(model, 'decode_head.neck', [2, level])


def test_labels_that_do_not_fit() -> None:
    model = segmentor()
    with pytest.raises(InputError, match='is 20 x 30, but its image is 45 x 70'):
        gate_maps(model, batch(label=torch.zeros(20, 30, dtype=torch.long)))
    with pytest.raises(InputError, match='holds class 9, but there are 4 classes'):
        gate_maps(model, batch(label=torch.full((45, 70), 9)))
    assert hooks(model) == 0


def test_what_becomes_wrong() -> None:
    label = np.array([[0, 1, 2, 255]])
    before, after = np.array([[0, 1, 0, 3]]), np.array([[1, 1, 2, 2]])
    assert spoiled(before, after, label).tolist() == [[True, False, False, False]]
    assert spoiled(after, before, label).tolist() == [[False, False, True, False]]
    assert spoiled(before, after, None).tolist() == [[True, False, True, True]]


def made(
    means: list[list[float]],
    label: list[list[int]] | None,
    before: list[list[int]],
    zeroed: dict[int, list[list[int]]],
    channels: int = 1,
) -> GateMaps:
    """Gates by hand, a row of cells each, of which the last is padding."""
    prediction = np.array(before)
    size = prediction.shape
    seen = Observation(
        path='scenes/hand.png',
        image=np.full((*size, 3), 90, np.uint8),
        feature=torch.zeros(1, 1, 1),
        prediction=prediction,
        label=None if label is None else np.array(label),
        placement=Placement(size, (0, 0, *size), (size[0], size[1] + 2)),
    )
    gates = []
    for i, values in enumerate(means, 1):
        inside = np.array([[True] * (len(values) - 1) + [False]])
        gates.append(Gate(f'level {i}', 2, channels, np.array([values], np.float32), inside))
    after = {level: np.array(value) for level, value in zeroed.items()}
    return GateMaps('decode_head.neck', seen, tuple(gates), after)


def test_rows_over_images_of_different_sizes() -> None:
    first = made([[0.2, 0.4, 9], [1, 1, 9]], [[0, 1, 2, 255]], [[0, 1, 0, 3]], {2: [[1, 1, 2, 2]]})
    second = made([[0.9, 9], [0, 9]], [[3, 3]], [[3, 3]], {2: [[0, 0]]})
    rows = gate_rows([first, second])
    assert [row['gate'] for row in rows] == [1, 2]
    # By cell, not by image; padding left out.
    assert [row['mean_gate'] for row in rows] == pytest.approx([1.5 / 3, 2 / 3])
    assert (rows[0]['become_wrong'], rows[0]['become_right']) == (None, None)
    # 1 of 3 labelled pixels and 2 of 2.
    assert rows[1]['become_wrong'] == pytest.approx(3 / 5)
    assert rows[1]['become_right'] == pytest.approx(1 / 5)

    # One image without a label: what is wrong is not known of all.
    unknown = made([[0.9, 9], [0, 9]], None, [[3, 3]], {2: [[0, 3]]})
    rows = gate_rows([first, unknown])
    assert 'become_wrong' not in rows[1]
    assert (rows[0]['changed'], rows[1]['changed']) == (None, pytest.approx((3 + 1) / 6))

    ignored = made([[0.5, 9]], [[255, 255]], [[3, 3]], {1: [[0, 0]]})
    assert math.isnan(gate_rows([ignored])[0]['become_wrong'])


def patches(picture: np.ndarray, colour: tuple[int, int, int]) -> list[tuple[int, int, float]]:
    """Width, height and filled share of the large regions of an RGB colour."""
    mask = (np.abs(picture[..., ::-1].astype(int) - colour).max(2) <= 2).astype(np.uint8)
    _, _, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=4)
    return [
        (int(w), int(h), area / (w * h)) for _, _, w, h, area in stats[1:].tolist() if area > 3000
    ]


@pytest.mark.stack
def test_draws_gates_and_what_becomes_wrong(tmp_path: Path) -> None:
    label = torch.randint(CLASSES, (40, 60)).tolist()
    before = np.array(label)
    after = before.copy()
    after[:20] = (after[:20] + 1) % CLASSES
    means = [torch.rand(31).tolist(), [0.5] * 16]
    view = made(means, label, before.tolist(), {2: after.tolist()}, channels=7)
    pictures = {}
    for name, found in {
        'both': [view, view],
        'gates': [GateMaps(view.module, view.seen, view.gates, {})],
        'unlabelled': [made(means, None, before.tolist(), {1: after.tolist()})],
    }.items():
        path = tmp_path / f'{name}.png'
        draw_gate_maps(found, INFO, path, name)
        pictures[name] = cv2.imread(str(path))
    for name, images, marked in (('both', 2, 2), ('gates', 1, 0), ('unlabelled', 1, 1)):
        # The gate of 0.5 in the middle of the colours, over the image and not over its padding.
        gates = patches(pictures[name], (33, 145, 140))
        assert len(gates) == images
        assert all(w / h == pytest.approx(60 / 40, rel=0.03) and f > 0.98 for w, h, f in gates)
        # The upper half of the image is marked.
        red = patches(pictures[name], (214, 39, 40))
        assert len(red) == marked
        for (w, h, filled), (width, height, _) in zip(red, gates):
            assert (w / width, h / height) == pytest.approx((1, 0.5), rel=0.04)
            assert filled > 0.98
    assert pictures['both'].shape[0] > 2.5 * pictures['gates'].shape[0]
    # The label's column is missing.
    assert pictures['unlabelled'].shape[1] < pictures['gates'].shape[1]
    with pytest.raises(ValueError, match='at least one image'):
        draw_gate_maps([], INFO, tmp_path / 'nothing.png')
