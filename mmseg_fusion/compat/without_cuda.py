"""Several processes, and mixed precision, on a machine without an accelerator.

mmengine 0.10.7 requires nccl and a CUDA device: ends with an mmengine that chooses the backend by
the device. Its AmpOptimWrapper refuses the CPU: ends with one that accepts it.
"""

from __future__ import annotations

import atexit
import functools
import gc
import logging
import sys
import time
import warnings

from .quirk import Quirk


def distributed_without_cuda() -> Quirk | None:
    """Training and testing with several processes on a machine without an accelerator.

    mmengine always requires ``nccl`` and a CUDA device, and passes a device index to
    DistributedDataParallel, which refuses it for a model on the CPU. On such a machine the backend
    becomes ``gloo``, and SyncBatchNorm, which torch runs only on GPUs, becomes BatchNorm.
    """
    from mmengine.device import get_device

    if get_device() != 'cpu':
        return None
    from mmengine.dist import utils
    from mmengine.runner import Runner

    for name in ('_init_dist_pytorch', '_init_dist_slurm', '_init_dist_mpi'):
        setattr(utils, name, _init_with_gloo(getattr(utils, name)))
    Runner.wrap_model = _wrap_model_on_cpu(Runner.wrap_model)
    return Quirk(
        'distributed_without_cuda',
        'no CUDA: several processes talk through gloo, DDP gets no device, SyncBN becomes BN',
        'mmengine that chooses the backend by the device',
    )


def _init_with_gloo(original):
    @functools.wraps(original)
    def init(backend, *args, **kwargs):
        import torch
        from mmengine.logging import print_log

        wanted, backend = backend, 'gloo' if 'nccl' in backend else backend
        set_device = torch.cuda.set_device
        torch.cuda.set_device = lambda device: None
        try:
            original(backend, *args, **kwargs)
        finally:
            torch.cuda.set_device = set_device
        atexit.register(_leave_process_group)
        if wanted != backend:
            print_log(
                f'No CUDA device: the processes talk through {backend} instead of {wanted} and '
                'compute on the CPU.',
                'current',
                logging.WARNING,
            )

    return init


def _leave_process_group() -> None:
    """Ends gloo's threads: one that frees a tensor while Python shuts down aborts the process."""
    from torch import distributed

    if not distributed.is_initialized():
        return
    # A runner is part of cycles, and its DDP keeps the group alive.
    gc.collect()
    distributed.destroy_process_group()
    # Where somebody still holds it, its threads get a moment to free what they have.
    time.sleep(0.5)


def _wrap_model_on_cpu(original):
    @functools.wraps(original)
    def wrap_model(self, model_wrapper_cfg, model):
        from mmengine.model import is_model_wrapper, revert_sync_batchnorm
        from mmengine.registry import MODEL_WRAPPERS
        from torch.nn import SyncBatchNorm
        from torch.nn.parallel import DistributedDataParallel

        if not self.distributed or is_model_wrapper(model):
            return original(self, model_wrapper_cfg, model)
        asked = self.cfg.pop('sync_bn', None)
        layers = sum(isinstance(m, SyncBatchNorm) for m in model.modules())
        if layers or asked:
            self.logger.warning(
                f'SyncBatchNorm needs GPUs: {layers or "all"} layers are BatchNorm here, with the '
                "statistics of each process's own batch."
            )
            model = revert_sync_batchnorm(model)
        wrapper = dict(model_wrapper_cfg or {})
        if model_wrapper_cfg is None:
            wrapper['broadcast_buffers'] = False
            wrapper['find_unused_parameters'] = self.cfg.get('find_unused_parameters', False)
        kind = wrapper.setdefault('type', 'MMDistributedDataParallel')
        kind = MODEL_WRAPPERS.get(kind) if isinstance(kind, str) else kind
        if isinstance(kind, type) and issubclass(kind, DistributedDataParallel):
            wrapper['device_ids'] = None
        try:
            return original(self, wrapper, model)
        finally:
            if asked is not None:
                self.cfg.sync_bn = asked

    return wrap_model


def amp_without_cuda() -> Quirk | None:
    """Configs with ``AmpOptimWrapper``, and ``--amp``, on a machine without an accelerator.

    mmengine's wrapper refuses to be built there, although its autocast supports the CPU. It
    computes in bfloat16, the only type that autocast supports there, and needs no loss scaling.
    """
    from mmengine.device import get_device

    if get_device() != 'cpu':
        return None
    from mmengine.optim import AmpOptimWrapper

    module = sys.modules[AmpOptimWrapper.__module__]
    if not hasattr(module, 'is_cuda_available'):
        return None
    # Nothing but the refusal asks it there.
    module.is_cuda_available = lambda: True
    AmpOptimWrapper.__init__ = _amp_in_bfloat16(AmpOptimWrapper.__init__)
    return Quirk(
        'amp_without_cuda',
        'no CUDA: AmpOptimWrapper computes in bfloat16 without loss scaling',
        'mmengine whose AmpOptimWrapper takes the CPU',
    )


def _amp_in_bfloat16(original):
    @functools.wraps(original)
    def __init__(self, loss_scale='dynamic', dtype=None, **kwargs):
        from mmengine.logging import print_log

        print_log(
            'No CUDA device: mixed precision is bfloat16 on the CPU'
            + (f' instead of {dtype}' if dtype not in (None, 'bfloat16') else '')
            + ', without loss scaling.',
            'current',
            logging.WARNING,
        )
        with warnings.catch_warnings():
            # torch's scaler says that it is off without CUDA.
            warnings.simplefilter('ignore')
            original(self, loss_scale, 'bfloat16', **kwargs)

    return __init__
