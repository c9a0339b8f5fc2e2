"""Where a run's files lie, and what its stages share: the dictionaries, the model, the prompts."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import yaml

from layerscope.errors import ConfigError, DictionaryError, PromptError
from layerscope.experiments.pathways.audit import Universe, find_files
from layerscope.experiments.pathways.config import PathwaysConfig
from layerscope.features.library import DictionarySet, open_set
from layerscope.files import sha256_file, sha256_text
from layerscope.models import LanguageModel, load
from layerscope.models.devices import parse_device

VALIDATION = "results/audit/data_validation.json"
FEATURES = "results/audit/features.parquet"
CAUSAL = "data/causal_features.json"
PROMPTS = "data/prompts_sample.json"
PROTOTYPE = "results/prototype/single_feature_test.json"
DISCOVERED = "results/pathways/discovered.parquet"
EDGES = "results/pathways/validated_pathways.parquet"
EDGES_JSONL = "results/pathways/validated_pathways.jsonl"
DOSES = "results/pathways/doses.parquet"
OVER_PROMPTS = "results/pathways/over_prompts.parquet"
REPLAY = "results/pathways/replay.json"
TOKENS = "results/tokens/token_associations.parquet"
WORDS = "results/tokens/word_associations.parquet"
TOKENS_JSON = "results/tokens/token_associations.json"
FEATURE_FIGURES = "results/tokens/feature_figures.parquet"
INTEGRATED = "results/integrated"
RUN = "run.json"
CHUNKS = ".chunks"

_WHOLE = 1 << 30  # files up to this size are hashed whole
_ENDS = 1 << 20


@dataclass(frozen=True)
class SampledPrompt:
    """One prompt of the run: its text and the ids that every stage must see."""

    id: str
    text: str
    ids: tuple[int, ...]
    origin: str
    sha256: str


class Workspace:
    """One run: its configuration, its folder, and what is loaded at most once.

    Attributes:
        config: of the run.
        out: its folder.
    """

    def __init__(
        self, config: PathwaysConfig, out: Path, *, model: LanguageModel | None = None
    ) -> None:
        self.config = config
        self.out = out
        self._model = model

    def path(self, name: str) -> Path:
        """Return the path of one of the run's files."""
        return self.out / name

    def need(self, name: str, stage: str) -> Path:
        """Return the path of a file that an earlier stage wrote.

        Raises:
            ConfigError: it is not there.
        """
        path = self.path(name)
        if not path.exists():
            raise ConfigError(f"{path} is missing: run `layerscope pathways {stage}` first")
        return path

    @cached_property
    def every_dictionary(self) -> DictionarySet:
        """All dictionaries; matrices stay on the disk, and are read to where the model is."""
        device = parse_device(self.config.device) if self._model is None else self._model.device
        # Other accelerators lack float64, in which rows are compared.
        where = str(device) if device.type == "cuda" else "cpu"
        return open_set(self.config.dictionaries, device=where)

    @cached_property
    def dictionaries(self) -> DictionarySet:
        """The dictionaries that are sources and targets: those of block 0 only if wanted."""
        if self.config.layer0 or 0 not in self.every_dictionary:
            return self.every_dictionary
        return self.layers([layer for layer in self.every_dictionary.layers if layer])

    def layers(self, layers: list[int]) -> DictionarySet:
        """Return the dictionaries of some layers, in the same feature space."""
        whole = self.every_dictionary
        if not layers:
            raise DictionaryError(f"{whole.name} has no dictionary of the layers wanted")
        space = whole.space
        chosen = DictionarySet(whole.name, [whole[layer] for layer in layers])
        for dictionary in chosen:  # ids keep the space of the whole set
            dictionary.space = space
        return chosen

    @property
    def has_model(self) -> bool:
        """Whether the model is loaded."""
        return self._model is not None

    @property
    def model(self) -> LanguageModel:
        """The model, loaded when first needed, and checked against the dictionaries."""
        if self._model is None:
            self._model = load(
                self.config.model, device=self.config.device, dtype=self.config.dtype
            )
            for dictionary in self.every_dictionary:
                dictionary.require_model(self._model, other_model=self.config.allow_mismatch)
        return self._model

    @property
    def universe(self) -> Universe:
        """Which ids exist."""
        every = self.every_dictionary
        first = next(iter(every))
        return Universe(every.space.name, dict(every.space.sizes), first.d_in, self.config.model)

    @property
    def prompts_path(self) -> Path:
        """The file of prompts.

        Raises:
            ConfigError: none was named and the data folder has none.
        """
        named = self.config.prompts
        path = Path(named) if named else Path(self.config.data) / "prompts.json"
        if not path.is_file():
            raise ConfigError(
                f"{path} is missing: name a file of prompts (--prompts); response logs do not hold "
                "the prompts that were answered"
            )
        return path

    def sampled_prompts(self) -> list[SampledPrompt]:
        """Return the prompts that the select stage wrote."""
        content = read_json(self.need(PROMPTS, "select"))
        return [
            SampledPrompt(p["id"], p["text"], tuple(p["ids"]), p["origin"], p["sha256"])
            for p in content["prompts"]
        ]

    def hashes(self, *names: str) -> dict[str, str]:
        """Return content hashes of the run's own files; absent ones say so."""
        return {name: hash_path(self.path(name)) for name in names}

    def data_hashes(self, *kinds: str) -> dict[str, str]:
        """Return content hashes of the data's files ("checkpoints", "responses")."""
        data = Path(self.config.data)
        patterns = [pattern for kind in kinds for pattern in getattr(self.config, kind)]
        return {
            path.relative_to(data).as_posix(): sha256_file(path)
            for path in find_files(data, patterns)
        }

    @cached_property
    def identities(self) -> dict[str, str]:
        """What tells this model and these dictionaries from others, by their files."""
        return {
            "model": fingerprint(self.config.model),
            "dictionaries": fingerprint(self.config.dictionaries),
        }


def read_prompts(path: Path) -> list[tuple[str, str, str]]:
    """Return (id, text, origin) of every prompt of a JSON, JSON-lines, YAML or text file.

    Raises:
        PromptError: the file cannot be read, holds no prompt, or two have one id.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            content: Any = [json.loads(line) for line in text.splitlines() if line.strip()]
        elif path.suffix == ".txt":
            content = [line for line in text.splitlines() if line.strip()]
        else:
            content = yaml.safe_load(text) if path.suffix in (".yaml", ".yml") else json.loads(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise PromptError(f"cannot read prompts from {path}: {error}") from None
    if isinstance(content, dict):
        content = cast("dict[str, Any]", content).get("prompts")
    if not isinstance(content, list) or not content:
        raise PromptError(f"{path} holds no prompts: write a list of texts or of {{id, text}}")
    found: list[tuple[str, str, str]] = []
    for index, each in enumerate(cast("list[Any]", content)):
        entry: dict[str, Any] = {"text": each} if isinstance(each, str) else dict(each or {})
        words = entry.get("text", entry.get("prompt"))
        if not isinstance(words, str) or not words:
            raise PromptError(f"{path}: prompt {index} has no text")
        name = str(entry.get("id", entry.get("key", f"p{index}")))
        found.append((name, words, str(entry.get("origin", path.name))))
    names = [name for name, _, _ in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise PromptError(f"{path}: two prompts are called '{twice}'; ids must differ")
    return found


def read_json(path: Path) -> dict[str, Any]:
    """Read one of the run's own JSON files; raises ConfigError where it is damaged."""
    try:
        return cast("dict[str, Any]", json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); run its stage again") from None


def hash_path(path: Path) -> str:
    """Return the hash of a file, or of all files of a folder; "absent" where there is none."""
    if path.is_dir():
        parts = [
            f"{each.relative_to(path).as_posix()}:{sha256_file(each)}"
            for each in sorted(path.rglob("*"))
            if each.is_file()
        ]
        return sha256_text("\n".join(parts))
    return sha256_file(path) if path.is_file() else "absent"


def fingerprint(source: str) -> str:
    """Return what tells a folder of weights from another; a hub name stands for itself.

    Small folders are hashed whole; of large files size, time of change and both ends are.
    """
    path = Path(source)
    if not path.exists():
        return source
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    whole = sum(file.stat().st_size for file in files) <= _WHOLE
    parts: list[str] = []
    for file in files:
        name = file.relative_to(path).as_posix()
        parts.append(f"{name}:{sha256_file(file) if whole else _ends(file)}")
    return sha256_text("\n".join(parts))


def _ends(path: Path) -> str:
    state = path.stat()
    digest = hashlib.sha256(f"{state.st_size}:{state.st_mtime_ns}".encode())
    with path.open("rb") as stream:
        digest.update(stream.read(_ENDS))
        stream.seek(max(0, state.st_size - _ENDS))
        digest.update(stream.read(_ENDS))
    return digest.hexdigest()
