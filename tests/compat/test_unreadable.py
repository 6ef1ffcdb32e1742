"""A file that is no checkpoint, and a model that no zoo has, say so."""

from __future__ import annotations

import pytest
import torch

from mmseg_fusion.errors import CheckpointError

from .running import saved


def test_a_file_that_was_not_torch_saves_says_what_it_is(tmp_path, loader, web):
    address, folder = web
    whole = saved(folder / 'whole.pth', dict(a=torch.zeros(999)), 'zip').read_bytes()
    for name, content, words in (
        ('empty', b'', 'the file is empty'),
        ('text', b'some words\n' * 9, 'it is a text file'),
        ('page', b'<!DOCTYPE html>404', 'it is a web page'),
        ('lfs', b'version https://git-lfs.github.com/spec/v1\n', 'git lfs pull'),
        ('half', whole[: len(whole) // 2], 'it is truncated'),
    ):
        (folder / f'{name}.pth').write_bytes(content)
        for path in (str(folder / f'{name}.pth'), f'{address}/{name}.pth'):
            with pytest.raises(CheckpointError) as wrong:
                loader.load_checkpoint(path)
            assert words in str(wrong.value)
            assert path in str(wrong.value)
            assert ('delete it there' in str(wrong.value)) == path.startswith('http')
    with pytest.raises(FileNotFoundError):
        loader.load_checkpoint(str(folder / 'none.pth'))


def test_a_zoo_that_has_no_such_model_says_so():
    from mmengine.runner import CheckpointLoader

    with pytest.raises(CheckpointError, match="torchvision:// knows no model 'resnet51'"):
        CheckpointLoader.load_checkpoint('torchvision://resnet51')
