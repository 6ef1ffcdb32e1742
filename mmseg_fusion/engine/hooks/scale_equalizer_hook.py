"""Scale equalization as an initialization hook: algorithm 1 of arXiv 2402.01149."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
from ...fusions import (
    Fusion,
    Lost,
    common_module,
    constants,
    explain_single_value,
    find_fusions,
    fold_plan,
    fold_tensors,
    install_equalizer,
    is_inside,
    is_transposed,
    kept_state,
    plan_model,
    refuse_uncalled,
    select_fusions,
    split_batches,
)

#: Key in a checkpoint's meta.
META_KEY = 'scale_equalizer'
#: Key in a checkpoint: the weights that explicit equalizers were folded into, as training has them.
EXACT_KEY = 'scale_equalizer_weights'

#: Components whose fusions ``layers='auto'`` leaves alone, at any depth.
PRETRAINED = ('backbone', 'image_encoder')

_MOVED = ('plan_equalization', 'plan_layers')


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

    Every branch of a concatenation is scaled to standard deviation 1. The hook measures the
    branches over the training set by one forward pass per image (and one more after each fusion
    without a norm behind it, see :func:`plan_layers`). With ``mode='fold'`` the constants are
    folded into the initial weight of the layer behind the concatenation (equation 9), and training
    costs the same as before.

    The hook traces a forward pass to find the fusions (:func:`mmseg_fusion.fusions.trace_fusions`);
    it does not depend on the names of heads. ``layers='auto'`` takes the fusions of the decoder. It
    does not change fusions in a component called ``backbone`` or ``image_encoder``, nor weights
    that come from a checkpoint or require no gradient, since algorithm 1 initializes weights that
    are to be trained. Such layers can be selected by name. Depthwise fusion layers in front of
    batch norm, and constant branches (standard deviation 0), are not changed. The hook reports
    everything that it does not change, with the reason. It runs once, after weights are loaded and
    before the first training step. It does not run on ``--resume``, nor on a layer that was
    equalized according to the meta of the loaded checkpoint.

    The measurement has a separate data loader over the training set, with its augmentations and
    labels. It runs the training forward pass in float32 without gradient (also under AMP). Batch
    norm layers use batch statistics; dropout and drop path are off. Running statistics, training
    flags and random states are restored, so that the training batches are those of a run without
    the hook. In distributed training each process measures its share of the images and the moments
    are summed, so that all weights stay identical. All of this was chosen; the paper leaves it
    open.

    Args:
        mode: ``'fold'`` divides each weight block by its standard deviation, as algorithm 1;
            ``'module'`` keeps the equalizers as constants during training. Both start from the same
            function but train differently: a step of SGD on a folded weight moves the effective
            weight ``std^2`` times as far, and a step of Adam ``std`` times. In both modes a saved
            checkpoint loads strictly into the plain model and gives the same logits.
        layers: ``'auto'`` for all fusions of the decoder whose weights are fresh, or a list of
            names of fusion layers, or of modules that contain them, anywhere in the model, e.g.
            ``['decode_head.fpn_bottleneck']`` or, for a U-Net, ``['backbone.decoder']``. A named
            layer is equalized even if its weights come from a checkpoint or are frozen, with a
            warning: batch norms behind it, and all layers that were trained with it, no longer fit.
        num_samples: number of training images to measure, drawn without repetition; None for
            the whole training set, as in the paper.
        equalize_mean: whether the mean is removed, too. ``'auto'``: if the fusion layer has a bias
            and no batch or instance norm directly behind it, which would remove the mean itself.
            True: if the layer has a bias. False: never. Without a bias, and in a transposed
            convolution, the mean cannot be removed.
        batch_size: images per forward pass and process; None for that of the training loader, at
            least 2, since batch norm layers use batch statistics.
        num_workers: worker processes that load images; None for as many as the training loader.
        seed: seed of the order in which images are drawn.

    Raises:
        ValueError: an argument is wrong, ``layers`` names something that is not a fusion layer (the
            candidates are listed), or custom_hooks has this hook twice.
        RuntimeError: no fusion was found (the modules that were searched are listed).
        FloatingPointError: a branch is not finite (layer and branch are named); no weight has
            been changed then.

    Example:
        Two lines in any MMSegmentation config::

            custom_imports = dict(imports=['mmseg_fusion'], allow_failed_imports=False)
            custom_hooks = [dict(type='ScaleEqualizerHook')]

    Example:
        >>> from mmengine.registry import HOOKS
        >>> HOOKS.build(dict(type='ScaleEqualizerHook')).mode
        'fold'
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
        self._done = False
        self._installed = False
        self._resumed = False
        self._loaded: set[str] = set()

    # --- when it runs -----------------------------------------------------------------------

    def before_run(self, runner) -> None:
        """Refuses a second hook of this kind, which would divide the weights once more."""
        if sum(isinstance(hook, ScaleEqualizerHook) for hook in runner.hooks) > 1:
            raise ValueError(
                'custom_hooks has ScaleEqualizerHook more than once; one takes all layers: give '
                'its layers=[...] the names of them all'
            )

    def before_train(self, runner) -> None:
        """Equalizes the model of ``runner``, unless that was done or training was resumed."""
        if self._resumed or runner.iter > 0:
            done = 'as its checkpoint says' if self.record else 'the run had started without it'
            runner.logger.info(f'Scale equalization: not measured on resume ({done}).')
            return
        if not self._done:
            self._equalize(runner, self._plain(runner))
            self._done = True

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        """Reads which weights are loaded and which were equalized; resuming restores equalizers."""
        self._resumed = bool(runner._resume)
        model = self._plain(runner)
        state = checkpoint.get('state_dict', checkpoint)
        record = (checkpoint.get('meta') or {}).get(META_KEY)
        if not self._resumed:
            ours = model.state_dict()
            loaded = {key.removeprefix('module.'): value for key, value in state.items()}
            self._loaded = {k for k, v in ours.items() if k in loaded and _fits(v, loaded[k])}
            self.record = self._covered(record or {}, runner.logger)
            return
        if record is None:
            return
        self.record = record
        if not any(_mode(entry, record) == 'module' for entry in record['layers']):
            return
        self._install(runner, model)
        exact = checkpoint.get(EXACT_KEY, ())
        self._unfold(model, state, exact)
        # EMAHook runs before and has loaded its copy already.
        for ema in self._ema_models(runner):
            copy = ema.state_dict()
            self._unfold(ema, copy, exact)
            ema.load_state_dict(copy)

    def _covered(self, record: dict[str, Any], logger) -> dict[str, Any] | None:
        """What of a checkpoint's record holds for this model: the layers that load their weight."""
        entries = [e for e in record.get('layers', ()) if not e['reason']]
        kept = [e for e in entries if f'{e["name"]}.weight' in self._loaded]
        if len(kept) < len(entries):
            gone = ', '.join(e['name'] for e in entries if e not in kept)
            logger.warning(
                f'Scale equalization: the loaded checkpoint was equalized at {gone}, which this '
                'model does not have or does not load; what it has instead is measured anew.'
            )
        if not kept:
            return None
        # The weights in a checkpoint are always the folded ones.
        return {**record, 'mode': 'fold', 'layers': [{**e, 'mode': 'fold'} for e in kept]}

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        """Records the equalized layers in the meta; folds explicit equalizers into the copy."""
        if self.record is None:
            return
        checkpoint.setdefault('meta', {})[META_KEY] = self.record
        if self._installed:
            model = self._plain(runner)
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
                raise explain_single_value(
                    error,
                    f'ScaleEqualizerHook: {len(batch["inputs"])} image has no batch statistics '
                    'where the decoder pools to 1 x 1; set num_samples and batch_size of the hook '
                    'to None or at least 2, and give the training set 2 images',
                ) from error

        rate = 0.0

        @contextmanager
        def watch():
            nonlocal rate
            start = time.perf_counter()
            with _Progress(images, runner.logger) as progress:
                yield lambda i: progress.advance(len(loader.order[i]))
            rate = images / (time.perf_counter() - start)

        # Loading an image draws random numbers as well as running the model.
        with kept_state(model):
            chosen = self._choose(
                runner.logger, model, *find_fusions(model, lambda: run(loader.first()))
            )
            if not chosen:
                return
            if self.mode == 'module':
                try:
                    refuse_uncalled(chosen)
                except ValueError as error:
                    raise ValueError(f'ScaleEqualizerHook: {error}') from None
            if any(f.equalizable for f in chosen):
                runner.logger.info(
                    f'Scale equalization: measuring {images} of {len(loader.dataset)} training '
                    f'images for {", ".join(f.name for f in chosen)}'
                )
            else:
                images = 0
                runner.logger.info(
                    'Scale equalization: no image is measured, since every fusion is left alone.'
                )
            plans = plan_model(chosen, model, loader, run, self.equalize_mean, counted, watch)
        done = self.record or {'layers': []}
        fresh = [{**plan, 'mode': self.mode} for plan in plans]
        self.record = {
            'mode': self.mode,
            'num_images': images,
            'layers': fresh + [e for e in done['layers'] if e['name'] not in
                               {plan['name'] for plan in plans}],
        }  # fmt: skip
        self._warn(runner.logger, fresh)
        if self.mode == 'module':
            self._install(runner, model)
        else:
            for entry in fresh:
                if entry['reason']:
                    continue
                layer = model.get_submodule(entry['name'])
                fold_plan(entry, layer)
                for ema in self._ema_models(runner):
                    ema.get_submodule(entry['name']).load_state_dict(layer.state_dict())
        self._report(runner, fresh, rate)

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

    def _choose(
        self, logger, model: nn.Module, fusions: list[Fusion], lost: list[Lost]
    ) -> list[Fusion]:
        """The fusions to equalize; says of all others why not. Empty if nothing is left to do."""
        auto = self.layers == 'auto'
        inside = [f.name for f in fusions if is_inside(f.name, PRETRAINED)]
        left = ''
        if auto and inside:
            left = (
                f' Inside the backbone, and left alone: {", ".join(inside)}; to equalize them set '
                f"layers=['{common_module(inside)}']."
            )
        lost = [x for x in lost if not is_inside(f'{x.name}.', PRETRAINED)]
        missed = ''.join(f' Not followed to a layer: {x}.' for x in lost)
        if auto:
            chosen = [f for f in fusions if f.name not in inside]
        else:
            try:
                chosen = select_fusions(fusions, self.layers)
            except ValueError as error:
                raise ValueError(f'ScaleEqualizerHook, layers: {error}{missed}') from None
        if not chosen:
            searched = [
                f'{name} ({type(child).__name__})'
                for name, child in model.named_children()
                if name not in (*PRETRAINED, 'data_preprocessor')
            ]
            raise RuntimeError(
                'ScaleEqualizerHook found no layer that takes features concatenated along the '
                f'channels; searched: {", ".join(searched) or "nothing but the backbone"}. Remove '
                'the hook from custom_hooks, or use a head that fuses by concatenation.'
                + left
                + missed
            )
        if left or missed:
            logger.info(f'Scale equalization:{left}{missed}')
        done = {entry['name'] for entry in (self.record or {'layers': []})['layers']}
        again = [f.name for f in chosen if f.name in done]
        if again:
            logger.info(
                f'Scale equalization: {", ".join(again)} equalized already, as the loaded '
                'checkpoint says; not done again.'
            )
        chosen = [f for f in chosen if f.name not in done]
        not_fresh = {f.name: why for f in chosen if (why := self._not_fresh(model, f))}
        for name, why in not_fresh.items():
            if auto:
                logger.info(
                    f'Scale equalization: {name} is left alone, {why}; to equalize it all the '
                    f"same, name it: layers=['{name}', ...]"
                )
            else:
                logger.warning(
                    f'ScaleEqualizerHook: {name} is equalized as layers asks, though {why}: the '
                    'running statistics behind it, and all that was trained with it, no longer fit.'
                )
        return [f for f in chosen if not auto or f.name not in not_fresh]

    def _not_fresh(self, model: nn.Module, fusion: Fusion) -> str:
        """Why the weight of a fusion layer is not one that is about to be initialized."""
        if fusion.reason:
            return ''
        if f'{fusion.name}.weight' in self._loaded:
            return 'its weight comes from the loaded checkpoint'
        parts = fusion.name.split('.')
        for end in range(len(parts) + 1):
            name = '.'.join(parts[:end])
            init = getattr(model.get_submodule(name), 'init_cfg', None)
            for cfg in init if isinstance(init, (list, tuple)) else [init]:
                if isinstance(cfg, dict) and cfg.get('type') in ('Pretrained', 'PretrainedInit'):
                    return f'init_cfg of {name or "the model"} loads a checkpoint'
        if not fusion.conv.weight.requires_grad:
            return 'its weight requires no gradient'
        return ''

    # --- applying -----------------------------------------------------------------------------

    @staticmethod
    def _plain(runner) -> nn.Module:
        return runner.model.module if is_model_wrapper(runner.model) else runner.model

    def _explicit(self, model: nn.Module) -> Iterator[tuple[dict[str, Any], nn.Module]]:
        """Record and layer of each explicit equalizer."""
        for entry in self.record['layers']:
            if not entry['reason'] and _mode(entry, self.record) == 'module':
                yield entry, model.get_submodule(entry['name'])

    @staticmethod
    def _ema_models(runner) -> list[nn.Module]:
        return [h.ema_model.module for h in runner.hooks if isinstance(h, EMAHook)]

    def _install(self, runner, model: nn.Module) -> None:
        # The copies of EMAHook get them too: it pairs buffers by their order.
        for target in (model, *self._ema_models(runner)):
            for entry, layer in self._explicit(target):
                install_equalizer(layer, *constants(entry))
        self._installed = True

    def _convert(
        self, model: nn.Module, state: dict, prefix: str = '', inverse: bool = False
    ) -> None:
        """Replaces the fusion layers' tensors in a state dict by folded (or unfolded) ones."""
        for entry, layer in self._explicit(model):
            key = f'{prefix}{entry["name"]}.'
            sigma, mu = constants(entry)
            weight, bias = fold_tensors(
                state[key + 'weight'],
                state.get(key + 'bias'),
                sigma,
                mu,
                getattr(layer, 'groups', 1),
                inverse,
                is_transposed(layer),
            )
            state[key + 'weight'] = weight
            if bias is not None:
                state[key + 'bias'] = bias

    def _fused(self, model: nn.Module, state: dict, prefix: str = '') -> dict[str, torch.Tensor]:
        """The fusion layers' tensors in a state dict, by their names without ``prefix``."""
        names = [
            f'{entry["name"]}.{part}'
            for entry, _ in self._explicit(model)
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

    @staticmethod
    def _warn(logger, layers: list[dict[str, Any]]) -> None:
        for entry in layers:
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

    def _report(self, runner, layers: list[dict[str, Any]], rate: float) -> None:
        if is_main_process():
            dump(self.record, f'{runner.work_dir}/scale_equalizer.json', indent=2)
        if not self.record['num_images']:
            return
        table = PrettyTable(['layer', 'branch', 'channels', 'size', 'mean', 'std', 'ratio', 'done'])
        scalars = {}
        for entry in layers:
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


def _mode(entry: dict[str, Any], record: dict[str, Any]) -> str:
    # Records of version 0.1.0 have one mode for all layers.
    return entry.get('mode', record['mode'])


def _fits(ours: Any, theirs: Any) -> bool:
    return getattr(ours, 'shape', None) == getattr(theirs, 'shape', None)


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
