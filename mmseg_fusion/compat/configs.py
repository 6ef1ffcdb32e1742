"""Configs: blanks in the values of ``--cfg-options``, ``_base_ = 'package::...'``, inferencers.

mmengine 0.10.7 drops the blanks: ends with an mmengine whose DictAction keeps them. It looks
packages up through ``pkg_resources``, which setuptools 82 removed, and knows neither this package
nor that onedl-mmsegmentation is ``mmseg``: ends with an mmengine that reads entry points.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import types
from typing import Any

from ..files import config_file
from .packages import FAMILIES, family, installed
from .quirk import Quirk


def blanks_in_options() -> Quirk | None:
    """``--cfg-options`` keeps the blanks inside a value.

    mmengine drops all blanks, so that the folder ``my data`` became ``mydata``. Blanks around an
    element of a list are still dropped.
    """
    from mmengine.config import DictAction

    original = DictAction._parse_iterable
    if original('a b') == 'a b':
        return None
    # mmengine parses the elements of a list through the same name.
    blank = '\0'

    def restored(value: Any) -> Any:
        if isinstance(value, str):
            return value.replace(blank, ' ')
        return type(value)(map(restored, value)) if isinstance(value, (list, tuple)) else value

    @functools.wraps(original)
    def parse_iterable(val: str) -> Any:
        val = val.replace(blank, ' ').strip().strip('\'"')
        return restored(original(val.replace(' ', blank)))

    DictAction._parse_iterable = staticmethod(parse_iterable)
    return Quirk(
        'blanks_in_options',
        '--cfg-options keeps the blanks inside a value, which mmengine drops',
        'mmengine whose DictAction keeps them',
    )


def external_configs() -> Quirk | None:
    """``_base_ = 'mmseg_fusion::...'`` and ``'mmseg::...'`` on every stack.

    mmengine knows neither this package nor, in ``mmseg::``, the distribution that onedl installs.
    mmengine 0.10.7 also calls ``pkg_resources``, which setuptools 82 removed and which finds no
    editable install. There known packages are looked up through ``importlib`` instead.
    """
    import mmengine.config.config
    import mmengine.config.utils
    import mmengine.hub.hub
    import mmengine.utils
    from mmengine.utils import package_utils

    table = mmengine.config.utils.MODULE2PACKAGE
    # The module's name is good for both: a distribution is found under any spelling of its name.
    table['mmseg_fusion'] = 'mmseg_fusion'
    what = "mmengine knows the configs of 'mmseg_fusion::'"
    if family() == 'onedl':
        for module, (names, _, _) in FAMILIES['onedl'].items():
            if module in table:
                table[module] = names[0]
        what += " and, for 'mmseg::', what onedl's distribution is called"
    if 'pkg_resources' in package_utils.get_installed_path.__code__.co_names:
        _look_up_through_importlib(table, package_utils)
        what += ', and looks installed packages up through importlib, not pkg_resources'
    _mmseg_scope_for_our_configs(mmengine.config.config.Config)
    return Quirk('external_configs', what, 'mmengine that reads entry points')


def named_models() -> Quirk:
    """``MMSegInferencer('mmseg_fusion::camvid/NAME', CHECKPOINT)``, with ``.py`` or without.

    mmengine's inferencers take a path or a name from MMSegmentation's metafiles. They looked for a
    config that is named as in ``_base_`` among these names.
    """
    from mmengine.config import Config
    from mmengine.infer import BaseInferencer

    original = BaseInferencer._load_model_from_metafile

    @functools.wraps(original)
    def load(self: BaseInferencer, model: str) -> tuple[Any, str | None]:
        if '::' not in model:
            return original(self, model)
        # No weights of its own: those are the inferencer's second argument.
        return Config.fromfile(config_file(model)), None

    BaseInferencer._load_model_from_metafile = load
    return Quirk(
        'named_models',
        "inferencers take a config that is named as in _base_, 'mmseg_fusion::FOLDER/NAME'",
        'mmengine whose inferencers take such a name',
    )


def _mmseg_scope_for_our_configs(config: type) -> None:
    """mmengine looks up what a ``package::`` config names in registries of that package's own
    name; this package registers into mmseg's."""
    find = config._get_cfg_path

    def in_scope_of_mmseg(cfg_path: str, filename: str) -> tuple[str, str | None]:
        path, scope = find(cfg_path, filename)
        return path, 'mmseg' if scope == 'mmseg_fusion' else scope

    config._get_cfg_path = staticmethod(in_scope_of_mmseg)


def _look_up_through_importlib(table: dict[str, str], package_utils: types.ModuleType) -> None:
    """Replaces ``is_installed`` and ``get_installed_path`` wherever mmengine has imported them."""
    import mmengine

    def folder(package: str) -> str | None:
        """The folder of the module of ``package``, which may be the name of a distribution."""
        module = next((m for m, p in table.items() if package in (m, p)), package)
        spec = importlib.util.find_spec(module.replace('-', '_'))
        return None if spec is None or spec.origin is None else os.path.dirname(spec.origin)

    def is_installed(package: str) -> bool:
        return folder(package) is not None or bool(installed([package]))

    def get_installed_path(package: str) -> str:
        path = folder(package)
        if path is None:
            raise ModuleNotFoundError(
                f'no module of package {package!r} is found: install it, or put its folder on '
                'PYTHONPATH'
            )
        return path

    for ours in (is_installed, get_installed_path):
        original = getattr(package_utils, ours.__name__)
        replacement = functools.update_wrapper(ours, original)
        for module in (package_utils, mmengine.utils, mmengine.config.config, mmengine.hub.hub):
            if getattr(module, ours.__name__, None) is original:
                setattr(module, ours.__name__, replacement)
