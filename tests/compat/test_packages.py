"""The installed packages: what is accepted, noted or refused, and with which command."""

from __future__ import annotations

import importlib.metadata
import importlib.util

import pytest

from mmseg_fusion import compat

OPENMMLAB = {
    'mmengine': '0.10.7',
    'mmcv-lite': '2.1.0',
    'mmsegmentation': '1.2.2',
    'mmpretrain': '1.2.0',
    'ftfy': '6.3.1',
    'regex': '2026.11.15',
    'torchvision': '0.28.0',
}


ONEDL = {
    'onedl-mmengine': '0.10.12',
    'onedl-mmcv': '2.3.6',
    'onedl-mmsegmentation': '1.4.2',
    'onedl-mmpretrain': '1.3.6',
    'torchvision': '0.28.0',
}


@pytest.fixture
def install(monkeypatch):
    """Makes ``importlib`` see these distributions, and of their modules only these."""
    modules = {name: m for t in compat.FAMILIES.values() for m, (n, *_) in t.items() for name in n}

    def pretend(distributions: dict[str, str]) -> None:
        def version(name: str) -> str:
            if name not in distributions:
                raise importlib.metadata.PackageNotFoundError(name)
            return distributions[name]

        present = {modules[name] for name in distributions}
        monkeypatch.setattr(importlib.metadata, 'version', version)
        monkeypatch.setattr(
            importlib.util, 'find_spec', lambda name: object() if name in present else None
        )

    return pretend


@pytest.mark.stack
def test_the_installed_stack_is_accepted():
    assert compat.check_stack() == []
    assert [package.state for package in compat.stack()] == ['ok'] * len(compat.stack())


@pytest.mark.parametrize('packages', [OPENMMLAB, ONEDL], ids=['openmmlab', 'onedl'])
def test_a_tested_stack_has_no_notes(install, packages):
    install(packages)
    assert compat.check_stack() == []


@pytest.mark.parametrize(
    ('change', 'found', 'needed', 'command'),
    [
        (
            {'mmcv-lite': '2.2.0'},
            'mmcv: found mmcv-lite 2.2.0',
            'needed mmcv-lite>=2.0.1,<2.2',
            "pip install 'mmcv-lite>=2.0.1,<2.2'",
        ),
        (
            {'mmengine': '0.7.0'},
            'mmengine: found mmengine 0.7.0',
            'needed mmengine>=0.10.5,<0.11',
            "pip install 'mmengine>=0.10.5,<0.11'",
        ),
        (
            {'mmsegmentation': None},
            'mmseg: found nothing',
            'needed mmsegmentation>=1.2.2,<1.3',
            "pip install 'mmsegmentation>=1.2.2,<1.3'",
        ),
        ({'ftfy': None}, 'ftfy: found nothing', 'needed ftfy', "pip install 'ftfy'"),
        (
            {'mmcv-lite': None, 'mmcv': '2.2.0'},
            'mmcv: found mmcv 2.2.0',
            'needed mmcv-lite>=2.0.1,<2.2',
            "pip uninstall -y mmcv\n    pip install 'mmcv-lite>=2.0.1,<2.2'",
        ),
    ],
)
def test_a_missing_or_wrong_package_says_found_needed_and_command(
    install, change, found, needed, command
):
    packages = {**OPENMMLAB, **change}
    install({name: version for name, version in packages.items() if version})
    with pytest.raises(ImportError) as error:
        compat.check_stack()
    message = str(error.value)
    assert f'{found}, {needed}' in message
    assert command in message
    assert f'pip install -r {compat.REQUIREMENTS / "openmmlab.txt"}' in message
    # Nothing else is said to be wrong.
    assert message.count(': found ') == 1


def test_the_command_for_onedl_names_its_own_packages(install):
    install({**ONEDL, 'onedl-mmcv': '2.0.0'})
    with pytest.raises(ImportError, match=r"pip install 'onedl-mmcv>=2.3.6'") as error:
        compat.check_stack()
    assert str(compat.REQUIREMENTS / 'onedl.txt') in str(error.value)


def test_the_family_without_mmseg_is_that_of_the_other_packages(install):
    install({name: version for name, version in ONEDL.items() if 'segmentation' not in name})
    with pytest.raises(ImportError, match=r'needed onedl-mmsegmentation>=1\.4\.2'):
        compat.check_stack()
    install({})
    assert compat.family() == 'openmmlab'


def test_two_families_side_by_side_are_noted_with_the_commands(install):
    install({**OPENMMLAB, **ONEDL})
    (note,) = compat.check_stack()
    command = note.split('pip uninstall -y ')[1].split(';')[0].split()
    assert set(command) == {name for name in {**OPENMMLAB, **ONEDL} if 'mm' in name}
    assert 'pip install -r' in note


def test_two_builds_of_mmcv_side_by_side_are_noted(install):
    install({**OPENMMLAB, 'mmcv': '2.1.0'})
    (note,) = compat.check_stack()
    assert 'pip uninstall -y mmcv mmcv-lite' in note


def test_a_missing_optional_package_does_not_stop_the_import(install):
    install({name: v for name, v in OPENMMLAB.items() if name not in ('mmpretrain', 'torchvision')})
    notes = compat.check_stack()
    assert [note.split(':')[0] for note in notes] == ['mmpretrain', 'torchvision']
    assert all(note.startswith(compat.OPTIONAL) for note in notes)


def test_a_source_checkout_without_metadata_is_let_be(install, monkeypatch):
    install({name: v for name, v in OPENMMLAB.items() if name != 'mmsegmentation'})
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: object())
    assert compat.check_stack() == []
