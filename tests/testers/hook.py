"""Base tester of hooks."""

from __future__ import annotations

import copy
import itertools
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner, load_checkpoint
from mmseg.registry import HOOKS, MODELS
from torch import Tensor, nn

from .toys import segmentor_config

_NUMBERS = itertools.count()


class Probe(Hook):
    """Records what the training step is about to see, after all other hooks had their say."""

    priority = 'LOWEST'

    def __init__(self) -> None:
        self.before: list[dict[str, Tensor]] = []
        self.after: dict[str, Tensor] = {}
        self.batches: list[Tensor] = []
        self.random: list[Any] = []
        self.modes: list[bool] = []

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        self.before.append(copy.deepcopy(runner.model.state_dict()))
        self.batches.append(torch.stack(list(data_batch['inputs'])))
        self.random.append(
            (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate())
        )
        self.modes.append(all(m.training for m in runner.model.modules()))

    def after_train(self, runner: Runner) -> None:
        self.after = copy.deepcopy(runner.model.state_dict())


class HookTester:
    """Checks of a hook that is given in ``custom_hooks``.

    Attributes:
        hook: config of the hook.
        head: decode head of the model that is trained.
        iterations: length of the run.
        same_batches: the run with the hook sees the batches and random states of the run without.
        keeps_weights: the weights before the first step are those of the run without the hook.
    """

    hook: dict
    head: dict = dict(
        type='UPerHead',
        in_channels=[8, 16],
        in_index=[0, 1],
        pool_scales=(1, 2),
        channels=8,
        num_classes=3,
        norm_cfg=dict(type='BN'),
    )
    iterations: int = 2
    same_batches: bool = True
    keeps_weights: bool = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not cls.same_batches:
            cls.test_batches_and_random_states_stay = None
        if not cls.keeps_weights:
            cls.test_weights_stay_before_the_first_step = None

    def config(self, work_dir: Path, hooks: list, **changes: Any) -> Config:
        """Config of a whole run of a few iterations."""
        backbone = dict(type='TinyPyramid', channels=(8, 16), strides=(4, 8))
        cfg = Config(
            dict(
                default_scope='mmseg',
                model=segmentor_config(self.head, backbone).model,
                work_dir=str(work_dir),
                experiment_name=f'hook-{next(_NUMBERS)}',
                train_dataloader=dict(
                    batch_size=2,
                    num_workers=0,
                    sampler=dict(type='InfiniteSampler', shuffle=True),
                    dataset=dict(type='ToyScenes'),
                ),
                train_cfg=dict(type='IterBasedTrainLoop', max_iters=self.iterations),
                optim_wrapper=dict(
                    type='OptimWrapper', optimizer=dict(type='SGD', lr=0.01, momentum=0.9)
                ),
                default_hooks=dict(
                    checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=1),
                    logger=dict(type='LoggerHook', interval=1, log_metric_by_epoch=False),
                ),
                log_processor=dict(by_epoch=False),
                randomness=dict(seed=3, deterministic=False),
                log_level='WARNING',
                custom_hooks=copy.deepcopy(hooks),
            )
        )
        cfg.merge_from_dict(changes)
        return cfg

    def run(
        self, work_dir: Path, hooks: list | None = None, **changes: Any
    ) -> tuple[Runner, Probe]:
        """Trains; ``hooks`` defaults to the tested one."""
        probe = Probe()
        runner = Runner.from_cfg(
            self.config(work_dir, [self.hook] if hooks is None else hooks, **changes)
        )
        runner.register_hook(probe)
        runner.train()
        return runner, probe

    def hook_of(self, runner: Runner) -> Hook:
        """The tested hook of a run."""
        kind = type(self.build())
        (hook,) = (h for h in runner.hooks if type(h) is kind)
        return hook

    def build(self) -> Hook:
        return HOOKS.build(copy.deepcopy(self.hook))

    def check_run(self, runner: Runner, probe: Probe) -> None:
        """What a subclass wants to see after the run."""

    # --- checks --------------------------------------------------------------------------------

    def test_builds_from_its_config(self) -> None:
        hook = self.build()
        assert isinstance(hook, Hook)
        kind = self.hook['type']
        if isinstance(kind, str):
            assert HOOKS.get(kind) is type(hook)

    def test_takes_part_in_a_run(self, tmp_path: Path) -> None:
        runner, probe = self.run(tmp_path)
        assert runner.iter == self.iterations
        assert all(probe.modes), 'the hook leaves the model, or a part of it, in eval mode'
        assert all(torch.isfinite(v).all() for v in probe.after.values())
        self.check_run(runner, probe)

    def test_checkpoint_loads_strictly_into_the_plain_model(self, tmp_path: Path) -> None:
        runner, _ = self.run(tmp_path)
        plain: nn.Module = MODELS.build(copy.deepcopy(runner.cfg.model))
        load_checkpoint(plain, str(tmp_path / f'iter_{self.iterations}.pth'), 'cpu', strict=True)

    def test_resume_changes_no_weight(self, tmp_path: Path) -> None:
        _, first = self.run(tmp_path)
        more = {'train_cfg.max_iters': self.iterations + 1, 'resume': True}
        runner, resumed = self.run(tmp_path, **more)
        assert runner.iter == self.iterations + 1
        assert len(resumed.before) == 1, 'the run did not resume'
        # Weights that are saved in another form come back up to rounding.
        changed = [
            name
            for name, value in first.after.items()
            if not torch.allclose(value, resumed.before[0][name], rtol=1e-5, atol=1e-7)
        ]
        assert not changed, f'the hook changes {changed} on resume'

    def test_batches_and_random_states_stay(self, tmp_path: Path) -> None:
        _, without = self.run(tmp_path / 'without', hooks=[])
        _, found = self.run(tmp_path / 'with')
        for a, b in zip(found.batches, without.batches):
            assert torch.equal(a, b), 'the run with the hook sees other batches'
        for (a_torch, a_numpy, a), (b_torch, b_numpy, b) in zip(found.random, without.random):
            assert a == b, "the hook left Python's random state changed"
            assert torch.equal(a_torch, b_torch), "torch's random state differs"
            assert np.array_equal(a_numpy, b_numpy), "numpy's random state differs"

    def test_weights_stay_before_the_first_step(self, tmp_path: Path) -> None:
        _, without = self.run(tmp_path / 'without', hooks=[])
        _, found = self.run(tmp_path / 'with')
        changed = [
            k for k, v in without.before[0].items() if not torch.equal(v, found.before[0][k])
        ]
        assert not changed, f'the hook changes {changed}'
