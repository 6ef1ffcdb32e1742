"""Decode heads, one method's head per file."""

from .batch_norm_after_upsampling import batch_norm_after_upsampling
from .caa_head import CAAHead
from .context_augmented_encoder import ContextAugmentedEncoder
from .cp_head import CPHead
from .dense_aspp_head import DenseASPPHead
from .detached_fcn_head import DetachedFCNHead
from .eseg_head import ESegHead
from .gff_head import GFFHead
from .hfgd_head import HFGDHead
from .ksac_head import KSACHead
from .linear_aspp_head import LinearASPPHead
from .pointwise_uper_head import PointwiseUPerHead
from .sa_head import SAHead
from .semantic_fpn_head import SemanticFPNHead, USFPNHead
from .sequential_dual_attention_head import SequentialDualAttentionHead

__all__ = [
    'CAAHead',
    'CPHead',
    'ContextAugmentedEncoder',
    'DenseASPPHead',
    'DetachedFCNHead',
    'ESegHead',
    'GFFHead',
    'HFGDHead',
    'KSACHead',
    'LinearASPPHead',
    'PointwiseUPerHead',
    'SAHead',
    'SemanticFPNHead',
    'SequentialDualAttentionHead',
    'USFPNHead',
    'batch_norm_after_upsampling',
]
