"""Decode heads, one method's head per file."""

from .batch_norm_after_upsampling import batch_norm_after_upsampling
from .caa_head import CAAHead
from .cp_head import CPHead
from .eseg_head import ESegHead
from .gff_head import GFFHead
from .ksac_head import KSACHead
from .sa_head import SAHead
from .sequential_dual_attention_head import SequentialDualAttentionHead

__all__ = [
    'CAAHead',
    'CPHead',
    'ESegHead',
    'GFFHead',
    'KSACHead',
    'SAHead',
    'SequentialDualAttentionHead',
    'batch_norm_after_upsampling',
]
