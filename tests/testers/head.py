"""Base tester of decode heads."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.model.utils import revert_sync_batchnorm
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .module import (
    CLOSE,
    ModuleTester,
    check_convolutions,
    in_mode,
    marked_convolution,
    places,
)
from .toys import level_size, segmentor_config, toy_features, toy_samples

#: Keys of BaseDecodeHead that every head honours.
KEYS = (
    'act_cfg',
    'align_corners',
    'channels',
    'conv_cfg',
    'dropout_ratio',
    'ignore_index',
    'in_channels',
    'in_index',
    'init_cfg',
    'input_transform',
    'loss_decode',
    'norm_cfg',
    'num_classes',
    'out_channels',
    'sampler',
)


class HeadTester(ModuleTester):
    """Checks of a :class:`mmseg.models.decode_heads.decode_head.BaseDecodeHead`.

    Attributes:
        head: config of the head. What is tested by itself may be left out: ``in_channels`` (from
            ``in_index``), ``channels``, ``num_classes``, ``norm_cfg``.
        channels: channels of the levels that the backbone gives.
        strides: their strides.
        stride: stride of the logits; None for a head that does not promise one.
        ignored_keys: those of :data:`KEYS` that the head does not take, and says so.
        plain_convolutions: patterns (fnmatch) of convolutions that ``conv_cfg`` does not reach, as
            the head says; the classifier's is everywhere.
    """

    head: dict
    channels: Sequence[int] = (8, 16, 32, 64)
    strides: Sequence[int] = (4, 8, 16, 32)
    stride: int | None = None
    ignored_keys: tuple[str, ...] = ()
    plain_convolutions: tuple[str, ...] = ()

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        super().pytest_generate_tests(metafunc)
        if 'key' in metafunc.fixturenames:
            keys = [k for k in KEYS if k not in self.ignored_keys]
            if isinstance(self.in_index(), (list, tuple)):
                # Such a head chooses the transform itself.
                keys.remove('input_transform')
            metafunc.parametrize('key', keys)

    # --- the kind ------------------------------------------------------------------------------

    def in_index(self) -> int | Sequence[int]:
        return self.head.get('in_index', -1)

    def config(self, **changes: Any) -> dict:
        index = changes.get('in_index', self.in_index())
        channels = changes.pop('levels', self.channels)
        if isinstance(index, int):
            in_channels: int | list[int] = channels[index]
        else:
            in_channels = [channels[i] for i in index]
        cfg = dict(
            in_channels=in_channels,
            channels=16,
            num_classes=5,
            norm_cfg=dict(type='BN', requires_grad=True),
        )
        return copy.deepcopy({**cfg, **self.head, **changes})

    def inputs(self, size: tuple[int, int], batch: int = 2) -> list[Tensor]:
        return toy_features(self.channels, self.strides, size, batch)

    def check_outputs(self, outputs: tuple[Tensor, ...], size: tuple[int, int], batch: int) -> None:
        logits = outputs[0]
        assert logits.shape[:2] == (batch, self.config()['num_classes'])
        if self.stride is not None:
            assert logits.shape[2:] == level_size(size, self.stride)

    def samples(self, size: tuple[int, int], **kwargs: Any) -> list[SegDataSample]:
        return toy_samples(self.config()['num_classes'], size, **kwargs)

    def losses(
        self, head: nn.Module, inputs: list[Tensor], samples: list[SegDataSample]
    ) -> dict[str, Tensor]:
        """The dict that the head gives in training."""
        return head.loss(inputs, samples, train_cfg=Config())

    def loss(self, module: nn.Module, inputs: list[Tensor], size: tuple[int, int]) -> Tensor:
        samples = [sample.to(inputs[0].device) for sample in self.samples(size)]
        return self.total(self.losses(module, inputs, samples))

    def total(self, losses: dict[str, Tensor]) -> Tensor:
        """What the segmentor would go backward from."""
        return BaseModel.parse_losses(None, losses)[0]

    def segmentor(self, **test_cfg: Any) -> Config:
        backbone = dict(type='TinyPyramid', channels=self.channels, strides=self.strides)
        return segmentor_config(self.config(), backbone, **test_cfg)

    # --- checks --------------------------------------------------------------------------------

    def test_losses_are_named_and_summed(self) -> None:
        size = self.image_sizes[0]
        losses = self.losses(self.build(), self.inputs(size), self.samples(size))
        summed = [name for name in losses if 'loss' in name]
        assert summed, f'no loss_* in {list(losses)}: nothing would be trained'
        assert all(value.isfinite().all() for value in losses.values())

    def test_batch_without_labels(self) -> None:
        size = self.image_sizes[0]
        samples = self.samples(size)
        for sample in samples:
            sample.gt_sem_seg.data.fill_(255)
        head = self.build()
        loss = self.total(self.losses(head, self.inputs(size), samples))
        assert loss.isfinite(), 'a batch whose pixels are all ignored breaks the loss'
        loss.backward()
        self.check_gradients(head, zeros=False)

    def test_gradient_reaches_every_level(self) -> None:
        size = self.image_sizes[0]
        head, inputs = self.build(), [x.requires_grad_() for x in self.inputs(size)]
        self.loss(head, inputs, size).backward()
        index = self.in_index()
        for i in [index] if isinstance(index, int) else index:
            gradient = inputs[i].grad
            used = gradient is not None and gradient.any()
            assert used, f'level {i} is not used'

    def test_predicts_at_the_size_of_the_image(self, size: tuple[int, int]) -> None:
        head = in_mode(self.build(), training=False)
        meta = [dict(img_shape=size, ori_shape=size, pad_shape=size)]
        with torch.no_grad():
            logits = head.predict(self.inputs(size, batch=1), meta, Config())
        assert logits.shape == (1, self.config()['num_classes'], *size)

    def test_sync_batch_norm(self) -> None:
        head = revert_sync_batchnorm(self.build(norm_cfg=dict(type='SyncBN', requires_grad=True)))
        size = self.image_sizes[0]
        self.loss(head, self.inputs(size), size).backward()
        self.check_gradients(head, zeros=False)

    def test_honours(self, key: str) -> None:
        getattr(self, f'check_{key}')()

    # --- one per key of BaseDecodeHead ---------------------------------------------------------

    def _twin(self, head: nn.Module, **changes: Any) -> nn.Module:
        """Another head with the same weights and other settings."""
        twin = self.build(**changes)
        twin.load_state_dict(head.state_dict(), strict=True)
        return in_mode(twin, head.training)

    def check_in_channels(self) -> None:
        more = tuple(2 * c for c in self.channels)
        size = self.image_sizes[0]
        self.outputs(self.build(levels=more), toy_features(more, self.strides, size))

    def check_in_index(self) -> None:
        head, inputs = in_mode(self.build(), training=False), self.inputs(self.image_sizes[0])
        extra = torch.randn(2, 3, 7, 5)
        index = self.in_index()
        number = len(self.channels)
        if isinstance(index, int):
            moved: int | list[int] = index % number + 1
        else:
            moved = [i % number + 1 for i in index]
        twin = self._twin(head, in_index=moved, levels=(3, *self.channels, 3))
        with torch.no_grad():
            found = self.outputs(twin, [extra, *inputs, extra])
            expected = self.outputs(head, inputs)
        for f, e in zip(found, expected):
            assert torch.equal(f, e), 'in_index is not what chooses the levels'

    def check_input_transform(self) -> None:
        indices = list(range(len(self.channels)))
        head = self.build(input_transform='resize_concat', in_index=indices)
        size = self.image_sizes[1]
        logits = self.outputs(head, self.inputs(size))[0]
        assert logits.shape[:2] == (2, self.config()['num_classes'])

    def check_channels(self) -> None:
        head = self.build(channels=24)
        assert head.channels == 24
        assert head.conv_seg.in_channels == 24, 'the classifier does not see `channels` channels'
        self.outputs(head, self.inputs(self.image_sizes[0]))

    def check_num_classes(self) -> None:
        head = self.build(num_classes=7)
        assert self.outputs(head, self.inputs(self.image_sizes[0]))[0].shape[1] == 7

    def check_out_channels(self) -> None:
        head = self.build(
            num_classes=2,
            out_channels=1,
            threshold=0.3,
            loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=True),
        )
        size = self.image_sizes[0]
        inputs = self.inputs(size)
        assert self.outputs(head, inputs)[0].shape[1] == 1
        assert self.total(self.losses(head, inputs, toy_samples(2, size))).isfinite()

    def check_dropout_ratio(self) -> None:
        inputs = self.inputs(self.image_sizes[0])
        still = self.build(dropout_ratio=0)
        first, second = (self.outputs(still, inputs)[0] for _ in range(2))
        assert torch.equal(first, second), 'dropout_ratio=0 leaves something random'
        random = self.build(dropout_ratio=0.5)
        first, second = (self.outputs(random, inputs)[0] for _ in range(2))
        assert not torch.equal(first, second), 'dropout_ratio=0.5 drops nothing'

    def check_conv_cfg(self) -> None:
        with marked_convolution() as marked:
            head = self.build(conv_cfg=dict(type=marked.__name__))
            self.outputs(head, self.inputs(self.image_sizes[0]))
        check_convolutions(head, marked, ('conv_seg', *self.plain_convolutions))

    def check_norm_cfg(self) -> None:
        head = self.build(norm_cfg=dict(type='GN', num_groups=2))
        found = places(head, nn.GroupNorm)
        assert found, 'norm_cfg is not used'
        fixed = places(head, _BatchNorm)
        assert not fixed, f'{fixed} stay although norm_cfg asks for GN'
        assert found == places(self.build(), _BatchNorm)
        bare = self.build(norm_cfg=None)
        left = places(bare, _BatchNorm)
        assert not left, f'{left} stay although norm_cfg is None'
        self.outputs(bare, self.inputs(self.image_sizes[0]))

    def check_act_cfg(self) -> None:
        head = self.build(act_cfg=dict(type='LeakyReLU', negative_slope=0.125))
        # One with another slope is part of the method: CAA's gates have it.
        own = {name for name, m in head.named_modules() if getattr(m, 'negative_slope', 0) == 0.125}
        assert own, 'act_cfg is not used'
        left = [name for name, m in head.named_modules() if isinstance(m, nn.ReLU)]
        assert not left, f'{left}: a ReLU stays although act_cfg asks for LeakyReLU'
        kind = type(MODELS.build(self.build().act_cfg))
        assert own == {name for name, m in self.build().named_modules() if isinstance(m, kind)}
        self.outputs(head, self.inputs(self.image_sizes[0]))

    def check_align_corners(self) -> None:
        size = self.image_sizes[1]
        meta = [dict(img_shape=size, ori_shape=size, pad_shape=size)]
        head, inputs = in_mode(self.build(), training=False), self.inputs(size, batch=1)
        twin = self._twin(head, align_corners=True)
        with torch.no_grad():
            found, other = (h.predict(inputs, meta, Config()) for h in (head, twin))
        assert twin.align_corners is True
        assert not torch.equal(found, other), 'align_corners changes nothing'

    def check_loss_decode(self) -> None:
        size = self.image_sizes[0]
        inputs, samples = self.inputs(size), self.samples(size)
        entropy = dict(type='CrossEntropyLoss', loss_name='loss_first', loss_weight=1.0)
        dice = dict(type='DiceLoss', loss_name='loss_second', loss_weight=0.5)
        head = self.build(dropout_ratio=0, loss_decode=[entropy, dice])
        losses = self.losses(head, inputs, samples)
        assert {'loss_first', 'loss_second'} <= set(losses)
        twice = self._twin(
            head, dropout_ratio=0, loss_decode=[dict(entropy, loss_weight=2.0), dice]
        )
        weighted = self.losses(twice, inputs, samples)
        torch.testing.assert_close(weighted['loss_first'], 2 * losses['loss_first'], **CLOSE)
        torch.testing.assert_close(weighted['loss_second'], losses['loss_second'], **CLOSE)

    def check_ignore_index(self) -> None:
        size = self.image_sizes[0]
        inputs, samples = self.inputs(size), self.samples(size)
        head = self.build(dropout_ratio=0)
        twin = self._twin(head, dropout_ratio=0, ignore_index=77)
        renamed = copy.deepcopy(samples)
        for sample in renamed:
            label = sample.gt_sem_seg.data
            label[label == 255] = 77
        expected = self.losses(head, inputs, samples)
        found = self.losses(twin, inputs, renamed)
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], **CLOSE)

    def check_sampler(self) -> None:
        size = self.image_sizes[0]
        inputs, samples = self.inputs(size), self.samples(size)
        head = self.build(dropout_ratio=0)
        twin = self._twin(head, dropout_ratio=0, sampler=dict(type='OHEMPixelSampler', min_kept=20))
        every = self.total(self.losses(head, inputs, samples))
        hard = self.total(self.losses(twin, inputs, samples))
        # 20 pixels of each image count, and the sum is still divided by all of them.
        assert 0 < hard < every, 'the sampler chooses nothing'

    def check_init_cfg(self) -> None:
        rule = dict(type='Constant', val=0.25, bias=0.5, override=dict(name='conv_seg'))
        head = self.build(init_cfg=rule)
        assert (head.conv_seg.weight == 0.25).all()
        assert (head.conv_seg.bias == 0.5).all()
