"""The types in a training checkpoint of mmengine that are safe to load.

mmengine 0.10.7 declares none of them as safe; onedl-mmengine 0.10.12 does, and ``getattr`` as well.
"""

from __future__ import annotations

from pickle import UnpicklingError
from typing import Any


def of_training() -> list[Any]:
    """The types in a training checkpoint of mmengine other than tensors, as torch's safe globals.

    mmengine's message hub holds ``HistoryBuffer`` objects with numpy arrays. The buffers refer to
    their own methods through ``getattr``, which stays forbidden for other objects.
    """
    import numpy
    from mmengine.logging import HistoryBuffer

    # numpy 1.26 has a numpy._core too, an empty one.
    core = numpy._core if int(numpy.__version__.partition('.')[0]) > 1 else numpy.core
    reconstruct, scalar = core.multiarray._reconstruct, core.multiarray.scalar
    # Files written with the other major version of numpy name the same functions differently.
    functions = [
        (function, f'{module}.multiarray.{function.__name__}')
        for function in (reconstruct, scalar)
        for module in ('numpy.core', 'numpy._core')
    ]
    HistoryBuffer()  # fills the table of its statistics
    statistics = tuple(HistoryBuffer._statistics_methods)

    def statistics_method(owner: type, name: str):
        if owner is not HistoryBuffer or name not in statistics:
            raise UnpicklingError(
                f'a checkpoint may name the statistics of HistoryBuffer '
                f'({", ".join(statistics)}), not {name!r} of {owner!r}'
            )
        return getattr(owner, name)

    functions.append((statistics_method, 'builtins.getattr'))
    dtypes = {type(numpy.dtype(code)) for code in 'efdbhilqBHILQ?'}
    return [HistoryBuffer, numpy.ndarray, numpy.dtype, *functions, *dtypes]
