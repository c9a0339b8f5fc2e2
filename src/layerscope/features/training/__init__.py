"""Training autoencoders and transcoders: BatchTopK and JumpReLU, seeded, resumable."""

from __future__ import annotations

from layerscope.features.training.options import TrainOptions
from layerscope.features.training.train import Trained, train_dictionaries
from layerscope.features.training.trainer import Trainer

__all__ = ["TrainOptions", "Trained", "Trainer", "train_dictionaries"]
