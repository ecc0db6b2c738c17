"""Open-vocabulary detection by hierarchical distillation from CLIP."""

from hdovd.core import __version__

__all__ = ["__version__"]
