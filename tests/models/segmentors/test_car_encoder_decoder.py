"""Class-aware regularization on heads that it has never seen."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from mmcv.cnn import ConvModule
from mmengine.runner import save_checkpoint
from mmengine.runner.checkpoint import load_state_dict
from mmseg.apis import inference_model, init_model
from mmseg.models.decode_heads import FCNHead
from mmseg.registry import MODELS
from torch import nn

from mmseg_fusion.analysis import count
from mmseg_fusion.models.layers import ClassAwareConv
from mmseg_fusion.models.segmentors import CAREncoderDecoder, merge_car

from ...distributed import in_processes
from ...testers.toys import segmentor_config, toy_samples

LEVELS = (8, 16, 32, 64)


@MODELS.register_module()
class StridedFCN(FCNHead):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.convs[0].conv.stride = (2, 2)


@MODELS.register_module()
class ResidualFCN(FCNHead):
    def _forward_feature(self, inputs):
        x = self._transform_inputs(inputs)
        return x + self.convs(x)


@MODELS.register_module()
class PreNormFCN(FCNHead):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        order = ('norm', 'act', 'conv')
        self.convs[0] = ConvModule(
            self.in_channels, self.channels, 3, padding=1, norm_cfg=self.norm_cfg, order=order
        )


KEYS = ('loss_car_intra_c2p', 'loss_car_inter_c2c', 'loss_car_inter_c2p')
BN = dict(type='BN')
CAR = dict(type='ClassAwareRegularization')


def head(kind: str, **kwargs) -> dict:
    cfg = dict(type=kind, in_channels=64, in_index=3, channels=16, num_classes=5, norm_cfg=BN)
    return {**cfg, **kwargs}


ALL = dict(in_channels=list(LEVELS), in_index=[0, 1, 2, 3])
FCN = head('FCNHead', num_convs=2, concat_input=False)
CASCADE = [
    head('FCNHead', num_convs=1, concat_input=False, dropout_ratio=0.0),
    head('OCRHead', ocr_channels=16),
]
# Each head, and the convolution before its classifier, read in the source of mmseg.
HEADS = {
    'FCNHead': (FCN, ['convs.1']),
    'FCNHead with concat': (head('FCNHead', num_convs=1), ['conv_cat']),
    'ASPPHead': (head('ASPPHead', dilations=(1, 2)), ['bottleneck']),
    'PSPHead': (head('PSPHead', pool_scales=(1, 2)), ['bottleneck']),
    'DepthwiseSeparableASPPHead': (
        head('DepthwiseSeparableASPPHead', dilations=(1, 2), c1_in_channels=8, c1_channels=4),
        ['sep_bottleneck.1'],
    ),
    'DAHead': (head('DAHead', pam_channels=8), ['pam_out_conv', 'cam_out_conv']),
    'UPerHead': (head('UPerHead', pool_scales=(1, 2), **ALL), ['fpn_bottleneck']),
    'SegformerHead': (head('SegformerHead', **ALL), ['fusion_conv']),
    'FPNHead': (
        head('FPNHead', feature_strides=[4, 8, 16, 32], **ALL),
        ['scale_heads.0.0', 'scale_heads.1.0', 'scale_heads.2.2', 'scale_heads.3.4'],
    ),
    'OCRHead': (CASCADE, ['1.object_context_block.bottleneck']),
    'LRASPPHead': (
        head(
            'LRASPPHead',
            in_channels=(8, 8, 16),
            in_index=(0, 0, 1),
            branch_channels=(4, 8),
            input_transform='multiple_select',
        ),
        ['conv_ups.conv_up0'],
    ),
}


def model_cfg(decode_head: dict | list, **car) -> dict:
    cfg = segmentor_config({}).model.to_dict()
    return dict(cfg, type='CAREncoderDecoder', decode_head=copy.deepcopy(decode_head), car=car)


def build(decode_head: dict | list, **car) -> CAREncoderDecoder:
    torch.manual_seed(0)
    return MODELS.build(model_cfg(decode_head, **car))


def losses(model: nn.Module, size=(64, 64), batch: int = 2, seed: int = 0) -> dict:
    torch.manual_seed(seed)
    return model.loss(torch.randn(batch, 3, *size), toy_samples(5, size, batch=batch))


def logits(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    found = model(x)
    # DANet gives those of its branches as well.
    return found[0] if isinstance(found, tuple) else found


@pytest.mark.parametrize('name', HEADS)
def test_finds_the_convolution_before_the_classifier(name: str) -> None:
    decode_head, layers = HEADS[name]
    model = build(decode_head)
    assert list(model.car_layers) == [f'decode_head.{layer}' for layer in layers]
    plain = (
        MODELS.build(
            {k: v for k, v in model_cfg(decode_head).items() if k != 'car'}
            | dict(type='EncoderDecoder')
        )
        if isinstance(decode_head, dict)
        else None
    )
    for layer in model.car_layers:
        found = model.get_submodule(layer)
        assert isinstance(found, ClassAwareConv)
        if plain is not None:
            convs = [m for m in plain.get_submodule(layer).modules() if isinstance(m, nn.Conv2d)]
            assert found.in_channels == convs[0].in_channels
            assert found.out_channels == convs[-1].out_channels
    if name == 'LRASPPHead':  # its pooling wants a larger image
        return
    model.train()
    size = (64, 64)
    log = losses(model, size)
    numbered = KEYS if len(layers) == 1 else [f'{k}_{i}' for k in KEYS for i in range(len(layers))]
    assert {f'decode.{key}' for key in numbered} <= set(log)
    total, _ = model.parse_losses(log)
    total.backward()
    missing = [n for n, p in model.decode_head.named_parameters() if p.grad is None]
    assert not missing
    model.eval()
    x = torch.randn(1, 3, *size)
    with torch.no_grad():
        expected = logits(model, x)
        merged = merge_car(copy.deepcopy(model))
        torch.testing.assert_close(logits(merged, x), expected, rtol=1e-5, atol=1e-5)
    fresh = build(decode_head, merged=True).eval()
    fresh.load_state_dict(merged.state_dict())
    with torch.no_grad():
        assert torch.equal(logits(fresh, x), logits(merged, x))
    # Exactly as large as the head with plain 1x1 convolutions.
    plain = build(decode_head, linear=False, loss=None)
    sizes = [[p.numel() for p in m.parameters()] for m in (plain, fresh)]
    assert sizes[0] == sizes[1]


@pytest.mark.stack
def test_losses_are_those_of_the_features(monkeypatch) -> None:
    """What is logged is the loss on the linear layer's output and the full-size labels."""
    model = build(FCN)
    seen = []
    original = type(model.car_loss[0]).forward
    monkeypatch.setattr(
        type(model.car_loss[0]),
        'forward',
        lambda self, x, y: seen.append((x, y)) or original(self, x, y),
    )
    outputs = []
    layer = model.get_submodule(model.car_layers[0])
    layer.linear.register_forward_hook(lambda m, i, o: outputs.append(o))
    log = losses(model, (33, 47))
    ((features, labels),) = seen
    assert features is outputs[0]
    assert labels.shape == (2, 33, 47)
    expected = original(model.car_loss[0], features, labels)
    for key in KEYS:
        torch.testing.assert_close(log[f'decode.{key}'], expected[key])
    assert model.car_loss[0].num_classes == 5
    assert model.car_loss[0].ignore_index == 255


def test_classes_and_ignored_label_come_from_the_head() -> None:
    decode_head = head('FCNHead', num_convs=1, ignore_index=7, num_classes=9)
    loss = build(decode_head).car_loss[0]
    assert (loss.num_classes, loss.ignore_index) == (9, 7)
    loss = build(FCN, pool=2).car_loss[0]
    assert loss.pool == 2


@pytest.mark.parametrize('classes', [1, 2])
def test_a_head_with_one_logit_has_two_classes(classes: int) -> None:
    """MMSegmentation's binary segmentation: labels 0 and 1, a sigmoid."""
    sigmoid = dict(type='CrossEntropyLoss', use_sigmoid=True)
    decode_head = dict(FCN, num_classes=classes, out_channels=1, threshold=0.3, loss_decode=sigmoid)
    model = build(decode_head)
    assert model.car_loss[0].num_classes == 2
    log = model.loss(torch.randn(2, 3, 64, 64), toy_samples(2, (64, 64)))
    assert all(log[f'decode.{key}'].isfinite() for key in KEYS)
    model.parse_losses(log)[0].backward()
    assert all(p.grad is not None for p in model.decode_head.parameters())
    assert build(decode_head, loss=dict(CAR, num_classes=3)).car_loss[0].num_classes == 3


def test_the_cascade_has_a_name() -> None:
    cfg = dict(model_cfg(CASCADE), type='CARCascadeEncoderDecoder')
    torch.manual_seed(0)
    named, old = MODELS.build(cfg), build(CASCADE)
    assert type(named) is type(old)
    assert type(named).__name__ == 'CARCascadeEncoderDecoder'
    assert named.num_stages == 2
    assert named.car_layers == old.car_layers
    assert all(torch.equal(v, old.state_dict()[k]) for k, v in named.state_dict().items())
    with pytest.raises(ValueError, match=r"CARCascadeEncoderDecoder needs a list.*'CAREncoderD"):
        MODELS.build(dict(cfg, decode_head=FCN))


def test_moving_average_is_as_wide_as_its_layer() -> None:
    model = build(FCN, layer=['convs.0', 'convs.1'], loss=dict(CAR, moving_average=0.9))
    assert [loss.channels for loss in model.car_loss] == [64, 16]
    before = [loss.moving_centers.clone() for loss in model.car_loss]
    losses(model)
    assert not any(torch.equal(b, m.moving_centers) for b, m in zip(before, model.car_loss))


@pytest.mark.parametrize(
    'name', ['convs.0', 'decode_head.convs.0', 'convs.0.conv', 'decode_head.convs.0.conv']
)
def test_layer_by_name(name: str) -> None:
    model = build(FCN, layer=name)
    expected = name if name.startswith('decode_head') else f'decode_head.{name}'
    assert list(model.car_layers) == [expected.removesuffix('.conv')]


def test_several_layers_by_name() -> None:
    model = build(FCN, layer=['convs.0', 'convs.1'])
    assert {f'decode.{k}_{i}' for k in KEYS for i in (0, 1)} <= set(losses(model))


@pytest.mark.parametrize(
    ('car', 'decode_head', 'message'),
    [
        (dict(layer='convs.9'), FCN, r"'convs.9' is no module.*Close to it: decode_head.convs"),
        (dict(layer='convs'), FCN, r"'convs' is Sequential"),
        (dict(layer=[]), FCN, 'names nothing'),
        (dict(layer='conv_seg'), FCN, "not its classifier; 'conv_seg' is Conv2d"),
        (dict(layer='backbone.stages.0'), FCN, "'backbone.stages.0' is ConvModule"),
        (dict(channels=0), FCN, 'car.channels must be a positive integer, got 0'),
        (dict(kernel_size=2), FCN, 'car.kernel_size must be odd and positive, got 2'),
        (dict(layers='auto'), FCN, r"car has no key 'layers'; it takes layer, channels"),
        (dict(linear=False), FCN, 'nothing to regularize: set car.loss=None'),
        (dict(merged=True, kernel_size=3), FCN, 'car.kernel_size is 3'),
        ({}, head('FCNHead', num_convs=0, concat_input=False, channels=64), "the head's own input"),
        ({}, head('EncHead', num_codes=4, use_se_loss=False, **ALL), 'mul.*bottleneck.conv'),
        ({}, head('SegmenterMaskTransformerHead', in_channels=64, num_layers=1, num_heads=2,
                  embed_dims=64, norm_cfg=dict(type='LN')), 'calls its classifier conv_seg'),
    ],
)  # fmt: skip
def test_errors_name_the_key(car: dict, decode_head: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f'(?s){message}'):
        build(decode_head, **car)


def test_stride_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'decode_head.0.convs.0' has a stride of \(2, 2\)"):
        build([dict(CASCADE[0], type='StridedFCN'), CASCADE[1]], layer='decode_head.0.convs.0')


def test_a_car_that_is_no_dict() -> None:
    with pytest.raises(ValueError, match=r"car must be a dict such as .* got 'auto'"):
        MODELS.build(dict(model_cfg(FCN), car='auto'))


def test_a_residual_around_the_convolution_is_no_single_convolution() -> None:
    with pytest.raises(ValueError, match="the head's own input"):
        build(head('ResidualFCN', num_convs=1, channels=64, concat_input=False))


def test_a_block_in_another_order_keeps_its_norm_and_activation() -> None:
    """As those of DDRNet and PIDNet: norm, activation, convolution."""
    model = build(head('PreNormFCN', num_convs=1, concat_input=False))
    assert list(model.car_layers) == ['decode_head.convs.0.conv']
    layer = model.get_submodule(model.car_layers[0])
    assert layer.project.norm is None
    assert not layer.project.with_activation
    assert model.decode_head.convs[0].bn.weight.shape == (64,)
    model.parse_losses(losses(model))[0].backward()
    assert all(p.grad is not None for p in model.decode_head.parameters())
    x = torch.randn(1, 3, 64, 64)
    model.eval()
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(merge_car(model)(x), expected, rtol=1e-5, atol=1e-5)


def test_a_larger_kernel_is_spread_as_the_one_before() -> None:
    model = build(head('FCNHead', num_convs=1, concat_input=False, dilation=6), kernel_size=3)
    conv = model.get_submodule(model.car_layers[0]).project.conv
    assert (conv.dilation, conv.padding) == ((6, 6), (6, 6))
    assert model(torch.randn(1, 3, 64, 64)).shape[2:] == (2, 2)


@pytest.mark.parametrize('form', ['merged', 'unmerged'])
def test_a_checkpoint_of_the_other_form_is_refused(form: str) -> None:
    """Both have the keys of `project`: half of the weights would be loaded in silence."""
    given, taking = build(FCN, merged=form == 'merged'), build(FCN, merged=form != 'merged')
    for load in (taking.load_state_dict, lambda s: load_state_dict(taking, s, strict=False)):
        with pytest.raises(RuntimeError, match=f'set model.car.merged={form == "merged"}'):
            load(given.state_dict())


def test_a_plain_checkpoint_loads_but_for_the_layer() -> None:
    cfg = dict(model_cfg(FCN), type='EncoderDecoder')
    del cfg['car']
    wrong = build(FCN).load_state_dict(MODELS.build(cfg).state_dict(), strict=False)
    keys = [*wrong.missing_keys, *wrong.unexpected_keys]
    assert keys
    assert all(key.startswith('decode_head.convs.1.') for key in keys)


def test_merging_a_moving_average_leaves_no_buffer() -> None:
    model = build(FCN, loss=dict(CAR, moving_average=0.9))
    fresh = build(FCN, loss=dict(CAR, moving_average=0.9), merged=True)
    fresh.load_state_dict(merge_car(model).state_dict())


@pytest.mark.parametrize('kind', ['ConvWS', 'ConvAWS'])
def test_convolutions_that_change_their_weight_are_not_merged(kind: str) -> None:
    model = build(head('FCNHead', num_convs=1, concat_input=False, conv_cfg=dict(type=kind)))
    with pytest.raises(ValueError, match=f'{kind}2d.* changes its weight'):
        merge_car(model)


def test_hooks_of_the_linear_layer_are_not_lost() -> None:
    model = build(FCN)
    model.get_submodule(model.car_layers[0]).linear.register_forward_pre_hook(lambda m, x: None)
    with pytest.raises(ValueError, match='merge the saved checkpoint'):
        merge_car(model)


@pytest.mark.parametrize('where', ['meta', 'float64'])
def test_built_where_the_model_is(where: str) -> None:
    before = torch.get_default_dtype()
    try:
        if where == 'float64':
            torch.set_default_dtype(torch.float64)
            model = build(FCN)
        else:
            with torch.device('meta'):
                model = build(FCN)
    finally:
        torch.set_default_dtype(before)
    assert list(model.car_layers) == ['decode_head.convs.1']
    assert len({(p.device.type, p.dtype) for p in model.parameters()}) == 1


def test_building_leaves_no_trace() -> None:
    """The search for the layer moves no statistic, no random number, no flag."""
    torch.manual_seed(0)
    by_name = MODELS.build(model_cfg(FCN, layer='convs.1'))
    after = torch.rand(3)
    torch.manual_seed(0)
    auto = MODELS.build(model_cfg(FCN))
    assert torch.equal(torch.rand(3), after)
    assert all(torch.equal(v, auto.state_dict()[k]) for k, v in by_name.state_dict().items())
    assert all(m.training for m in auto.modules())
    assert all(p.grad is None for p in auto.parameters())


def test_frozen_head_is_found_and_stays_frozen() -> None:
    cfg = model_cfg(FCN)

    @MODELS.register_module(force=True)
    class FrozenFCNHead(MODELS.get('FCNHead')):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.requires_grad_(False)

    try:
        cfg['decode_head']['type'] = 'FrozenFCNHead'
        model = MODELS.build(cfg)
    finally:
        MODELS._module_dict.pop('FrozenFCNHead')
    assert list(model.car_layers) == ['decode_head.convs.1']
    assert not model.decode_head.conv_seg.weight.requires_grad


def test_without_losses_is_the_architecture_alone() -> None:
    model = build(FCN, loss=None)
    assert model.car_loss is None
    assert not [key for key in losses(model) if 'car' in key]


def test_nothing_is_kept_outside_of_training() -> None:
    model = build(FCN)
    layer = model.get_submodule(model.car_layers[0])
    model(torch.randn(2, 3, 64, 64))
    assert layer.features is None
    losses(model)
    assert layer.features is None
    assert not layer.keep_features
    pickle.loads(pickle.dumps(copy.deepcopy(model)))


def test_a_wrong_label_is_named_and_nothing_is_kept() -> None:
    model = build(FCN)
    bad = toy_samples(5, (64, 64))
    bad[0].gt_sem_seg.data[0, 0, 0] = 17
    with pytest.raises(ValueError, match=r'label 17 is neither a class \(0 to 4\)'):
        model.loss(torch.randn(2, 3, 64, 64), bad)
    assert model.get_submodule(model.car_layers[0]).features is None


@pytest.mark.parametrize('size', [(64, 64), (33, 47), (50, 31)])
def test_any_size_and_mixed_precision(size: tuple[int, int]) -> None:
    model = build(HEADS['UPerHead'][0], pool=2)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        log = losses(model, size)
    assert all(log[f'decode.{key}'].dtype == torch.float32 for key in KEYS)
    model.parse_losses(log)[0].backward()
    assert all(p.grad.isfinite().all() for p in model.decode_head.parameters())


def test_compiles() -> None:
    model = build(FCN)
    expected = losses(model)
    torch._dynamo.reset()
    compiled = torch.compile(model.loss, backend='eager')
    torch.manual_seed(0)
    found = compiled(torch.randn(2, 3, 64, 64), toy_samples(5, (64, 64)))
    for key in KEYS:
        torch.testing.assert_close(found[f'decode.{key}'], expected[f'decode.{key}'])


@pytest.mark.stack
def test_init_model_and_inference(tmp_path: Path) -> None:
    cfg = segmentor_config(FCN)
    cfg.model.update(type='CAREncoderDecoder', car=dict())
    model = MODELS.build(cfg.model)
    path = tmp_path / 'car.pth'
    meta = dict(dataset_meta=dict(classes=list('abcde'), palette=[[i, i, i] for i in range(5)]))
    save_checkpoint(dict(state_dict=model.state_dict(), meta=meta), str(path))
    loaded = init_model(cfg, str(path), device='cpu')
    image = torch.randint(256, (37, 51, 3), dtype=torch.uint8).numpy()
    expected = inference_model(loaded, image).seg_logits.data
    merged = inference_model(merge_car(loaded), image).seg_logits.data
    assert expected.shape == (5, 37, 51)
    torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-5)


def test_merged_counts_as_the_head_with_a_1x1() -> None:
    cfg = segmentor_config(FCN)

    def counts(**car):
        changed = copy.deepcopy(cfg)
        changed.model.update(type='CAREncoderDecoder', car=car)
        return count(changed, (64, 64))

    assert counts(merged=True) == counts(linear=False, loss=None)
    assert counts().flops - counts(merged=True).flops == 2 * 2 * 16 * 16


def test_merge_car_wants_a_car_model() -> None:
    with pytest.raises(ValueError, match=r'Linear has no ClassAwareConv'):
        merge_car(nn.Linear(2, 2))


# --- two processes -------------------------------------------------------------------------------


def _work(rank: int, world: int) -> dict:
    torch.distributed.init_process_group('gloo', rank=rank, world_size=world)
    model = build(FCN)
    parallel = nn.parallel.DistributedDataParallel(model)
    for seed in range(2):  # a parameter without gradient would stop the second step
        torch.manual_seed(10 * seed + rank)
        inputs, samples = torch.randn(2, 3, 64, 64), toy_samples(5, (64, 64))
        log = parallel(inputs, samples, mode='loss')
        model.parse_losses(log)[0].backward()
    c2c = float(log['decode.loss_car_inter_c2c'])
    return dict(c2c=c2c, grad=model.decode_head.conv_seg.weight.grad)


def test_two_processes_have_one_set_of_centres(tmp_path: Path) -> None:
    first, second = in_processes(_work, 2, tmp_path)
    assert first['c2c'] == pytest.approx(second['c2c'], rel=1e-6)
    assert torch.equal(first['grad'], second['grad'])
