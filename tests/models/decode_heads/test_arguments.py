"""No decode head of this package guesses which argument is which."""

from __future__ import annotations

import pytest
from mmseg.registry import MODELS

from ...testers.every_head import head_config, registered_heads

OURS = [
    name for name in registered_heads() if MODELS.get(name).__module__.startswith('mmseg_fusion.')
]


@pytest.mark.parametrize('name', OURS)
@pytest.mark.parametrize(('method', 'last'), [('loss', 'train_cfg'), ('predict', 'test_cfg')])
def test_an_argument_that_is_given_twice_raises(name: str, method: str, last: str) -> None:
    call = getattr(MODELS.build(head_config(name)), method)
    with pytest.raises(TypeError, match=rf"multiple values for argument '{last}'"):
        call([], [], {}, **{last: {}})
    with pytest.raises(TypeError, match="unexpected keyword argument 'samples'"):
        call([], samples=[], **{last: {}})


def test_all_are_there() -> None:
    assert {'HFGDHead', 'GFFHead', 'CAAHead', 'KSACHead', 'ESegHead'} < set(OURS)
