"""Which matrix product runs: torch as it was found, or the fastest float32-accurate one here.

On some CPUs torch sends float32 products to a slow library although a faster one, just as
accurate, is a setting away: ``torch.set_float32_matmul_precision("medium")`` *permits* bfloat16
products, but on a CPU without matrix units for bfloat16 it merely selects oneDNN, which then
computes in float32. Whether that is so on the machine at hand is measured once per process against
float64; no timing enters the decision, so it is the same on every run.

On a CPU with matrix units for bfloat16 (AMX) that setting rounds operands, and is rejected. There
products of our own make float32 out of smaller numbers (`matrix_units`), and pass the same check.

Readouts of few rows may take a product of their own (`layerscope.readout.dots`), whose error is
bounded on any CPU; what is chosen here does not touch it.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from layerscope.errors import ConfigError, nearest
from layerscope.products.hardware import has_matrix_units

Products = Literal["default", "checked"]

_REQUESTS = ("default", "checked")
MATRIX_UNITS = "matrix units"
# Preferred first, after the matrix units. "medium" permits what "high" permits and more, so it is
# never the slower one.
_CANDIDATES = ("medium", "high")
_TOLERANCE = 4.0  # an error up to this multiple of the default's counts as float32-accurate
# (rows, d_model, vocab): one long reduction of a wide model, one short and wide product.
_CHECK_SHAPES = ((64, 2048, 512), (208, 256, 1024))
_OUTLIER = 64.0  # times as large as the rest: products may go another way then


@dataclass(frozen=True)
class ProductChoice:
    """The product that was chosen, and the measurement behind the choice.

    Attributes:
        requested: "default" or "checked".
        precision: what `products` sets, "highest" | "high" | "medium"; "unchanged" leaves torch
            as it was found; "matrix units" is "highest" with large products of our own.
        max_error: largest absolute error of the chosen product against float64, over the
            root-mean-square of the exact result, of several products; None where nothing was
            measured.
        reference_error: the same for torch's "highest".
        reason: why, in one sentence.
    """

    requested: str
    precision: str
    max_error: float | None
    reference_error: float | None
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a JSON-able dict, for provenance."""
        return asdict(self)


def choose(
    requested: Products = "checked",
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    compiled: bool = True,
) -> ProductChoice:
    """Decide which product serves `requested` on this device, measuring once per process.

    Args:
        requested: "default" leaves torch as found; "checked" takes the fastest setting whose
            error against float64 is at most 4 times that of "highest", in each of several products.
        device: where the products will run. Away from the CPU "checked" never leaves full
            float32: TF32 keeps 10 bits of the significand.
        dtype: dtype of the operands; the setting concerns float32 only.
        compiled: whether products of our own may be loaded, which takes half a second.

    Raises:
        ConfigError: `requested` is neither "default" nor "checked".
    """
    if requested not in _REQUESTS:
        raise ConfigError(
            f"unknown products {requested!r}{nearest(requested, _REQUESTS)}; "
            "pass 'default' or 'checked'"
        )
    if requested == "default":
        return ProductChoice(requested, "unchanged", None, None, "torch is left as it was found")
    kind = torch.device(device).type
    if dtype != torch.float32:
        return ProductChoice(
            requested, "unchanged", None, None, f"operands are {dtype}; the setting is for float32"
        )
    if kind != "cpu":
        return ProductChoice(
            requested,
            "highest",
            None,
            None,
            f"on {kind} the faster settings round operands (TF32), which is not float32-accurate",
        )
    return _checked_on_cpu(compiled and has_matrix_units() and _compiles())


@functools.lru_cache(maxsize=2)
def _checked_on_cpu(matrix_units: bool) -> ProductChoice:
    references = _relative_errors("highest")
    reference = max(references)
    rejected: list[str] = []
    candidates = (MATRIX_UNITS, *_CANDIDATES) if matrix_units else _CANDIDATES
    for precision in candidates:
        errors = _relative_errors(precision)
        error = max(errors)
        pairs = zip(errors, references, strict=True)
        if all(one <= _TOLERANCE * other for one, other in pairs):
            return ProductChoice(
                "checked",
                precision,
                error,
                reference,
                f"{precision!r} is float32-accurate here: error {error:.1e} against "
                f"{reference:.1e} of 'highest'" + "".join(rejected),
            )
        rejected.append(f"; {precision!r} was rejected with error {error:.1e}")
    return ProductChoice(
        "checked",
        "highest",
        reference,
        reference,
        "no faster setting is float32-accurate here" + "".join(rejected),
    )


def _compiles() -> bool:
    try:
        importlib.import_module("layerscope.products.matrix_units")
    except (ImportError, OSError):  # a numba that does not go with this numpy
        return False
    return True


def _relative_errors(precision: str) -> list[float]:
    """Return the worst |product - exact| / rms(exact) of every product of the check."""
    found: list[float] = []
    generator = torch.Generator().manual_seed(20240229)
    for rows, width, tokens in _CHECK_SHAPES:
        left = torch.randn(rows, width, generator=generator)
        right = torch.randn(tokens, width, generator=generator)
        uneven = left.clone()
        uneven[:, 0] *= _OUTLIER
        for each in (left, uneven):
            exact = each.double() @ right.double().T
            product = _product(precision, each, right.T)
            found.append(_error(product, exact))
    return found


def _product(precision: str, left: Tensor, right: Tensor) -> Tensor:
    if precision == MATRIX_UNITS:
        from layerscope.products import matrix_units

        return matrix_units.product(left, right)
    with _float32_precision(precision):
        return left @ right


def _error(product: Tensor, exact: Tensor) -> float:
    error = (product.double() - exact).abs().max() / exact.square().mean().sqrt()
    return float(error.nan_to_num(nan=float("inf")))


@contextmanager
def products(
    requested: Products | ProductChoice, *, device: str | torch.device = "cpu"
) -> Generator[ProductChoice]:
    """Run the block with the chosen float32 product, then restore whatever was set before.

    Scopes nest, and restore on exceptions too. The setting is torch's and therefore global to the
    process: products that other threads run at the same time are affected as well.

    Args:
        requested: "default", "checked", or a choice made by `choose`.
        device: where the products will run, see `choose`.
    """
    choice = requested if isinstance(requested, ProductChoice) else choose(requested, device=device)
    if choice.precision == "unchanged":
        yield choice
        return
    with _scope(choice.precision):
        yield choice


@contextmanager
def _scope(precision: str) -> Generator[None]:
    if precision == MATRIX_UNITS:
        from layerscope.products.replacing import matrix_unit_products

        with _float32_precision("highest"), matrix_unit_products():
            yield
        return
    with _float32_precision(precision):
        yield


@contextmanager
def _float32_precision(precision: str) -> Generator[None]:
    before = _Settings.read()
    try:
        torch.set_float32_matmul_precision(precision)
        yield
    finally:
        before.restore()


@dataclass(frozen=True)
class _Settings:
    """torch's two ways of saying the same thing: the process-wide word and the per-backend ones.

    Setting the word overwrites the per-backend values, and reading the word raises where a caller
    has set a per-backend value that contradicts it; so both are read, and restored in that order.
    """

    word: str
    backends: tuple[tuple[Any, str], ...]

    @staticmethod
    def read() -> _Settings:
        backends = tuple((module, module.fp32_precision) for module in _matmul_modules())
        try:
            word = torch.get_float32_matmul_precision()
        except RuntimeError:
            word = _hidden_word()
            for module, value in backends:
                module.fp32_precision = value
        return _Settings(word, backends)

    def restore(self) -> None:
        torch.set_float32_matmul_precision(self.word)
        for module, value in self.backends:
            module.fp32_precision = value


def _matmul_modules() -> list[Any]:
    """Return the per-backend setting holders, where this torch has them (2.9 and later)."""
    found: list[Any] = []
    for backend in (torch.backends.mkldnn, torch.backends.cuda):
        module = getattr(backend, "matmul", None)
        with suppress(AttributeError, RuntimeError, AssertionError):
            if module is not None and isinstance(module.fp32_precision, str):
                found.append(module)
    return found


def _hidden_word() -> str:
    """Read the word where a contradicting per-backend value forbids it (the caller restores)."""
    for value in ("ieee", "tf32", "bf16"):
        for module in _matmul_modules():
            with suppress(RuntimeError):
                module.fp32_precision = value
        with suppress(RuntimeError):
            return torch.get_float32_matmul_precision()
    return "highest"
