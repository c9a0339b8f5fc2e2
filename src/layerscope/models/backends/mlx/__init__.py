"""The MLX backend: models of mlx-lm, the real modules, tapped for the length of a run.

Nothing here imports MLX before a model is opened: it is an extra.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from layerscope.errors import ModelError

if TYPE_CHECKING:
    from layerscope.models.backends.mlx.backend import MlxBackend
    from layerscope.models.backends.mlx.loading import LoadedMlx
    from layerscope.models.identities import IdentityReport


def open_model(source: Any, **options: Any) -> tuple[MlxBackend, LoadedMlx, IdentityReport | None]:
    """Load a model with mlx-lm; options as for `loading.load_mlx`.

    Raises:
        ModelError: MLX is not installed, or the model cannot be loaded; says what to do.
    """
    missing = [name for name in ("mlx", "mlx_lm") if find_spec(name) is None]
    if missing:
        raise ModelError(
            f"the mlx backend needs {' and '.join(missing)}, which is not installed: "
            "pip install 'layerscope[mlx]'"
        )
    from layerscope.models.backends.mlx.loading import load_mlx

    return load_mlx(source, **options)
