"""Every public class has an example in its docstring, and every example in the package runs."""

from __future__ import annotations

import dataclasses
import doctest
import importlib
import inspect
import pkgutil

import mmseg.registry
import pytest
import torch
from torch import nn

import mmseg_fusion
from mmseg_fusion import fusions
from mmseg_fusion.models import layers

MODULES = sorted(
    name
    for _, name, _ in pkgutil.walk_packages(mmseg_fusion.__path__, 'mmseg_fusion.')
    if not name.endswith('__main__')
)


def registered() -> dict[str, type]:
    """Classes of this package in MMSegmentation's registries."""
    return {
        cls.__name__: cls
        for registry in vars(mmseg.registry).values()
        if hasattr(registry, 'module_dict')
        for cls in registry.module_dict.values()
        if cls.__module__.startswith('mmseg_fusion.')
    }


def exported() -> dict[str, type]:
    """Classes of the rooms that are used without a registry; data classes are results."""
    found = {name: getattr(room, name) for room in (fusions, layers) for name in room.__all__}
    return {
        name: value
        for name, value in found.items()
        if inspect.isclass(value) and not dataclasses.is_dataclass(value)
    }


PUBLIC = {**registered(), **exported()}


def test_the_package_has_public_classes():
    assert {'KSACHead', 'GFFHead', 'BiFPN', 'ScaleEqualizerHook', 'AxialAttention'} <= set(PUBLIC)


@pytest.mark.parametrize('name', sorted(PUBLIC))
def test_a_public_class_has_an_example(name):
    # A class has its own docstring or none; the one that it inherits does not count.
    assert '    >>> ' in (PUBLIC[name].__doc__ or ''), PUBLIC[name].__module__


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', MODULES)
def test_the_examples_of_a_module_run(name):
    module = importlib.import_module(name)
    failed, _ = doctest.testmod(module, extraglobs=dict(torch=torch, nn=nn), verbose=False)
    assert failed == 0
