"""Read the weights of a model folder to where they were decided to go, and never twice."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from layerscope.errors import ModelError
from layerscope.models.backends.huggingface.files import ModelFolder, one_line
from layerscope.models.backends.huggingface.placing import Request
from layerscope.models.backends.huggingface.quantised import (
    Scheme,
    require_plain_ends,
    scheme_of_model,
)
from layerscope.models.backends.huggingface.weights import DTYPES, Entry, Unread, readable
from layerscope.models.devices import dtype_name
from layerscope.models.memory.choose import RESERVE, Candidate, Decision
from layerscope.models.memory.estimate import show_bytes


@dataclass(frozen=True)
class Source:
    """A checked folder: its configuration, and the headers of its files."""

    folder: ModelFolder
    config: PreTrainedConfig
    entries: Mapping[str, Entry]
    scheme: Scheme | None
    trust_remote_code: bool


@dataclass(frozen=True, eq=False)
class Outcome:
    """A model that was read.

    Attributes:
        model: on its device.
        chosen: the placement that succeeded.
        attempts: every placement that came into question up to it, with what became of it.
        unused: names of weights in the files that the model has no place for.
    """

    model: PreTrainedModel
    chosen: Candidate
    attempts: tuple[dict[str, str], ...]
    unused: tuple[str, ...]


def read(source: Source, decision: Decision, request: Request) -> Outcome:
    """Load by the first placement that works; memory that runs out leads to the next one.

    Raises:
        ModelError: a weight is missing, made up or damaged, or memory ran out everywhere.
    """
    attempts = [_attempt(candidate, "skipped", why) for candidate, why in decision.skipped]
    for candidate in decision.tried:
        try:
            model, unused = _read_once(source, candidate, request)
        except ModelError:
            raise
        # Loading fails in many ways (damaged files, memory, missing packages, model code).
        except Exception as error:
            if not _is_out_of_memory(error):
                raise ModelError(
                    f"cannot load {source.folder.source}: {one_line(error)}"
                ) from error
        else:
            attempts.append(_attempt(candidate, "loaded", candidate.reason))
            return Outcome(model, candidate, tuple(attempts), unused)
        attempts.append(_attempt(candidate, "failed", "memory ran out while loading"))
        _release()
    failed = ", ".join(f"{attempt['dtype']} on {attempt['device']}" for attempt in attempts)
    needed = min(candidate.needed for candidate in decision.tried)
    raise ModelError(
        f"memory ran out while loading {source.folder.source} ({failed}); it needs about "
        f"{show_bytes(needed)}: see `layerscope fit {source.folder.source}`"
    )


def _read_once(
    source: Source, candidate: Candidate, request: Request
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    options: dict[str, Any] = {
        "config": source.config,
        "dtype": candidate.dtype,
        "output_loading_info": True,
        # Collected below, with names and shapes, instead of an error that has neither.
        "ignore_mismatched_sizes": True,
    }
    device = torch.device(candidate.devices[0].name)
    direct = _direct(source, candidate)
    if direct is not None:
        model_class, config = direct
        where = None if device.type == "cpu" else device
        weights = {name: Unread(entry, where) for name, entry in source.entries.items()}
        options |= {"config": config, "state_dict": weights}
        loaded = model_class.from_pretrained(None, **options)
    else:
        options |= {"use_safetensors": True, "trust_remote_code": source.trust_remote_code}
        if len(candidate.devices) > 1:
            options["device_map"] = request.device_map or "auto"
            if not isinstance(request.device_map, Mapping):
                options["max_memory"] = {
                    int(card.name.partition(":")[2]): max(0, card.free - RESERVE[card.kind])
                    for card in candidate.devices
                }
        elif source.scheme is not None:
            options["device_map"] = {"": device}
        loaded = AutoModelForCausalLM.from_pretrained(source.folder.path, **options)
    model, info = cast(tuple[PreTrainedModel, dict[str, Any]], cast(Any, loaded))
    _check_loading_info(info, source.folder.source)
    if direct is not None:
        _complete(model, source)
    if source.scheme is None:
        if len(candidate.devices) == 1:
            model.to(device)  # pyright: ignore[reportArgumentType]
    elif scheme_of_model(model) is None:
        # Unpacked on loading: what was never packed still has the dtype of its file.
        model.to(candidate.dtype)  # pyright: ignore[reportArgumentType]
    _require_present(model, source.folder.source)
    if source.scheme is not None:
        require_plain_ends(model, source.folder.source)
    return model, tuple(sorted(info.get("unexpected_keys") or ()))


def _direct(source: Source, candidate: Candidate) -> tuple[Any, PreTrainedConfig] | None:
    """Return class and configuration where the files are better read here than mapped.

    Mapping is best where nothing changes: no memory is taken until a weight is used. In another
    dtype, or on the way to an accelerator, it would leave a second copy.
    """
    if source.scheme is not None or len(candidate.devices) > 1 or not readable(source.entries):
        return None
    kinds = {DTYPES[entry.kind] for entry in source.entries.values()}
    floating = {kind for kind in kinds if kind.is_floating_point}
    if candidate.where == "cpu" and floating <= {candidate.dtype}:
        return None
    config = source.config
    if source.trust_remote_code and getattr(config, "auto_map", None):
        return None
    found: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if found is None or isinstance(found, list | tuple):
        return None
    # A model of several modalities keeps its language model's configuration inside its own.
    inner = getattr(config, "sub_configs", {}).get("text_config")
    if inner is not None and found.config_class == inner:
        config = config.get_text_config()
    return found, config


def _complete(model: PreTrainedModel, source: Source) -> None:
    """Add what transformers reads from the folder beside the weights."""
    folder = source.folder.path
    model.config.name_or_path = str(folder)
    if (folder / "generation_config.json").is_file() and model.can_generate():
        model.generation_config = GenerationConfig.from_pretrained(folder)


def _check_loading_info(info: dict[str, Any], source: str) -> None:
    mismatched: list[Any] = sorted(info.get("mismatched_keys") or [], key=str)
    if mismatched:
        name, found, needed = mismatched[0]
        raise ModelError(
            f"{source}: {len(mismatched)} weights do not fit config.json, first {name} with shape "
            f"{list(found)} where {list(needed)} is needed"
        )
    missing = sorted(info.get("missing_keys") or ())
    if missing:
        shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise ModelError(
            f"{source} lacks {len(missing)} weights that its config.json needs ({shown}): "
            "transformers would fill them with random numbers"
        )
    if info.get("error_msgs"):
        raise ModelError(f"{source}: {info['error_msgs'][0]}")


def _require_present(model: PreTrainedModel, source: str) -> None:
    absent = [name for name, tensor in model.named_parameters() if tensor.device.type == "meta"]
    if absent:
        raise ModelError(
            f"{source} does not fit on the devices of its device_map: {len(absent)} weights were "
            f"left out, first {absent[0]}; see `layerscope fit {source}`"
        )


def _attempt(candidate: Candidate, outcome: str, reason: str) -> dict[str, str]:
    # No measured figure here: provenance names a run, and free memory is never twice the same.
    return {
        "device": candidate.where,
        "dtype": dtype_name(candidate.dtype),
        "outcome": outcome,
        "reason": reason,
    }


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and (
        "out of memory" in text or "can't allocate memory" in text
    )


def _release() -> None:
    """Give back what a failed attempt left behind."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
