"""A small config of every decode head that is registered, this package's and MMSegmentation's."""

from __future__ import annotations

import copy
import importlib
import inspect
from typing import NamedTuple

from mmengine.config import ConfigDict
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.registry import MODELS

from .toys import segmentor_config

#: Channels of TinyPyramid's levels, which these heads take.
CHANNELS = (8, 16, 32, 64)
BN = dict(type='BN')
CE, OHEM = dict(type='CrossEntropyLoss'), dict(type='OhemCrossEntropy')
ONE = dict(in_channels=64, in_index=3)
ALL = dict(in_channels=list(CHANNELS), in_index=[0, 1, 2, 3])
#: In front of a head that takes levels of one width.
NECK = dict(type='FPN', in_channels=list(CHANNELS), out_channels=16, num_outs=4)
SAME = dict(in_channels=[16] * 4, in_index=[0, 1, 2, 3])
COARSE = dict(type='FCNHead', num_convs=1, concat_input=False, dropout_ratio=0.0, **ONE)
_FCN = dict(type='FCNHead', num_convs=1, concat_input=False)
_UPDATE = dict(
    type='KernelUpdateHead',
    num_classes=5,
    num_ffn_fcs=2,
    num_heads=2,
    num_mask_fcs=1,
    feedforward_channels=32,
    in_channels=16,
    out_channels=16,
    conv_kernel_size=1,
    kernel_updator_cfg=dict(type='KernelUpdator', in_channels=16, feat_channels=16),
)

#: Arguments of each head beside channels=16, num_classes=5 and norm_cfg.
HEADS: dict[str, dict] = {
    # MMSegmentation
    'ANNHead': dict(
        in_channels=[32, 64], in_index=[2, 3], project_channels=8, key_pool_scales=(1, 2)
    ),
    'APCHead': dict(pool_scales=(1, 2), **ONE),
    'ASPPHead': dict(dilations=(1, 2), **ONE),
    'CCHead': ONE,
    'DAHead': dict(pam_channels=8, **ONE),
    'DDRHead': dict(in_channels=64, loss_decode=[OHEM, OHEM]),
    'DMHead': dict(filter_sizes=(1, 3), **ONE),
    'DNLHead': ONE,
    'DPTHead': dict(
        in_channels=[16] * 4,
        in_index=[0, 1, 2, 3],
        embed_dims=16,
        post_process_channels=list(CHANNELS),
        input_transform='multiple_select',
    ),
    'DepthwiseSeparableASPPHead': dict(dilations=(1, 2), c1_in_channels=8, c1_channels=4, **ONE),
    'DepthwiseSeparableFCNHead': dict(num_convs=2, concat_input=False, **ONE),
    'EMAHead': dict(ema_channels=16, num_bases=4, num_stages=2, **ONE),
    'EncHead': dict(num_codes=4, in_channels=[64], in_index=[3]),
    'FCNHead': dict(num_convs=2, concat_input=False, **ONE),
    'FPNHead': dict(feature_strides=[4, 8, 16, 32], **ALL),
    'GCHead': ONE,
    'ISAHead': dict(isa_channels=8, down_factor=(2, 2), **ONE),
    'IterativeDecodeHead': dict(
        num_stages=1,
        kernel_update_head=[_UPDATE],
        kernel_generate_head=dict(_FCN, channels=16, num_classes=5, norm_cfg=BN, **ONE),
    ),
    'LRASPPHead': dict(
        in_channels=(8, 8, 16),
        in_index=(0, 0, 1),
        branch_channels=(4, 8),
        input_transform='multiple_select',
    ),
    'LightHamHead': dict(
        ham_channels=16, ham_kwargs=dict(MD_R=4), in_channels=[32, 64], in_index=[2, 3]
    ),
    'NLHead': ONE,
    'OCRHead': dict(ocr_channels=16, **ONE),
    'PIDHead': dict(in_channels=64, loss_decode=[CE, OHEM, dict(type='BoundaryLoss'), OHEM]),
    'PSAHead': dict(mask_size=(2, 2), **ONE),
    'PSPHead': dict(pool_scales=(1, 2), **ONE),
    'PointHead': dict(in_channels=[64], in_index=[3]),
    'SETRMLAHead': dict(mla_channels=4, **SAME),
    'SETRUPHead': dict(**ONE),
    'STDCHead': dict(num_convs=1, concat_input=False, **ONE),
    'SegformerHead': ALL,
    'SegmenterMaskTransformerHead': dict(
        num_layers=1, num_heads=2, embed_dims=16, norm_cfg=dict(type='LN'), **ONE
    ),
    'UPerHead': dict(pool_scales=(1, 2), **ALL),
    'VPDDepthHead': dict(
        in_channels=(16, 16, 32, 64), embed_dim=16, feature_dim=128, num_deconv_filters=(16, 16, 16)
    ),
    'SideAdapterCLIPHead': dict(
        deep_supervision_idxs=[0],
        san_cfg=ConfigDict(
            in_channels=3,
            patch_size=16,
            patch_bias=True,
            norm_cfg=dict(type='LN'),
            clip_channels=16,
            embed_dims=16,
            num_queries=4,
            fusion_index=[0],
            cfg_encoder=dict(num_encode_layer=1, num_heads=2, mlp_ratio=1),
            cfg_decoder=dict(
                num_heads=2, num_layers=1, embed_channels=8, mlp_channels=8, num_mlp=1, rescale=True
            ),
        ),
        maskgen_cfg=ConfigDict(
            sos_token_format='cls_token',
            sos_token_num=4,
            num_layers=1,
            embed_dims=16,
            num_heads=2,
            mlp_ratio=1,
            out_dims=8,
        ),
        train_cfg=ConfigDict(
            num_points=4,
            oversample_ratio=3.0,
            importance_sample_ratio=0.75,
            assigner=dict(
                type='HungarianAssigner', match_costs=[dict(type='ClassificationCost', weight=1.0)]
            ),
        ),
        loss_decode=dict(type='CrossEntropyLoss'),
    ),
    'MaskFormerHead': dict(),
    'Mask2FormerHead': dict(),
    # this package
    'CAAHead': dict(qk_channels=8, **ONE),
    'CPHead': dict(prior_channels=8, prior_size=4, **ONE),
    'ContextAugmentedEncoder': dict(wide_channels=32, attention_channels=16, qk_channels=8, **ONE),
    'DenseASPPHead': dict(**ONE),
    'DetachedFCNHead': dict(num_convs=2, concat_input=False, **ONE),
    'ESegHead': dict(**SAME),
    'GFFHead': dict(context=dict(type='PSPHead', pool_scales=(1, 2)), **ALL),
    'HFGDHead': dict(**ALL),
    'KSACHead': dict(dilations=(1, 2), **ONE),
    'LinearASPPHead': dict(dilations=(1, 2), **ONE),
    'PointwiseUPerHead': dict(pool_scales=(1, 2), **ALL),
    'SAHead': dict(qk_channels=8, **ONE),
    'SemanticFPNHead': dict(**ALL),
    'SequentialDualAttentionHead': dict(pam_channels=8, **ONE),
    'USFPNHead': dict(**ALL),
}
_VIT = dict(
    type='VisionTransformer',
    img_size=(64, 64),
    embed_dims=16,
    num_layers=4,
    num_heads=2,
    mlp_ratio=1,
    out_indices=(0, 1, 2, 3),
)
#: Heads behind a neck, or on a backbone of their own; the others take TinyPyramid's levels.
NECKS = {'ESegHead': NECK}
BACKBONES = {
    'DDRHead': dict(type='DDRNet', channels=16, ppm_channels=8, norm_cfg=BN),
    'PIDHead': dict(
        type='PIDNet', channels=16, ppm_channels=8, num_stem_blocks=1, num_branch_blocks=1
    ),
    'DPTHead': dict(_VIT, output_cls_token=True),
    'SETRMLAHead': _VIT,
    'VPDDepthHead': dict(type='TinyPyramid', channels=(16, 16, 32, 64)),
}
# Arguments that a head does not take.
_WITHOUT = {
    'IterativeDecodeHead': ('channels', 'norm_cfg', 'num_classes'),
    'VPDDepthHead': ('channels', 'norm_cfg', 'num_classes'),
    'SideAdapterCLIPHead': ('channels', 'norm_cfg'),
    'MaskFormerHead': ('channels', 'norm_cfg'),
    'Mask2FormerHead': ('channels', 'norm_cfg'),
    'PointHead': ('norm_cfg',),
}


class Unbuildable(NamedTuple):
    """What a head misses, and with which error it stops."""

    reason: str
    error: type[Exception] | tuple[type[Exception], ...]


# Of Mask2Former onedl-mmsegmentation says so; the rest misses a key.
_DETECTION = Unbuildable('needs MMDetection', (KeyError, ImportError))
#: Heads that cannot be built with the packages that this one asks for.
UNBUILDABLE = {'MaskFormerHead': _DETECTION, 'Mask2FormerHead': _DETECTION}
#: Heads that refine the prediction of another one.
CASCADED = ('OCRHead', 'PointHead')


def ops_there() -> bool:
    """Whether this mmcv has its compiled part."""
    try:
        return getattr(importlib.import_module('mmcv._ext'), '__file__', None) is not None
    except ModuleNotFoundError:  # the fork without its ops
        return False


def registered_heads() -> list[str]:
    """Names of all decode heads in MMSegmentation's registry, without those of the tests."""
    import mmseg_fusion.models  # noqa: F401

    return sorted(
        name
        for name, cls in MODELS.module_dict.items()
        if inspect.isclass(cls)
        and cls.__module__.startswith(('mmseg.models.decode_heads', 'mmseg_fusion.'))
        and (issubclass(cls, BaseDecodeHead) or name in ('MaskFormerHead', 'Mask2FormerHead'))
    )


def head_config(name: str, **changes) -> dict | list[dict]:
    """``decode_head`` of a model with this head: a list where the head is cascaded."""
    common = dict(channels=16, num_classes=5, norm_cfg=BN)
    if name in _WITHOUT:
        kept = {k: v for k, v in common.items() if k not in _WITHOUT[name]}
    else:
        kept = common
    head = copy.deepcopy({**kept, 'type': name, **HEADS[name], **changes})
    return [{**common, **COARSE}, head] if name in CASCADED else head


def model_config(name: str, **changes) -> dict:
    """A model with this head, whose type is that of a plain encoder-decoder."""
    head = head_config(name, **changes)
    cfg = segmentor_config({}, BACKBONES.get(name), NECKS.get(name)).model.to_dict()
    cfg['decode_head'] = head
    if isinstance(head, list):
        cfg.update(type='CascadeEncoderDecoder', num_stages=len(head))
    return cfg
