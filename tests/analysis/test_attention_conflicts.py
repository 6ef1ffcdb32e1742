"""Conflicts of dual attention: the answers, the counts and the picture."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.structures import PixelData
from mmseg.models.utils import resize
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from PIL import Image

from mmseg_fusion.analysis.attention_conflicts import (
    CHANNEL,
    PREDICTION,
    SPATIAL,
    Conflicts,
    Example,
    branches_of,
    compare,
    conflict_map,
    draw_conflicts,
    predict_branches,
)
from tests.testers import segmentor_config

HEAD = dict(
    in_channels=64,
    in_index=3,
    channels=8,
    pam_channels=4,
    num_classes=5,
    norm_cfg=dict(type='BN'),
)


def model_of(head: str, **options):
    test_cfg = options.pop('test_cfg', {})
    cfg = segmentor_config(dict(HEAD, type=head, **options), **test_cfg)
    torch.manual_seed(3)
    model = MODELS.build(cfg.model).eval()
    for parameter in model.decode_head.parameters():
        torch.nn.init.normal_(parameter, 0, 0.5)  # answers that differ
    return model


def batch(size: tuple[int, int], original: tuple[int, int]) -> dict:
    metainfo = dict(img_shape=size, ori_shape=original, pad_shape=size)
    sample = SegDataSample(
        metainfo=metainfo, gt_sem_seg=PixelData(data=torch.zeros(1, *original, dtype=torch.long))
    )
    image = torch.randint(256, (3, *size), dtype=torch.uint8)
    return dict(inputs=[image], data_samples=[sample])


@pytest.mark.stack
@pytest.mark.parametrize(
    ('head', 'options', 'names'),
    [
        ('DAHead', {}, [SPATIAL, CHANNEL]),
        ('SequentialDualAttentionHead', {}, [CHANNEL]),
        ('SequentialDualAttentionHead', dict(order='spatial_channel'), [SPATIAL]),
    ],
)
def test_answers_are_the_heads_logits(head: str, options: dict, names: list[str]) -> None:
    model = model_of(head, **options)
    data = batch((65, 97), (51, 83))
    (answers,) = predict_branches(model, copy.deepcopy(data))
    assert list(answers) == [*names, PREDICTION]
    with torch.no_grad():
        inputs = model.data_preprocessor(copy.deepcopy(data), False)['inputs']
        prediction, *branches = model.decode_head(model.extract_feat(inputs))
    for name, logits in zip(list(answers), [*branches, prediction]):
        for size in ((65, 97), (51, 83)):
            logits = resize(logits, size=size, mode='bilinear', align_corners=False)
        np.testing.assert_array_equal(answers[name], logits[0].argmax(0).numpy())
    assert (answers[names[0]] != answers[PREDICTION]).any()


def test_sliding_windows_and_the_model_is_left_alone() -> None:
    model = model_of('DAHead', test_cfg=dict(mode='slide', crop_size=(64, 64), stride=(40, 40)))
    data = batch((90, 130), (90, 130))
    calls = []
    model.backbone.register_forward_hook(lambda *_: calls.append(1))
    (expected,) = model.test_step(copy.deepcopy(data))
    (windows,) = {len(calls)}
    assert windows > 1
    (answers,) = predict_branches(model, data)
    assert len(calls) == 2 * windows, 'features are computed once'
    np.testing.assert_array_equal(answers[PREDICTION], expected.pred_sem_seg.data[0].numpy())
    # The channel attention's logits in the prediction's place.
    forward = model.decode_head.forward
    assert 'forward' not in vars(model.decode_head)
    model.decode_head.forward = lambda inputs: forward(inputs)[2:]
    (expected,) = model.test_step(copy.deepcopy(data))
    np.testing.assert_array_equal(answers[CHANNEL], expected.pred_sem_seg.data[0].numpy())
    assert 'extract_feat' not in vars(model)


def test_other_heads_are_refused() -> None:
    head = MODELS.build(dict(type='FCNHead', in_channels=4, channels=4, num_classes=2))
    with pytest.raises(ValueError, match=r"FCNHead has no logits .*type='DAHead'"):
        branches_of(head)


def random_maps(names: list[str], seed: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    rng = np.random.default_rng(seed)
    answers = {name: rng.integers(3, size=(13, 17)) for name in [*names, PREDICTION]}
    truth = rng.integers(3, size=(13, 17))
    truth[rng.random((13, 17)) < 0.2] = 255
    return answers, truth


@pytest.mark.parametrize('names', [[SPATIAL, CHANNEL], [CHANNEL]])
@pytest.mark.parametrize('known', [True, False])
def test_counts_pixel_by_pixel(names: list[str], known: bool) -> None:
    answers, truth = random_maps(names, 0)
    expected = Conflicts()
    if known:
        expected.right = dict.fromkeys(answers, 0)
        expected.lost_by = dict.fromkeys(names, 0)
    for place in np.ndindex(*truth.shape):
        said = {name: int(answer[place]) for name, answer in answers.items()}
        if known and truth[place] == 255:
            continue
        expected.pixels += 1
        heard = [said[name] for name in names] if len(names) == 2 else list(said.values())
        expected.disagree += len(set(heard)) > 1
        if not known:
            continue
        for name, value in said.items():
            expected.right[name] += value == truth[place]
        wrong = said[PREDICTION] != truth[place]
        some = any(said[name] == truth[place] for name in names)
        expected.lost += wrong and some
        expected.gained += not wrong and not some
        for name in names:
            expected.lost_by[name] += wrong and said[name] == truth[place]
    assert compare(answers, truth if known else None) == expected
    assert expected.disagree > 0


def test_images_add_up() -> None:
    answers, truth = random_maps([SPATIAL, CHANNEL], 0)
    others, other_truth = random_maps([SPATIAL, CHANNEL], 1)
    both = {name: np.concatenate([a, others[name]]) for name, a in answers.items()}
    together = compare(both, np.concatenate([truth, other_truth]))
    assert Conflicts() + compare(answers, truth) + compare(others, other_truth) == together
    shares = together.shares()
    assert shares['lost'] == pytest.approx(100 * together.lost / together.pixels)
    parts = [shares[f'{name} right, lost'] for name in (SPATIAL, CHANNEL)]
    assert max(parts) <= shares['lost'] <= sum(parts)


def test_parallel_attentions_that_agree_can_be_overruled() -> None:
    # Both right, their sum wrong: no conflict, and lost all the same.
    one, zero = np.ones((2, 2), int), np.zeros((2, 2), int)
    counts = compare({SPATIAL: one, CHANNEL: one, PREDICTION: zero}, one)
    assert (counts.disagree, counts.lost, counts.gained) == (0, 4, 0)


def test_truth_of_another_size() -> None:
    answers, truth = random_maps([CHANNEL], 0)
    with pytest.raises(ValueError, match=r'label is 12 x 17, the prediction 13 x 17; .*pipeline'):
        compare(answers, truth[1:])


def test_everything_ignored() -> None:
    answers, truth = random_maps([CHANNEL], 0)
    shares = compare(answers, np.full_like(truth, 255)).shares()
    # The columns of the table stay.
    assert shares == dict.fromkeys(compare(answers, truth).shares(), 0.0)


def example(known: bool = True) -> Example:
    truth = np.zeros((40, 60), int)
    spatial, channel, prediction = truth.copy(), truth.copy(), truth.copy()
    channel[5:15, 10:30] = prediction[5:15, 10:30] = 1  # spatial right, overruled
    spatial[20:30, 40:50] = 2  # channel right, and it wins
    spatial[32:36, 2:10], channel[32:36, 2:10], prediction[32:36, 2:10] = 1, 2, 1
    answers = {SPATIAL: spatial, CHANNEL: channel, PREDICTION: prediction}
    image = np.full((40, 60, 3), 90, np.uint8)
    truth_or_none = truth if known else None
    return Example('a.png', image, answers, truth_or_none, compare(answers, truth_or_none))


@pytest.mark.parametrize('known', [True, False])
def test_picture(known: bool, tmp_path: Path) -> None:
    shown = example(known)
    kinds = conflict_map(shown)
    if known:
        # Solved, lost, all wrong.
        assert [(kinds == k).sum() for k in (1, 2, 3)] == [100, 200, 32]
        assert shown.rank == pytest.approx(200 / 2400)
    else:
        assert (kinds == 4).sum() == 332
        assert shown.rank == pytest.approx(332 / 2400)
    palette = [[10, 200, 10], [200, 10, 200], [10, 10, 200]]
    metainfo = dict(classes=('a', 'b', 'c'), palette=palette)
    draw_conflicts([shown, shown], metainfo, tmp_path / 'picture.png', 'title')
    picture = np.asarray(Image.open(tmp_path / 'picture.png').convert('RGB')).astype(int)

    def shown_in(colour: list[int]) -> bool:
        return bool((np.abs(picture - colour).sum(-1) < 8).mean() > 0.001)

    assert all(shown_in(colour) for colour in palette)
    assert shown_in([214, 39, 40]) is known
    assert shown_in([235, 140, 30]) is not known
    # Six columns with truth, five without.
    width = picture.shape[1]
    assert width / 110 == pytest.approx(2.4 * (6 if known else 5) + 0.3, abs=0.02)


def test_picture_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='at least one'):
        draw_conflicts([], dict(classes=(), palette=[]), tmp_path / 'none.png')
