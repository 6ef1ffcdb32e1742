"""Class centres and dependency maps against naive numpy."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from PIL import Image

from mmseg_fusion.analysis.class_dependency import (
    ClassCenters,
    Dependency,
    class_tokens,
    collect_centers,
    dependency_matrix,
    diagonal_means,
    draw_dependency,
    save_dependency,
    strongest_pairs,
)
from mmseg_fusion.analysis.layer_features import ImageSet, InputError, batches, load_segmentor

from .test_layer_features import FCN, model_config

pytestmark = pytest.mark.filterwarnings('ignore')


def naive_centers(features, labels, num_classes, ignore=255):
    found = [[] for _ in range(num_classes)]
    for feature, label in zip(features, labels):
        for i in range(label.shape[0]):
            for j in range(label.shape[1]):
                if label[i, j] != ignore:
                    found[label[i, j]].append(feature[:, i, j].astype(np.float64))
    channels = features[0].shape[0]
    return np.stack([np.mean(f, 0) if f else np.full(channels, np.nan) for f in found])


def naive_dependency(vectors, similarity):
    size = len(vectors)
    result = np.full((size, size), np.nan)
    some = [i for i in range(size) if not np.isnan(vectors[i]).any()]
    for i in some:
        dots = {j: sum(a * b for a, b in zip(vectors[i], vectors[j])) for j in some}
        for j in some:
            if similarity == 'cosine':
                lengths = np.linalg.norm(vectors[i]) * np.linalg.norm(vectors[j])
                result[i, j] = dots[j] / lengths
            else:
                result[i, j] = dots[j] / math.sqrt(vectors.shape[1])
        if similarity == 'softmax':
            total = sum(math.exp(result[i, j]) for j in some)
            for j in some:
                result[i, j] = math.exp(result[i, j]) / total
    return result


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize('ignore', [255, 3])
def test_centers_against_loops(dtype, ignore):
    sizes = [(2, 5, 7), (1, 4, 4), (3, 1, 9)]
    features = [torch.randn(n, 6, h, w).to(dtype) for n, h, w in sizes]
    labels = [torch.randint(0, 5, size) for size in sizes]
    # Class 5 never occurs.
    centers = ClassCenters(6, ignore)
    for feature, label in zip(features, labels):
        label[:, :1, :2] = ignore
        centers.add(feature, label)
    expected = naive_centers(
        [f.float().numpy() for fs in features for f in fs],
        [x.numpy() for xs in labels for x in xs],
        6,
        ignore,
    )
    np.testing.assert_allclose(centers.centers.numpy(), expected, rtol=1e-12)
    assert centers.centers.dtype == torch.float64
    assert not centers.present[5]
    assert centers.counts.sum() == sum(int((x != ignore).sum()) for x in labels)


def test_centers_of_many_pixels_keep_their_digits():
    """Sums in float32 would lose the small part of these features."""
    feature = torch.full((1, 1, 300, 300), 1000.0) + torch.randn(1, 1, 300, 300) * 1e-3
    centers = ClassCenters(1)
    for _ in range(20):
        centers.add(feature, torch.zeros(1, 300, 300, dtype=torch.long))
    assert centers.centers.item() == pytest.approx(feature.double().mean().item(), rel=1e-12)


def test_everything_ignored():
    centers = ClassCenters(3)
    centers.add(torch.randn(1, 4, 2, 2), torch.full((1, 2, 2), 255))
    assert centers.centers.isnan().all()
    assert dependency_matrix(centers.centers).isnan().all()


def test_wrong_labels_and_shapes():
    centers = ClassCenters(3, ignore_index=7)
    with pytest.raises(InputError, match=r'class 3, but there are 3 .*reduce_zero_label'):
        centers.add(torch.randn(1, 4, 2, 2), torch.full((1, 2, 2), 3))
    with pytest.raises(InputError, match='class -1'):
        centers.add(torch.randn(1, 4, 2, 2), torch.full((1, 2, 2), -1))
    with pytest.raises(ValueError, match=r'\(1, 3, 2\)'):
        centers.add(torch.randn(1, 4, 2, 2), torch.zeros(1, 3, 2))
    with pytest.raises(ValueError, match='no image'):
        centers.centers  # noqa: B018
    # Padding is 255 whatever the ignore index.
    centers.add(torch.randn(1, 4, 1, 3), torch.tensor([[[255, 7, 1]]]))
    assert centers.counts.tolist() == [0, 1, 0]
    with pytest.raises(InputError, match='4 channels on an earlier image and has 5'):
        centers.add(torch.randn(1, 5, 1, 1), torch.zeros(1, 1, 1))


@pytest.mark.stack
@pytest.mark.parametrize('size', [(64, 64), (75, 50)])
def test_centers_of_a_model(tmp_path, size):
    cfg = model_config(tmp_path, size=size, length=3)
    model, images = load_segmentor(cfg, None), ImageSet(cfg)
    found = collect_centers(model, batches(images), 8)
    features, labels = [], []
    for sample in images:
        with torch.no_grad():
            x = (sample['inputs'].float()[None] - 127) / 58
            feature = model.decode_head._forward_feature(model.extract_feat(x))[0]
        label = sample['data_samples'].gt_sem_seg.data[0].numpy()
        h, w = feature.shape[1:]
        rows = [int((i + 0.5) * size[0] / h) for i in range(h)]
        columns = [int((j + 0.5) * size[1] / w) for j in range(w)]
        features.append(feature.numpy())
        labels.append(label[rows][:, columns])
    expected = naive_centers(features, labels, 8)
    np.testing.assert_allclose(found.centers.numpy(), expected, rtol=1e-5, atol=1e-7)
    assert found.counts.sum() == sum(int((x != 255).sum()) for x in labels)


@pytest.mark.gpu
def test_centers_on_a_gpu():
    feature, label = torch.randn(2, 6, 9, 9), torch.randint(0, 4, (2, 9, 9))
    here, there = ClassCenters(5), ClassCenters(5)
    here.add(feature, label)
    there.add(feature.cuda(), label)
    torch.testing.assert_close(there.centers, here.centers, equal_nan=True)
    assert torch.equal(there.counts, here.counts)


def test_classes_as_predicted(tmp_path):
    cfg = model_config(tmp_path, length=2)
    model = load_segmentor(cfg, None)
    # Everything becomes class 3.
    torch.nn.init.zeros_(model.decode_head.conv_seg.weight)
    model.decode_head.conv_seg.bias.data = torch.eye(8)[3]
    found = collect_centers(model, batches(ImageSet(cfg)), 8, source='predictions')
    assert found.present.tolist() == [i == 3 for i in range(8)]


def test_labels_are_needed(tmp_path):
    cfg = model_config(tmp_path, length=1)
    cfg.val_dataloader.dataset.pipeline.pop(1)
    model = load_segmentor(cfg, None)
    with pytest.raises(InputError, match=r'has no label.*--classes-from predictions'):
        collect_centers(model, batches(ImageSet(cfg)), 8)


@pytest.mark.parametrize('similarity', ['softmax', 'dot', 'cosine'])
def test_matrix_against_loops(similarity):
    vectors = torch.randn(7, 5, dtype=torch.float64)
    vectors[[2, 5]] = math.nan
    found = dependency_matrix(vectors, similarity)
    np.testing.assert_allclose(
        found.numpy(), naive_dependency(vectors.numpy(), similarity), rtol=1e-12
    )
    # Absent classes change nothing between the others.
    some = [0, 1, 3, 4, 6]
    torch.testing.assert_close(found[some][:, some], dependency_matrix(vectors[some], similarity))


def test_rows_of_the_softmax_sum_to_one():
    matrix = dependency_matrix(torch.randn(6, 9) * 100)
    torch.testing.assert_close(matrix.sum(1), torch.ones(6, dtype=torch.float64))
    diagonal, others = diagonal_means(matrix)
    assert others == pytest.approx((1 - diagonal) / 5)


def test_wrong_matrix_arguments():
    with pytest.raises(ValueError, match=r'\(K, C\), got \(3,\)'):
        dependency_matrix(torch.ones(3))
    with pytest.raises(ValueError, match="'dots'"):
        dependency_matrix(torch.ones(3, 2), 'dots')


def test_means_and_pairs_by_hand():
    nan = math.nan
    matrix = torch.tensor([[0.7, nan, 0.3], [nan, nan, nan], [0.5, nan, 0.1]])
    assert diagonal_means(matrix) == pytest.approx((0.4, 0.4))
    pairs = strongest_pairs(matrix, ('a', 'b', 'c'))
    assert [(a, b, round(v, 3)) for a, b, v in pairs] == [('c', 'a', 0.5), ('a', 'c', 0.3)]
    assert matrix[0, 0] == pytest.approx(0.7)
    alone = diagonal_means(torch.tensor([[1.0]]))
    assert alone[0] == 1
    assert math.isnan(alone[1])


def test_tokens(tmp_path):
    model = load_segmentor(model_config(tmp_path), None)
    weight = model.decode_head.conv_seg.weight
    tokens = class_tokens(model)
    assert tokens.shape == (8, 6)
    torch.testing.assert_close(tokens, weight.detach()[:, :, 0, 0].double())
    assert class_tokens(model, 'decode_head.convs.0.conv').shape == (6, 9 * 8)
    with pytest.raises(InputError, match='row per class'):
        class_tokens(model, 'decode_head.convs.0.bn')
    binary = dict(FCN, num_classes=2, out_channels=1)
    with pytest.raises(InputError, match=r'got \(1, 6, 1, 1\)'):
        class_tokens(load_segmentor(model_config(tmp_path, binary), None))


@pytest.fixture
def maps():
    made = []
    for name in ('plain', 'with CAR'):
        vectors = torch.randn(4, 8, dtype=torch.float64)
        vectors[2] = math.nan
        counts = torch.tensor([3, 2, 0, 5])
        made.append(Dependency(name, vectors, dependency_matrix(vectors), counts))
    return made


CLASSES = ('road', 'sky', 'tree', 'car')


def test_numbers_are_saved(maps, tmp_path):
    save_dependency(maps, CLASSES, tmp_path / 'new' / 'm.npz', similarity='softmax')
    with np.load(tmp_path / 'new' / 'm.npz') as file:
        assert tuple(file['classes']) == CLASSES
        assert tuple(file['names']) == ('plain', 'with CAR')
        assert str(file['similarity']) == 'softmax'
        np.testing.assert_array_equal(file['matrix'][1], maps[1].matrix.numpy())
        np.testing.assert_array_equal(file['vectors_0'], maps[0].vectors.numpy())
        assert file['counts'].tolist() == [[3, 2, 0, 5]] * 2
    save_dependency(maps, CLASSES, tmp_path / 'm.json', similarity='softmax')
    text = (tmp_path / 'm.json').read_text()
    # NaN is no JSON.
    assert 'NaN' not in text
    entry = json.loads(text)['models'][0]
    assert entry['matrix'][2] == [None] * 4
    assert entry['mean_off_diagonal'] == pytest.approx(diagonal_means(maps[0].matrix)[1])
    with pytest.raises(InputError, match=r'\.npz or \.json'):
        save_dependency(maps, CLASSES, tmp_path / 'm.csv')


def picture(maps, classes, path, **more):
    draw_dependency(maps, classes, path, **more)
    with Image.open(path) as image:
        return np.asarray(image.convert('RGB')).astype(int)


@pytest.mark.parametrize('similarity', ['softmax', 'dot', 'cosine'])
def test_absent_classes_are_marked(maps, tmp_path, similarity):
    drawn = picture(maps, CLASSES, tmp_path / 'a.png', title='some', similarity=similarity)
    grey = (np.abs(drawn - 0xD9).max(2) < 3).mean()
    zeros = [Dependency(m.name, m.vectors, m.matrix.nan_to_num(0), m.counts) for m in maps]
    full = picture(zeros, CLASSES, tmp_path / 'b.png', similarity=similarity)
    assert grey > 0.02
    assert (np.abs(full - 0xD9).max(2) < 3).mean() < 0.001


def test_one_colour_scale(tmp_path):
    """The brightest colour stands for the largest value of all models, drawn once only."""
    maps = [
        Dependency(name, torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, 1.0]]) * top)
        for name, top in (('a', 1.0), ('b', 0.5))
    ]
    drawn = picture(maps, ('x', 'y'), tmp_path / 'a.png')
    brightest = np.abs(drawn - np.array([252, 255, 164])).max(2) < 3
    columns = np.flatnonzero(brightest.sum(0) > 20)
    # The left map and the colour bar, nothing between.
    assert columns[0] < drawn.shape[1] * 0.3
    middle = drawn.shape[1] // 2
    assert not brightest[:, middle : int(drawn.shape[1] * 0.85)].any()


@pytest.mark.parametrize('count', [2, 20])
def test_a_uniform_map_has_the_middle_colour(tmp_path, count):
    """Neither the brightest, which says that a class leans on another, nor the darkest."""
    names = [f'class {i}' for i in range(count)]
    uniform = torch.full((count, count), 1 / count)
    uniform[0, 0] += 1e-4
    maps = [Dependency('a', torch.eye(count), uniform)]
    drawn = picture(maps, names, tmp_path / 'a.png')
    middle = np.array([int(255 * v) for v in colormaps['inferno'](0.5)[:3]])
    height, width = drawn.shape[:2]
    inside = drawn[height // 2 - 5 : height // 2 + 5, width // 2 - 60 : width // 2 - 50]
    assert (np.abs(drawn - middle).max(2) < 12).mean() > 0.1
    assert np.abs(inside - [252, 255, 164]).max(2).min() > 50


def test_many_classes_make_a_larger_picture(tmp_path):
    """Every name has its own line of at least 8 points."""
    names = [f'class {i}' for i in range(59)]
    vectors = torch.randn(59, 4)
    maps = [Dependency('a', vectors, dependency_matrix(vectors))]
    drawn = picture(maps, names, tmp_path / 'a.png')
    assert drawn.shape[0] > 59 * 8 / 72 * 130


def test_nothing_present(tmp_path):
    nothing = torch.full((2, 3), math.nan)
    maps = [Dependency('a', nothing, dependency_matrix(nothing))]
    assert picture(maps, ('x', 'y'), tmp_path / 'a.png').size
