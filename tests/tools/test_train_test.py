"""tools/train.py and tools/test.py as subprocesses: the command lines of MMSegmentation's own."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import cv2
import mmseg
import pytest
import torch

from mmseg_fusion import cli
from mmseg_fusion.analysis import counting

from .running import ROOT, TOOLS, load, run, run_again, small_config


def scalars(work_dir: Path) -> dict[int, dict[str, float]]:
    """What was logged per iteration by the newest run in ``work_dir``."""
    newest = sorted(work_dir.glob('*/vis_data/scalars.json'))[-1]
    rows = [json.loads(line) for line in newest.read_text().splitlines()]
    return {row['iter']: row for row in rows if 'loss' in row}


@pytest.fixture(scope='module')
def trained(tmp_path_factory) -> Path:
    """A folder with small.py and, in ``work``, a run of it over 6 iterations."""
    folder = tmp_path_factory.mktemp('trained')
    run(TOOLS / 'train.py', small_config(folder).name, '--work-dir', 'work', cwd=folder)
    return folder


@pytest.mark.stack
def test_train_writes_checkpoints_log_and_metrics(trained):
    work = trained / 'work'
    assert {p.name for p in work.glob('*.pth')} == {'iter_3.pth', 'iter_6.pth'}
    assert list(scalars(work)) == [1, 2, 3, 4, 5, 6]
    log = next(work.glob('*/*.log')).read_text()
    assert 'mIoU' in log
    assert (work / 'small.py').is_file()


@pytest.mark.stack
def test_resume_continues_as_if_nothing_had_happened(trained, tmp_path):
    # What is left of a run that was killed after 3 iterations.
    work = tmp_path / 'work'
    work.mkdir()
    shutil.copy(trained / 'work' / 'iter_3.pth', work)
    (work / 'last_checkpoint').write_text(str(work / 'iter_3.pth'))
    resume = ['--work-dir', work, '--resume']
    run_again(TOOLS / 'train.py', trained / 'small.py', *resume, cwd=tmp_path)

    ours, uninterrupted = scalars(work), scalars(trained / 'work')
    assert list(ours) == [4, 5, 6]
    for iteration, row in ours.items():
        for name in ('lr', 'loss', 'decode.loss_ce'):
            assert row[name] == uninterrupted[iteration][name], (iteration, name)
    ours = load(work / 'iter_6.pth')
    uninterrupted = load(trained / 'work' / 'iter_6.pth')
    assert ours['meta']['iter'] == uninterrupted['meta']['iter'] == 6
    assert len(ours['message_hub']['log_scalars']['train/loss'].data[0]) == 6
    for name, value in uninterrupted['state_dict'].items():
        assert torch.equal(ours['state_dict'][name], value), name
    first = {k: v['exp_avg'] for k, v in uninterrupted['optimizer']['state'].items()}
    for key, value in first.items():
        assert torch.equal(ours['optimizer']['state'][key]['exp_avg'], value)


@pytest.mark.stack
def test_test_with_augmentation_pictures_and_predictions(trained, tmp_path):
    run(
        TOOLS / 'test.py', trained / 'small.py', trained / 'work' / 'iter_6.pth', '--tta',
        '--show-dir', 'pictures', '--out', 'predictions', '--work-dir', 'work', cwd=tmp_path,
    )  # fmt: skip
    predictions = sorted((tmp_path / 'predictions').glob('*.png'))
    assert len(predictions) == 3
    for path in predictions:
        label = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        assert label.shape == (64, 64)
        assert label.max() < 8
    pictures = list((tmp_path / 'pictures').rglob('*.png'))
    assert len(pictures) == 3
    # The scene with its truth beside the scene with its prediction.
    assert cv2.imread(str(pictures[0])).shape == (64, 128, 3)
    metrics = json.loads(next((tmp_path / 'work').glob('*/*.json')).read_text())
    assert 0 <= metrics['mIoU'] <= 100


@pytest.mark.stack
def test_train_with_mixed_precision_and_options(trained, tmp_path):
    config = small_config(tmp_path, installed=True)
    options = ['train_cfg.max_iters=2', 'train_cfg.val_interval=2', 'optim_wrapper.optimizer.lr=0']
    run_again(
        TOOLS / 'train.py', config, '--work-dir', 'work', '--amp',
        '--cfg-options', *options, 'load_from=' + str(trained / 'work' / 'iter_6.pth'),
        cwd=tmp_path,
    )  # fmt: skip
    rows = scalars(tmp_path / 'work')
    assert list(rows) == [1, 2]
    assert all(0 < row['loss'] < 100 for row in rows.values())
    # A learning rate of 0: the weights that it started from.
    ours = load(tmp_path / 'work' / 'iter_2.pth')['state_dict']
    start = load(trained / 'work' / 'iter_6.pth')['state_dict']
    name = 'decode_head.conv_seg.weight'
    assert torch.equal(ours[name], start[name])


@pytest.mark.stack
def test_the_config_runs_with_the_tools_of_the_installed_mmseg(trained, tmp_path):
    # Without our tools nothing but custom_imports brings mmseg_fusion in: it must be installed.
    (tmp_path / 'mmseg_fusion').symlink_to(ROOT / 'mmseg_fusion')
    tools = Path(mmseg.__file__).parent / '.mim' / 'tools'
    for name in ('train', 'test'):
        (tmp_path / f'{name}.py').write_text((tools / f'{name}.py').read_text())
    options = ['--work-dir', 'work', '--cfg-options', 'train_cfg.max_iters=2']
    config = trained / 'small.py'
    run(tmp_path / 'train.py', config, *options, 'train_cfg.val_interval=2', cwd=tmp_path)
    assert list(scalars(tmp_path / 'work')) == [1, 2]
    result = run(tmp_path / 'test.py', config, 'work/iter_2.pth', cwd=tmp_path)
    assert 'mIoU' in result.stdout


@pytest.mark.stack
def test_a_test_with_weights_missing_is_asked_for(trained, tmp_path):
    # Without --allow-missing it stops: tests/tools/test_bad_inputs.py.
    checkpoint = load(trained / 'work' / 'iter_6.pth')
    state = checkpoint['state_dict']
    partial = {k: v for k, v in state.items() if not k.startswith('decode_head.conv_seg')}
    torch.save(dict(state_dict=partial), tmp_path / 'partial.pth')
    arguments = [trained / 'small.py', 'partial.pth', '--work-dir', 'work']
    refused = run_again(TOOLS / 'test.py', *arguments, cwd=tmp_path, check=False)
    assert refused.returncode == 1
    words = refused.stderr.splitlines()[-1]
    assert 'partial.pth does not fit the model of the config: it lacks weights, 2 of ' in words
    assert 'decode_head.conv_seg.weight' in words
    assert 'add --allow-missing' in words
    assert 'Iter(test)' not in refused.stdout
    allowed = run_again(TOOLS / 'test.py', *arguments, '--allow-missing', cwd=tmp_path)
    assert 'Iter(test) [3/3]' in allowed.stdout


@pytest.mark.stack
def test_a_data_root_with_a_blank_is_that_folder(trained, tmp_path):
    root = tmp_path / 'my data'
    options = ['--cfg-options', f'work_dir={root}', 'train_cfg.max_iters=1']
    run_again(TOOLS / 'train.py', trained / 'small.py', *options, cwd=tmp_path)
    assert (root / 'iter_1.pth').is_file()
    assert not (tmp_path / 'mydata').exists()


# --- paths that are not there --------------------------------------------------------------------


def test_a_config_that_is_not_there_gives_similar_ones(tmp_path):
    config = 'configs/camvid/upernet_r18_scale-eq_1xb16-4k_camvid.py'
    result = run_again(TOOLS / 'train.py', config, cwd=tmp_path, check=False)
    assert result.returncode == 1
    assert 'Traceback' not in result.stderr
    assert f'config {config!r} is not a file (looked in {tmp_path})' in result.stderr
    suggestion = result.stderr.split('Did you mean one of these?')[1].split()[0]
    assert Path(tmp_path, suggestion).is_file()
    assert 'upernet_r18_scale-eq' in suggestion


def test_a_config_from_another_folder_is_suggested_where_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = next((ROOT / 'configs' / 'scale_equalizer').glob('*.py'))
    with pytest.raises(SystemExit) as error:
        cli.check_config(f'configs/scale_equalizer/{path.name}')
    lines = str(error.value).splitlines()
    assert len(lines) == 3
    assert Path(lines[2].strip()).resolve() == path
    cli.check_config(str(path))


def test_a_folder_instead_of_a_config_lists_what_it_holds(tmp_path):
    (tmp_path / 'mine.py').touch()
    with pytest.raises(SystemExit, match=r'(?s)That folder holds:.*mine\.py'):
        cli.check_config(str(tmp_path))


def test_a_config_like_no_other_points_to_the_folder(tmp_path):
    with pytest.raises(SystemExit, match=r'The configs of this package are in .*configs'):
        cli.check_config(str(tmp_path / 'zzzzzzzz.py'))


def test_a_checkpoint_that_is_not_there_gives_those_nearby(trained, tmp_path):
    result = run_again(
        TOOLS / 'test.py', trained / 'small.py', trained / 'work' / 'iter_9.pth',
        cwd=tmp_path, check=False,
    )  # fmt: skip
    assert result.returncode == 1
    assert 'Traceback' not in result.stderr
    assert 'iter_9.pth' in result.stderr
    # The newest first.
    assert result.stderr.index('iter_6.pth') < result.stderr.index('iter_3.pth')
    with pytest.raises(SystemExit, match='There is no folder'):
        cli.check_checkpoint(str(tmp_path / 'none' / 'iter_1.pth'))
    cli.check_checkpoint('https://example.com/model.pth')


def test_an_mmseg_without_its_tools_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(mmseg, '__file__', str(tmp_path / 'mmseg' / '__init__.py'))
    with pytest.raises(SystemExit, match=r'installed without its tools.*pip install'):
        cli.installed_tool('train')


def test_the_tools_of_a_source_checkout_of_mmseg_are_found(tmp_path, monkeypatch):
    (tmp_path / 'tools').mkdir()
    (tmp_path / 'tools' / 'train.py').write_text('NAME = "from the checkout"\n')
    monkeypatch.setattr(mmseg, '__file__', str(tmp_path / 'mmseg' / '__init__.py'))
    assert cli.installed_tool('train').NAME == 'from the checkout'


NAMED = 'mmseg_fusion::fusion_shapes/upernet_r18_1xb4-1k_fusion-shapes-128x128'


@pytest.mark.stack
@pytest.mark.parametrize(
    'name', [NAMED, f'{NAMED}.py', 'mmseg::pspnet/pspnet_r50-d8_4xb2-40k_cityscapes-512x1024']
)
def test_a_config_is_found_by_its_name(name):
    path = Path(cli.check_config(name))
    assert path.is_file()
    assert path.stem == name.rpartition('/')[2].removesuffix('.py')
    assert cli.read_config(name).model.type == cli.read_config(str(path)).model.type
    assert counting.read_config(name).model == cli.read_config(name).model


@pytest.mark.parametrize(
    ('name', 'words'),
    [
        ('mmseg_fusion::camvid/upernet_r18_1xb16-4k_camvid-360x481', 'upernet_r18_1xb16-4k_camvid'),
        ('no_such_package::a/b', "'no_such_package' is no installed package with configs"),
        ('torch::a/b.py', "'torch' is no installed package with configs"),
        ('::a', "'' is no installed package"),
    ],
)
def test_a_name_that_is_none_is_said(name, words):
    with pytest.raises(SystemExit, match=re.escape(words)):
        cli.check_config(name)


@pytest.mark.stack
def test_a_named_config_is_trained_and_tested_and_every_image_is_drawn(tmp_path):
    small = [
        'train_cfg.max_iters=1', 'train_cfg.val_interval=2', 'train_dataloader.batch_size=2',
        'train_dataloader.num_workers=0', 'train_dataloader.persistent_workers=False',
        'test_dataloader.num_workers=0', 'test_dataloader.persistent_workers=False',
        'test_dataloader.dataset.length=3', 'model.decode_head.channels=16',
    ]  # fmt: skip
    options = ['--work-dir', 'work', '--cfg-options', *small]
    run_again(TOOLS / 'train.py', NAMED, *options, cwd=tmp_path)
    checkpoint = tmp_path / 'work' / 'iter_1.pth'
    run_again(TOOLS / 'test.py', NAMED, checkpoint, '--show-dir', 'drawn', *options, cwd=tmp_path)
    # The config has the hook's own interval, 50.
    assert 'interval' not in cli.read_config(NAMED).default_hooks.visualization
    assert len(list((tmp_path / 'drawn').rglob('*.png'))) == 3
