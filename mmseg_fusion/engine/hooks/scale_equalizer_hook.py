"""Scale equalization as an initialization hook: algorithm 1 of arXiv 2402.01149."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal

import torch
from mmengine.dataset import RepeatDataset, worker_init_fn
from mmengine.dist import get_dist_info, is_main_process
from mmengine.fileio import dump
from mmengine.hooks import EMAHook, Hook
from mmengine.model import is_model_wrapper
from mmseg.registry import HOOKS
from prettytable import PrettyTable
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from torch import nn
from torch.utils.data import DataLoader

from ... import fusions
from ...fusions.fold import constants, fold_plan, fold_tensors, install_equalizer
from ...fusions.plan import plan_layers
from ...fusions.state import kept_state
from ...fusions.statistics import (
    BranchStatistics,
    measure_branches,
    measuring,
    reduce_statistics,
    split_batches,
)
from ...fusions.trace import Fusion, FusionTracer, select_fusions

#: Key in a checkpoint's meta.
META_KEY = 'scale_equalizer'
#: Key in a checkpoint: the weights that explicit equalizers were folded into, as training has them.
EXACT_KEY = 'scale_equalizer_weights'

_MOVED = ('plan_equalization',)


def __getattr__(name: str) -> Any:
    # Until version 0.3.
    if name not in _MOVED:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    warnings.warn(
        f'{name} has moved: import it from mmseg_fusion.fusions', DeprecationWarning, stacklevel=2
    )
    return getattr(fusions, name)


@HOOKS.register_module()
class ScaleEqualizerHook(Hook):
    """Calibrates the fusion layers of any decoder before training starts (section 3.2, alg. 1).

    Every branch of a concatenation is brought to standard deviation 1, measured over the training
    set by one forward pass per image (one more after each fusion that has no norm behind it, see
    :func:`plan_layers`). With ``mode='fold'`` the constants go into the initial weight
    of the layer behind the concatenation (equation 9) and training costs nothing more.

    The fusions are found by watching a forward pass (:func:`mmseg_fusion.fusions.trace_fusions`),
    no head is known by name. Those inside the backbone are pretrained and left alone; so are
    depthwise fusion layers and branches that are constant (standard deviation 0), which are
    reported. It runs once, before the first training step and after weights are loaded: never on
    ``--resume``, and never on a checkpoint whose meta says that it was done.

    The measurement has a data loader of its own over the training set with its augmentations
    and the classes' labels, runs the training forward pass in float32 without gradient
    (also under AMP), with batch statistics in norm layers, dropout and drop path off, and puts
    running statistics, training flags and random states back: the training batches are those of
    a run without the hook. Distributed, each process measures its share and the moments are
    summed, so that all weights stay identical. All of this is chosen; the paper leaves it open.

    Args:
        mode: ``'fold'`` divides each weight block by its standard deviation, the recommended
            form; ``'module'`` keeps the equalizers as constants during training. Equal at the
            start, not in training: a step of SGD on a folded weight acts ``std^2`` times as
            strongly on the effective one, a step of Adam ``std`` times. In both modes a saved
            checkpoint loads strictly into the plain model and gives the same logits.
        layers: ``'auto'`` for all fusions of the decoder, or a list of names of fusion layers
            or of modules around them, e.g. ``['decode_head.fpn_bottleneck']``.
        num_samples: number of training images to measure, drawn without repetition; None for
            the whole training set, as in the paper.
        equalize_mean: whether the mean is taken out too: ``'auto'`` where the fusion layer has a
            bias and no batch or instance norm right behind it, which would take the mean out
            itself; True wherever the layer has a bias; False nowhere. A layer without a bias
            cannot take it.
        batch_size: images per forward pass and process; None for that of the training loader,
            at least 2, since norm layers use batch statistics.
        num_workers: worker processes that load images; None for as many as the training loader.
        seed: of the order in which images are drawn.

    Raises:
        ValueError: an argument is wrong, or ``layers`` names something that is no fusion layer
            (the candidates are listed).
        RuntimeError: no fusion was found (the modules that were searched are listed).
        FloatingPointError: a branch is not finite (layer and branch are named); no weight has
            been changed then.

    Example:
        Two lines in any MMSegmentation config::

            custom_imports = dict(imports=['mmseg_fusion'], allow_failed_imports=False)
            custom_hooks = [dict(type='ScaleEqualizerHook')]
    """

    # Behind EMAHook, whatever its priority, so that before_save_checkpoint sees its weights too.
    priority = 'LOWEST'

    def __init__(
        self,
        mode: Literal['fold', 'module'] = 'fold',
        layers: Literal['auto'] | Sequence[str] = 'auto',
        num_samples: int | None = None,
        equalize_mean: Literal['auto'] | bool = 'auto',
        batch_size: int | None = None,
        num_workers: int | None = None,
        seed: int = 0,
    ) -> None:
        if mode not in ('fold', 'module'):
            raise ValueError(f"mode must be 'fold' or 'module', got {mode!r}")
        if isinstance(layers, str) and layers != 'auto':
            raise ValueError(f"layers must be 'auto' or a list of names, got {layers!r}")
        if not isinstance(layers, str) and (
            not layers or not all(isinstance(name, str) for name in layers)
        ):
            raise ValueError(f"layers must be 'auto' or a list of names, got {layers!r}")
        if equalize_mean not in ('auto', True, False):
            raise ValueError(f"equalize_mean must be 'auto', True or False, got {equalize_mean!r}")
        for name, value, low in (
            ('num_samples', num_samples, 1),
            ('batch_size', batch_size, 1),
            ('num_workers', num_workers, 0),
        ):
            if value is not None and (not isinstance(value, int) or value < low):
                raise ValueError(f'{name} must be None or an integer >= {low}, got {value!r}')
        self.mode = mode
        self.layers = layers if isinstance(layers, str) else list(layers)
        self.num_samples = num_samples
        self.equalize_mean = equalize_mean
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        #: What was done, as it stands in the checkpoint's meta; None before.
        self.record: dict[str, Any] | None = None
        self._installed = False
        self._resumed = False

    # --- when it runs -----------------------------------------------------------------------

    def before_train(self, runner) -> None:
        """Equalizes the model of ``runner``, unless that was done or training was resumed."""
        if self._resumed or runner.iter > 0:
            done = 'as its checkpoint says' if self.record else 'the run had started without it'
            runner.logger.info(f'Scale equalization: not measured on resume ({done}).')
            return
        if self.record is not None:
            if not self._installed:
                runner.logger.info(
                    'Scale equalization: the loaded checkpoint was equalized already, nothing '
                    'is done again.'
                )
            return
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        self._equalize(runner, model)

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        """Reads what a checkpoint says was done; on resume puts explicit equalizers back."""
        self._resumed = bool(runner._resume)
        record = (checkpoint.get('meta') or {}).get(META_KEY)
        if record is None:
            return
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        if not self._resumed and not self._covers(record, checkpoint['state_dict'], model):
            runner.logger.warning(
                'Scale equalization: the loaded checkpoint was equalized at layers that this model '
                'does not have or does not load; it is measured anew.'
            )
            return
        if not (self._resumed and record['mode'] == 'module'):
            # The weights in a checkpoint are always the folded ones.
            self.record = {**record, 'mode': 'fold'}
            return
        self.record = record
        self._install(runner, model)
        exact = checkpoint.get(EXACT_KEY, ())
        self._unfold(model, checkpoint['state_dict'], exact)
        # EMAHook runs before and has loaded its copy already.
        for ema in self._ema_models(runner):
            state = ema.state_dict()
            self._unfold(ema, state, exact)
            ema.load_state_dict(state)

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        """Writes what was done into the meta; explicit equalizers are folded into the copy."""
        if self.record is None:
            return
        checkpoint.setdefault('meta', {})[META_KEY] = self.record
        if self._installed:
            model = runner.model.module if is_model_wrapper(runner.model) else runner.model
            exact = []
            for part, prefix in (('state_dict', ''), ('ema_state_dict', 'module.')):
                if part in checkpoint:
                    exact.append(self._fused(model, checkpoint[part], prefix))
                    self._convert(model, checkpoint[part], prefix)
            # Folding rounds. A run that resumes, which needs the optimizer too, goes on from the
            # very weights that it had.
            if 'optimizer' in checkpoint:
                checkpoint[EXACT_KEY] = exact

    # --- measuring ------------------------------------------------------------------------------

    def _equalize(self, runner, model: nn.Module) -> None:
        loader, counted, images = self._loader(runner)

        def run(batch) -> None:
            try:
                model._run_forward(model.data_preprocessor(batch, True), mode='loss')
            except ValueError as error:
                if 'more than 1 value per channel' not in str(error):
                    raise
                raise ValueError(
                    f'ScaleEqualizerHook: {len(batch["inputs"])} image has no batch statistics '
                    'where the decoder pools to 1 x 1; set num_samples and batch_size of the hook '
                    'to None or at least 2, and give the training set 2 images'
                ) from error

        # Loading an image draws random numbers as well as running the model.
        with kept_state(model):
            fusions = self._select(model, self._trace(model, loader, run))
            runner.logger.info(
                f'Scale equalization: measuring {images} of {len(loader.dataset)} training images '
                f'for {", ".join(f.name for f in fusions)}'
            )
            if self.mode == 'module':
                self._refuse_uncalled(fusions)
            rate = 0.0

            def measure() -> dict[str, BranchStatistics]:
                nonlocal rate
                start = time.perf_counter()
                with _Progress(images, runner.logger) as progress:
                    _, statistics = measure_branches(
                        model,
                        loader,
                        run,
                        counted,
                        lambda i: progress.advance(len(loader.order[i])),
                    )
                rate = images / (time.perf_counter() - start)
                return reduce_statistics(statistics)

            layers = plan_layers(fusions, measure, self.equalize_mean)
        self.record = {
            'mode': self.mode,
            'num_images': images,
            'layers': layers,
        }
        self._warn(runner.logger)
        if self.mode == 'module':
            self._install(runner, model)
        else:
            for entry, layer in self._recorded(model):
                fold_plan(entry, layer)
                for ema in self._ema_models(runner):
                    twin = ema.get_submodule(entry['name'])
                    twin.load_state_dict(layer.state_dict())
        self._report(runner, rate)

    @staticmethod
    def _refuse_uncalled(fusions: list[Fusion]) -> None:
        names = [f.name for f in fusions if f.equalizable and not f.called]
        if names:
            raise ValueError(
                f'ScaleEqualizerHook: the weight of {", ".join(names)} is used without calling the '
                "layer, so mode='module' cannot put an equalizer before it; use mode='fold'"
            )

    def _loader(self, runner) -> tuple[_Batches, int, int]:
        source = runner.train_dataloader
        dataset = source.dataset
        while isinstance(dataset, RepeatDataset):
            dataset = dataset.dataset
        try:
            length = len(dataset)
        except TypeError as error:
            raise ValueError(
                f'ScaleEqualizerHook needs a training set with a length, {type(dataset).__name__} '
                'has none; set train_dataloader.dataset to one'
            ) from error
        images = length if self.num_samples is None else min(self.num_samples, length)
        if self.num_samples is not None and self.num_samples > length:
            runner.logger.warning(
                f'ScaleEqualizerHook: num_samples={self.num_samples} is more than the training '
                f'set has; all {length} images are measured.'
            )
        size = self.batch_size or max(2, source.batch_size or 2)
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(length, generator=generator)[:images].tolist()
        batches = split_batches(order, size)
        rank, world = get_dist_info()
        mine = batches[rank::world]
        # Every process makes the same number of passes, counted or not: a model that talks to
        # the other processes in its forward pass never waits for one that has finished.
        passes = math.ceil(len(batches) / world)
        padded = mine + [batches[0]] * (passes - len(mine))
        workers = source.num_workers if self.num_workers is None else self.num_workers
        return (
            _Batches(dataset, source.collate_fn, padded, workers, self.seed, rank),
            len(mine),
            images,
        )

    @staticmethod
    def _trace(model: nn.Module, loader: _Batches, run) -> list[Fusion]:
        # In the very mode of the measurement: a model may run otherwise with norms in eval mode.
        with measuring(model), FusionTracer(model) as tracer:
            run(loader.first())
            return tracer.fusions

    def _select(self, model: nn.Module, fusions: list[Fusion]) -> list[Fusion]:
        found = [f for f in fusions if f.name.split('.')[0] != 'backbone']
        inside = [f.name for f in fusions if f not in found]
        left = f' Inside the backbone, and left alone: {", ".join(inside)}.' if inside else ''
        chosen = found
        if self.layers != 'auto':
            try:
                chosen = select_fusions(found, self.layers)
            except ValueError as error:
                raise ValueError(f'ScaleEqualizerHook, layers: {error}{left}') from None
        if not chosen:
            searched = [
                f'{name} ({type(child).__name__})'
                for name, child in model.named_children()
                if name not in ('backbone', 'data_preprocessor')
            ]
            raise RuntimeError(
                'ScaleEqualizerHook found no layer that takes features concatenated along the '
                f'channels; searched: {", ".join(searched)}. Remove the hook from custom_hooks, '
                'or use a head that fuses by concatenation.' + left
            )
        return chosen

    @staticmethod
    def _covers(record: dict[str, Any], state: dict, model: nn.Module) -> bool:
        ours = model.state_dict()
        keys = [f'{entry["name"]}.weight' for entry in record['layers'] if not entry['reason']]
        loaded = {k.removeprefix('module.'): v for k, v in state.items()}
        return all(k in ours and k in loaded and ours[k].shape == loaded[k].shape for k in keys)

    # --- applying -----------------------------------------------------------------------------

    def _recorded(self, model: nn.Module) -> Iterator[tuple[dict[str, Any], nn.Module]]:
        for entry in self.record['layers']:
            if not entry['reason']:
                yield entry, model.get_submodule(entry['name'])

    @staticmethod
    def _ema_models(runner) -> list[nn.Module]:
        return [h.ema_model.module for h in runner.hooks if isinstance(h, EMAHook)]

    def _install(self, runner, model: nn.Module) -> None:
        # The copies of EMAHook get them too: it pairs buffers by their order.
        for target in (model, *self._ema_models(runner)):
            for entry, layer in self._recorded(target):
                install_equalizer(layer, *constants(entry))
        self._installed = True

    def _convert(
        self, model: nn.Module, state: dict, prefix: str = '', inverse: bool = False
    ) -> None:
        """Replaces the fusion layers' tensors in a state dict by folded (or unfolded) ones."""
        for entry, layer in self._recorded(model):
            key = f'{prefix}{entry["name"]}.'
            sigma, mu = constants(entry)
            weight, bias = fold_tensors(
                state[key + 'weight'],
                state.get(key + 'bias'),
                sigma,
                mu,
                getattr(layer, 'groups', 1),
                inverse,
            )
            state[key + 'weight'] = weight
            if bias is not None:
                state[key + 'bias'] = bias

    def _fused(self, model: nn.Module, state: dict, prefix: str = '') -> dict[str, torch.Tensor]:
        """The fusion layers' tensors in a state dict, by their names without ``prefix``."""
        names = [
            f'{entry["name"]}.{part}'
            for entry, _ in self._recorded(model)
            for part in ('weight', 'bias')
        ]
        return {name: state[prefix + name] for name in names if prefix + name in state}

    def _unfold(self, model: nn.Module, state: dict, exact: Sequence[dict]) -> None:
        """Replaces the fusion layers' folded tensors by those that were folded.

        Args:
            model: with the layers.
            state: of the model, as it was saved.
            exact: what may have been folded to it, as :meth:`before_save_checkpoint` keeps it: of
                the model and of its moving average, which EMAHook exchanges. The one that folds
                to ``state`` is taken; without any, unfolding rounds.
        """
        folded = {name: value.cpu() for name, value in self._fused(model, state).items()}
        for kept in exact:
            again = {name: value.cpu() for name, value in kept.items()}
            self._convert(model, again)
            if again.keys() == folded.keys() and all(
                torch.equal(again[name], value) for name, value in folded.items()
            ):
                state.update(kept)
                return
        self._convert(model, state, inverse=True)

    # --- telling --------------------------------------------------------------------------------

    def _warn(self, logger) -> None:
        for entry in self.record['layers']:
            if entry['reason']:
                logger.warning(
                    f'ScaleEqualizerHook: {entry["name"]} is left alone: {entry["reason"]}.'
                )
                continue
            constant = [str(i) for i, s in enumerate(entry['std']) if s == 0]
            if constant:
                logger.warning(
                    f'ScaleEqualizerHook: branch {", ".join(constant)} of {entry["name"]} is '
                    'constant over the measured images (standard deviation 0) and is left alone.'
                )

    def _report(self, runner, rate: float) -> None:
        table = PrettyTable(['layer', 'branch', 'channels', 'size', 'mean', 'std', 'ratio', 'done'])
        scalars = {}
        for entry in self.record['layers']:
            for i, std in enumerate(entry['std']):
                done = 'left alone' if entry['reason'] or std == 0 else 'weight / std'
                if entry['bias'] and std > 0:
                    done += ', mean into bias'
                table.add_row(
                    [
                        entry['name'] if i == 0 else '',
                        i,
                        entry['channels'][i],
                        ' x '.join(map(str, entry['sizes'][i])),
                        f'{entry["mean"][i]:.4f}',
                        f'{std:.4f}',
                        f'{entry["ratio"][i]:.3f}',
                        done,
                    ]
                )
                key = f'scale_equalizer/{entry["name"]}/{i}'
                scalars[f'{key}/mean'] = entry['mean'][i]
                scalars[f'{key}/std'] = std
        runner.logger.info(
            f"Scale equalization (mode '{self.mode}') over {self.record['num_images']} images at "
            f'{rate:.1f} images/s; ratio is to the largest std of the layer\n{table}'
        )
        if is_main_process():
            runner.visualizer.add_scalars(scalars, step=0)
            dump(self.record, f'{runner.work_dir}/scale_equalizer.json', indent=2)


class _Batches:
    """The measurement's own data loader over the training set, in fixed batches."""

    def __init__(
        self, dataset, collate, order: list[list[int]], workers: int, seed: int, rank: int
    ) -> None:
        self.order = order
        self.dataset, self.collate = dataset, collate
        self.loader = DataLoader(
            self.dataset,
            batch_sampler=order,
            num_workers=workers,
            collate_fn=self.collate,
            worker_init_fn=partial(
                worker_init_fn,
                num_workers=workers,
                rank=rank,
                seed=seed,
                disable_subprocess_warning=True,
            ),
        )

    def first(self) -> Any:
        """The first batch, loaded in this process."""
        return self.collate([self.dataset[i] for i in self.order[0]])

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator:
        return iter(self.loader)


class _Progress:
    """Progress with images/s: a bar on a terminal, else ten lines in the log."""

    def __init__(self, total: int, logger) -> None:
        self._bar = Progress(
            TextColumn('measuring branches'),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn('{task.fields[rate]} images/s'),
            TimeRemainingColumn(),
        )
        self._drawn = is_main_process() and self._bar.console.is_terminal
        self._logger = logger
        self._world = get_dist_info()[1]
        self._total, self._done, self._start = total, 0, 0.0

    def __enter__(self) -> _Progress:
        if self._drawn:
            self._bar.start()
        self._task = self._bar.add_task('', total=self._total, rate='-')
        self._start = time.perf_counter()
        return self

    def __exit__(self, *exception) -> None:
        if self._drawn:
            self._bar.stop()

    def advance(self, images: int) -> None:
        """Counts a batch of ``images`` on this process."""
        before = 10 * self._done // self._total
        # The processes keep step, so the others have done as many.
        self._done = min(self._done + images * self._world, self._total)
        rate = f'{self._done / max(time.perf_counter() - self._start, 1e-9):.1f}'
        if self._drawn:
            self._bar.update(self._task, completed=self._done, rate=rate)
        elif 10 * self._done // self._total > before and self._done < self._total:
            self._logger.info(f'measured {self._done} of {self._total} images, {rate} images/s')
