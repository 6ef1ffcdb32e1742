"""What the pages of KSAC and CAA say to write stands on top of a config of MMSegmentation."""

from __future__ import annotations

import re
from pathlib import Path

import mmseg
import pytest
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmseg.registry import MODELS

ROOT = Path(__file__).resolve().parents[3]
INSTALLED = Path(mmseg.__file__).parent / '.mim' / 'configs'


def snippets() -> list:
    found = []
    for name in ('ksac', 'caa'):
        for page in (f'docs/methods/{name}.md', f'configs/{name}/README.md'):
            text = (ROOT / page).read_text(encoding='utf-8')
            blocks = re.findall(r'^```python\n(.*?)^```', text, re.MULTILINE | re.DOTALL)
            found += [
                pytest.param(block, id=f'{page}-{i}')
                for i, block in enumerate(blocks)
                # Whole ones: those that replace a part of the model.
                if '_delete_' in block
            ]
    return found


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('snippet', snippets())
def test_snippet_on_deeplab(tmp_path, snippet):
    base = INSTALLED / 'deeplabv3' / 'deeplabv3_r50-d8_4xb4-20k_voc12aug-512x512.py'
    path = tmp_path / 'config.py'
    path.write_text(f'_base_ = {str(base)!r}\n{snippet}', encoding='utf-8')
    cfg = Config.fromfile(path, import_custom_modules=False)
    # Without it nothing of this project is registered.
    assert cfg.custom_imports.imports == ['mmseg_fusion']
    xception = cfg.model.backbone.type == 'AlignedXception'
    if xception:
        assert cfg.model.pretrained is None
        assert cfg.model.data_preprocessor.mean == [127.5] * 3
        assert cfg.model.data_preprocessor.std == [127.5] * 3
        assert cfg.model.data_preprocessor.type == 'SegDataPreProcessor'
        # DeepLab's auxiliary head names the channels of a ResNet's level.
        cfg.model.auxiliary_head = None
    else:
        cfg.model.pretrained = None
    model = revert_sync_batchnorm(MODELS.build(cfg.model)).eval()
    with torch.no_grad():
        logits = model(torch.randn(1, 3, 64, 64), mode='tensor')
    assert logits.shape[:2] == (1, cfg.model.decode_head.num_classes)


def test_every_page_has_one():
    ids = ' '.join(str(p.id) for p in snippets())
    for page in ('docs/methods/ksac.md', 'docs/methods/caa.md', 'configs/ksac/', 'configs/caa/'):
        assert page in ids
