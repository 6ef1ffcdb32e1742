"""Several processes, and mixed precision, without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
from mmengine.runner import Runner

from mmseg_fusion import compat

from .running import run_python


@pytest.mark.stack
def test_distributed_training_on_the_cpu(tmp_path):
    # One process is enough to meet all that mmengine asks of CUDA; two: tests/tools/test_dist.py.
    code = f"""
        import atexit
        import sys
        import torch
        sys.path.insert(0, {str(Path(__file__).parents[2])!r})
        # Registered first, it runs last.
        atexit.register(lambda: print('still a group', torch.distributed.is_initialized()))
        import mmseg_fusion
        from mmengine.config import Config, DictAction
        from tests.compat import running

        class Normed(running.Line):
            def __init__(self):
                super().__init__()
                self.norm = torch.nn.SyncBatchNorm(1)

            def forward(self, inputs, mode='tensor'):
                return dict(loss=self.norm(self.linear(torch.stack(inputs))).square().mean())

        running.Line = Normed
        from pathlib import Path
        runner = running.make_runner(
            Path({str(tmp_path)!r}), 2, launcher='pytorch',
            env_cfg=dict(dist_cfg=dict(backend='nccl')), cfg=Config(dict(sync_bn='torch')))
        runner.train()
        print(type(runner.model).__name__, runner.model.device_ids, runner.cfg.sync_bn)
        print(type(runner.model.module.norm).__name__, torch.distributed.get_backend())
        print('device untouched', torch.cuda.set_device.__module__)
    """
    env = dict(RANK='0', LOCAL_RANK='0', WORLD_SIZE='1', MASTER_ADDR='127.0.0.1', MASTER_PORT='0')
    result = run_python(code, **env)
    assert result.stdout.splitlines()[-4:] == [
        'MMDistributedDataParallel None torch',
        '_BatchNormXd gloo',
        'device untouched torch.cuda',
        'still a group False',
    ]
    log = result.stdout + result.stderr
    assert 'gloo instead of nccl' in log
    assert 'SyncBatchNorm needs GPUs: 1 layers are BatchNorm here' in log


@pytest.mark.stack
def test_mixed_precision_on_the_cpu():
    code = """
        import torch
        import mmseg_fusion
        from mmengine.optim import AmpOptimWrapper

        model = torch.nn.Linear(4, 1)
        wrapper = AmpOptimWrapper(
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1), dtype='float16',
            loss_scale='dynamic', clip_grad=dict(max_norm=1))
        before = model.weight.clone()
        with wrapper.optim_context(model):
            output = model(torch.ones(2, 4))
            wrapper.update_params(output.float().mean())
        wrapper.load_state_dict(wrapper.state_dict())
        # d mean / d w = 1 for each of the 4 weights and the bias: norm sqrt(5), clipped to 1.
        print(output.dtype, model.weight.dtype, torch.allclose(
            before - model.weight, torch.full((1, 4), 0.1 / 5 ** 0.5), atol=1e-5))
    """
    result = run_python(code)
    assert result.stdout.splitlines()[-1] == 'torch.bfloat16 torch.float32 True'
    assert 'bfloat16 on the CPU instead of float16' in result.stdout + result.stderr


def test_a_machine_with_a_gpu_is_left_alone(monkeypatch):
    from mmengine.dist import utils

    monkeypatch.setattr('mmengine.device.get_device', lambda: 'cuda')
    before = Runner.wrap_model, utils._init_dist_pytorch
    assert compat.distributed_without_cuda() is None
    assert compat.amp_without_cuda() is None
    assert (Runner.wrap_model, utils._init_dist_pytorch) == before
