"""Base testers, one per kind of class: what a new head, neck, backbone, loss or hook must do.

Derive a class whose name starts with ``Test`` and say in its attributes what is tested::

    class TestUPerHead(HeadTester):
        head = dict(type='UPerHead', in_index=[0, 1, 2, 3])

Every check is a test of its own and can be overridden where a class differs on purpose.
"""

from .backbone import BackboneTester
from .head import HeadTester
from .hook import HookTester
from .loss import LossTester
from .module import ModuleTester
from .neck import NeckTester
from .toys import TinyPyramid, ToyScenes, segmentor_config

__all__ = [
    'BackboneTester',
    'HeadTester',
    'HookTester',
    'LossTester',
    'ModuleTester',
    'NeckTester',
    'TinyPyramid',
    'ToyScenes',
    'segmentor_config',
]
