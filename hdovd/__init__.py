"""Open-vocabulary detection by hierarchical distillation from CLIP."""


def __getattr__(name: str) -> str:
    """`__version__`. Importing the package imports nothing: `hdovd.__main__` settles what Ctrl-C does before that."""
    if name != "__version__":
        raise AttributeError(f"module 'hdovd' has no attribute {name!r}")
    from hdovd.core import __version__

    return __version__
