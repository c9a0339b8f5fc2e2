"""A matrix with one row per feature that may still lie in its file."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from layerscope.errors import DictionaryError

_CHUNK = 4096

Ids = Sequence[int] | Tensor


class Matrix:
    """Rows of features, [n, width], read whole or row by row, and folded the same way in both.

    What a row is multiplied with (normalisation, decoder norm) is one number per feature, so the
    rows that are read one by one equal those of the whole matrix bit for bit.

    Attributes:
        name: for messages.
        shape: (features, width).
        dtype: of the values once read.
        bytes_read: bytes taken from the source so far, in its own dtype.
    """

    def __init__(
        self,
        name: str,
        view: Callable[[], Float[Tensor, "n width"]],
        shape: tuple[int, int],
        *,
        scale: Float[Tensor, " n"] | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.name = name
        self.shape = shape
        self.dtype = dtype
        self.device = torch.device(device)
        self.bytes_read = 0
        self._view = view
        # Where the file is: rows are chosen and measured there too.
        self._scale = None if scale is None or bool((scale == 1).all()) else scale.cpu()
        self._held: Tensor | None = None

    @classmethod
    def of(cls, name: str, values: Float[Tensor, "n width"]) -> Matrix:
        """Return a matrix that is in memory already."""
        n, width = values.shape
        made = cls(name, lambda: values, (n, width), dtype=values.dtype, device=values.device)
        made._held = values
        return made

    @property
    def resident(self) -> bool:
        """Whether the whole matrix is in memory."""
        return self._held is not None

    @property
    def nbytes(self) -> int:
        """Bytes of the whole matrix in memory."""
        return self.shape[0] * self.shape[1] * self.dtype.itemsize

    def load(self) -> Float[Tensor, "n width"]:
        """Read the whole matrix, keep it, and return it.

        Raises:
            DictionaryError: a value is NaN or infinite.
        """
        if self._held is None:
            self._held = self._read(self._view(), self._scale)
        return self._held

    def release(self) -> None:
        """Forget the matrix; it is read again when asked for."""
        self._held = None

    def tensor(self) -> Float[Tensor, "n width"]:
        """Return the whole matrix: the one held, or a fresh reading that is not kept."""
        return self._held if self._held is not None else self._read(self._view(), self._scale)

    def rows(self, ids: Ids) -> Float[Tensor, "k width"]:
        """Return some rows; where the matrix is not in memory, only these are read.

        Raises:
            DictionaryError: there is no such feature, or a value is not finite.
        """
        index = indices(ids, self.shape[0], self.name)
        if self._held is not None:
            return self._held[index.to(self._held.device)]
        scale = None if self._scale is None else self._scale[index]
        return self._read(self._view()[index], scale, copied=True)

    def norms(self) -> Float[Tensor, " n"]:
        """Return the L2 norm of every row, float64, with little of the matrix in memory."""
        if self._held is not None:
            return self._held.double().norm(dim=1)
        view = self._view()
        parts: list[Tensor] = []
        for first in range(0, self.shape[0], _CHUNK):
            part = view[first : first + _CHUNK].double()
            if self._scale is not None:
                part = part * self._scale[first : first + _CHUNK, None].double()
            parts.append(part.norm(dim=1).cpu())
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)

    def scaled(self, scale: Float[Tensor, " n"]) -> Matrix:
        """Return this matrix with every row multiplied by its number; reads nothing."""
        scale = scale.cpu()
        combined = scale if self._scale is None else self._scale.double() * scale.double()
        return Matrix(
            self.name,
            self._view,
            self.shape,
            scale=combined.to(torch.promote_types(self.dtype, torch.float32)),
            dtype=self.dtype,
            device=self.device,
        )

    def _read(self, values: Tensor, scale: Tensor | None, *, copied: bool = False) -> Tensor:
        self.bytes_read += values.numel() * values.element_size()
        # One copy from the mapped file, whatever its layout: nothing else of this size exists.
        wide = self.dtype
        if scale is not None:
            wide = torch.promote_types(self.dtype, torch.float32)
        if self.device.type == "cuda":  # sent as it lies in the file, turned and widened there
            turned = not values.is_contiguous() and values.T.is_contiguous()
            values = values.T.to(self.device).T if turned else values.to(self.device)
        if copied and values.dtype == wide and values.device == self.device:
            found = values
        else:
            found = torch.empty(values.shape, dtype=wide, device=self.device).copy_(values)
        if scale is not None:
            found = found.mul_(scale.to(found.device, wide)[:, None]).to(self.dtype)
        # The sum is finite unless an entry is not, or it overflows; only then look closer.
        if not bool(found.sum().isfinite()) and not bool(found.isfinite().all()):
            bad = int((~found.isfinite()).any(dim=1).nonzero()[0])
            raise DictionaryError(
                f"{self.name} holds NaN or infinity, first in row {bad}; download the file again"
            )
        return found


def indices(ids: Ids, n: int, what: str) -> Tensor:
    """Return feature numbers as an int64 tensor on the CPU.

    Raises:
        DictionaryError: one is outside 0 to n - 1.
    """
    given = ids.detach().cpu().long() if isinstance(ids, Tensor) else torch.tensor(list(ids))
    given = given.reshape(-1).long()
    if given.numel() and (int(given.min()) < 0 or int(given.max()) >= n):
        bad = int(given.min()) if int(given.min()) < 0 else int(given.max())
        raise DictionaryError(f"{what} has features 0 to {n - 1}; there is no feature {bad}")
    return given
