"""Hooks, places and images behind the pictures of the last features."""

from __future__ import annotations

import copy
from pathlib import Path
from urllib.error import URLError

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from mmengine.config import Config
from mmseg.models import EncoderDecoder
from mmseg.registry import MODELS
from torch import nn

from mmseg_fusion.analysis.layer_features import (
    ImageSet,
    InputError,
    Placement,
    batches,
    captured,
    check_alike,
    data_info,
    find_layer,
    load_segmentor,
    model_names,
    observe,
)

from ..engine.small import BN, LEVELS, config, dataset

pytestmark = pytest.mark.filterwarnings('ignore')

FCN = dict(
    type='FCNHead',
    in_channels=LEVELS[1],
    in_index=1,
    channels=6,
    num_convs=1,
    num_classes=8,
    concat_input=False,
    norm_cfg=BN,
)
OCR = dict(
    type='OCRHead',
    in_channels=LEVELS[1],
    in_index=1,
    channels=10,
    ocr_channels=5,
    num_classes=8,
    norm_cfg=BN,
)


def model_config(
    tmp_path: Path, head: dict | list = FCN, size=(64, 64), length=3, **changes
) -> Config:
    cfg = config(tmp_path)
    cfg.model.decode_head = copy.deepcopy(head)
    if isinstance(head, list):
        cfg.model.update(type='CascadeEncoderDecoder', num_stages=len(head))
    cfg.val_dataloader = dict(batch_size=1, dataset=dataset(length, size=size))
    cfg.merge_from_dict(changes)
    return cfg


def model_and_batch(cfg: Config) -> tuple[nn.Module, dict]:
    return load_segmentor(cfg, None), next(iter(batches(ImageSet(cfg))))


# ------------------------------------------------------------------------------------- the model


@pytest.mark.stack
@pytest.mark.parametrize('size', [(64, 64), (65, 93)])
def test_feature_is_what_the_classifier_takes(tmp_path, size):
    model, batch = model_and_batch(model_config(tmp_path, size=size))
    raw = batch['inputs'][0].clone()
    seen = observe(model, batch)
    with torch.no_grad():
        x = (raw.float()[None] - 127) / 58
        expected = model.decode_head._forward_feature(model.extract_feat(x))[0]
        logits = F.interpolate(
            model.decode_head.conv_seg(expected[None]), size=size, mode='bilinear'
        )
    torch.testing.assert_close(seen.feature, expected)
    np.testing.assert_array_equal(seen.prediction, logits[0].argmax(0).numpy())
    assert seen.label.shape == seen.placement.size == size
    assert seen.path.startswith('fusion-shapes://')
    # RGB: the pipeline's image is BGR.
    np.testing.assert_array_equal(seen.image[..., 0], raw[2].numpy())
    assert not model.decode_head.conv_seg._forward_hooks


def test_output_of_another_layer(tmp_path):
    model, batch = model_and_batch(model_config(tmp_path))
    before = observe(model, copy.deepcopy(batch), 'decode_head.convs.0.conv')
    after = observe(model, batch, 'decode_head.convs.0.conv', 'output', predict=False)
    assert before.feature.shape[0] == LEVELS[1]
    conv = model.decode_head.convs[0].conv
    with torch.no_grad():
        torch.testing.assert_close(after.feature, conv(before.feature[None])[0])
    assert after.prediction is None


@pytest.mark.parametrize('error', [URLError('no network'), FileNotFoundError('gone.pth')])
def test_pretrained_weights_out_of_reach_are_explained(tmp_path, monkeypatch, error):
    def unreachable(self):
        raise error

    monkeypatch.setattr(EncoderDecoder, 'init_weights', unreachable)
    with pytest.raises(InputError, match=r'give a checkpoint, or --cfg-options model\.pretrained'):
        load_segmentor(model_config(tmp_path), None)


def test_last_call_of_a_layer_counts(tmp_path):
    model, batch = model_and_batch(model_config(tmp_path))
    head, calls = model.decode_head, []
    once = head.cls_seg

    def twice(feature):
        calls.append(feature)
        return once(feature) + once(feature * 2)

    head.cls_seg = twice
    torch.testing.assert_close(observe(model, batch).feature, 2 * calls[0][0])


def test_ignored_pixels_are_255_whatever_the_data_set_calls_them(tmp_path):
    model, batch = model_and_batch(model_config(tmp_path))
    label = observe(model, copy.deepcopy(batch)).label
    frequent = int(np.bincount(label[label != 255]).argmax())
    seen = observe(model, batch, ignore_index=frequent)
    np.testing.assert_array_equal(seen.label, np.where(label == frequent, 255, label))


def test_cascade_takes_the_last_head(tmp_path):
    model, batch = model_and_batch(model_config(tmp_path, [FCN, OCR]))
    assert find_layer(model) == 'decode_head.1.conv_seg'
    seen = observe(model, batch)
    assert seen.feature.shape[0] == OCR['channels']


def test_head_with_three_outputs(tmp_path):
    head = dict(FCN, type='DAHead', pam_channels=4)
    for key in ('num_convs', 'concat_input'):
        head.pop(key)
    model, batch = model_and_batch(model_config(tmp_path, head))
    assert observe(model, batch).feature.shape[0] == 6


def test_sliding_models_see_the_whole_image(tmp_path):
    changes = {'model.test_cfg': dict(mode='slide', crop_size=(32, 32), stride=(24, 24))}
    model, batch = model_and_batch(model_config(tmp_path, size=(96, 80), **changes))
    whole = load_segmentor(model_config(tmp_path), None)
    whole.load_state_dict(model.state_dict())
    seen = observe(model, copy.deepcopy(batch))
    torch.testing.assert_close(seen.feature, observe(whole, batch).feature)


def test_padding_and_resizing(tmp_path):
    """Image 64 x 96 resized to 80 x 120 and padded to 96 x 128, label as large as the file."""
    cfg = model_config(tmp_path, size=(64, 96))
    cfg.model.data_preprocessor.update(test_cfg=dict(size_divisor=32))
    del cfg.model.data_preprocessor['size']
    steps = cfg.val_dataloader.dataset.pipeline
    steps.insert(1, dict(type='Resize', scale=(120, 80), keep_ratio=True))
    model, batch = model_and_batch(cfg)
    seen = observe(model, batch)
    assert seen.placement == Placement((64, 96), (0, 0, 80, 120), (96, 128))
    assert seen.feature.shape[1:] == (12, 16)
    assert seen.label.shape == seen.prediction.shape == (64, 96)
    assert seen.image.shape == (80, 120, 3)
    grid = seen.placement.on_grid(seen.label, (12, 16))
    # Cells of 8 x 8 of which the last two rows and the last column are padding.
    assert (grid[10:] == 255).all()
    assert (grid[:, 15:] == 255).all()
    # The centre of cell (3, 5) is (28, 44) of the input and (22.4, 35.2) of the file.
    assert grid[3, 5] == seen.label[22, 35]


def test_unknown_layer_names_near_ones(tmp_path):
    model = load_segmentor(model_config(tmp_path), None)
    with pytest.raises(InputError, match=r"no layer 'conv_seg' .*decode_head\.conv_seg"):
        find_layer(model, 'conv_seg')
    with pytest.raises(InputError, match=r'decode_head\.convs\.0'):
        find_layer(model, 'decode_head.conv.0')


class NoClassifier(nn.Module):
    num_classes = 8

    def __init__(self):
        super().__init__()
        self.mask_embed = nn.Linear(4, 8)


def test_head_without_classifier(tmp_path):
    model = load_segmentor(model_config(tmp_path), None)
    model.decode_head = NoClassifier()
    with pytest.raises(InputError, match=r'--layer.*decode_head\.mask_embed'):
        find_layer(model)
    with pytest.raises(InputError, match='no decode_head'):
        find_layer(nn.Linear(2, 2))


def test_layer_without_a_map(tmp_path):
    model, batch = model_and_batch(model_config(tmp_path))
    with pytest.raises(InputError, match='does not run'):
        observe(model, copy.deepcopy(batch), 'decode_head.loss_decode')
    with pytest.raises(InputError, match=r'is no feature map.*got tuple'):
        observe(model, batch, 'backbone', 'output')


def test_hook_takes_keyword_inputs_and_leaves():
    layer = nn.Identity()
    with captured(layer) as kept:
        layer(input=torch.ones(2))
    assert kept[0].sum() == 2
    layer(torch.ones(2))
    assert len(kept) == 1


def save(model: nn.Module, path: Path, prefix: str = '') -> str:
    torch.save({'state_dict': {prefix + k: v for k, v in model.state_dict().items()}}, path)
    return str(path)


def test_checkpoint_round_trip(tmp_path):
    cfg = model_config(tmp_path)
    saved = MODELS.build(cfg.model)
    for prefix in ('', 'module.'):
        loaded = load_segmentor(cfg, save(saved, tmp_path / 'a.pth', prefix))
        assert not loaded.training
        for key, value in saved.state_dict().items():
            assert torch.equal(loaded.state_dict()[key], value), key


def test_checkpoint_of_another_model(tmp_path):
    path = save(MODELS.build(model_config(tmp_path).model), tmp_path / 'fcn.pth')
    with pytest.raises(InputError, match=r'lacks weights.*decode_head\.psp_modules.* more'):
        load_segmentor(config(tmp_path), path)
    with pytest.raises(InputError, match='does not fit'):
        load_segmentor(model_config(tmp_path, dict(FCN, channels=7)), path)
    # What testing never reads may be missing.
    aux = dict(FCN, in_channels=LEVELS[0], in_index=0)
    load_segmentor(model_config(tmp_path, **{'model.auxiliary_head': aux}), path)


# ------------------------------------------------------------------------- where a pixel is on it


def naive_grid(label, placement, grid, fill):
    result = np.full(grid, fill)
    (top, left, height, width), (rows, columns) = placement.box, grid
    for i in range(rows):
        for j in range(columns):
            y = (i + 0.5) * placement.input_size[0] / rows - top
            x = (j + 0.5) * placement.input_size[1] / columns - left
            if 0 <= y < height and 0 <= x < width:
                result[i, j] = label[
                    int(y / height * label.shape[0]), int(x / width * label.shape[1])
                ]
    return result


def test_label_on_the_grid_against_loops():
    rng = np.random.default_rng(0)
    for _ in range(30):
        size, box, pad = rng.integers(5, 30, (3, 2))
        placement = Placement(tuple(size), (*pad, *box), tuple(box + 2 * pad))
        label = rng.integers(0, 9, size)
        grid = tuple(rng.integers(1, 20, 2))
        np.testing.assert_array_equal(
            placement.on_grid(label, grid, 9), naive_grid(label, placement, grid, 9)
        )


@given(st.data())
def test_cell_covers_the_pixel(data):
    """Any pixel of any image lies inside the cell that is said to cover it."""
    side = st.integers(1, 50)
    size = data.draw(st.tuples(side, side))
    box = data.draw(st.tuples(side, side, side, side))
    whole = (box[0] + box[2] + 3, box[1] + box[3])
    grid = data.draw(st.tuples(side, side))
    placement = Placement(size, box, whole)
    y, x = (data.draw(st.integers(0, n - 1)) for n in size)
    cell = placement.cell((x, y), grid)
    for axis, value in enumerate((y, x)):
        place = box[axis] + (value + 0.5) * box[2 + axis] / size[axis]
        step = whole[axis] / grid[axis]
        assert cell[axis] * step <= place + 1e-9 < (cell[axis] + 1) * step + 2e-9


@pytest.mark.parametrize('point', [(-1, 0), (0, -1), (9, 0), (0, 5)])
def test_point_outside(point):
    placement = Placement((5, 9), (0, 0, 5, 9), (5, 9))
    assert placement.cell((8, 4), (5, 9)) == (4, 8)
    with pytest.raises(InputError, match='width 9 and height 5'):
        placement.cell(point, (5, 9))


# ------------------------------------------------------------------------------------- the images


def test_images_of_the_data_set(tmp_path):
    cfg = model_config(tmp_path, length=10)
    assert ImageSet(cfg).indices == list(range(10))
    assert ImageSet(cfg, num_samples=3).indices == [0, 3, 6]
    assert ImageSet(cfg, num_samples=30).indices == list(range(10))
    chosen = ImageSet(cfg, indices=[7])
    assert chosen[0]['data_samples'].img_path.endswith('000007.png')
    with pytest.raises(InputError, match='from 0 to 9'):
        ImageSet(cfg, indices=[10])
    with pytest.raises(InputError, match='no test_dataloader'):
        ImageSet(cfg, 'test')


def file_config(tmp_path: Path, **more) -> Config:
    cfg = model_config(tmp_path)
    # A stock data set with other file names than its images here.
    cfg.val_dataloader.dataset = dict(
        type='CityscapesDataset',
        data_root=str(tmp_path / 'nowhere'),
        data_prefix=dict(img_path='img', seg_map_path='ann'),
        pipeline=dataset()['pipeline'],
        **more,
    )
    return cfg


def test_images_of_a_folder(tmp_path):
    images, labels = tmp_path / 'images', tmp_path / 'labels'
    images.mkdir()
    labels.mkdir()
    rng = np.random.default_rng(0)
    for stem, size in (('b_leftImg8bit', (40, 50)), ('a', (64, 48))):
        cv2.imwrite(str(images / f'{stem}.png'), rng.integers(0, 255, (*size, 3), np.uint8))
    cfg = file_config(tmp_path)
    found = ImageSet(cfg, images=[str(images)])
    assert [Path(found[i]['data_samples'].img_path).stem for i in range(2)] == [
        'a',
        'b_leftImg8bit',
    ]
    assert 'gt_sem_seg' not in found[0]['data_samples']
    with pytest.raises(InputError, match=r'has no label.*a_gtFine_labelTrainIds\.png'):
        ImageSet(cfg, images=[str(images)], ann_dir=str(labels))
    ids = rng.integers(0, 19, (40, 50), np.uint8)
    cv2.imwrite(str(labels / 'b_gtFine_labelTrainIds.png'), ids)
    found = ImageSet(cfg, images=[str(images / 'b_leftImg8bit.png')], ann_dir=str(labels))
    np.testing.assert_array_equal(found[0]['data_samples'].gt_sem_seg.data[0], ids)


def test_missing_images(tmp_path):
    cfg = file_config(tmp_path)
    with pytest.raises(InputError, match=r'val_dataloader\.dataset\.data_root'):
        ImageSet(cfg)
    with pytest.raises(InputError, match='neither an image file nor a folder'):
        ImageSet(cfg, images=[str(tmp_path / 'nowhere')])
    (tmp_path / 'empty').mkdir()
    with pytest.raises(InputError, match='holds no image'):
        ImageSet(cfg, images=[str(tmp_path / 'empty')])


def test_classes_without_files(tmp_path):
    info = data_info(file_config(tmp_path))
    assert len(info.classes) == 19
    assert info.palette[0] == (128, 64, 128)
    assert info.suffixes == ('_leftImg8bit.png', '_gtFine_labelTrainIds.png')
    assert not info.reduce_zero_label
    # The data set's own default counts.
    context = file_config(tmp_path)
    context.val_dataloader.dataset.type = 'PascalContextDataset59'
    assert data_info(context).reduce_zero_label
    assert len(data_info(context).classes) == 59
    # A subset, behind a wrapper.
    some = file_config(tmp_path, metainfo=dict(classes=('car', 'road')))
    some.val_dataloader.dataset = dict(
        type='RepeatDataset', times=2, dataset=some.val_dataloader.dataset
    )
    info = data_info(some)
    assert info.label_map[13] == 0
    assert info.label_map[1] == 255
    assert info.palette == ((0, 0, 142), (128, 64, 128))


def test_classes_are_needed(tmp_path):
    cfg = file_config(tmp_path)
    cfg.val_dataloader.dataset.type = 'BaseSegDataset'
    with pytest.raises(InputError, match=r'metainfo=dict\(classes='):
        data_info(cfg)
    cfg.val_dataloader.dataset.metainfo = dict(classes=('one', 'two'))
    info = data_info(cfg)
    assert info.classes == ('one', 'two')
    assert info.palette[0] != info.palette[1]
    cfg.val_dataloader.dataset.type = 'NowhereDataset'
    with pytest.raises(InputError, match='custom_imports'):
        data_info(cfg)


def test_models_side_by_side(tmp_path):
    cfg = model_config(tmp_path)
    info, model = data_info(cfg), load_segmentor(cfg, None)
    check_alike(['a', 'b'], [info, info], [model, model])
    other = load_segmentor(model_config(tmp_path, dict(FCN, num_classes=19)), None)
    with pytest.raises(InputError, match=r'b: model\.decode_head\.num_classes is 19.* 8 classes'):
        check_alike(['a', 'b'], [info, info], [model, other])
    city = data_info(file_config(tmp_path))
    with pytest.raises(InputError, match=r'a has 8, b has 19 \(num_classes\)'):
        check_alike(['a', 'b'], [info, city], [model, other])
    renamed = copy.copy(info)
    object.__setattr__(renamed, 'classes', ('meadow', *info.classes[1:]))
    with pytest.raises(InputError, match="'field', b has 'meadow'"):
        check_alike(['a', 'b'], [info, renamed], [model, model])


def test_names_tell_models_apart():
    assert model_names(['x/a.py', 'b.py'], ['1.pth', '1.pth']) == ['a', 'b']
    assert model_names(['a.py', 'x/a.py'], ['1.pth', '2.pth']) == ['a, 1', 'a, 2']
    assert model_names(['a.py'] * 2, ['x/1.pth', 'y/1.pth']) == ['a, 1 (1)', 'a, 1 (2)']


@pytest.mark.gpu
def test_same_on_a_gpu(tmp_path):
    model, batch = model_and_batch(model_config(tmp_path))
    here = observe(model, copy.deepcopy(batch))
    there = observe(model.cuda(), batch)
    torch.testing.assert_close(there.feature.cpu(), here.feature, rtol=1e-3, atol=1e-3)
    assert (there.prediction == here.prediction).mean() > 0.99
