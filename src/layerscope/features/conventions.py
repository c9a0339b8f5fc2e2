"""What a dictionary's file left unsaid, said in one line."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Convention:
    """How a dictionary was read; everything named here is folded into its weights already.

    Attributes:
        pre_bias: whether a bias is subtracted before encoding, and which.
        norm: how activations are normalised: "none", a dataset's scale (folded), or per token.
        gate: the rule that makes features out of pre-activations.
        decoder: the scale of decoder rows, and so the unit of features.
        notes: anything else a reader must know.
    """

    pre_bias: str = "no"
    norm: str = "none"
    gate: str = "relu"
    decoder: str = "as stored"
    notes: tuple[str, ...] = ()

    def line(self) -> str:
        """Return the one line that is printed when a dictionary is loaded."""
        parts = (
            f"pre-bias {self.pre_bias}",
            f"norm {self.norm}",
            f"gate {self.gate}",
            f"decoder {self.decoder}",
            *self.notes,
        )
        return " | ".join(parts)
