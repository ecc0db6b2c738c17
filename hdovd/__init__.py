"""Open-vocabulary detection by hierarchical distillation from CLIP."""

from hdovd.core.version import __version__

__all__ = ["__version__"]
