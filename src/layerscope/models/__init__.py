"""Language models one can look into: load one, name sites, run, capture, edit.

model = layerscope.load("some/model")
result = model.run("The capital of France is", capture="resid_post.*", logits="last")
result["resid_post.3"]          # [batch, pos, d_model]
"""

from __future__ import annotations

from layerscope.models.answers import AnswerAlignment, align_answer
from layerscope.models.edits import (
    Add,
    Apply,
    Clamp,
    Edit,
    EditContext,
    MeanAblate,
    ProjectOut,
    Replace,
    ResampleAblate,
    Scale,
    ZeroAblate,
)
from layerscope.models.generation import Generation, Piece
from layerscope.models.identities import IdentityReport
from layerscope.models.language_model import LanguageModel, load
from layerscope.models.prompt import Prompt, render
from layerscope.models.prompts import TokenBatch
from layerscope.models.run import Capture, RunResult, Start
from layerscope.models.scopes import Scope
from layerscope.models.sites import Site
from layerscope.models.templates import TaskTemplate, get_template

__all__ = [
    "Add",
    "AnswerAlignment",
    "Apply",
    "Capture",
    "Clamp",
    "Edit",
    "EditContext",
    "Generation",
    "IdentityReport",
    "LanguageModel",
    "MeanAblate",
    "Piece",
    "ProjectOut",
    "Prompt",
    "Replace",
    "ResampleAblate",
    "RunResult",
    "Scale",
    "Scope",
    "Site",
    "Start",
    "TaskTemplate",
    "TokenBatch",
    "ZeroAblate",
    "align_answer",
    "get_template",
    "load",
    "render",
]
