"""A head of queries and masks, which is no BaseDecodeHead, under the hook."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from mmseg.registry import MODELS
from torch import nn

from .small import LEVELS, runner
from .test_scale_equalizer_hook import layers, record_of, train

pytestmark = pytest.mark.filterwarnings('ignore')


@MODELS.register_module()
class QueryMaskHead(BaseModule):
    """Masks out of queries, built as MaskFormer and Mask2Former are.

    The levels go as tokens of one sequence through a transformer encoder and come back as maps; a
    pyramid makes the mask feature of them; queries look at the tokens; masks are an ``einsum``.
    ``forward`` gives dicts in a list and takes the samples; ``loss`` and ``predict`` each go their
    own way through the parts.

    Args:
        pyramid: ``'sum'``: top-down sums; ``'fuse'``: all levels side by side and a convolution;
            ``'masks'``: all levels side by side, which the masks are made of directly.
    """

    align_corners = False
    num_classes = out_channels = 8

    def __init__(self, pyramid='sum', width=8, queries=4, **_):
        super().__init__()
        self.pyramid = pyramid
        self.lateral = nn.ModuleList(nn.Conv2d(c, width, 1) for c in LEVELS)
        layer = nn.TransformerEncoderLayer(width, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        layer = nn.TransformerDecoderLayer(width, 2, 16, batch_first=True)
        self.decoder = nn.TransformerDecoder(layer, 2)
        self.query = nn.Embedding(queries, width)
        self.cls_embed = nn.Linear(width, self.num_classes + 1)
        total = 4 * width
        self.mask_embed = nn.Linear(width, total if pyramid == 'masks' else width)
        if pyramid == 'fuse':
            self.fuse = nn.Conv2d(total, width, 3, padding=1)

    def pixels(self, x):
        levels = [lateral(f) for lateral, f in zip(self.lateral, x)]
        shapes = [f.shape[2:] for f in levels[1:]]
        tokens = torch.cat([f.flatten(2).transpose(1, 2) for f in levels[1:]], dim=1)
        tokens = self.encoder(tokens)
        split = tokens.split([h * w for h, w in shapes], dim=1)
        maps = [levels[0]] + [
            t.transpose(1, 2).reshape(len(t), -1, *s) for t, s in zip(split, shapes)
        ]
        size = maps[0].shape[2:]
        if self.pyramid == 'sum':
            for i in (2, 1, 0):
                maps[i] = maps[i] + F.interpolate(maps[i + 1], maps[i].shape[2:], mode='nearest')
            return maps[0], tokens
        side = torch.cat([F.interpolate(m, size, mode='bilinear') for m in maps], dim=1)
        return (self.fuse(side) if self.pyramid == 'fuse' else side), tokens

    def forward(self, x, samples):
        feature, tokens = self.pixels(x)
        query = self.query.weight.expand(len(feature), -1, -1)
        found = []
        for layer in self.decoder.layers:
            query = layer(query, tokens)
            masks = torch.einsum('bqc,bchw->bqhw', self.mask_embed(query), feature)
            found.append(dict(classes=self.cls_embed(query), masks=masks))
        return found

    def logits(self, found, size):
        masks = F.interpolate(found['masks'], size, mode='bilinear').sigmoid()
        classes = found['classes'].softmax(-1)[..., :-1]
        return torch.einsum('bqc,bqhw->bchw', classes, masks)

    def loss(self, x, samples, train_cfg):
        label = torch.stack([s.gt_sem_seg.data[0] for s in samples])
        return {
            f'd{i}.loss_mask': F.nll_loss(
                self.logits(found, label.shape[1:]).clamp_min(1e-6).log(), label, ignore_index=255
            )
            for i, found in enumerate(self(x, samples))
        }

    def predict(self, x, batch_img_metas, test_cfg):
        return self.logits(self(x, batch_img_metas)[-1], batch_img_metas[0]['img_shape'])


def test_sums_alone_are_nothing_to_do(tmp_path):
    made = runner(tmp_path, hook={}, head=dict(type='QueryMaskHead'))
    with pytest.raises(RuntimeError) as error:
        made.train()
    assert 'found no layer that takes features concatenated' in str(error.value)
    # The tokens of all levels stand one behind the other: that is no fusion, and no loss of one.
    assert 'decode_head (QueryMaskHead)' in str(error.value)
    assert 'Not followed' not in str(error.value)


def test_its_fusion_is_folded_and_predicts_alike(tmp_path):
    head = dict(type='QueryMaskHead', pyramid='fuse')
    made = train(tmp_path / 'fold', hook={}, head=head)
    plain = train(tmp_path / 'plain', head=head)
    ((name, entry),) = layers(record_of(made)).items()
    assert (name, entry['channels']) == ('decode_head.fuse', [8] * 4)
    assert (entry['sizes'], entry['reason']) == ([[16, 16], [8, 8], [4, 4], [2, 2]], '')
    old, new = (m.recorder.start for m in (plain, made))
    assert {k for k in old if not torch.equal(old[k], new[k])} == {f'{name}.weight', f'{name}.bias'}
    folded = torch.cat([b / s for b, s in zip(old[f'{name}.weight'].split(8, 1), entry['std'])], 1)
    torch.testing.assert_close(new[f'{name}.weight'], folded)
    assert made.model.eval().predict(torch.randn(1, 3, 64, 64))[0].pred_sem_seg.shape == (64, 64)


def test_masks_of_concatenated_levels_are_told(tmp_path):
    made = runner(tmp_path, hook={}, head=dict(type='QueryMaskHead', pyramid='masks'))
    with pytest.raises(RuntimeError) as error:
        made.train()
    assert (
        'Not followed to a layer: 8 + 8 + 8 + 8 channels, concatenated inside decode_head: '
        "its trail ends at 'einsum'" in str(error.value)
    )
