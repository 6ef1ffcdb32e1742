"""Shared parts of the tools: MMSegmentation's own tools, configs, arguments, output files."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import functools
import importlib.util
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

from . import files
from .channels import check_channels
from .errors import InputError
from .files import CONFIGS, Outputs, add_overwrite, whole_file

if TYPE_CHECKING:
    from mmengine.config import Config

__all__ = [
    'CONFIGS',
    'Outputs',
    'add_overwrite',
    'check_at_least',
    'check_checkpoint',
    'check_config',
    'config_files',
    'exits_on_input_error',
    'installed_tool',
    'model_files',
    'read_config',
    'run_installed_tool',
    'whole_file',
]


def exits_on_input_error(main: Callable) -> Callable:
    """Decorates the main function of a tool: an :class:`InputError` ends it with its message."""

    @functools.wraps(main)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return main(*args, **kwargs)
        except InputError as error:
            raise SystemExit(str(error)) from error

    return run


@exits_on_input_error
def config_file(name: str) -> str:
    """:func:`mmseg_fusion.files.config_file`; stops the program where there is no such package."""
    return files.config_file(name)


def installed_tool(name: str) -> ModuleType:
    """MMSegmentation's own ``tools/<name>.py`` as a module.

    A wheel of mmsegmentation carries its tools in ``mmseg/.mim``, a source checkout beside
    ``mmseg``.

    Raises:
        SystemExit: the installed mmsegmentation has no such tool.
    """
    import mmseg

    root = Path(mmseg.__file__).parent
    tried = [root / '.mim' / 'tools' / f'{name}.py', root.parent / 'tools' / f'{name}.py']
    path = next((p for p in tried if p.is_file()), None)
    if path is None:
        raise SystemExit(
            f'mmsegmentation {mmseg.__version__} was installed without its tools (looked for '
            f'{" and ".join(map(str, tried))}); install its wheel: '
            'pip install --force-reinstall --no-deps mmsegmentation=={}'.format(mmseg.__version__)
        )
    spec = importlib.util.spec_from_file_location(f'mmseg_tool_{name}', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _closest(name: str, paths: Iterable[Path], count: int = 3) -> list[Path]:
    by_stem: dict[str, Path] = {}
    for path in paths:
        by_stem.setdefault(path.stem, path)
    stems = difflib.get_close_matches(Path(name).stem, by_stem, n=count, cutoff=0.5)
    return [by_stem[stem] for stem in stems]


def _shown(path: Path) -> str:
    """``path`` from here, if that is shorter to type."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith(os.path.join('..', '..')) else relative


def check_config(name: str) -> str:
    """The file of a config; stops the program if it does not exist.

    Args:
        name: a path, or a name of :func:`config_file`.

    Returns:
        The path.

    Raises:
        SystemExit: its message lists configs of this package with similar names.
    """
    path = config_file(name)
    if os.path.isfile(path):
        return path
    known = [p for p in CONFIGS.resolve().glob('*/*.py') if p.parent.name != '_base_']
    same = [p for p in known if p.as_posix().endswith('/' + path.partition('configs/')[2])]
    lines = [f'config {path!r} is not a file (looked in {os.getcwd()}).']
    if os.path.isdir(path):
        near = sorted(Path(path).glob('*.py'))
        lines += ['That folder holds:'] * bool(near) + [f'  {_shown(p)}' for p in near]
    else:
        near = (same if 'configs/' in path else []) or _closest(path, known)
        lines += ['Did you mean one of these?'] * bool(near) + [f'  {_shown(p)}' for p in near]
    if not near:
        lines.append(f'The configs of this package are in {_shown(CONFIGS.resolve())}.')
    raise SystemExit('\n'.join(lines))


def check_checkpoint(path: str) -> None:
    """Stops the program if there is no checkpoint file ``path``; a URL is not checked.

    Raises:
        SystemExit: its message lists the checkpoints that are nearby.
    """
    if '://' in path or os.path.isfile(path):
        return
    folder = Path(path) if os.path.isdir(path) else Path(path).parent
    checkpoints = sorted(folder.glob('*.pth'), key=lambda p: p.stat().st_mtime, reverse=True)
    lines = [f'checkpoint {path!r} is not a file (looked in {os.getcwd()}).']
    if checkpoints:
        lines += [f'{folder} holds, newest first:', *(f'  {p}' for p in checkpoints)]
    elif not folder.is_dir():
        lines.append(f'There is no folder {str(folder)!r}; tools/train.py writes to --work-dir.')
    raise SystemExit('\n'.join(lines))


def read_config(
    path: str,
    options: Mapping[str, Any] | None = None,
    needs: Sequence[str] = ('model',),
) -> Config:
    """A config with the changes of ``--cfg-options``.

    Args:
        path: of the file, or a name of :func:`config_file`.
        options: value of ``--cfg-options``.
        needs: keys that the tool cannot do without, ``a.b`` for one of a dict.

    Raises:
        SystemExit: there is no such file, it is not a config, an option does not fit, a key is
            missing, or, if the model is needed, its parts disagree on the channels of an image; the
            message says which.
    """
    from mmengine.config import Config

    path = check_config(path)
    try:
        cfg = Config.fromfile(path)
    # A config is a program: it may end in any kind of error.
    except Exception as error:
        raise SystemExit(
            f'config {path!r} cannot be read: {type(error).__name__}: {error}. Give a config in '
            'Python, as those of this package in configs/'
        ) from error
    try:
        cfg.merge_from_dict(dict(options or {}))
    except (AssertionError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise SystemExit(
            f'--cfg-options does not fit {path!r}: {type(error).__name__}: {error}'
        ) from error
    for need in needs:
        value: Any = cfg
        for key in need.split('.'):
            value = value.get(key) if hasattr(value, 'get') else None
        if value is None:
            raise SystemExit(
                f'{path} has no {need}: give a whole config, not a base of one, or set '
                f'it with --cfg-options {need}...'
            )
    if any(need.partition('.')[0] == 'model' for need in needs):
        try:
            check_channels(cfg.model)
        except InputError as error:
            raise SystemExit(f'{path}: {error}') from error
    return cfg


def check_at_least(parser: argparse.ArgumentParser, args: argparse.Namespace, **least: int) -> None:
    """Stops the program if an argument is below its minimum."""
    for name, smallest in least.items():
        value = getattr(args, name)
        if value is not None and value < smallest:
            parser.error(f'--{name.replace("_", "-")} must be at least {smallest}, got {value}')


def config_files(*configs: str) -> list[str]:
    """Config files and all their base files, as inputs of :class:`Outputs`."""
    from mmengine.config import Config

    files: list[str] = []
    waiting = list(configs)
    while waiting:
        file = config_file(waiting.pop())
        if file in files or not os.path.isfile(file):
            continue
        files.append(file)
        # What is no config is said by read_config, which everyone calls.
        with contextlib.suppress(Exception):
            waiting += [Config._get_cfg_path(b, file)[0] for b in Config._get_base_files(file)]
    return files


def model_files(pairs: Sequence[str | None]) -> list[str]:
    """All files of pairs of config and checkpoint; other entries are skipped later."""
    return [*config_files(*pairs[::2]), *(path for path in pairs[1::2] if path)]


def check_work_dir(config: str, work_dir: str | None) -> None:
    """Refuses a work dir in which MMEngine would overwrite a config.

    Raises:
        InputError: the config, or one of its base files, is the file that MMEngine would write; a
            file that MMEngine wrote there in an earlier run is accepted.
    """
    from mmengine.config import Config

    if not work_dir:
        return
    written = Path(work_dir) / Path(config).name
    try:
        Outputs('MMEngine', config_files(config), overwrite=True).check(written)
    except InputError as error:
        # As it is written, nothing of it is lost: no comment, no _base_.
        text = Path(config).read_text(encoding='utf-8')
        if os.path.samefile(config, written) and Config.fromfile(config).pretty_text == text:
            return
        raise InputError(
            f'--work-dir {work_dir}: MMEngine writes all that the config says to {written}. '
            f'{error}; give another --work-dir'
        ) from error


def check_predictions(outputs: Outputs, folder: Path) -> None:
    """Refuses a folder for ``--out`` in which MMSegmentation could overwrite other images.

    Raises:
        InputError: the folder holds PNG files that earlier predictions did not write.
    """
    try:
        outputs.check(*sorted(folder.glob('*.png')))
    except InputError as error:
        raise InputError(
            f'--out {folder} holds PNG files that tools/test.py did not write there, and '
            'predictions are named as their images: give a new folder'
        ) from error


def _with_our_options(tool: str) -> type[argparse.ArgumentParser]:
    """The parser of MMSegmentation's ``tool`` with what this package adds to its options."""

    class Parser(argparse.ArgumentParser):
        def add_argument(self, *names: str, **kwargs: Any) -> argparse.Action:
            if tool == 'train' and '--resume' in names:
                kwargs = dict(
                    nargs='?',
                    const=True,
                    default=False,
                    metavar='CHECKPOINT',
                    help='continue from the last intact checkpoint in the work dir, or from this '
                    'one; without any it is a fresh start (from load_from, where that is set)',
                )
            return super().add_argument(*names, **kwargs)

        def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
            if tool == 'test':
                self.add_argument(
                    '--allow-missing',
                    action='store_true',
                    help='test although the checkpoint lacks weights of the model, which are '
                    'random then',
                )
            words = list(sys.argv[1:] if args is None else args)
            # --resume CONFIG: the config is no checkpoint.
            for index, word in enumerate(words[:-1]):
                next_one = words[index + 1]
                if word == '--resume' and (next_one.endswith('.py') or '::' in next_one):
                    words[index : index + 2] = [next_one, word]
            args = super().parse_args(words, namespace)
            args.config = config_file(args.config)
            return args

    return Parser


@exits_on_input_error
def run_installed_tool(name: str, runner: type | None = None) -> None:
    """Runs MMSegmentation's ``tools/<name>.py`` on the command line of this process.

    Args:
        name: of the tool.
        runner: replaces mmengine's Runner.

    Raises:
        SystemExit: an argument does not fit; the message says which.
    """
    tool = installed_tool(name)
    tool.argparse = SimpleNamespace(ArgumentParser=_with_our_options(name))
    args = tool.parse_args()
    needs = ['model', f'{name}_dataloader.dataset', f'{name}_cfg']
    cfg = read_config(args.config, args.cfg_options, needs + ['optim_wrapper'] * (name == 'train'))
    if name == 'train':
        _check_train_cfg(cfg, args.config)
    if hasattr(args, 'checkpoint'):
        check_checkpoint(args.checkpoint)
    if name == 'test':
        tool.trigger_visualization_hook = _every_image(tool.trigger_visualization_hook)
    # Of several processes one looks, before any of them writes.
    ranks = [os.environ.get(key) for key in ('RANK', 'SLURM_PROCID', 'OMPI_COMM_WORLD_RANK')]
    first = all(rank in (None, '0') for rank in ranks)
    predictions = getattr(args, 'out', None) if first else None
    outputs = Outputs(name, model_files([args.config, getattr(args, 'checkpoint', None)]))
    check_work_dir(args.config, args.work_dir or cfg.get('work_dir'))
    if predictions:
        check_predictions(outputs, Path(predictions))
    if runner is not None:
        asked = dict(
            testing=hasattr(args, 'checkpoint'),
            allow_missing=getattr(args, 'allow_missing', False),
        )
        tool.Runner = type(runner.__name__, (runner,), asked)
    tool.main()
    if predictions:
        outputs.note(*Path(predictions).glob('*.png'))


def _every_image(trigger: Callable) -> Callable:
    """``--show`` and ``--show-dir`` draw every image; the hook's own default is each 50th."""

    def triggered(cfg: Config, args: argparse.Namespace) -> Config:
        cfg = trigger(cfg, args)
        key = 'default_hooks.visualization.interval'
        if key not in (args.cfg_options or {}):
            cfg.merge_from_dict({key: 1})
        return cfg

    return triggered


def _check_train_cfg(cfg: Config, path: str) -> None:
    """Stops the program where a training would do nothing."""
    for key in ('max_iters', 'max_epochs'):
        count = cfg.train_cfg.get(key)
        if count is not None and not (isinstance(count, int) and count > 0):
            raise SystemExit(
                f'{path}: train_cfg.{key} must be a number of at least 1, got {count!r}: nothing '
                f'would be trained. Set it with --cfg-options train_cfg.{key}=...'
            )
