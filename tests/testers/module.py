"""What heads, necks and backbones have in common."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import MODELS as ENGINE_MODELS
from mmengine.runner import save_checkpoint
from mmseg.apis import MMSegInferencer, inference_model, init_model
from mmseg.registry import MODELS
from torch import Tensor, nn

#: Every check of outputs asks for float32's accuracy, not for the same order of operations.
CLOSE = dict(rtol=1e-4, atol=1e-5)


def relative_error(found: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    """Largest, over the tensors, of the norm of the difference over the norm expected."""
    return max(
        float((f.double() - e.double()).norm() / e.double().norm().clamp_min(1e-12))
        for f, e in zip(found, expected)
    )


def in_mode(module: nn.Module, training: bool) -> nn.Module:
    """The module in that mode; mmseg's ResNet returns nothing from ``train()``."""
    module.train(training)
    return module


def places(module: nn.Module, kind: type) -> set[str]:
    """Where layers of that kind are: the name of what holds them."""
    return {
        name.rpartition('.')[0] for name, part in module.named_modules() if isinstance(part, kind)
    }


@contextlib.contextmanager
def marked_convolution() -> Iterator[type[nn.Conv2d]]:
    """A kind of convolution that configs can name: whatever has another was not asked."""

    class MarkedConv(nn.Conv2d):
        pass

    ENGINE_MODELS.register_module(MarkedConv.__name__, module=MarkedConv)
    try:
        yield MarkedConv
    finally:
        ENGINE_MODELS.module_dict.pop(MarkedConv.__name__)


def check_convolutions(module: nn.Module, kind: type[nn.Conv2d], plain: Iterable[str]) -> None:
    """All convolutions are of that kind but those that match a pattern, and every pattern does."""
    convolutions = {n: type(m) for n, m in module.named_modules() if isinstance(m, nn.Conv2d)}
    left = {name for name, found in convolutions.items() if found is not kind}
    assert left != convolutions.keys(), 'conv_cfg is not used'
    for pattern in plain:
        matched = {name for name in left if fnmatch(name, pattern)}
        assert matched, f'{pattern}: no such convolution, or it is of the kind that was asked for'
        left -= matched
    assert not left, f'{left} are not of the kind that conv_cfg asks for'


class ModuleTester:
    """Base of the testers of modules that map a list of levels, or an image, to tensors.

    Attributes:
        image_sizes: images that the inputs are made for. The first is large enough that no ReLU
            is dead by chance; odd ones show sizes that are assumed to divide.
        unused_parameters: patterns (fnmatch) of parameters that get no gradient on purpose.
        zero_gradients: patterns of parameters whose gradient is 0 at initialization on purpose,
            for example behind a gate that starts at 0.
        autocast_error: largest relative error of bfloat16 autocast against float32.
        compiled: check ``torch.compile``, graph capture only.
    """

    image_sizes: tuple[tuple[int, int], ...] = ((64, 64), (33, 47), (50, 31))
    unused_parameters: tuple[str, ...] = ()
    zero_gradients: tuple[str, ...] = ()
    autocast_error: float = 0.05
    compiled: bool = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not cls.compiled:
            cls.test_compiles = None

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if 'size' in metafunc.fixturenames:
            ids = [f'{h}x{w}' for h, w in self.image_sizes]
            metafunc.parametrize('size', self.image_sizes, ids=ids)

    # --- what a kind of module fills in -------------------------------------------------------

    def config(self, **changes: Any) -> dict:
        """The module's config with some keys changed."""
        raise NotImplementedError

    def inputs(self, size: tuple[int, int], batch: int = 2) -> Any:
        """Input for images of that size."""
        raise NotImplementedError

    def outputs(self, module: nn.Module, inputs: Any) -> tuple[Tensor, ...]:
        """The module's output as a tuple of tensors."""
        out = module(inputs)
        return (out,) if isinstance(out, Tensor) else tuple(out)

    def check_outputs(self, outputs: tuple[Tensor, ...], size: tuple[int, int], batch: int) -> None:
        """Asserts the shapes."""
        raise NotImplementedError

    def loss(self, module: nn.Module, inputs: Any, size: tuple[int, int]) -> Tensor:
        """A scalar to go backward from: by default one that no normalization cancels."""
        generator = torch.Generator().manual_seed(1)
        total = 0.0
        for out in self.outputs(module, inputs):
            noise = torch.randn(out.shape, generator=generator).to(out)
            total = total + (out * noise).mean() + (out * out * noise.abs()).mean()
        return total

    def segmentor(self, **test_cfg: Any) -> Config:
        """Config of a whole segmentor around the module."""
        raise NotImplementedError

    def num_classes_of(self, cfg: Config) -> int:
        return cfg.model.decode_head.num_classes

    # --- common --------------------------------------------------------------------------------

    def build(self, **changes: Any) -> nn.Module:
        """The module in training mode, initialized as the runner does it."""
        module = MODELS.build(self.config(**changes))
        if hasattr(module, 'init_weights'):
            module.init_weights()
        return in_mode(module, training=True)

    def _leaves(self, inputs: Any) -> list[Tensor]:
        return [inputs] if isinstance(inputs, Tensor) else list(inputs)

    def _matches(self, name: str, patterns: Iterable[str]) -> bool:
        return any(fnmatch(name, pattern) for pattern in patterns)

    def check_gradients(self, module: nn.Module, zeros: bool = True) -> None:
        """Asserts that every parameter has a finite gradient, and one that is not 0 everywhere."""
        wanted = {
            name: p
            for name, p in module.named_parameters()
            if p.requires_grad and not self._matches(name, self.unused_parameters)
        }
        missing = [name for name, p in wanted.items() if p.grad is None]
        assert not missing, f'no gradient reaches {missing}: DDP would wait for them'
        broken = [name for name, p in wanted.items() if not p.grad.isfinite().all()]
        assert not broken, f'gradient is NaN or infinite in {broken}'
        if zeros:
            zero = [
                name
                for name, p in wanted.items()
                if not p.grad.any() and not self._matches(name, self.zero_gradients)
            ]
            assert not zero, f'gradient is exactly 0 in {zero}'

    # --- checks --------------------------------------------------------------------------------

    def test_forward_and_backward(self, size: tuple[int, int]) -> None:
        module, inputs = self.build(), self.inputs(size)
        outputs = self.outputs(module, inputs)
        self.check_outputs(outputs, size, batch=2)
        finite = all(out.isfinite().all() for out in outputs)
        assert finite, 'an output is NaN or infinite'
        loss = self.loss(module, inputs, size)
        assert loss.isfinite()
        loss.backward()
        # On a map of a few pixels a ReLU may well be shut everywhere.
        self.check_gradients(module, zeros=size == self.image_sizes[0])

    def test_batch_of_one_in_eval_mode(self, size: tuple[int, int]) -> None:
        module = in_mode(self.build(), training=False)
        with torch.no_grad():
            outputs = self.outputs(module, self.inputs(size, batch=1))
        self.check_outputs(outputs, size, batch=1)
        finite = all(out.isfinite().all() for out in outputs)
        assert finite, 'an output is NaN or infinite'

    def test_images_of_a_batch_do_not_mix_in_eval_mode(self) -> None:
        module, inputs = in_mode(self.build(), training=False), self.inputs(self.image_sizes[0])
        with torch.no_grad():
            both = self.outputs(module, inputs)
            if isinstance(inputs, Tensor):
                first = self.outputs(module, inputs[:1])
            else:
                first = self.outputs(module, [x[:1] for x in inputs])
        for out, alone in zip(both, first):
            torch.testing.assert_close(out[:1], alone, **CLOSE)

    def test_inputs_are_left_alone(self) -> None:
        module, inputs = self.build(), self.inputs(self.image_sizes[0])
        before = [x.clone() for x in self._leaves(inputs)]
        self.outputs(module, inputs)
        for x, kept in zip(self._leaves(inputs), before):
            assert torch.equal(x, kept), 'the forward pass writes into its input'

    def test_bfloat16_autocast(self) -> None:
        size = self.image_sizes[1]
        module, inputs = in_mode(self.build(), training=False), self.inputs(size)
        with torch.no_grad():
            full = self.outputs(module, inputs)
            with torch.autocast('cpu', dtype=torch.bfloat16):
                half = self.outputs(module, inputs)
        error = relative_error(half, full)
        assert error < self.autocast_error, f'bfloat16 differs by {error:.3f} from float32'
        in_mode(module, training=True)
        with torch.autocast('cpu', dtype=torch.bfloat16):
            loss = self.loss(module, inputs, size)
        assert loss.isfinite()
        loss.backward()
        self.check_gradients(module, zeros=False)

    @pytest.mark.gpu
    def test_float16_autocast_on_cuda(self) -> None:
        size = self.image_sizes[1]
        module, inputs = self.build().cuda(), self.inputs(size)
        inputs = inputs.cuda() if isinstance(inputs, Tensor) else [x.cuda() for x in inputs]
        with torch.autocast('cuda', dtype=torch.float16):
            loss = self.loss(module, inputs, size)
        loss.backward()
        self.check_gradients(module, zeros=False)

    def test_saves_and_loads_strictly(self, tmp_path: Path) -> None:
        module, inputs = self.build(), self.inputs(self.image_sizes[0])
        self.outputs(module, inputs)  # running statistics differ from a fresh module's
        save_checkpoint(dict(state_dict=module.state_dict()), str(tmp_path / 'saved.pth'))
        torch.manual_seed(99)
        other = self.build()
        state = torch.load(tmp_path / 'saved.pth', weights_only=True)['state_dict']
        other.load_state_dict(state, strict=True)
        with torch.no_grad():
            expected = self.outputs(in_mode(module, training=False), inputs)
            found = self.outputs(in_mode(other, training=False), inputs)
        for f, e in zip(found, expected):
            assert torch.equal(f, e), 'a loaded module gives other outputs: some state is not saved'

    def test_keys_of_the_state_do_not_depend_on_use(self) -> None:
        module, inputs = self.build(), self.inputs(self.image_sizes[0])
        keys = list(module.state_dict())
        self.outputs(module, inputs)
        assert list(module.state_dict()) == keys, 'a forward pass changes the keys'
        in_mode(module, training=False)
        with torch.no_grad():
            self.outputs(module, inputs)
        assert list(module.state_dict()) == keys, 'eval mode changes the keys'

    def test_copies_and_pickles_after_use(self) -> None:
        module, inputs = self.build(), self.inputs(self.image_sizes[0])
        self.loss(module, inputs, self.image_sizes[0]).backward()
        twins = [copy.deepcopy(module), pickle.loads(pickle.dumps(module))]
        with torch.no_grad():
            expected = self.outputs(in_mode(module, training=False), inputs)
            for twin in twins:
                for f, e in zip(self.outputs(in_mode(twin, training=False), inputs), expected):
                    assert torch.equal(f, e)

    def test_compiles(self) -> None:
        module, inputs = in_mode(self.build(), training=False), self.inputs(self.image_sizes[0])
        torch._dynamo.reset()
        with torch.no_grad():
            expected = self.outputs(module, inputs)
            # The backend 'eager' runs what was captured as it is: no compiler is needed.
            found = self.outputs(torch.compile(module, backend='eager'), inputs)
        for f, e in zip(found, expected):
            torch.testing.assert_close(f, e, **CLOSE)

    def test_inference_functions(self, tmp_path: Path) -> None:
        image = np.random.randint(0, 256, (45, 61, 3), dtype=np.uint8)
        cfg = self.segmentor()
        classes = self.num_classes_of(cfg)
        model = MODELS.build(copy.deepcopy(cfg.model))
        model.init_weights()
        meta = dict(
            classes=[f'class {i}' for i in range(classes)],
            palette=[[20 * i, 255 - 20 * i, 100] for i in range(classes)],
        )
        checkpoint = str(tmp_path / 'model.pth')
        save_checkpoint(
            dict(state_dict=model.state_dict(), meta=dict(dataset_meta=meta)), checkpoint
        )
        model = init_model(copy.deepcopy(cfg), checkpoint, device='cpu')
        found = inference_model(model, image)
        assert found.seg_logits.data.shape == (classes, 45, 61)
        labels = found.pred_sem_seg.data[0]

        inferencer = MMSegInferencer(
            copy.deepcopy(cfg), checkpoint, device='cpu', scope='mmseg', **meta
        )
        inferencer.show_progress = False
        result = inferencer(image, return_vis=True, out_dir=str(tmp_path))
        assert result['predictions'].shape == (45, 61)
        np.testing.assert_array_equal(result['predictions'], labels.numpy())
        assert result['visualization'].shape == (45, 61, 3)

    def test_sliding_windows(self) -> None:
        cfg = self.segmentor(mode='slide', crop_size=(32, 32), stride=(21, 21))
        model = init_model(cfg, device='cpu')
        found = inference_model(model, np.random.randint(0, 256, (45, 61, 3), dtype=np.uint8))
        assert found.seg_logits.data.shape == (self.num_classes_of(cfg), 45, 61)
        assert found.seg_logits.data.isfinite().all()

    def test_test_time_augmentation(self) -> None:
        cfg = self.segmentor()
        model = MODELS.build(dict(cfg.tta_model, module=cfg.model)).eval()
        cfg.tta_pipeline[0].type = 'LoadImageFromNDArray'
        image = np.random.randint(0, 256, (45, 61, 3), dtype=np.uint8)
        data = pseudo_collate([Compose(cfg.tta_pipeline)(dict(img=image))])
        with torch.no_grad():
            (found,) = model.test_step(data)
        labels = found.pred_sem_seg.data
        assert labels.shape[-2:] == (45, 61)
        assert 0 <= labels.min() <= labels.max() < self.num_classes_of(cfg)
