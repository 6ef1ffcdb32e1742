"""Datasets, registered in MMSegmentation's registry."""

from .camvid import CamVidDataset
from .fusion_shapes import FusionShapesDataset, draw_scene

__all__ = ['CamVidDataset', 'FusionShapesDataset', 'draw_scene']
