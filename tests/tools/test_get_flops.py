"""The counting tool: what it prints, what it writes into a metafile, what it says of bad input."""

from __future__ import annotations

import importlib.util
import re
import time
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from .running import run_again

SWIN_B = 'configs/scale_equalizer/upernet_swin-b_scale-eq_4xb4-160k_ade20k-512x512.py'
METAFILE = """# A comment that stays.
Models:
- Name: small  # and this one
  Config: configs/toy/small.py
  Metadata:
    Training Data: toys
    Parameters: 0
    FLOPs: 1   # too few
    FLOPs Shape: [24, 40]
- Name: other
  Config: configs/toy/other.py
  Metadata:
    Batch Size: 4
"""
CONV = "dict(type='Conv2d', in_channels=3, out_channels={}, kernel_size=1)"


@pytest.fixture(scope='module')
def tool(repo_root: Path) -> ModuleType:
    path = repo_root / 'tools' / 'analysis_tools' / 'get_flops.py'
    spec = importlib.util.spec_from_file_location('get_flops', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """configs/toy with two configs and their metafile."""
    folder = tmp_path / 'configs' / 'toy'
    folder.mkdir(parents=True)
    base = "default_scope = 'mmseg'\nmodel = dict(type='EncoderDecoder', \n"
    base += "    data_preprocessor=dict(type='SegDataPreProcessor', size=(8, 12)),\n"
    base += "    backbone=dict(type='UNet', base_channels=4, num_stages=2, strides=(1, 1),\n"
    base += '        enc_num_convs=(1, 1), dec_num_convs=(1,), downsamples=(False,),\n'
    base += '        enc_dilations=(1, 1), dec_dilations=(1,)),\n'
    base += "    decode_head=dict(type='FCNHead', in_channels=4, channels={}, num_convs=0,\n"
    base += '        concat_input=False, num_classes=2, in_index=-1), test_cfg=dict())\n'
    (folder / 'small.py').write_text(base.format(4))
    (folder / 'other.py').write_text(base.format(4).replace('num_classes=2', 'num_classes=3'))
    (folder / 'metafile.yaml').write_text(METAFILE)
    return folder


@pytest.mark.stack
def test_swin_b_in_seconds(repo_root: Path) -> None:
    start = time.perf_counter()
    words = (SWIN_B, '--shape', 2048, 1024)
    run = run_again('tools/analysis_tools/get_flops.py', *words, cwd=repo_root)
    # An idle core takes 4 s; a real forward pass takes minutes and 20 GB.
    assert time.perf_counter() - start < 60
    assert 'input       3 x 2048 x 1024' in run.stdout
    assert re.search(r'FLOPs       2\.369 T multiply-adds \(2,368,\d{3},\d{3},\d{3}\)', run.stdout)
    assert 'parameters  120.061 M' in run.stdout
    assert re.search(r'^backbone +86\.745 M', run.stdout, re.M)
    assert re.search(r'^decode_head +33\.316 M', run.stdout, re.M)
    assert 'auxiliary_head' not in run.stdout


def test_options(tool: ModuleType, folder: Path, capsys: pytest.CaptureFixture) -> None:
    config = str(folder / 'small.py')

    def flops(*arguments: str) -> int:
        assert tool.main([config, *arguments]) == 0
        return int(re.search(r'\(([\d,]+)\)', capsys.readouterr().out).group(1).replace(',', ''))

    crop = flops()  # 8 x 12
    assert flops('--shape', '8', '12') == crop
    assert flops('--shape', '16') == crop * 16 * 16 // (8 * 12)
    # One more class: the classifier has 4 inputs.
    assert flops('--cfg-options', 'model.decode_head.num_classes=3') == crop + 8 * 12 * 4
    assert tool.main([config, '--per-module', '3']) == 0
    assert '    conv_seg' not in capsys.readouterr().out
    assert tool.main([config, '--per-module', '2']) == 0
    assert '  conv_seg' in capsys.readouterr().out


def test_config_of_a_package(tool: ModuleType, capsys: pytest.CaptureFixture) -> None:
    assert tool.main([f'mmseg_fusion::{SWIN_B.partition("/")[2]}']) == 0
    assert 'input       3 x 512 x 512' in capsys.readouterr().out


def test_update_writes_the_numbers_alone(tool: ModuleType, folder: Path) -> None:
    from mmseg_fusion.analysis.counting import count

    metafile = folder / 'metafile.yaml'
    metafile.write_bytes(METAFILE.replace('\n', '\r\n').encode())  # line ends stay, too
    assert tool.main(['--update', str(metafile)]) == 0
    text = metafile.read_bytes().decode()
    small, other = yaml.safe_load(text)['Models']
    for model, shape in ((small, [24, 40]), (other, [8, 12])):
        counts = count(folder.parents[1] / model['Config'], shape)
        said = model['Metadata']
        found = said.pop('Parameters'), said.pop('FLOPs'), said.pop('FLOPs Shape')
        assert found == (counts.params, counts.flops, shape)
    assert (small['Metadata'], other['Metadata']) == ({'Training Data': 'toys'}, {'Batch Size': 4})
    kept = ('# A comment that stays.\r\n', '# and this one\r\n', '# too few\r\n')
    assert all(line in text for line in kept)
    assert tool.update_metafile(metafile) == 0
    assert metafile.read_bytes().decode() == text


def test_update_says_what_is_missing(
    tool: ModuleType, folder: Path, capsys: pytest.CaptureFixture
) -> None:
    metafile = folder / 'metafile.yaml'

    def message(text: str) -> str:
        metafile.write_text(text)
        assert tool.main(['--update', str(metafile)]) == 1
        assert metafile.read_text() == text
        return capsys.readouterr().err

    without = METAFILE.replace('  Metadata:\n    Batch Size: 4\n', '')
    assert 'line 10: the model has no Metadata' in message(without)
    assert 'expected a list of models' in message('')
    assert 'mapping values are not allowed' in message('Models: a: b')
    missing = METAFILE.replace('toy/other.py', 'toy/none.py')
    assert 'other names Config: configs/toy/none.py' in message(missing)
    config = folder / 'other.py'
    config.write_text(config.read_text().replace('size=(8, 12)', ''))
    assert 'add FLOPs Shape: [height, width]' in message(METAFILE)


@pytest.mark.parametrize(
    ('arguments', 'status', 'message'),
    [
        (['missing.py'], 2, 'no such file: missing.py'),
        ([], 2, 'give a config, or --update with metafiles'),
        (
            ['{}', '--shape', '1', '2', '3'],
            2,
            '--shape: expected H W or one side, positive, got 1 2 3',
        ),
        (['{}', '--shape', '0'], 2, 'positive, got 0'),
        (['{}', '--shape', 'wide'], 2, "invalid int value: 'wide'"),
        (['{}', '--per-module', '0'], 2, '--per-module: expected at least 1, got 0'),
        (['--update', '{}', '--shape', '8'], 2, '--update takes the shapes'),
        (['{}', '--cfg-options', 'model.data_preprocessor.size=None'], 1, 'give --shape H W'),
        (
            ['{}', '--shape', '1', '7', '--cfg-options']
            + [f'model.decode_head.{key}=5' for key in ('in_channels', 'channels')],
            1,
            '3 x 1 x 7',
        ),
        (
            [
                '{}',
                '--cfg-options',
                'model.backbone.in_channels=4',
                'model.data_preprocessor.mean=[1.0,2.0,3.0]',
                'model.data_preprocessor.std=[1.0,2.0,3.0]',
            ],
            1,
            'mean has 3 values, one per channel of an image, but model.backbone.in_channels is 4',
        ),
        (['nopackage::a/b.py'], 1, 'nopackage'),
        (['mmseg_fusion::a/b.py'], 1, 'does not exist'),
    ],
)
def test_bad_input(
    tool: ModuleType,
    folder: Path,
    capsys: pytest.CaptureFixture,
    arguments: list[str],
    status: int,
    message: str,
) -> None:
    arguments = [a.format(folder / 'small.py') for a in arguments]
    try:
        found = tool.main(arguments)
    except SystemExit as error:
        found = error.code
    assert (found, message in capsys.readouterr().err) == (status, True)


def test_channels_of_the_backbone_where_nothing_is_normalized(
    tool: ModuleType, folder: Path, capsys: pytest.CaptureFixture
) -> None:
    config = str(folder / 'small.py')
    assert tool.main([config, '--cfg-options', 'model.backbone.in_channels=4']) == 0
    assert 'input       4 x 8 x 12 (channels x height x width)' in capsys.readouterr().out
