"""From a model and text to stored dictionaries: collect, train, measure, write."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layerscope.errors import DictionaryError
from layerscope.features.dictionary import SparseDictionary
from layerscope.features.figures import collect, loss_recovered, tally
from layerscope.features.formats.saelens import CONFIG
from layerscope.features.formats.write import write_dictionary
from layerscope.features.library import load
from layerscope.features.training.options import TrainOptions
from layerscope.features.training.trainer import Trainer
from layerscope.files import canonical_json, sha256_text
from layerscope.lenses.fitting.drive import Progress, drive, forget
from layerscope.models.batches import TokenBatch
from layerscope.models.language_model import LanguageModel
from layerscope.models.sites import Site


@dataclass(frozen=True)
class Trained:
    """One dictionary as it was stored.

    Attributes:
        folder: where it lies.
        site: what it reads.
        figures: FVU, L0, dead share, losses, on held-out text, of the stored file.
        resumed: steps that an earlier, interrupted process had done.
    """

    folder: Path
    site: Site
    figures: dict[str, Any]
    resumed: int = 0


def train_dictionaries(
    model: LanguageModel,
    train: Sequence[TokenBatch],
    held_out: Sequence[TokenBatch],
    sites: Iterable[Site],
    folder: str | Path,
    *,
    options: TrainOptions | None = None,
    skip: int = 1,
    store_dtype: torch.dtype = torch.float32,
    progress: Callable[[Site, Progress], object] | None = None,
    checkpoint_seconds: float = 30.0,
) -> list[Trained]:
    """Train an autoencoder or transcoder for every site and store each in a folder of its own.

    Finished sites are left as they are, and an interrupted one goes on where it stopped, with the
    same result; a folder of other settings, text or model is refused. One site's activations are in
    memory at a time: tokens x width x 4 bytes, and those of the site that a transcoder explains.

    Args:
        model: the model; it is not changed.
        train, held_out: padded ids.
        sites: what to train for, such as ``resid_post.3``; for transcoders, such as ``mlp_in.3``.
        folder: gets one SAELens folder per site, named after it.
        options: see `TrainOptions`.
        skip: first positions of every row that are left out.
        store_dtype: of the stored matrices.
        progress: called after every step.
        checkpoint_seconds: least time between checkpoints.

    Raises:
        DictionaryError: there is too little text, or the folder holds another run's dictionary.
        ConfigError: a transcoder cannot read one of the sites.
        LensError: a checkpoint is of another run, or damaged.
    """
    options, sites = options or TrainOptions(), list(sites)
    for site in sites:
        options.target(site)  # refused before anything is computed
    done: list[Trained] = []
    for site in sites:
        place = Path(folder) / str(site)
        key = {
            "site": str(site),
            "options": asdict(options),
            "skip": skip,
            "dtype": str(store_dtype),
            "text": _ids_sha256(train, held_out),
            "model": model.provenance()["weights_sha256"],
        }
        name = sha256_text(canonical_json(key))
        if (place / CONFIG).is_file():
            done.append(_finished(place, site, name))
            continue
        target = options.target(site)
        found = collect(model, train, list(dict.fromkeys((site, target))), skip=skip)
        trainer = Trainer(
            found[site], site, options, y=found[target] if options.transcoder else None
        )
        show = None
        if progress is not None:
            show = _tell(progress, site)
        resumed = drive(trainer, folder=place, key=key, every=checkpoint_seconds, progress=show)
        dictionary = trainer.dictionary(model_name=model.name)
        figures = _store(model, dictionary, held_out, place, skip, store_dtype, name)
        forget(place)
        done.append(Trained(place, site, figures, resumed))
    return done


def _store(
    model: LanguageModel,
    dictionary: SparseDictionary,
    held_out: Sequence[TokenBatch],
    place: Path,
    skip: int,
    dtype: torch.dtype,
    key: str,
) -> dict[str, Any]:
    """Write the dictionary, measure what was written, and write it again with its figures."""
    site, target = dictionary.reads, dictionary.writes[0]
    first = place / "unmeasured"
    write_dictionary(dictionary, first, dtype=dtype)
    stored = load(first)
    found = collect(model, held_out, list(dict.fromkeys((site, target))), skip=skip)
    sums = tally(stored, found[site], found[target])
    losses = loss_recovered(model, stored, held_out, skip=skip)
    total = sums.figures()
    figures = {
        "fvu": total.fvu,
        "l0": total.l0,
        "dead": total.dead,
        "rows": total.rows,
        "loss": losses,
        "skip": skip,
        "key": key,
    }
    rates = (sums.counts.double() / sums.rows).clamp_min(1e-10).log10()
    write_dictionary(dictionary, place, dtype=dtype, figures=figures, log_sparsity=rates)
    for path in first.iterdir():
        path.unlink()
    first.rmdir()
    return figures


def _finished(place: Path, site: Site, key: str) -> Trained:
    from layerscope.features.formats.base import read_json

    figures = read_json(place / CONFIG)["metadata"].get("layerscope") or {}
    figures.pop("folded", None)
    if figures.get("key") != key:
        raise DictionaryError(
            f"{place} holds a dictionary of another run (settings, text or model differ); choose "
            "another folder, or remove it"
        )
    return Trained(place, site, figures)


def _tell(progress: Callable[[Site, Progress], object], site: Site) -> Callable[[Progress], object]:
    return lambda state: progress(site, state)


def _ids_sha256(*groups: Sequence[TokenBatch]) -> str:
    import hashlib

    digest = hashlib.sha256()
    for group in groups:
        for batch in group:
            digest.update(f"{list(batch.ids.shape)}".encode())
            digest.update(_bytes(batch.ids))
            digest.update(_bytes(batch.attention_mask.to(torch.int64)))
    return digest.hexdigest()


def _bytes(values: Tensor) -> bytes:
    return values.cpu().contiguous().numpy().tobytes()
