"""What a strength does beside its purpose: the change on neutral texts, and a strength for it."""

from __future__ import annotations

import polars as pl

from layerscope.errors import ConfigError
from layerscope.experiments.steering.config import SteeringConfig
from layerscope.experiments.units import Piece
from layerscope.interventions.steering.calibrate import calibrate_kl, kl_bits
from layerscope.interventions.steering.vector import Mode, SteeringVector
from layerscope.models import LanguageModel

DAMAGE = {"kind": pl.String, "alpha": pl.Float64, "bits": pl.Float64}


def damage(
    model: LanguageModel, kind: str, direction: SteeringVector, config: SteeringConfig
) -> Piece:
    """Measure by how many bits per token a direction changes neutral texts at every strength."""
    found = kl_bits(model, direction, config.neutral, config.alphas, mode=_mode(config))
    rows = [{"kind": kind, "alpha": alpha, "bits": bits} for alpha, bits in found.items()]
    return Piece(pl.DataFrame(rows, schema=DAMAGE))


def calibration(model: LanguageModel, vector: SteeringVector, config: SteeringConfig) -> Piece:
    """Find the strength that changes neutral texts by ``config.kl_bits`` per token.

    Where none does, the payload says why.
    """
    assert config.kl_bits is not None
    schema = {name: DAMAGE[name] for name in ("alpha", "bits")}
    payload = {"target_bits": config.kl_bits}
    try:
        curve = calibrate_kl(
            model, vector, config.neutral, target_bits=config.kl_bits, mode=_mode(config)
        )
    except ConfigError as error:
        empty = pl.DataFrame(schema=schema)
        return Piece(empty, {**payload, "alpha": None, "reason": str(error)})
    found = {
        "alpha": curve.alpha,
        "bits": curve.bits,
        "monotone": curve.monotone,
        "forwards": curve.forwards,
    }
    return Piece(pl.DataFrame(curve.points, schema=schema, orient="row"), {**payload, **found})


def _mode(config: SteeringConfig) -> Mode:
    return config.mode
