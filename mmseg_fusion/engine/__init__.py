"""Runner, hooks and metrics."""

from . import hooks, metrics

__all__ = ['hooks', 'metrics']
