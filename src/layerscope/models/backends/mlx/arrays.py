"""Arrays between MLX and torch: always copies, always the same bits."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import torch
from torch import Tensor

from layerscope.errors import ConfigError

_TO_MLX: dict[torch.dtype, mx.Dtype] = {
    torch.float32: mx.float32,
    torch.float16: mx.float16,
    torch.bfloat16: mx.bfloat16,
}
_TO_TORCH = {mlx: dtype for dtype, mlx in _TO_MLX.items()}


def to_torch(array: mx.array) -> Tensor:
    """Return a copy of an MLX array as a tensor on the CPU, bit by bit."""
    if array.dtype == mx.bfloat16:  # numpy has none
        return torch.from_numpy(np.array(array.view(mx.int16))).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))


def to_mlx(tensor: Tensor, dtype: mx.Dtype | None = None) -> mx.array:
    """Return a copy of a tensor as an MLX array, converted to `dtype` if one is given."""
    plain = tensor.detach().cpu().contiguous()
    if plain.dtype == torch.bfloat16:
        array = mx.array(plain.view(torch.int16).numpy()).view(mx.bfloat16)
    else:
        array = mx.array(_numpy(plain))
    return array if dtype is None else array.astype(dtype)


def mlx_dtype(dtype: torch.dtype) -> mx.Dtype:
    """Return MLX's name of a dtype.

    Raises:
        ConfigError: MLX runs no model in it.
    """
    if dtype not in _TO_MLX:
        raise ConfigError(
            f"the mlx backend runs no model in {str(dtype).removeprefix('torch.')}; use float32, "
            "bfloat16 or float16"
        )
    return _TO_MLX[dtype]


def torch_dtype(dtype: mx.Dtype) -> torch.dtype:
    """Return torch's name of the dtype of a residual stream."""
    return _TO_TORCH[dtype]


def _numpy(tensor: Tensor) -> Any:
    # MLX computes in float64 on no accelerator, and a stream is never that wide.
    return tensor.float().numpy() if tensor.dtype == torch.float64 else tensor.numpy()
