"""The embedded model: a small, real, trained language model that ships inside the package.

This package holds the model itself (the folder `layerscope-demo/`, in Hugging Face format) and
everything that made it: the grammar of its training text (`corpus`), its trainer (`train`) and its
evaluation (`evaluate`). Importing `layerscope.demo` imports neither torch nor transformers.
"""

from pathlib import Path

__all__ = ["model_path"]


def model_path() -> Path:
    """Return the folder of the embedded model, ready for `from_pretrained`."""
    return Path(__file__).resolve().parent / "layerscope-demo"
