"""The runner of ``tools/train.py`` and ``tools/test.py``: mmengine's, with checks."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from mmengine.dist import broadcast_object_list, is_main_process
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.runner import CheckpointLoader, Runner
from torch import nn
from torch.utils.data import DataLoader

from ..checkpoints import check_finite, fit, last_intact, weights_of
from ..cli import check_checkpoint
from ..errors import CheckpointError, InputError
from ..fusions import is_single_value, single_value_layer
from ..images import explain_reading


class CheckedRunner(Runner):
    """mmengine's runner, with checks of checkpoints, images and labels.

    ``resume=True`` resumes from the last checkpoint of the work dir. If ``load_from`` is set,
    mmengine resumes from that checkpoint instead, although it is the one from which the first start
    took its weights; an interrupted run then continued from the iteration of another model. Here
    ``load_from`` is only used by a run that has no checkpoint yet. ``resume='CHECKPOINT'`` names
    another checkpoint. If a checkpoint cannot be read, for example the last one after a full disk,
    the one before is taken, with a warning.

    An image or label that cannot be read stops the run with the name of the file and what is wrong
    with it.

    It is an error if a checkpoint lacks weights that the model needs at test, or has weights that
    are not finite. mmengine continues with random weights.
    """

    #: Whether it is built to test: resuming is no question then.
    testing = False
    #: Whether a test takes a checkpoint that lacks weights of the model.
    allow_missing = False

    @staticmethod
    def build_dataloader(*args: Any, **kwargs: Any) -> DataLoader:
        """As mmengine's; errors of the data set name the file that cannot be read."""
        loader = Runner.build_dataloader(*args, **kwargs)
        explain_reading(loader.dataset)
        return loader

    def train(self) -> nn.Module:
        """As mmengine's, with clear errors for labels that are no class, and for too small a batch.

        Raises:
            InputError: the training set has such a label, or a batch norm layer of the model saw a
                single value per channel.
        """
        try:
            return super().train()
        except ValueError as error:
            if not is_single_value(error):
                raise
            batch = self.train_dataloader.batch_size
            layer = single_value_layer(error, self._plain_model())
            raise InputError(
                'a batch norm layer of the model saw a single value per channel, as behind pooling '
                f'to one cell with one image per process{f": {layer}" if layer else ""} ({error}). '
                f'train_dataloader.batch_size is {batch}: expected 2 or more (with drop_last=True, '
                "where the last batch is smaller), norm_cfg=dict(type='SyncBN') on several GPUs, "
                'or a norm that needs no batch, such as GN, in the decode head.'
            ) from error
        except (IndexError, RuntimeError) as error:
            known = re.search(r'Target (-?\d+) is out of bounds', str(error))
            # What other losses say, and CUDA, where no number is known.
            likely = 'Class values must be' in str(error) or 'device-side assert' in str(error)
            if not (known or likely):
                raise
            heads = [m for m in self._plain_model().modules() if hasattr(m, 'loss_decode')]
            classes = sorted({head.num_classes for head in heads if hasattr(head, 'num_classes')})
            what = f'label {known[1]}' if known else 'a label that is no class, it seems'
            config = self.cfg.filename or 'CONFIG'
            raise InputError(
                f'the training set has {what}: model.decode_head.num_classes is '
                f'{" or ".join(map(str, classes))}, so labels go from 0 to num_classes - 1, and '
                f'the ignore index is left out. Files and labels: python '
                f'tools/analysis_tools/check_dataset.py {config}. Set num_classes of every head '
                'to that of the data set, reduce_zero_label of the data set where its label 0 '
                f'is no class, or its metainfo ({str(error).splitlines()[0]}).'
            ) from error

    def load_or_resume(self) -> None:
        """Loads a checkpoint, resumes from one, or does neither; the log says which."""
        if self.testing:
            self._resume = False
        if self._has_loaded or not self._resume:
            return super().load_or_resume()
        given = self._resume if isinstance(self._resume, str) else None
        path, passed_over = (given, {}) if given else self._last_checkpoint()
        for broken, reason in passed_over.items():
            self.logger.warning(
                f'--resume: {broken} cannot be resumed from; going back to {path}. {reason}'
            )
        if path is None:
            # For the hooks, which ask: nothing is resumed.
            self._resume = False
            start = f'load_from={self._load_from!r}' if self._load_from else 'initial weights'
            self.logger.info(
                f'--resume: {self.work_dir} holds no checkpoint: a fresh start from {start}'
            )
            return super().load_or_resume()
        what = 'that was given' if given else f'the last one of {self.work_dir}'
        dropped = (
            f'; load_from={self._load_from!r} is what a fresh start would take'
            if self._load_from
            else ''
        )
        self.logger.info(f'--resume: continues from {path}, {what}{dropped}')
        self.resume(path)
        self._has_loaded = True
        if self.iter >= self.max_iters:
            self.logger.warning(
                f'--resume: nothing is left to train: {path} is of iteration {self.iter} of '
                f'{self.max_iters}. Raise train_cfg.max_iters to go on, or take another work dir.'
            )
        return None

    def _last_checkpoint(self) -> tuple[str | None, dict[str, str]]:
        """What :func:`last_intact` finds on the main process; the others take its word."""
        answer: list[Any] = [None]
        if is_main_process():
            try:
                answer = [last_intact(self.work_dir)]
            except CheckpointError as error:
                answer = [error]
        broadcast_object_list(answer)
        if isinstance(answer[0], CheckpointError):
            raise answer[0]
        return answer[0]

    def resume(self, filename: str, *args: Any, **kwargs: Any) -> None:
        """As mmengine's, with a clear error if the file is not a checkpoint of such a run."""
        try:
            super().resume(filename, *args, **kwargs)
        except CheckpointError:
            raise
        except (KeyError, ValueError) as error:
            raise CheckpointError(
                f'checkpoint {filename} is none of this run, whose config has another optimizer, '
                f'schedule or model ({type(error).__name__}: {error}). Give the config that it '
                'was trained with, or begin from its weights alone: '
                f'--cfg-options load_from={filename}, without --resume.'
            ) from error

    def load_checkpoint(
        self,
        filename: str,
        map_location: str | Callable = 'cpu',
        strict: bool = False,
        **kwargs: Any,
    ) -> dict:
        """As mmengine's, with an error if the checkpoint does not fit the model.

        Raises:
            SystemExit: there is no such file; the message lists those nearby.
            CheckpointError: the checkpoint cannot be read, holds no weights, weights that are not
                finite, none of the model, or, for a test, not all of it.
        """
        check_checkpoint(filename)
        try:
            checkpoint = super().load_checkpoint(filename, map_location, strict, **kwargs)
        except (AttributeError, KeyError, RuntimeError, TypeError):
            # Nothing that mmengine expects: this says what it is.
            weights_of(CheckpointLoader.load_checkpoint(filename, 'cpu', 'silent'), filename)
            raise
        model = self._plain_model()
        weights = weights_of(checkpoint, filename)
        if self.testing and not self.allow_missing:
            try:
                fit(model, checkpoint, filename)
            except CheckpointError as error:
                raise CheckpointError(
                    f'{error} To test with random weights for those that are missing, add '
                    '--allow-missing.'
                    if 'lacks weights' in str(error)
                    else str(error)
                ) from error
        elif not weights.keys() & model.state_dict().keys():
            raise CheckpointError(
                f'checkpoint {filename} has none of the weights of the model: it has '
                f'{next(iter(weights))}, the model {next(iter(model.state_dict()))}. Give the '
                'checkpoint of another model, or load_from=None for the initial weights.'
            )
        check_finite(model, filename)
        return checkpoint

    def _plain_model(self) -> nn.Module:
        """The model itself: neither distributed nor with test-time augmentation."""
        model = self.model
        while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
            model = model.module
        return model
