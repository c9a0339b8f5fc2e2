"""The embedded model: a small, real, trained language model that ships inside the package.

This package holds the model itself (the folder `layerscope-demo/`, in Hugging Face format) and
everything that made it: the grammar of its training text (`corpus`), its trainer (`train`) and its
evaluation (`evaluate`). Beside it lie sparse dictionaries of its residual stream
(`layerscope-demo-dictionaries/`, in SAELens format) and transcoders of its MLPs
(`layerscope-demo-transcoders/`), which `layerscope.features.demo_set` trained.
Importing `layerscope.demo` imports neither torch nor transformers.
"""

from pathlib import Path

__all__ = ["dictionaries_path", "model_path", "transcoders_path"]


def model_path() -> Path:
    """Return the folder of the embedded model, ready for `from_pretrained`."""
    return Path(__file__).resolve().parent / "layerscope-demo"


def dictionaries_path() -> Path:
    """Return the folder of the embedded model's sparse dictionaries, one for every block."""
    return Path(__file__).resolve().parent / "layerscope-demo-dictionaries"


def transcoders_path() -> Path:
    """Return the folder of the embedded model's transcoders, one for every MLP."""
    return Path(__file__).resolve().parent / "layerscope-demo-transcoders"
