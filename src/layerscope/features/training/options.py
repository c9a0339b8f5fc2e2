"""What decides a training run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from layerscope.errors import ConfigError
from layerscope.models.sites import Site

KINDS = ("batchtopk", "jumprelu")


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """How a dictionary is trained.

    Attributes:
        kind: "batchtopk" (stored with a threshold that keeps its average L0) or "jumprelu".
        transcoder: explain what the MLP writes from what it reads, instead of a site from itself.
        affine: a linear map of what is read is added to what a transcoder writes: a skip
            transcoder.
        expansion: features per dimension of the site.
        k: features per token: exact on average for batchtopk, aimed at by jumprelu.
        steps: of the optimiser.
        batch: tokens of a step.
        learning_rate: of Adam; it rises over the first 5% of the steps and falls to zero over the
            last 30%.
        dead_after: tokens without firing after which a feature counts as dead, and is trained on
            the error that the others leave.
        revive: weight of that auxiliary loss.
        bandwidth: of the straight-through estimator of jumprelu thresholds.
        sparsity: weight of the jumprelu penalty ``(L0 / k - 1)^2``.
        seed: of initialisation and order.
    """

    kind: Literal["batchtopk", "jumprelu"] = "batchtopk"
    transcoder: bool = False
    affine: bool = False
    expansion: float = 8
    k: int = 32
    steps: int = 2000
    batch: int = 1024
    learning_rate: float = 1e-3
    dead_after: int = 100_000
    revive: float = 1 / 32
    bandwidth: float = 0.1
    sparsity: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"unknown kind '{self.kind}'; train {' or '.join(KINDS)}")
        if self.affine and not self.transcoder:
            raise ConfigError("only a transcoder can be affine: an autoencoder would copy its site")
        for name in (
            "expansion",
            "k",
            "steps",
            "batch",
            "learning_rate",
            "dead_after",
            "bandwidth",
        ):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; give more than 0")

    def target(self, site: Site) -> Site:
        """Return the site that is explained: of a transcoder, what the MLP writes.

        Raises:
            ConfigError: a transcoder cannot read this site.
        """
        if not self.transcoder:
            return site
        if site.kind != "mlp_in" or site.layer is None:
            raise ConfigError(
                f"a transcoder reads what an MLP reads, not {site}; give sites such as mlp_in.3"
            )
        return Site("mlp_out", site.layer)

    def features(self, d_in: int) -> int:
        """Return the number of features for a site of this width; raises ConfigError if below k."""
        n = round(self.expansion * d_in)
        if n < self.k:
            raise ConfigError(f"{n} features cannot hold k = {self.k}; give a larger expansion")
        return n
