"""The base testers on MMSegmentation's own classes, and on classes that are broken on purpose."""

from __future__ import annotations

import inspect
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mmengine.hooks import Hook
from mmseg.models.backbones import ResNetV1c
from mmseg.models.decode_heads import FCNHead
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.registry import HOOKS
from torch import Tensor, nn

from tests.testers import (
    BackboneTester,
    HeadTester,
    HookTester,
    LossTester,
    ModuleTester,
    NeckTester,
    TinyPyramid,
)
from tests.testers.head import KEYS

pytestmark = pytest.mark.stack


# --- whole classes ---------------------------------------------------------------------------


class TestUPerHead(HeadTester):
    head = dict(type='UPerHead', in_index=[0, 1, 2, 3], pool_scales=(1, 2, 3))
    stride = 4


class TestFCNHead(HeadTester):
    head = dict(type='FCNHead', in_index=2, num_convs=1)
    stride = 16


class TestASPPHead(HeadTester):
    head = dict(type='ASPPHead', dilations=(1, 2))
    stride = 32


class TestFPN(NeckTester):
    neck = dict(type='FPN', out_channels=8, num_outs=4)
    out_channels, out_strides = (8, 8, 8, 8), (4, 8, 16, 32)


class TestMLANeck(NeckTester):
    neck = dict(type='MLANeck', out_channels=8)
    takes_conv_cfg = False
    strides = (8, 8, 8, 8)
    out_channels, out_strides = (8, 8, 8, 8), (8, 8, 8, 8)


class TestJPU(NeckTester):
    neck = dict(type='JPU', mid_channels=8, start_level=1, dilations=(1, 2))
    in_channels_type = tuple
    # Not in its separable convolutions.
    takes_conv_cfg = False
    unused_levels = (0,)
    out_channels, out_strides = (16, 32, 16), (8, 16, 8)


class TestResNet18(BackboneTester):
    # With zero_init_residual the branches' weights have gradient 0 at the start.
    backbone = dict(type='ResNetV1c', depth=18, base_channels=8, zero_init_residual=False)
    out_channels, out_strides = (8, 16, 32, 64), (4, 8, 16, 32)


class TestTinyPyramid(BackboneTester):
    backbone = dict(type='TinyPyramid', channels=(4, 8), strides=(2, 8))
    out_channels, out_strides = (4, 8), (2, 8)
    freezes = has_norm_eval = False


class TestCrossEntropyLoss(LossTester):
    loss = dict(type='CrossEntropyLoss')


class TestWeightedCrossEntropyLoss(LossTester):
    loss = dict(type='CrossEntropyLoss', class_weight=[1.0, 2.0, 0.5, 1.0], avg_non_ignore=True)


class TestDiceLoss(LossTester):
    loss = dict(type='DiceLoss', use_sigmoid=False)
    # mmseg's takes one weight per image, and ignored pixels are background to it.
    pixel_weight = ignores_pixels = False


class TestEMAHook(HookTester):
    hook = dict(type='EMAHook')

    def check_run(self, runner: Any, probe: Any) -> None:
        assert self.hook_of(runner).ema_model.steps == self.iterations


# --- heads that are broken -------------------------------------------------------------------


class _Head(FCNHead):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(num_convs=1, **kwargs)


class UnusedParameter(_Head):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.forgotten = nn.Conv2d(3, 3, 1)


class InfiniteSlope(_Head):
    def forward(self, inputs: list[Tensor]) -> Tensor:
        logits = super().forward(inputs)
        return logits + (0 * logits).sqrt()


class DeadParameter(_Head):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.gate = nn.Parameter(torch.ones(1))

    def forward(self, inputs: list[Tensor]) -> Tensor:
        return super().forward(inputs) + 0 * self.gate


class DoublesSizes(BaseDecodeHead):
    """Upsamples by 2 and adds, which only fits where the strides divide the image."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(input_transform='multiple_select', **kwargs)
        self.convs = nn.ModuleList(nn.Conv2d(c, self.channels, 1) for c in self.in_channels)

    def forward(self, inputs: list[Tensor]) -> Tensor:
        fine, coarse = (
            conv(x) for conv, x in zip(self.convs, self._transform_inputs(list(inputs)))
        )
        return self.cls_seg(fine + F.interpolate(coarse, scale_factor=2.0))


class LastLevelOnly(DoublesSizes):
    def forward(self, inputs: list[Tensor]) -> Tensor:
        _, coarse = self._transform_inputs(list(inputs))
        return self.cls_seg(self.convs[1](coarse) + 0 * self.convs[0].weight.sum())


class WholeBatchMean(_Head):
    def forward(self, inputs: list[Tensor]) -> Tensor:
        logits = super().forward(inputs)
        return logits - logits.mean(0)


class NeedsTwoImages(_Head):
    def forward(self, inputs: list[Tensor]) -> Tensor:
        logits = super().forward(inputs)
        return logits / logits.std(0)


class InPlace(_Head):
    def forward(self, inputs: list[Tensor]) -> Tensor:
        return super().forward([x.relu_() for x in inputs])


class Float32Only(_Head):
    def forward(self, inputs: list[Tensor]) -> Tensor:
        logits = super().forward(inputs)
        with torch.autocast('cpu', enabled=False):
            return torch.einsum('nchw,dc->ndhw', logits, torch.eye(logits.shape[1]))


class Imprecise(_Head):
    def forward(self, inputs: list[Tensor]) -> Tensor:
        logits = super().forward(inputs)
        return (logits + 1000) - 1000


class StateInAttribute(_Head):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.scale = float(torch.rand(()))

    def forward(self, inputs: list[Tensor]) -> Tensor:
        return self.scale * super().forward(inputs)


class LateBuffer(_Head):
    def forward(self, inputs: list[Tensor]) -> Tensor:
        self.register_buffer('seen', torch.ones(1))
        return super().forward(inputs)


class KeepsGraph(_Head):
    def forward(self, inputs: list[Tensor]) -> Tensor:
        self.last = super().forward(inputs)
        return self.last


class OtherWhenCompiled(_Head):
    def forward(self, inputs: list[Tensor]) -> Tensor:
        return super().forward(inputs) + float(torch._dynamo.is_compiling())


class ExtraClass(_Head):
    def forward(self, inputs: list[Tensor]) -> Tensor:
        logits = super().forward(inputs)
        return torch.cat([logits, 9 + logits[:, :1]], dim=1)


class NamelessLoss(_Head):
    def loss_by_feat(self, *args: Any) -> dict[str, Tensor]:
        return {'ce': super().loss_by_feat(*args)['loss_ce']}


class DividesByValid(_Head):
    def loss_by_feat(self, *args: Any) -> dict[str, Tensor]:
        losses = super().loss_by_feat(*args)
        valid = sum((s.gt_sem_seg.data != self.ignore_index).sum() for s in args[1])
        return {name: value / valid for name, value in losses.items()}


class FeatureSize(_Head):
    def predict_by_feat(self, seg_logits: Tensor, batch_img_metas: list[dict]) -> Tensor:
        return seg_logits


class ReadsNormType(_Head):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if self.norm_cfg['type'] != 'BN':
            raise ValueError('BN is all I know')


class FixedInside(BaseDecodeHead):
    """Does whatever it likes, whatever the config says."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.body = nn.Sequential(
            nn.Conv2d(64, 16, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 5, 1)
        )

    def init_weights(self) -> None:
        nn.init.normal_(self.conv_seg.weight, std=0.01)

    def forward(self, inputs: list[Tensor]) -> Tensor:
        return F.dropout(self.body(inputs[-1]), 0.1, self.training)

    def predict_by_feat(self, seg_logits: Tensor, batch_img_metas: list[dict]) -> Tensor:
        return F.interpolate(seg_logits, batch_img_metas[0]['img_shape'])

    def loss_by_feat(self, seg_logits: Tensor, batch_data_samples: list) -> dict[str, Tensor]:
        label = self._stack_batch_gt(batch_data_samples)[:, 0]
        logits = F.interpolate(seg_logits, label.shape[1:])
        return {'loss_ce': F.cross_entropy(logits, label.clamp(max=4))}


class HalfOfThem(_Head):
    """A convolution of its own, and a norm that is there with batch norm alone."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.extra = nn.Conv2d(16, 16, 1)
        wanted = (self.norm_cfg or {}).get('type') == 'BN'
        self.extra_norm = nn.BatchNorm2d(16) if wanted else nn.Identity()

    def _forward_feature(self, inputs: list[Tensor]) -> Tensor:
        return self.extra_norm(self.extra(super()._forward_feature(inputs)))


class FirstIndexOnly(_Head):
    def _transform_inputs(self, inputs: list[Tensor]) -> Tensor:
        return inputs[self.in_index]


class NoSampler(_Head):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.sampler = None


class NarrowClassifier(_Head):
    def __init__(self, **kwargs: Any) -> None:
        kwargs['channels'] = 16
        super().__init__(**kwargs)


LARGE, ODD = (64, 64), (33, 47)
TWO = dict(in_index=[2, 3])
#: check, arguments, class, more of the config, what the failure says
BROKEN_HEADS = [
    ('test_forward_and_backward', dict(size=LARGE), UnusedParameter, {}, 'no gradient reaches'),
    ('test_forward_and_backward', dict(size=ODD), InfiniteSlope, {}, 'NaN or infinite'),
    ('test_forward_and_backward', dict(size=LARGE), DeadParameter, {}, 'exactly 0'),
    ('test_forward_and_backward', dict(size=ODD), DoublesSizes, TWO, 'must match'),
    ('test_forward_and_backward', dict(size=LARGE), ExtraClass, {}, 'assert'),
    ('test_batch_of_one_in_eval_mode', dict(size=LARGE), NeedsTwoImages, {}, 'NaN or infinite'),
    ('test_images_of_a_batch_do_not_mix_in_eval_mode', {}, WholeBatchMean, {}, 'not close'),
    ('test_inputs_are_left_alone', {}, InPlace, {}, 'writes into its input'),
    ('test_bfloat16_autocast', {}, Float32Only, {}, 'dtype|type'),
    ('test_bfloat16_autocast', {}, Imprecise, {}, 'bfloat16 differs'),
    ('test_saves_and_loads_strictly', {}, StateInAttribute, {}, 'not saved'),
    ('test_keys_of_the_state_do_not_depend_on_use', {}, LateBuffer, {}, 'changes the keys'),
    ('test_copies_and_pickles_after_use', {}, KeepsGraph, {}, 'deepcopy'),
    ('test_compiles', {}, OtherWhenCompiled, {}, 'not close'),
    ('test_inference_functions', {}, ExtraClass, {}, 'assert'),
    ('test_sliding_windows', {}, ExtraClass, {}, 'must match|assert'),
    ('test_test_time_augmentation', {}, ExtraClass, {}, 'assert'),
    ('test_losses_are_named_and_summed', {}, NamelessLoss, {}, 'nothing would be trained'),
    ('test_batch_without_labels', {}, DividesByValid, {}, 'all ignored'),
    ('test_gradient_reaches_every_level', {}, LastLevelOnly, TWO, 'level 2 is not used'),
    ('test_predicts_at_the_size_of_the_image', dict(size=ODD), FeatureSize, {}, 'assert'),
    ('test_sync_batch_norm', {}, ReadsNormType, {}, 'BN is all'),
    ('test_honours', dict(key='act_cfg'), FixedInside, {}, 'act_cfg is not used'),
    ('test_honours', dict(key='align_corners'), FixedInside, {}, 'changes nothing'),
    ('test_honours', dict(key='channels'), NarrowClassifier, {}, 'assert 16 == 24'),
    ('test_honours', dict(key='conv_cfg'), FixedInside, {}, 'conv_cfg is not used'),
    ('test_honours', dict(key='conv_cfg'), HalfOfThem, {}, r"{'extra'} are not of the kind"),
    ('test_honours', dict(key='norm_cfg'), HalfOfThem, {}, 'assert'),
    ('test_honours', dict(key='dropout_ratio'), FixedInside, {}, 'leaves something random'),
    ('test_honours', dict(key='ignore_index'), FixedInside, {}, 'not close|must match|bounds'),
    ('test_honours', dict(key='in_channels'), FixedInside, {}, 'channels'),
    ('test_honours', dict(key='in_index'), FixedInside, dict(in_index=2), 'channels'),
    ('test_honours', dict(key='init_cfg'), FixedInside, {}, '0.25'),
    ('test_honours', dict(key='input_transform'), FirstIndexOnly, {}, 'indices'),
    ('test_honours', dict(key='loss_decode'), FixedInside, {}, 'loss_second'),
    ('test_honours', dict(key='norm_cfg'), FixedInside, {}, 'norm_cfg is not used'),
    ('test_honours', dict(key='num_classes'), FixedInside, {}, '5 == 7'),
    ('test_honours', dict(key='out_channels'), FixedInside, {}, '5 == 1'),
    ('test_honours', dict(key='sampler'), NoSampler, {}, 'chooses nothing'),
]


# --- necks -----------------------------------------------------------------------------------


class _Neck(nn.Module):
    def __init__(self, in_channels: list[int], **kwargs: Any) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c, 8, 1), nn.BatchNorm2d(8), nn.ReLU()) for c in in_channels
        )

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        return [conv(x) for conv, x in zip(self.convs, inputs)]


class HalvesSizes(_Neck):
    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        return [F.avg_pool2d(x, 2, ceil_mode=True) for x in super().forward(inputs)]


class ForgetsTop(_Neck):
    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        *lower, top = super().forward(inputs)
        return [*lower, top.detach()]


BROKEN_NECKS = [
    ('test_forward_and_backward', dict(size=ODD), HalvesSizes, {}, 'assert'),
    ('test_gradient_reaches_every_level', {}, ForgetsTop, {}, 'level 3 is not used'),
    ('test_honours_norm_cfg', {}, _Neck, {}, 'norm_cfg is not used'),
    ('test_honours_act_cfg', {}, _Neck, {}, 'act_cfg is not used'),
    ('test_honours_conv_cfg', {}, _Neck, {}, 'conv_cfg is not used'),
]


# --- backbones -------------------------------------------------------------------------------


class ConstantLevel(TinyPyramid):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        *lower, top = super().forward(x)
        return (*lower, 0 * top + self.stages[-1].conv.weight.sum())


class NeverFrozen(TinyPyramid):
    def __init__(self, frozen_stages: int = -1, norm_eval: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)


class StatisticsMove(ResNetV1c):
    """Freezes parameters and forgets that ``train()`` sets the norms in training again."""

    def train(self, mode: bool = True) -> None:
        nn.Module.train(self, mode)


DEEP = dict(depth=18, base_channels=8)
BROKEN_BACKBONES = [
    ('test_every_level_depends_on_the_image', {}, ConstantLevel, {}, 'level 3 does not depend'),
    ('test_frozen_stages', {}, NeverFrozen, {}, 'freezes nothing'),
    ('test_frozen_stages', {}, StatisticsMove, DEEP, 'belong to frozen stages'),
    ('test_norm_eval', {}, NeverFrozen, {}, 'leaves batch norms in training'),
]


# --- losses ----------------------------------------------------------------------------------


class _Loss(nn.Module):
    """A loss that is right; what follows breaks one step of it each."""

    name = 'loss_own'

    def __init__(
        self, loss_weight: float = 1.0, reduction: str = 'mean', loss_name: str | None = None
    ) -> None:
        super().__init__()
        self.loss_weight, self.reduction = loss_weight, reduction
        self.loss_name = self.name if loss_name is None else loss_name

    def pixels(self, logits: Tensor, label: Tensor, ignore_index: int) -> Tensor:
        return F.cross_entropy(
            logits.float() if logits.dtype is torch.bfloat16 else logits,
            label,
            ignore_index=ignore_index,
            reduction='none',
        )

    def reduce(self, value: Tensor, label: Tensor) -> Tensor:
        return {'none': value, 'sum': value.sum(), 'mean': value.mean()}[self.reduction]

    def forward(
        self, logits: Tensor, label: Tensor, weight: Tensor | None = None, ignore_index: int = 255
    ) -> Tensor:
        value = self.pixels(logits, label, ignore_index)
        if weight is not None:
            value = value * weight
        return self.loss_weight * self.reduce(value, label)


class PerPixel(_Loss):
    def reduce(self, value: Tensor, label: Tensor) -> Tensor:
        return value


class ForgetsDerivative(_Loss):
    def pixels(self, logits: Tensor, label: Tensor, ignore_index: int) -> Tensor:
        value = super().pixels(logits, label, ignore_index)
        return value * value.detach()


class WrongSign(_Loss):
    def pixels(self, logits: Tensor, label: Tensor, ignore_index: int) -> Tensor:
        return -super().pixels(logits, label, ignore_index)


class IgnoredIsFirstClass(_Loss):
    def pixels(self, logits: Tensor, label: Tensor, ignore_index: int) -> Tensor:
        known = label.where(label != ignore_index, label.new_zeros(()))
        return super().pixels(logits, known, ignore_index)


class Always255(_Loss):
    def pixels(self, logits: Tensor, label: Tensor, ignore_index: int) -> Tensor:
        return super().pixels(logits, label, 255)


class MeanOfNothing(_Loss):
    def reduce(self, value: Tensor, label: Tensor) -> Tensor:
        return value.sum() / (label != 255).sum()


class NeedsEveryClass(_Loss):
    def reduce(self, value: Tensor, label: Tensor) -> Tensor:
        return sum(value[label == i].mean() for i in range(2))


class Overflows(_Loss):
    def pixels(self, logits: Tensor, label: Tensor, ignore_index: int) -> Tensor:
        score = logits.exp() / logits.exp().sum(1, keepdim=True)
        return F.nll_loss(score.log(), label, ignore_index=ignore_index, reduction='none')


class HalfPrecision(_Loss):
    def pixels(self, logits: Tensor, label: Tensor, ignore_index: int) -> Tensor:
        shifted = (logits + 1000) - 1000
        return super().pixels(shifted, label, ignore_index)


class NotSummed(_Loss):
    name = 'own'


class FixedWeight(_Loss):
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        self.loss_weight = 1.0
        return super().forward(*args, **kwargs)


class NoPixelWeight(_Loss):
    def forward(self, logits: Tensor, label: Tensor, weight: Any = None, **kwargs: Any) -> Tensor:
        return super().forward(logits, label, **kwargs)


class NeverSums(_Loss):
    def reduce(self, value: Tensor, label: Tensor) -> Tensor:
        return value if self.reduction == 'none' else value.mean()


class HasState(_Loss):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.register_buffer('seen', torch.zeros(1))


class KeepsLast(_Loss):
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        self.last = super().forward(*args, **kwargs)
        return self.last


class SmallImagesOnly(_Loss):
    def pixels(self, logits: Tensor, label: Tensor, ignore_index: int) -> Tensor:
        return super().pixels(logits.reshape(2, -1, 6, 5), label, ignore_index)


BROKEN_LOSSES = [
    ('test_value_is_a_finite_scalar', {}, PerPixel, {}, 'assert'),
    ('test_gradient_is_the_derivative', {}, ForgetsDerivative, {}, 'Jacobian mismatch'),
    ('test_truth_costs_less_than_an_error', {}, WrongSign, {}, 'assert'),
    ('test_ignored_pixels_have_no_influence', {}, IgnoredIsFirstClass, {}, 'get a gradient'),
    ('test_ignore_index_of_the_head_counts', {}, Always255, {}, 'out of bounds'),
    ('test_nothing_but_ignored_pixels', {}, MeanOfNothing, {}, 'isfinite'),
    ('test_one_class_only', {}, NeedsEveryClass, {}, 'isfinite'),
    ('test_large_logits', dict(scale=1e4), Overflows, {}, 'isfinite'),
    ('test_bfloat16_autocast', {}, HalfPrecision, {}, 'the gradient in bfloat16'),
    ('test_name_is_summed', {}, NotSummed, {}, 'sums only what is named'),
    ('test_loss_weight_is_a_factor', {}, FixedWeight, {}, 'not close'),
    ('test_weight_zero_takes_a_pixel_out', {}, NoPixelWeight, {}, 'weight 0 gets'),
    ('test_reductions_agree', {}, NeverSums, {}, 'not close'),
    ('test_state_fits_a_plain_model', {}, HasState, {}, 'seen'),
    ('test_copies_and_pickles_after_use', {}, KeepsLast, {}, 'deepcopy'),
    ('test_inside_a_head', {}, SmallImagesOnly, {}, 'invalid for input'),
]


# --- hooks -----------------------------------------------------------------------------------


class NotAHook:
    pass


class LeavesEvalMode(Hook):
    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        runner.model.decode_head.eval()


class TouchesWeights(Hook):
    """On every start, resumed or not."""

    def before_train(self, runner: Any) -> None:
        with torch.no_grad():
            runner.model.decode_head.conv_seg.weight.mul_(2)


class DrawsNumbers(Hook):
    def before_train(self, runner: Any) -> None:
        torch.rand(1)


class AddsModule(Hook):
    def before_train(self, runner: Any) -> None:
        runner.model.decode_head.extra = nn.Linear(1, 1)


BROKEN_HOOKS = [
    ('test_builds_from_its_config', {}, NotAHook, {}, 'assert'),
    ('test_takes_part_in_a_run', {}, LeavesEvalMode, {}, 'eval mode'),
    (
        'test_checkpoint_loads_strictly_into_the_plain_model',
        {},
        AddsModule,
        {},
        '(?i)unexpected key',
    ),
    ('test_resume_changes_no_weight', {}, TouchesWeights, {}, 'on resume'),
    ('test_batches_and_random_states_stay', {}, DrawsNumbers, {}, 'random state|other batches'),
    ('test_weights_stay_before_the_first_step', {}, TouchesWeights, {}, 'the hook changes'),
]


# --- that each check catches what it is for ----------------------------------------------------

KINDS = {
    'head': (HeadTester, BROKEN_HEADS, {}),
    'neck': (NeckTester, BROKEN_NECKS, dict(out_channels=(8,) * 4, out_strides=(4, 8, 16, 32))),
    'backbone': (
        BackboneTester,
        BROKEN_BACKBONES,
        dict(out_channels=(8, 16, 32, 64), out_strides=(4, 8, 16, 32)),
    ),
    'loss': (LossTester, BROKEN_LOSSES, {}),
    'hook': (HookTester, BROKEN_HOOKS, {}),
}
CASES = [
    pytest.param(kind, *case, id=f'{kind}-{case[0]}-{case[2].__name__}')
    for kind, (_, cases, _) in KINDS.items()
    for case in cases
]


def make_tester(kind: str, config: dict) -> Any:
    base, _, attributes = KINDS[kind]
    return type('Broken', (base,), {kind: config, **attributes})()


def call(tester: Any, check: str, arguments: dict, tmp_path: Path) -> None:
    method = getattr(tester, check)
    if 'tmp_path' in inspect.signature(method).parameters:
        arguments = dict(arguments, tmp_path=tmp_path)
    method(**arguments)


@pytest.mark.parametrize(('kind', 'check', 'arguments', 'broken', 'more', 'message'), CASES)
def test_check_catches(
    kind: str,
    check: str,
    arguments: dict,
    broken: type,
    more: dict,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if issubclass(broken, Hook):
        # The runner prints its config: a hook goes by name.
        monkeypatch.setitem(HOOKS.module_dict, broken.__name__, broken)
        more = dict(more, type=broken.__name__)
    tester = make_tester(kind, {'type': broken, **more})
    errors = (AssertionError, RuntimeError, ValueError, TypeError, IndexError)
    with pytest.raises(errors, match=message):
        call(tester, check, arguments, tmp_path)


@pytest.mark.parametrize('kind', ['head', 'loss'])
def test_sound_class_passes_where_broken_ones_fail(kind: str, tmp_path: Path) -> None:
    """The classes that the broken ones derive from: only what they break is caught."""
    sound = make_tester(kind, dict(type={'head': _Head, 'loss': _Loss}[kind]))
    for check, arguments, *_ in KINDS[kind][1]:
        call(sound, check, arguments, tmp_path)


def checks_of(tester: type) -> set[str]:
    return {
        name
        for name, method in inspect.getmembers(tester, inspect.isfunction)
        if name.startswith('test_') and not hasattr(method, 'pytestmark')
    } | {'test_large_logits'} & set(dir(tester))


def test_every_check_is_shown_to_catch_something() -> None:
    shown = {kind: {case[0] for case in cases} for kind, (_, cases, _) in KINDS.items()}
    common = checks_of(ModuleTester)
    assert common <= shown['head']
    for kind, (tester, _, _) in KINDS.items():
        assert checks_of(tester) - common <= shown[kind], kind
    keys = {c[1]['key'] for c in BROKEN_HEADS if c[0] == 'test_honours'}
    assert keys == set(KEYS)


def test_attributes_switch_checks_off() -> None:
    class Still(LossTester):
        pixel_weight = ignores_pixels = False
        reductions = ()

    class Plain(NeckTester):
        takes_norm_cfg = takes_act_cfg = compiled = False

    off = {
        Still: (
            'test_weight_zero_takes_a_pixel_out',
            'test_ignored_pixels_have_no_influence',
            'test_reductions_agree',
        ),
        Plain: ('test_honours_norm_cfg', 'test_honours_act_cfg', 'test_compiles'),
    }
    for tester, names in off.items():
        assert not any(callable(getattr(tester, name)) for name in names)
        assert all(callable(getattr(tester.__base__, name)) for name in names)


def test_listed_patterns_are_left_out() -> None:
    class Knows(HeadTester):
        head = dict(type=DeadParameter)
        zero_gradients = ('gate',)

    class KnowsToo(HeadTester):
        head = dict(type=UnusedParameter)
        unused_parameters = ('forgotten.*',)

    for tester in (Knows(), KnowsToo()):
        tester.test_forward_and_backward(LARGE)


def test_names_are_distinct() -> None:
    names = [case.id for case in CASES]
    repeated = [n for n, group in itertools.groupby(sorted(names)) if len(list(group)) > 1]
    assert not [n for n in repeated if 'test_honours' not in n]
