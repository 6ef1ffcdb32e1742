"""Fusions of any PyTorch module: found, measured, planned and equalized.

This subpackage contains the basis of scale equalization (arXiv 2402.01149). It does not depend on
MMSegmentation: it uses only torch (and numpy's random state). Read the modules in this order:

- :mod:`~mmseg_fusion.fusions.state`: restores the state of a module after a trace;
- :mod:`~mmseg_fusion.fusions.trace`: which layers take concatenated features;
- :mod:`~mmseg_fusion.fusions.statistics`: mean and standard deviation of their branches;
- :mod:`~mmseg_fusion.fusions.plan`: the changes to each layer;
- :mod:`~mmseg_fusion.fusions.fold`: applies the changes to the weights (equation 9) or as explicit
  layers;
- :mod:`~mmseg_fusion.fusions.equalization`: all steps in one call, :func:`equalize`.
"""

from .equalization import (
    PRETRAINED,
    BranchScale,
    EqualizationReport,
    common_module,
    equalize,
    find_fusions,
    is_inside,
    plan_model,
    refuse_uncalled,
)
from .fold import (
    ScaleEqualizer,
    bias_shift,
    constants,
    fold_plan,
    fold_scale_equalizer,
    fold_tensors,
    install_equalizer,
    is_transposed,
)
from .plan import plan_equalization, plan_layers
from .single_value import explain_single_value, is_single_value, single_value_layer
from .state import kept_state
from .statistics import (
    BranchStatistics,
    measure_branches,
    measuring,
    reduce_statistics,
    split_batches,
)
from .trace import Fusion, FusionTracer, Lost, select_fusions, trace_fusions

__all__ = [
    'PRETRAINED',
    'BranchScale',
    'BranchStatistics',
    'EqualizationReport',
    'Fusion',
    'FusionTracer',
    'Lost',
    'ScaleEqualizer',
    'bias_shift',
    'common_module',
    'constants',
    'equalize',
    'explain_single_value',
    'find_fusions',
    'fold_plan',
    'fold_scale_equalizer',
    'fold_tensors',
    'install_equalizer',
    'is_inside',
    'is_single_value',
    'is_transposed',
    'kept_state',
    'measure_branches',
    'measuring',
    'plan_equalization',
    'plan_layers',
    'plan_model',
    'reduce_statistics',
    'refuse_uncalled',
    'select_fusions',
    'single_value_layer',
    'split_batches',
    'trace_fusions',
]
