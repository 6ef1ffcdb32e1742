"""The head that the docs show how to add."""

from docs.examples import sum_fusion_head  # noqa: F401  (registers it)
from tests.testers import HeadTester


class TestSumFusionHead(HeadTester):
    head = dict(type='SumFusionHead', in_index=[0, 1, 2, 3])
    stride = 4
