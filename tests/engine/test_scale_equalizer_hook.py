"""The hook's contract, sentence by sentence."""

from __future__ import annotations

import gc
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from mmengine.dataset import pseudo_collate
from mmengine.hooks import Hook
from mmengine.registry import DATASETS, HOOKS
from mmengine.runner import CheckpointLoader, Runner
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.registry import MODELS, TRANSFORMS
from torch import nn

from mmseg_fusion.engine.hooks import ScaleEqualizerHook
from mmseg_fusion.fusions import (
    BranchStatistics,
    ScaleEqualizer,
    measure_branches,
    measuring,
    split_batches,
)

from ..testers import HookTester
from .small import BN, LEVELS, UPER, config, dataset, runner

pytestmark = pytest.mark.filterwarnings('ignore')
FUSIONS = {
    'decode_head.bottleneck.conv': (32, 6, 6),
    'decode_head.fpn_bottleneck.conv': (6, 6, 6, 6),
}
SEGFORMER = dict(
    type='SegformerHead', in_channels=list(LEVELS), in_index=[0, 1, 2, 3], channels=6, num_classes=8
)


@HOOKS.register_module()
class Recorder(Hook):
    """Keeps what training starts from and every batch it sees."""

    priority = 'LOWEST'

    def __init__(self):
        self.batches = []

    def before_run(self, runner):
        runner.recorder = self

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if not self.batches:
            self.start = {k: v.clone() for k, v in runner.model.state_dict().items()}
        self.batches.append(torch.stack(data_batch['inputs']).clone())


RECORD = dict(more_hooks=[dict(type='Recorder')])


def train(path, **options):
    made = runner(path, **{**RECORD, **options})
    made.train()
    return made


def record_of(made):
    return next(h for h in made.hooks if isinstance(h, ScaleEqualizerHook)).record


def layers(record):
    return {entry['name']: entry for entry in record['layers']}


class TestFold(HookTester):
    hook = dict(type='ScaleEqualizerHook')
    keeps_weights = False


class TestModule(HookTester):
    hook = dict(type='ScaleEqualizerHook', mode='module')
    keeps_weights = False


# --- what it does ----------------------------------------------------------------------------


@pytest.fixture(scope='module')
def pair(tmp_path_factory):
    """The same run without and with the hook, random augmentation included."""
    path = tmp_path_factory.mktemp('pair')
    flip = [dict(type='RandomFlip', prob=0.5), dict(type='PhotoMetricDistortion')]
    options = dict(train_dataloader=dict(dataset=dataset(12, flip)))
    return train(path / 'without', **options), train(path / 'with', hook={}, **options)


@pytest.mark.stack
def test_training_sees_the_very_batches_of_the_run_without(pair):
    without, with_hook = (p.recorder.batches for p in pair)
    assert len(without) == 2
    assert all(torch.equal(a, b) for a, b in zip(without, with_hook))


def test_only_the_fusion_weights_differ(pair):
    without, with_hook = (p.recorder.start for p in pair)
    changed = {k for k in without if not torch.equal(without[k], with_hook[k])}
    # Running statistics are back, the fusion inside the backbone is left alone.
    assert changed == {f'{name}.weight' for name in FUSIONS}


def test_each_block_is_divided_by_its_std(pair):
    without, with_hook = (p.recorder.start for p in pair)
    for name, entry in layers(record_of(pair[1])).items():
        assert tuple(entry['channels']) == FUSIONS[name]
        old = without[f'{name}.weight'].split(FUSIONS[name], 1)
        new = with_hook[f'{name}.weight'].split(FUSIONS[name], 1)
        for a, b, std in zip(old, new, entry['std']):
            torch.testing.assert_close(b * std, a, rtol=1e-5, atol=1e-8)


@pytest.mark.stack
def test_std_measured_independently(tmp_path):
    made = train(tmp_path, hook={}, batch_size=3)
    # Naively: all fusion inputs of all images in float64, from a fresh copy of the start.
    fresh = runner(tmp_path / 'fresh', batch_size=3)
    model = fresh.model.train()
    model.load_state_dict(
        {
            k: undo(v, k, record_of(made)) if k.startswith('decode_head') else v
            for k, v in made.recorder.start.items()
        }
    )
    for module in model.modules():
        if isinstance(module, nn.Dropout2d):
            module.eval()
    seen = {name: [] for name in FUSIONS}
    for name in FUSIONS:
        model.get_submodule(name).register_forward_pre_hook(
            lambda m, x, name=name: seen[name].append(x[0].detach().double())
        )
    images = DATASETS.build(dataset(12))
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0)).tolist()
    for i in range(0, 12, 3):
        batch = pseudo_collate([images[k] for k in order[i : i + 3]])
        model(**model.data_preprocessor(batch, True), mode='loss')
    for name, entry in layers(record_of(made)).items():
        for part, mean, std in zip(
            torch.cat(seen[name]).split(FUSIONS[name], 1), entry['mean'], entry['std']
        ):
            assert part.mean().item() == pytest.approx(mean, rel=1e-3)
            assert part.std(correction=0).item() == pytest.approx(std, rel=1e-3)


def undo(value, key, record):
    entry = layers(record).get(key.removesuffix('.weight'))
    if entry is None:
        return value
    blocks = value.split(entry['channels'], 1)
    return torch.cat([b * s for b, s in zip(blocks, entry['std'])], 1)


def test_branches_have_unit_std_behind_it():
    """After equalization the weights' gradients are on one scale: proposition 3.1."""
    statistics = BranchStatistics((2, 3))
    parts = [torch.randn(4, 2, 5, 5) * 3 + 1, torch.randn(4, 3, 5, 5) * 0.1]
    statistics.add([parts[0][:1], parts[1][:1]])
    statistics.add([parts[0][1:], parts[1][1:]])
    assert statistics.count == 4
    for part, mean, std in zip(parts, statistics.mean, statistics.std):
        assert part.mean().item() == pytest.approx(mean, rel=1e-5)
        assert part.std(correction=0).item() == pytest.approx(std, rel=1e-5)


@pytest.mark.parametrize('workers', [0, 1])
def test_worker_processes_do_not_matter_to_batches(tmp_path, workers):
    options = dict(
        train_dataloader=dict(
            num_workers=workers, dataset=dataset(8, [dict(type='RandomFlip', prob=0.5)])
        )
    )
    a = train(tmp_path / 'a', **options)
    b = train(tmp_path / 'b', hook=dict(num_workers=1 - workers), **options)
    assert all(torch.equal(x, y) for x, y in zip(a.recorder.batches, b.recorder.batches))


@pytest.mark.stack
@pytest.mark.parametrize('mode', ['fold', 'module'])
def test_checkpoint_loads_strictly_into_the_plain_model(tmp_path, mode):
    # A head with batch norm behind one fusion and a bias at another.
    head = dict(
        type='DepthwiseSeparableASPPHead',
        in_channels=32,
        in_index=3,
        c1_in_channels=4,
        c1_channels=4,
        dilations=(1, 2),
        channels=6,
        num_classes=8,
        norm_cfg=BN,
    )
    for name, decode_head in (('uper', UPER), ('sep', head), ('bias', BIASED)):
        made = train(tmp_path / name, head=decode_head, hook=dict(mode=mode))
        state = CheckpointLoader.load_checkpoint(str(tmp_path / name / 'iter_2.pth'))
        assert state['meta']['scale_equalizer']['mode'] == mode
        plain = MODELS.build(config(tmp_path, head=decode_head).model)
        plain.load_state_dict(state['state_dict'], strict=True)
        x = torch.randn(2, 3, 33, 47)
        with torch.no_grad():
            ours, theirs = made.model.eval()(x), plain.eval()(x)
        # Borders included.
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('norm_cfg', [BN, None], ids=['norm', 'bias'])
@pytest.mark.parametrize('implementation', ['dilated', 'shared_taps'])
def test_a_kernel_that_several_rates_share(tmp_path, implementation, norm_cfg):
    head = dict(
        type='KSACHead',
        in_channels=list(LEVELS[1:]),
        in_index=[1, 2, 3],
        input_transform='resize_concat',
        dilations=(1, 2, 9),
        implementation=implementation,
        channels=6,
        num_classes=8,
        norm_cfg=norm_cfg,
    )
    name, x = 'decode_head.pyramid.conv', torch.randn(2, 3, 33, 47)
    made, logits = {}, {}
    for mode in ('fold', 'module'):
        made[mode] = train(tmp_path / mode, head=head, hook=dict(mode=mode), max_iters=1)
        entry = layers(record_of(made[mode]))[name]
        assert tuple(entry['channels']) == LEVELS[1:]
        assert entry['bias'] is (norm_cfg is None)
        assert made[mode].model.decode_head.pyramid.implementation == implementation
        # From the start of training: the same network, written in two ways.
        model = made[mode].model.eval()
        model.load_state_dict(made[mode].recorder.start)
        with torch.no_grad():
            logits[mode] = model(x)
    start = {mode: run.recorder.start[f'{name}.weight'] for mode, run in made.items()}
    divisor = torch.repeat_interleave(torch.tensor(entry['std']), torch.tensor(LEVELS[1:]))
    folded = start['module'] / divisor[:, None, None]
    torch.testing.assert_close(start['fold'], folded, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(logits['fold'], logits['module'], rtol=1e-4, atol=1e-4)


@MODELS.register_module()
class BiasedHead(type(MODELS.build(UPER)).__mro__[1]):
    """Fuses with a zero-padded convolution that has a bias and no norm, then a linear layer."""

    def __init__(self, **kwargs):
        super().__init__(input_transform='multiple_select', **kwargs)
        self.fuse = nn.Conv2d(sum(LEVELS), self.channels, 3, padding=1)
        self.linear = nn.Linear(self.channels + LEVELS[0], self.channels)

    def forward(self, inputs):
        inputs = self._transform_inputs(inputs)
        size = inputs[0].shape[2:]
        up = [nn.functional.interpolate(x, size=size, mode='bilinear') for x in inputs]
        x = self.fuse(torch.cat(up, 1))
        x = torch.cat([x, up[0]], 1).permute(0, 2, 3, 1)
        return self.cls_seg(self.linear(x).permute(0, 3, 1, 2))


BIASED = dict(
    type='BiasedHead', in_channels=list(LEVELS), in_index=[0, 1, 2, 3], channels=6, num_classes=8
)


def test_mean_goes_into_a_bias_without_norm(tmp_path):
    a, b = train(tmp_path / 'a', head=BIASED), train(tmp_path / 'b', head=BIASED, hook={})
    for name, entry in layers(record_of(b)).items():
        assert entry['bias']
        old, new = a.recorder.start, b.recorder.start
        weight = (
            old[f'{name}.weight'].double().flatten(2).sum(2)
            if 'fuse' in name
            else (old[f'{name}.weight'].double())
        )
        ratio = torch.repeat_interleave(
            torch.tensor(entry['mean']) / torch.tensor(entry['std']),
            torch.tensor(entry['channels']),
        )
        expected = old[f'{name}.bias'].double() - weight @ ratio.double()
        torch.testing.assert_close(new[f'{name}.bias'].double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ('equalize_mean', 'head', 'expected'),
    [
        ('auto', BIASED, True),
        (False, BIASED, False),
        ('auto', UPER, False),
        (True, UPER, False),  # its fusion layers have no bias to take it
        ('auto', dict(UPER, type='NormBiasHead'), False),
        (True, dict(UPER, type='NormBiasHead'), True),
    ],
)
def test_equalize_mean(tmp_path, equalize_mean, head, expected):
    made = train(tmp_path, head=head, hook=dict(equalize_mean=equalize_mean))
    assert layers(record_of(made)).popitem()[1]['bias'] is expected


@MODELS.register_module()
class NormBiasHead(type(MODELS.build(UPER))):
    """UPerHead whose last fusion has a bias in front of its batch norm."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.fpn_bottleneck.conv.bias = nn.Parameter(torch.zeros(self.channels))


def test_fusions_in_a_row_without_norm_are_measured_one_after_the_other(tmp_path):
    made = runner(tmp_path, head=BIASED, hook={}, **RECORD)
    made.train()
    assert len(layers(record_of(made))) == 2
    # In the order in which they run, whatever the order of their names in the config.
    names = ['decode_head.linear', 'decode_head.fuse']
    other = train(tmp_path / 'named', head=BIASED, hook=dict(layers=names))
    assert list(layers(record_of(other))) == names[::-1]
    model, stds = MODELS.build(config(tmp_path, head=BIASED).model), {}
    model.load_state_dict(made.recorder.start)
    # What the second fusion takes from the first one, with the first one equalized.
    model.decode_head.linear.register_forward_pre_hook(
        lambda m, x: stds.update(value=x[0].detach().double())
    )
    images = DATASETS.build(dataset(12))
    batch = pseudo_collate([images[i] for i in range(12)])
    model.train()
    model(**model.data_preprocessor(batch, True), mode='loss')
    entry = layers(record_of(made))['decode_head.linear']
    for part, std in zip(stds['value'].split(entry['channels'], -1), entry['std']):
        assert part.std(correction=0).item() == pytest.approx(std, rel=0.05)


def test_module_mode_keeps_constants(tmp_path):
    made = train(tmp_path, hook=dict(mode='module'))
    for name, entry in layers(record_of(made)).items():
        layer = made.model.get_submodule(name)
        assert isinstance(layer.scale_equalizer, ScaleEqualizer)
        assert not list(layer.scale_equalizer.parameters())
        torch.testing.assert_close(
            layer.scale_equalizer.std,
            torch.repeat_interleave(torch.tensor(entry['std']), torch.tensor(entry['channels'])),
        )
    # Nothing of it is learnt, and the weights start where they would have.
    assert set(made.model.state_dict()) == set(runner(tmp_path / 'b').model.state_dict())


def test_fold_equals_module_at_the_start_but_not_in_training(tmp_path):
    fold = train(tmp_path / 'fold', hook={}, max_iters=1, head=SEGFORMER_BN)
    module = train(tmp_path / 'module', hook=dict(mode='module'), max_iters=1, head=SEGFORMER_BN)
    name = 'decode_head.fusion_conv.conv.weight'
    std = layers(record_of(fold))[name.removesuffix('.weight')]['std']
    channels = [6] * 4
    before = fold.recorder.start[name], module.recorder.start[name]
    after = fold.model.state_dict()[name], module.model.state_dict()[name]
    for i, sigma in enumerate(std):
        blocks = [x.split(channels, 1)[i] for x in (*before, *after)]
        torch.testing.assert_close(blocks[0] * sigma, blocks[1], rtol=1e-5, atol=1e-7)
        # A step of SGD on the folded weight acts sigma^2 times as strongly on the effective one:
        # d(effective) is sigma * d(explicit) through the equalizer, and that over sigma here.
        folded_step, explicit_step = blocks[2] - blocks[0], blocks[3] - blocks[1]
        torch.testing.assert_close(folded_step, explicit_step * sigma, rtol=2e-2, atol=1e-6)


SEGFORMER_BN = dict(SEGFORMER, norm_cfg=BN)


# --- when it runs -------------------------------------------------------------------------------


def test_runs_after_weights_are_loaded(tmp_path):
    loaded = runner(tmp_path / 'x').model.state_dict()
    loaded = {k: v + 0.01 if v.is_floating_point() else v for k, v in loaded.items()}
    torch.save(dict(state_dict=loaded, meta={}), tmp_path / 'loaded.pth')
    # By name: layers='auto' leaves weights from a checkpoint alone.
    hook = dict(layers=list(FUSIONS))
    made = train(tmp_path / 'y', hook=hook, load_from=str(tmp_path / 'loaded.pth'))
    for name, entry in layers(record_of(made)).items():
        new = made.recorder.start[f'{name}.weight'].split(entry['channels'], 1)
        old = loaded[f'{name}.weight'].split(entry['channels'], 1)
        for a, b, std in zip(old, new, entry['std']):
            torch.testing.assert_close(a / std, b, rtol=1e-5, atol=1e-7)


@pytest.mark.stack
@pytest.mark.parametrize('mode', ['fold', 'module'])
def test_never_on_resume(tmp_path, mode):
    hook = dict(mode=mode)
    whole = train(tmp_path / 'whole', hook=hook, max_iters=4)
    train(tmp_path / 'part', hook=hook, max_iters=2)
    resumed = train(
        tmp_path / 'resumed',
        hook=hook,
        max_iters=4,
        load_from=str(tmp_path / 'part' / 'iter_2.pth'),
        resume=True,
    )
    assert resumed.iter == 4
    assert record_of(resumed) == record_of(whole)
    installed = [m for m in resumed.model.modules() if isinstance(m, ScaleEqualizer)]
    assert len(installed) == (len(FUSIONS) if mode == 'module' else 0)
    # mmengine's sampler starts anew on resume, so the batches of iterations 1 and 2 come again;
    # what training went on from is what was saved.
    saved = train(tmp_path / 'again', hook=hook, max_iters=2)
    for key, value in saved.model.state_dict().items():
        assert torch.equal(resumed.recorder.start[key], value), key


def test_never_twice(tmp_path, caplog):
    first = train(tmp_path / 'a', hook={})
    path = str(tmp_path / 'a' / 'iter_2.pth')
    second = train(tmp_path / 'b', hook=dict(mode='module'), load_from=path)
    saved = CheckpointLoader.load_checkpoint(path)['state_dict']
    assert all(torch.equal(v, saved[k]) for k, v in second.recorder.start.items())
    # What was done stays known, as folded weights, also to the run after the next.
    meta = CheckpointLoader.load_checkpoint(str(tmp_path / 'b' / 'iter_2.pth'))['meta']
    assert meta['scale_equalizer'] == record_of(first)
    third = train(
        tmp_path / 'c',
        hook=dict(mode='module'),
        max_iters=3,
        load_from=str(tmp_path / 'b' / 'iter_2.pth'),
        resume=True,
    )
    assert not [m for m in third.model.modules() if isinstance(m, ScaleEqualizer)]


def log_of(path):
    return next(path.glob('*/*.log')).read_text()


def test_weights_from_a_checkpoint_are_left_alone_unless_they_are_named(tmp_path):
    trained = train(tmp_path / 'trained', max_iters=2)
    path = str(tmp_path / 'trained' / 'iter_2.pth')
    auto = train(tmp_path / 'auto', hook={}, load_from=path)
    state = trained.model.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in auto.recorder.start.items())
    assert record_of(auto) is None
    for name in FUSIONS:
        told = f'{name} is left alone, its weight comes from the loaded checkpoint'
        assert f"{told}; to equalize it all the same, name it: layers=['{name}'" in log_of(
            tmp_path / 'auto'
        )
    name = 'decode_head.fpn_bottleneck.conv'
    named = train(tmp_path / 'named', hook=dict(layers=[name]), load_from=path)
    (entry,) = record_of(named)['layers']
    folded = torch.cat(
        [b / s for b, s in zip(state[f'{name}.weight'].split(FUSIONS[name], 1), entry['std'])], 1
    )
    torch.testing.assert_close(named.recorder.start[f'{name}.weight'], folded)
    assert f'{name} is equalized as layers asks, though its weight comes' in log_of(
        tmp_path / 'named'
    )


def test_weights_that_init_cfg_loads_are_left_alone(tmp_path):
    train(tmp_path / 'trained', max_iters=2)
    init = dict(type='Pretrained', checkpoint=str(tmp_path / 'trained' / 'iter_2.pth'))
    head = dict(UPER, init_cfg=dict(init, prefix='decode_head.'))
    made = train(tmp_path / 'head', head=head, hook={})
    assert record_of(made) is None
    assert 'init_cfg of decode_head loads a checkpoint' in log_of(tmp_path / 'head')
    made = train(tmp_path / 'model', hook={}, model=dict(init_cfg=init))
    assert record_of(made) is None
    assert 'init_cfg of the model loads a checkpoint' in log_of(tmp_path / 'model')


def test_frozen_weights_are_left_alone(tmp_path):
    made = runner(tmp_path, hook={}, **RECORD)
    name = 'decode_head.bottleneck.conv'
    made.model.get_submodule(name).weight.requires_grad_(False)
    made.train()
    assert list(layers(record_of(made))) == ['decode_head.fpn_bottleneck.conv']
    assert f'{name} is left alone, its weight requires no gradient' in log_of(tmp_path)


def test_a_record_covers_what_it_names_and_no_more(tmp_path):
    """Equalized at one layer: that one is done, the other one is neither done nor said to be."""
    first, second = FUSIONS
    a = train(tmp_path / 'a', hook=dict(layers=[first]))
    path = str(tmp_path / 'a' / 'iter_2.pth')
    saved = CheckpointLoader.load_checkpoint(path)['state_dict']
    auto = train(tmp_path / 'auto', hook={}, load_from=path)
    assert record_of(auto) == record_of(a)
    assert f'{first} equalized already' in log_of(tmp_path / 'auto')
    assert f'{second} is left alone, its weight comes' in log_of(tmp_path / 'auto')
    # Asked for by name: the one that the record lacks, and the records become one.
    both = train(tmp_path / 'both', hook=dict(layers=[first, second]), load_from=path)
    assert layers(record_of(both)).keys() == {first, second}
    assert layers(record_of(both))[first] == layers(record_of(a))[first]
    changed = {k for k, v in both.recorder.start.items() if not torch.equal(v, saved[k])}
    assert changed == {f'{second}.weight'}
    meta = CheckpointLoader.load_checkpoint(str(tmp_path / 'both' / 'iter_2.pth'))['meta']
    assert {e['name'] for e in meta['scale_equalizer']['layers']} == {first, second}


def test_records_of_both_modes_resume(tmp_path):
    """A folded layer from a checkpoint beside an explicit equalizer of this run."""
    first, second = FUSIONS
    train(tmp_path / 'a', hook=dict(layers=[first]))
    hook = dict(layers=[first, second], mode='module')
    path = str(tmp_path / 'a' / 'iter_2.pth')
    b = train(tmp_path / 'b', hook=hook, load_from=path)
    assert {e['name']: e['mode'] for e in record_of(b)['layers']} == {
        first: 'fold',
        second: 'module',
    }
    c = train(
        tmp_path / 'c',
        hook=hook,
        max_iters=3,
        load_from=str(tmp_path / 'b' / 'iter_2.pth'),
        resume=True,
    )
    for key, value in b.model.state_dict().items():
        torch.testing.assert_close(c.recorder.start[key], value, rtol=1e-6, atol=1e-7)
    installed = [n for n, m in c.model.named_modules() if isinstance(m, ScaleEqualizer)]
    assert installed == [f'{second}.scale_equalizer']


def test_a_head_loaded_in_part(tmp_path):
    """What the checkpoint does not bring is fresh, whatever its record says."""
    train(tmp_path / 'a', hook={})
    path = tmp_path / 'a' / 'iter_2.pth'
    checkpoint = CheckpointLoader.load_checkpoint(str(path))
    first, second = FUSIONS
    del checkpoint['state_dict'][f'{second}.weight']
    torch.save(checkpoint, path)
    made = train(tmp_path / 'b', hook={}, load_from=str(path))
    plain = train(tmp_path / 'c').recorder.start[f'{second}.weight']
    entry = layers(record_of(made))[second]
    got = made.recorder.start[f'{second}.weight']
    expected = [b / s for b, s in zip(plain.split(FUSIONS[second], 1), entry['std'])]
    torch.testing.assert_close(got, torch.cat(expected, 1), rtol=1e-5, atol=1e-7)
    saved = checkpoint['state_dict'][f'{first}.weight']
    assert torch.equal(made.recorder.start[f'{first}.weight'], saved)


@pytest.mark.parametrize('layers_of_hook', ['auto', [*FUSIONS, 'auxiliary_head.conv_cat']])
def test_a_new_auxiliary_fusion(tmp_path, layers_of_hook):
    """A checkpoint that was equalized without it: it alone is equalized, and joins the record."""
    a = train(tmp_path / 'a', hook={})
    path = str(tmp_path / 'a' / 'iter_2.pth')
    auxiliary = dict(
        type='FCNHead', in_channels=16, in_index=2, channels=6, num_convs=1, concat_input=True,
        num_classes=8, norm_cfg=BN,
    )  # fmt: skip
    options = dict(model=dict(auxiliary_head=auxiliary), load_from=path)
    plain = train(tmp_path / 'plain', **options).recorder.start
    made = train(tmp_path / 'b', hook=dict(layers=layers_of_hook), **options)
    name = 'auxiliary_head.conv_cat.conv'
    record = layers(record_of(made))
    assert record.keys() == {*FUSIONS, name}
    assert all(record[known] == layers(record_of(a))[known] for known in FUSIONS)
    start = made.recorder.start
    assert {k for k, v in start.items() if not torch.equal(v, plain[k])} == {f'{name}.weight'}
    blocks = plain[f'{name}.weight'].split(record[name]['channels'], 1)
    folded = torch.cat([b / s for b, s in zip(blocks, record[name]['std'])], 1)
    torch.testing.assert_close(start[f'{name}.weight'], folded)
    saved = CheckpointLoader.load_checkpoint(str(tmp_path / 'b' / 'iter_2.pth'))
    assert saved['meta']['scale_equalizer'] == record_of(made)


def test_an_empty_record_covers_nothing(tmp_path):
    train(tmp_path / 'a')
    path = tmp_path / 'a' / 'iter_2.pth'
    checkpoint = CheckpointLoader.load_checkpoint(str(path))
    checkpoint['meta']['scale_equalizer'] = dict(mode='fold', num_images=0, layers=[])
    torch.save(checkpoint, path)
    made = train(tmp_path / 'b', hook=dict(layers=list(FUSIONS)), load_from=str(path))
    assert layers(record_of(made)).keys() == FUSIONS.keys()
    assert 'equalized already' not in log_of(tmp_path / 'b')


def test_two_hooks_are_refused(tmp_path):
    more = [dict(type='ScaleEqualizerHook', layers=['decode_head.bottleneck'])]
    made = runner(tmp_path, hook={}, more_hooks=more)
    with pytest.raises(ValueError, match=r'more than once; one takes all layers: give its layers'):
        made.train()


def test_fusions_of_the_backbone_by_name(tmp_path):
    made = train(tmp_path, hook=dict(layers=['backbone.fuse']))
    assert layers(record_of(made)).keys() == {'backbone.fuse'}


UNET = dict(
    type='UNet', in_channels=3, base_channels=4, num_stages=3, strides=(1, 1, 1),
    enc_num_convs=(1, 1, 1), dec_num_convs=(1, 1), downsamples=(True, True),
    enc_dilations=(1, 1, 1), dec_dilations=(1, 1), norm_cfg=BN,
)  # fmt: skip
UNET_HEAD = dict(
    type='FCNHead', in_channels=4, in_index=2, channels=4, num_convs=0, num_classes=8,
    concat_input=False, norm_cfg=BN,
)  # fmt: skip


def test_unet(tmp_path):
    """Its decoder lies in the backbone: 'auto' says which name to give, and the name works."""
    options = dict(head=UNET_HEAD, model=dict(backbone=dict(UNET, _delete_=True)))
    with pytest.raises(RuntimeError, match=r"set layers=\['backbone.decoder'\]"):
        train(tmp_path / 'auto', hook={}, **options)
    made = train(tmp_path / 'named', hook=dict(layers=['backbone.decoder']), **options)
    plain = train(tmp_path / 'plain', **options)
    record = layers(record_of(made))
    assert list(record) == [
        'backbone.decoder.1.conv_block.convs.0.conv',
        'backbone.decoder.0.conv_block.convs.0.conv',
    ]
    assert [e['channels'] for e in record.values()] == [[8, 8], [4, 4]]
    for name, entry in record.items():
        blocks = plain.recorder.start[f'{name}.weight'].split(entry['channels'], 1)
        folded = torch.cat([b / s for b, s in zip(blocks, entry['std'])], 1)
        torch.testing.assert_close(made.recorder.start[f'{name}.weight'], folded)


@MODELS.register_module()
class HeadWithBackbone(type(MODELS.build(UPER))):
    """UPerHead with a second backbone inside, as a student has one."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.backbone = nn.Module()
        self.backbone.fuse = nn.Conv2d(2 * LEVELS[0], LEVELS[0], 1)

    def forward(self, inputs):
        first = self.backbone.fuse(torch.cat([inputs[0], inputs[0]], 1))
        return super().forward([first, *inputs[1:]])


def test_a_backbone_at_any_depth_is_left_alone(tmp_path):
    made = train(tmp_path, head=dict(UPER, type='HeadWithBackbone'), hook={})
    assert layers(record_of(made)).keys() == FUSIONS.keys()
    assert 'decode_head.backbone.fuse' in log_of(tmp_path)


def test_nothing_is_measured_where_every_fusion_is_left_alone(tmp_path):
    head = dict(
        type='DepthwiseSeparableFCNHead', in_channels=32, in_index=3, channels=6, num_convs=1,
        concat_input=True, num_classes=8, norm_cfg=BN,
    )  # fmt: skip
    made = train(tmp_path, head=head, hook={})
    assert record_of(made)['num_images'] == 0
    assert 'no image is measured' in log_of(tmp_path)
    assert 'images/s' not in log_of(tmp_path)
    (entry,) = record_of(made)['layers']
    assert 'depthwise' in entry['reason']
    stored = json.loads((tmp_path / 'scale_equalizer.json').read_text())
    assert stored == record_of(made)


@MODELS.register_module()
class SlicingHead(BaseDecodeHead):
    """One fusion that is followed, and one whose concatenation is cut up."""

    def __init__(self, **kwargs):
        super().__init__(input_transform='multiple_select', **kwargs)
        self.fuse = nn.Conv2d(sum(LEVELS[:2]), self.channels, 1)
        self.other = nn.Conv2d(sum(LEVELS[:2]) // 2, self.channels, 1)

    def forward(self, inputs):
        x, y = self._transform_inputs(inputs)
        y = nn.functional.interpolate(y, size=x.shape[2:])
        both = torch.cat([y, x], 1)
        return self.cls_seg(self.fuse(torch.cat([x, y], 1)) + self.other(both[:, ::2]))


def test_a_concatenation_that_is_not_followed_is_told(tmp_path):
    head = dict(
        type='SlicingHead', in_channels=list(LEVELS[:2]), in_index=[0, 1], channels=6,
        num_classes=8,
    )  # fmt: skip
    made = train(tmp_path, head=head, hook={})
    assert layers(record_of(made)).keys() == {'decode_head.fuse'}
    told = "8 + 4 channels, concatenated inside the model: its trail ends at '__getitem__'"
    assert f'Not followed to a layer: {told}' in log_of(tmp_path)


def test_resume_of_a_run_without_it(tmp_path):
    train(tmp_path / 'a')
    made = train(
        tmp_path / 'b',
        hook={},
        max_iters=3,
        load_from=str(tmp_path / 'a' / 'iter_2.pth'),
        resume=True,
    )
    assert record_of(made) is None


def test_resume_asked_for_but_nothing_there(tmp_path):
    assert record_of(train(tmp_path, hook={}, resume=True)) is not None


@pytest.mark.parametrize('priority', ['NORMAL', 'LOW'])
@pytest.mark.parametrize('mode', ['fold', 'module'])
def test_ema_copies_follow(tmp_path, mode, priority):
    ema_hook = dict(type='EMAHook', momentum=0.5, update_buffers=True, priority=priority)
    options = dict(hook=dict(mode=mode), more_hooks=[dict(type='Recorder'), ema_hook])
    made = runner(tmp_path / 'a', **options, max_iters=3)
    made.train()
    ema = next(h for h in made.hooks if type(h).__name__ == 'EMAHook').ema_model.module
    for name in FUSIONS:
        # Three steps at lr 0.01 stay close to the start; the unequalized weight is not close.
        start = made.recorder.start[f'{name}.weight']
        close = ema.get_submodule(name).weight - start
        assert close.abs().max() < 0.1 * start.abs().max()
    state = CheckpointLoader.load_checkpoint(str(tmp_path / 'a' / 'iter_3.pth'))
    plain = MODELS.build(config(tmp_path).model)
    plain.load_state_dict(state['state_dict'], strict=True)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = ema.eval()(x)
        torch.testing.assert_close(plain.eval()(x), expected, rtol=1e-4, atol=1e-4)
    # And on resume both copies are what they were.
    resumed = runner(
        tmp_path / 'b',
        **options,
        max_iters=4,
        load_from=str(tmp_path / 'a' / 'iter_3.pth'),
        resume=True,
    )
    seen = {}
    ema_hook = next(h for h in resumed.hooks if type(h).__name__ == 'EMAHook')
    recorder = next(h for h in resumed.hooks if isinstance(h, Recorder))
    original = recorder.before_train_iter

    def spy(runner, batch_idx, data_batch=None):
        seen.setdefault(
            'ema', {k: v.clone() for k, v in ema_hook.ema_model.module.state_dict().items()}
        )
        original(runner, batch_idx, data_batch)

    recorder.before_train_iter = spy
    resumed.train()
    for key, value in ema.state_dict().items():
        assert torch.equal(seen['ema'][key], value), key
    for key, value in made.model.state_dict().items():
        assert torch.equal(recorder.start[key], value), key


@pytest.mark.stack
def test_only_what_resumes_keeps_the_weights_before_folding(tmp_path):
    made = train(tmp_path, hook=dict(mode='module'))
    key = 'scale_equalizer_weights'
    path = tmp_path / 'iter_2.pth'
    saved = CheckpointLoader.load_checkpoint(str(path))
    (exact,) = saved[key]
    assert {name.rpartition('.')[0] for name in exact} == set(FUSIONS)
    for name, value in exact.items():
        assert torch.equal(value, made.model.state_dict()[name])
    name = f'{next(iter(FUSIONS))}.weight'
    assert not torch.equal(exact[name], saved['state_dict'][name])
    made.save_checkpoint(str(tmp_path), 'best.pth', save_optimizer=False, by_epoch=False)
    assert key not in CheckpointLoader.load_checkpoint(str(tmp_path / 'best.pth'))
    # A checkpoint of before, or whose weights were changed, unfolds what it has.
    del saved[key]
    torch.save(saved, path)
    options = dict(hook=dict(mode='module'), max_iters=3, load_from=str(path), resume=True)
    start = train(tmp_path / 'resumed', **options).recorder.start
    for name, value in exact.items():
        torch.testing.assert_close(start[name], value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    'wrapper', [dict(type='AmpOptimWrapper', dtype='bfloat16'), dict(accumulative_counts=3)]
)
def test_amp_and_gradient_accumulation(tmp_path, wrapper):
    plain = train(tmp_path / 'a', hook={})
    other = train(tmp_path / 'b', hook={}, optim_wrapper=wrapper)
    assert record_of(plain) == record_of(other)
    assert all(torch.isfinite(p).all() for p in other.model.parameters())


def test_head_in_eval_mode(tmp_path):
    expected = record_of(train(tmp_path / 'a', hook={}))
    made = runner(tmp_path / 'b', hook={})
    made.model.decode_head.eval()
    made.train()
    assert record_of(made) == expected


# --- what it costs and tells -----------------------------------------------------------------


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.fuse = nn.Conv2d(8, 4, 1)
        self.calls = 0

    def forward(self, x):
        self.calls += len(x)
        return self.fuse(torch.cat([x, x], 1))


def test_one_pass_per_image_and_nothing_kept():
    model, alive = Counting(), []

    def count(index):
        gc.collect()
        alive.append(sum(t.numel() for t in gc.get_objects() if isinstance(t, torch.Tensor)))

    batches = (torch.randn(2, 4, 64, 64) for _ in range(12))
    _, statistics = measure_branches(model, batches, model, on_batch=count)
    assert model.calls == 24
    assert statistics['fuse'].count == 24
    assert alive[-1] == alive[1]


def test_sync_bn_uses_the_batch_of_its_own_process():
    """Or a process with fewer images would leave the others waiting."""
    sync, plain = nn.SyncBatchNorm(4), nn.BatchNorm2d(4)
    model = nn.ModuleList([sync])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x = torch.randn(3, 4, 5, 5) * 2 + 1
    with measuring(model):
        assert sync.forward.__module__ == measuring.__module__
        torch.testing.assert_close(sync(x), plain(x))
    assert 'forward' not in vars(sync)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_attention_drops_nothing_while_it_is_measured():
    attention = nn.MultiheadAttention(4, 2, dropout=0.5)
    x = torch.randn(5, 2, 4)
    with measuring(nn.ModuleList([attention])):
        assert torch.equal(attention(x, x, x)[0], attention(x, x, x)[0])
    assert attention.training


def test_images_loaded_once(tmp_path):
    made = runner(tmp_path, hook=dict(num_samples=8), length=20)
    images, seen = made.train_dataloader, []
    original = type(images.dataset).__getitem__

    class Spy(type(images.dataset)):
        def __getitem__(self, index):
            seen.append(index)
            return original(self, index)

    images.dataset.__class__ = Spy
    made.train_loop.max_iters  # noqa: B018  (builds the loop, whose sampler prefetches nothing)
    hook = next(h for h in made.hooks if isinstance(h, ScaleEqualizerHook))
    hook.before_train(made)
    # The first batch once more, to find the fusions before the work starts.
    assert len(seen) == 8 + 4
    assert len(set(seen)) == 8
    assert record_of(made)['num_images'] == 8


def test_a_last_image_is_never_alone():
    assert split_batches(range(9), 4) == [[0, 1, 2, 3], [4, 5, 6, 7, 8]]
    assert split_batches(range(10), 4) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert split_batches(range(3), 4) == [[0, 1, 2]]
    assert split_batches([7], 4) == [[7]]


@pytest.mark.stack
def test_table_goes_to_log_visualizer_and_file(tmp_path):
    made = train(tmp_path, hook=dict(num_samples=8))
    stored = json.loads((tmp_path / 'scale_equalizer.json').read_text())
    assert stored == record_of(made)
    log = next(tmp_path.glob('*/*.log')).read_text()
    assert 'measured 4 of 8 images' in log
    assert 'over 8 images at' in log
    scalars = [json.loads(line) for line in next(tmp_path.glob('*/vis_data/scalars.json')).open()]
    (told,) = [s for s in scalars if any(k.startswith('scale_equalizer/') for k in s)]
    for name, entry in layers(stored).items():
        assert name in log
        assert max(entry['ratio']) == 1.0
        for i, std in enumerate(entry['std']):
            assert f'{std:.4f}' in log
            assert told[f'scale_equalizer/{name}/{i}/std'] == pytest.approx(std)


# --- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(mode='both'), "'fold' or 'module'"),
        (dict(layers='fpn_bottleneck'), 'list of names'),
        (dict(layers=[]), 'list of names'),
        (dict(equalize_mean='yes'), 'equalize_mean'),
        (dict(num_samples=0), 'num_samples'),
        (dict(batch_size=2.5), 'batch_size'),
        (dict(num_workers=-1), 'num_workers'),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        ScaleEqualizerHook(**arguments)


def test_unknown_layer_lists_candidates(tmp_path):
    with pytest.raises(ValueError, match=r"'decode_head.nothing'.*candidates: .*fpn_bottleneck"):
        train(tmp_path, hook=dict(layers=['decode_head.nothing']))


def test_layers_by_name_of_a_module_around_them(tmp_path):
    made = train(tmp_path, hook=dict(layers=['decode_head.fpn_bottleneck']))
    assert list(layers(record_of(made))) == ['decode_head.fpn_bottleneck.conv']


def test_no_fusion_lists_what_was_searched(tmp_path):
    head = dict(
        type='FCNHead',
        in_channels=32,
        in_index=3,
        channels=6,
        num_convs=1,
        num_classes=8,
        concat_input=False,
        norm_cfg=BN,
    )
    with pytest.raises(RuntimeError, match=r'searched: decode_head \(FCNHead\)'):
        train(tmp_path, head=head, hook={})


def test_more_samples_than_images(tmp_path):
    made = train(tmp_path, hook=dict(num_samples=100))
    assert record_of(made)['num_images'] == 12
    assert 'num_samples=100 is more' in next(tmp_path.glob('*/*.log')).read_text()


def test_constant_branch_is_left_alone(tmp_path):
    head = dict(
        type='ANNHead',
        project_channels=4,
        in_channels=[16, 32],
        in_index=[2, 3],
        query_scales=(1,),
        key_pool_scales=(1, 2),
        channels=6,
        num_classes=8,
        norm_cfg=BN,
    )
    made = train(tmp_path, head=head, hook={})
    entry = layers(record_of(made))['decode_head.fusion.bottleneck.conv']
    (index,) = [i for i, s in enumerate(entry['std']) if s == 0]
    assert entry['divisor'][index] == 1.0
    assert all(d == s for i, (d, s) in enumerate(zip(entry['divisor'], entry['std'])) if i != index)
    log = next(tmp_path.glob('*/*.log')).read_text()
    assert f'branch {index} of decode_head.fusion.bottleneck.conv is constant' in log
    assert all(torch.isfinite(p).all() for p in made.model.parameters())


def test_depthwise_fusion_is_left_alone(tmp_path):
    head = dict(
        type='DepthwiseSeparableASPPHead',
        in_channels=32,
        in_index=3,
        c1_in_channels=4,
        c1_channels=4,
        dilations=(1, 2),
        channels=6,
        num_classes=8,
        norm_cfg=BN,
    )
    a, b = train(tmp_path / 'a', head=head), train(tmp_path / 'b', head=head, hook={})
    name = 'decode_head.sep_bottleneck.0.depthwise_conv.conv'
    assert torch.equal(a.recorder.start[f'{name}.weight'], b.recorder.start[f'{name}.weight'])
    assert 'depthwise' in layers(record_of(b))[name]['reason']
    assert f'{name} is left alone' in next((tmp_path / 'b').glob('*/*.log')).read_text()


@TRANSFORMS.register_module()
class Spoil(nn.Module):
    """An image full of NaN."""

    def __call__(self, results):
        results['img'] = np.full(results['img'].shape, math.nan, np.float32)
        return results


@pytest.mark.stack
def test_not_finite_stops_before_anything_changes(tmp_path):
    made = runner(
        tmp_path, hook={}, **RECORD, train_dataloader=dict(dataset=dataset(8, [dict(type='Spoil')]))
    )
    with pytest.raises(FloatingPointError, match=r'branch 0 of decode_head.bottleneck.conv'):
        made.train()
    for name in FUSIONS:
        assert torch.isfinite(made.model.get_submodule(name).weight).all()
    untouched = runner(tmp_path / 'b', **RECORD)
    untouched.train()
    for name in FUSIONS:
        assert torch.equal(
            made.model.get_submodule(name).weight, untouched.recorder.start[f'{name}.weight']
        )
    assert all(torch.isfinite(b).all() for b in made.model.buffers())


@pytest.mark.parametrize('hook', [dict(num_samples=1), dict(batch_size=1)])
def test_one_image_per_pass(tmp_path, hook):
    with pytest.raises(ValueError, match='num_samples and batch_size'):
        train(tmp_path, hook=hook)


def test_repeated_data_set_is_measured_once(tmp_path):
    repeated = dict(type='RepeatDataset', times=50, dataset=dataset(4))
    made = train(tmp_path, hook={}, train_dataloader=dict(dataset=dict(_delete_=True, **repeated)))
    assert record_of(made)['num_images'] == 4


@MODELS.register_module()
class WeightUser(BiasedHead):
    """Uses the weight of its fusion layer without calling the layer."""

    def forward(self, inputs):
        inputs = self._transform_inputs(inputs)
        size = inputs[0].shape[2:]
        up = [nn.functional.interpolate(x, size=size, mode='bilinear') for x in inputs]
        fused = nn.functional.conv2d(torch.cat(up, 1), self.fuse.weight, self.fuse.bias, padding=1)
        return self.cls_seg(fused)


def test_weight_used_without_its_layer(tmp_path):
    head = dict(BIASED, type='WeightUser')
    made = train(tmp_path / 'fold', head=head, hook={})
    assert list(layers(record_of(made))) == ['decode_head.fuse']
    with pytest.raises(ValueError, match=r"decode_head.fuse is used without.*mode='fold'"):
        train(tmp_path / 'module', head=head, hook=dict(mode='module'))


def test_equalized_checkpoint_of_another_head_is_measured_anew(tmp_path):
    train(tmp_path / 'a', hook={})
    path = str(tmp_path / 'a' / 'iter_2.pth')
    made = train(tmp_path / 'b', head=SEGFORMER_BN, hook={}, load_from=path)
    assert list(layers(record_of(made))) == ['decode_head.fusion_conv.conv']
    assert 'measured anew' in next((tmp_path / 'b').glob('*/*.log')).read_text()


def test_only_the_backbone_fuses(tmp_path):
    head = dict(
        type='FCNHead', in_channels=32, in_index=3, channels=6, num_convs=1, num_classes=8,
        concat_input=False, norm_cfg=BN,
    )  # fmt: skip
    with pytest.raises(RuntimeError, match=r'Inside the backbone, and left alone: backbone.fuse'):
        train(tmp_path, head=head, hook={})


def test_epoch_based_and_cascade(tmp_path):
    """OCRNet's cascade of two heads, by epochs."""
    fcn = dict(
        type='FCNHead', in_channels=32, in_index=3, channels=6, num_convs=1, num_classes=8,
        norm_cfg=BN,
    )  # fmt: skip
    ocr = dict(
        type='OCRHead', in_channels=32, in_index=3, channels=6, ocr_channels=6, num_classes=8,
        norm_cfg=BN,
    )  # fmt: skip
    cfg = config(tmp_path, hook=dict(mode='module'), **RECORD)
    cfg.model.update(type='CascadeEncoderDecoder', num_stages=2, decode_head=[fcn, ocr])
    cfg.train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=1)
    cfg.train_dataloader.sampler = dict(type='DefaultSampler', shuffle=True)
    cfg.default_hooks.checkpoint = dict(type='CheckpointHook', by_epoch=True)
    made = Runner.from_cfg(cfg)
    made.train()
    assert list(layers(record_of(made))) == [
        'decode_head.0.conv_cat.conv',
        'decode_head.1.object_context_block.bottleneck.conv',
    ]
    plain = MODELS.build(cfg.model)
    state = CheckpointLoader.load_checkpoint(str(tmp_path / 'epoch_1.pth'))
    plain.load_state_dict(state['state_dict'], strict=True)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(plain.eval()(x), made.model.eval()(x), rtol=1e-4, atol=1e-4)


def test_setr_mla_classifies_what_it_concatenates(tmp_path):
    """SETR's head has no norm behind its fusion, the classifier: folded, and the means go too."""
    head = dict(
        type='SETRMLAHead', in_channels=[32] * 3, in_index=[3, 3, 3], mla_channels=4, channels=12,
        num_classes=8, up_scale=4, norm_cfg=BN,
    )  # fmt: skip
    made = train(tmp_path / 'fold', hook={}, head=head)
    plain = train(tmp_path / 'plain', head=head)
    ((name, entry),) = layers(record_of(made)).items()
    assert (name, entry['channels']) == ('decode_head.conv_seg', [4, 4, 4])
    old, new = (m.recorder.start for m in (plain, made))
    blocks = old[f'{name}.weight'].split(4, 1)
    folded = torch.cat([b / s for b, s in zip(blocks, entry['std'])], 1)
    torch.testing.assert_close(new[f'{name}.weight'], folded)
    shift = sum((w.sum((1, 2, 3)) * m) for w, m in zip(folded.split(4, 1), entry['mean']))
    torch.testing.assert_close(new[f'{name}.bias'], old[f'{name}.bias'] - shift)


def test_cascade_by_iterations(tmp_path):
    """OCRNet under 'auto' and 'fold': the fusions of both stages, each folded."""
    cascade = dict(
        model=dict(
            type='CascadeEncoderDecoder', num_stages=2,
            decode_head=[
                dict(type='FCNHead', in_channels=32, in_index=3, channels=6, num_convs=1,
                     num_classes=8, norm_cfg=BN),
                dict(type='OCRHead', in_channels=32, in_index=3, channels=6, ocr_channels=6,
                     num_classes=8, norm_cfg=BN),
            ],
        )
    )  # fmt: skip
    made = train(tmp_path / 'fold', hook={}, **cascade)
    plain = train(tmp_path / 'plain', **cascade)
    record = layers(record_of(made))
    assert {name: e['channels'] for name, e in record.items()} == {
        'decode_head.0.conv_cat.conv': [32, 6],
        'decode_head.1.object_context_block.bottleneck.conv': [6, 6],
    }
    old, new = (m.recorder.start for m in (plain, made))
    assert {k for k in old if not torch.equal(old[k], new[k])} == {f'{n}.weight' for n in record}
    for name, entry in record.items():
        blocks = old[f'{name}.weight'].split(entry['channels'], 1)
        folded = torch.cat([b / s for b, s in zip(blocks, entry['std'])], 1)
        torch.testing.assert_close(new[f'{name}.weight'], folded)


def test_data_set_without_length(tmp_path):
    made = runner(tmp_path, hook={})
    hook = next(h for h in made.hooks if isinstance(h, ScaleEqualizerHook))

    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(())

    made.train_loop.dataloader = torch.utils.data.DataLoader(Endless())
    with pytest.raises(ValueError, match='Endless has none'):
        hook.before_train(made)


# --- deterministic ---------------------------------------------------------------------------


def test_bit_identical_twice(tmp_path):
    a = train(tmp_path / 'a', hook={}, max_iters=20)
    b = train(tmp_path / 'b', hook={}, max_iters=20)
    assert all(torch.equal(v, b.model.state_dict()[k]) for k, v in a.model.state_dict().items())


# --- without the plugin -----------------------------------------------------------------------

WITHOUT_PLUGIN = """
import importlib.util, sys, types
from importlib.machinery import ModuleSpec
try:
    import mmcv.ops
except ImportError:
    # mmcv-lite: what mmseg 1.2.2 wants to import, and nothing of this package.
    ext = types.ModuleType('mmcv._ext')
    ext.__file__ = '_ext'
    ext.__getattr__ = lambda name: print
    ext.__spec__ = ModuleSpec('mmcv._ext', None)
    sys.modules['mmcv._ext'] = ext
# mmseg imports timm where it is installed, and with it a torchvision that may not fit this torch.
sys.modules['timm'] = None
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmseg.registry import MODELS
import mmseg.models
config, checkpoint, logits = sys.argv[1:]
cfg = Config.fromfile(config, import_custom_modules=False)
init_default_scope('mmseg')
model = MODELS.build(cfg.model)
model.load_state_dict(torch.load(checkpoint, weights_only=False)['state_dict'], strict=True)
stored = torch.load(logits, weights_only=True)
with torch.no_grad():
    torch.testing.assert_close(model.eval()(stored['x']), stored['y'], rtol=1e-4, atol=1e-4)
assert 'mmseg_fusion' not in sys.modules
print('loaded strictly')
"""


@pytest.mark.stack
@pytest.mark.parametrize('mode', ['fold', 'module'])
def test_checkpoint_loads_without_the_plugin(tmp_path, mode):
    backbone = dict(
        _delete_=True, type='ResNetV1c', depth=18, base_channels=4, stem_channels=4,
        out_indices=(0, 1, 2, 3), norm_cfg=BN, norm_eval=False,
    )  # fmt: skip
    made = train(tmp_path, hook=dict(mode=mode), model=dict(backbone=backbone))
    x = torch.randn(2, 3, 33, 47)
    with torch.no_grad():
        torch.save(dict(x=x, y=made.model.eval()(x)), tmp_path / 'logits.pth')
    made.cfg.dump(tmp_path / 'config.py')
    done = subprocess.run(
        [sys.executable, '-c', WITHOUT_PLUGIN, 'config.py', 'iter_2.pth', 'logits.pth'],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert 'loaded strictly' in done.stdout, done.stderr
