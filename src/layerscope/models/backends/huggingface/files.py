"""Model folders on disk: where they are, and whether they are whole."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from layerscope.errors import ModelError

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer.model.v3",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tiktoken.model",
    "qwen.tiktoken",
)
_DOWNLOADED = ("*.json", "model*.safetensors", "*.model", "*.model.v3", "*.txt", "*.tiktoken")
_NOT_DOWNLOADED = ("*/*", "model.fp*.safetensors", "consolidated*")
_PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class ModelFolder:
    """A local folder with a model: the user's own, or a snapshot in the hub cache."""

    path: Path
    name: str
    source: str
    kind: str
    revision: str | None

    @property
    def weight_files(self) -> tuple[Path, ...]:
        """The safetensors files of the model, in order of name."""
        return weight_files(self.path)


def find_folder(source: str | Path, *, revision: str | None, custom_code: bool) -> ModelFolder:
    """Find a model by folder or hub id; a complete snapshot in the hub cache is used as it is.

    Raises:
        ModelError: there is no such folder, or the hub id is neither cached nor reachable.
    """
    text = str(source)
    path = Path(text).expanduser()
    if path.is_dir():
        if revision is not None:
            raise ModelError(f"{text} is a local folder: revision={revision!r} is for hub ids only")
        return ModelFolder(path, path.resolve().name, text, "folder", None)
    if path.is_file():
        if path.suffix == ".gguf":
            raise ModelError(_gguf(text, path.name))
        raise ModelError(f"{text} is a file: give the folder that holds it")
    if isinstance(source, Path) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", text) or text[0] in "./":
        raise ModelError(f"there is no folder {text}: check the path")
    path = _snapshot(text, revision, custom_code)
    return ModelFolder(path, text.rsplit("/", 1)[-1], text, "hub", path.name)


def check_folder(folder: ModelFolder) -> None:
    """Check that config and weights are there and whole, before anything is allocated.

    Raises:
        ModelError: a file is missing, truncated, damaged, or of a kind that is not read.
    """
    if not (folder.path / CONFIG_FILE).is_file():
        raise ModelError(
            f"{folder.source} is not a model folder: it has no {CONFIG_FILE}; give a folder with "
            f"{CONFIG_FILE} and *.safetensors"
        )
    files = folder.weight_files
    if not files:
        raise ModelError(_no_weights(folder))
    for file in files:
        if not file.is_file():
            raise ModelError(f"{folder.source} lacks {file.name}, named in {INDEX_FILE}: get it")
        check_safetensors(file)


def refuse_other_formats(folder: ModelFolder) -> None:
    """Recognise the folders of other systems, whose weights transformers would misread or miss.

    Raises:
        ModelError: MLX-quantised or GGUF weights; says what opens them.
    """
    try:
        config: Any = json.loads((folder.path / CONFIG_FILE).read_text("utf-8"))
    except (OSError, ValueError):
        config = None
    if isinstance(config, dict) and is_mlx_quantised(cast(dict[str, Any], config)):
        raise ModelError(
            f"{folder.source} holds weights that MLX quantised: load it with backend='mlx', or get "
            "the model that it was made from"
        )
    ggufs = sorted(file.name for file in folder.path.glob("*.gguf"))
    if ggufs and not folder.weight_files:
        raise ModelError(_gguf(folder.source, ggufs[0]))


def is_mlx_quantised(config: Mapping[str, Any]) -> bool:
    """Say whether a config.json describes weights in MLX's own packing."""
    for key in ("quantization", "quantization_config"):
        found = config.get(key)
        if isinstance(found, Mapping) and "quant_method" not in found:
            return "group_size" in found and "bits" in found
    return False


def has_tokenizer(path: Path) -> bool:
    """Say whether a folder holds the vocabulary of a tokenizer."""
    return any((path / name).is_file() for name in TOKENIZER_FILES)


def weight_files(path: Path) -> tuple[Path, ...]:
    """Return the safetensors files a folder's weights are read from; they may be absent.

    Raises:
        ModelError: the index of the shards cannot be read.
    """
    if (path / WEIGHTS_FILE).is_file():
        return (path / WEIGHTS_FILE,)
    index = path / INDEX_FILE
    if not index.is_file():
        return ()
    try:
        names = cast(dict[str, str], json.loads(index.read_text("utf-8"))["weight_map"]).values()
        return tuple(path / name for name in sorted(set(names)))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"{index} is damaged ({error}): download it again") from error


def check_safetensors(file: Path) -> None:
    """Check that a safetensors file has a readable header and all the bytes it promises.

    Raises:
        ModelError: the file is truncated, damaged, or a Git LFS pointer.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        if start == b"version ":
            raise ModelError(f"{file} is a Git LFS pointer, not the weights: run 'git lfs pull'")
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length + 8 > size:
            raise ModelError(f"{file} is truncated or not safetensors: download it again")
        try:
            header = cast(dict[str, dict[str, Any]], json.loads(stream.read(length)))
            ends = [
                int(entry["data_offsets"][1])
                for name, entry in header.items()
                if name != "__metadata__"
            ]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise ModelError(f"{file} has a damaged header: download it again") from error
    expected = 8 + length + max(ends, default=0)
    if size < expected:
        raise ModelError(
            f"{file} is truncated: {size} bytes of {expected}; download or copy it again"
        )


def _snapshot(repo: str, revision: str | None, custom_code: bool) -> Path:
    """Return the snapshot folder of a hub model, from the cache if complete, else downloaded."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    code = ("*.py",) if custom_code else ()
    wanted: dict[str, Any] = {
        "revision": revision,
        "allow_patterns": [*_DOWNLOADED, "*.jinja", *code],
        "ignore_patterns": list(_NOT_DOWNLOADED),
    }
    try:
        try:
            cached = Path(snapshot_download(repo, local_files_only=True, **wanted))
            if _is_complete(cached):
                return cached
        except LocalEntryNotFoundError:
            pass
        return Path(snapshot_download(repo, **wanted))
    except LocalEntryNotFoundError as error:
        raise ModelError(
            f"{repo} is neither a folder here nor in the Hugging Face cache, and the hub cannot be "
            "reached: connect, download it first, or give a local folder"
        ) from error
    except HFValidationError as error:
        raise ModelError(f"{repo} is neither a folder here nor a hub id: {error}") from error
    except OSError as error:
        # Hub errors (unknown id, gated, unknown revision) are OSErrors with long explanations.
        at = f" at revision {revision!r}" if revision else ""
        raise ModelError(f"cannot get {repo}{at} from the hub: {one_line(error)}") from error


def _is_complete(path: Path) -> bool:
    files = weight_files(path)
    whole = bool(files) and all(file.is_file() for file in files)
    return whole and (path / CONFIG_FILE).is_file() and has_tokenizer(path)


def _no_weights(folder: ModelFolder) -> str:
    pickles = [file.name for glob in _PICKLES for file in sorted(folder.path.glob(glob))]
    if pickles:
        return (
            f"{folder.source} has only pickled weights ({pickles[0]}), which can run code when "
            "read; convert them where you trust them: AutoModelForCausalLM.from_pretrained(...)"
            ".save_pretrained(folder, safe_serialization=True)"
        )
    if (folder.path / "adapter_config.json").is_file():
        return f"{folder.source} holds only an adapter: merge it into its base model and save that"
    return f"{folder.source} has no weights: it needs {WEIGHTS_FILE} or {INDEX_FILE} with its parts"


def _gguf(source: str, name: str) -> str:
    return (
        f"{source} is in GGUF, which is not read: get the model's safetensors, or convert it (pip "
        f"install gguf accelerate) with AutoModelForCausalLM.from_pretrained(folder, "
        f"gguf_file={name!r}).save_pretrained(...), its tokenizer likewise"
    )


def one_line(error: BaseException) -> str:
    """Return the first sentence-like line of an error, for messages of one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
