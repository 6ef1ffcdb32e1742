"""What happens around training."""

from . import hooks, metrics

__all__ = ['hooks', 'metrics']
