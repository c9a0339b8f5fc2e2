"""Train the embedded model: `python -m layerscope.demo.train --out DIR`.

The run is fixed by its seed and step count (up to the floating-point arithmetic of the machine).
It writes checkpoints, goes on from the last one with `--resume`, and ends with a complete
Hugging Face folder, its evaluation and its model card. Training needs torch 2.9 or later, for its
Muon optimizer; using the model does not.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from layerscope.demo import corpus, packing
from layerscope.demo.vocabulary import (
    BOS,
    CONTEXT,
    EOS,
    PAD,
    VOCABULARY_SIZE,
    build_tokenizer,
    save_tokenizer,
    special_id,
)

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer
    from transformers import LlamaForCausalLM

_log = logging.getLogger(__name__)

# Shares of a batch computed side by side; the result depends on it only by rounding.
WORKERS = 2


@dataclass(frozen=True, slots=True)
class Recipe:
    """All that decides what is learned, besides the corpus."""

    steps: int = 1100
    rows: int = 16
    seed: int = corpus.SEED
    layers: int = 8
    width: int = 192
    inner: int = 512
    heads: int = 6
    key_value_heads: int = 3
    muon_rate: float = 4e-3
    adam_rate: float = 4e-3
    weight_decay: float = 0.02
    # Turning points of the learning rate: step, and factor of the rates above.
    rates: tuple[tuple[int, float], ...] = (
        (-1, 0.0),
        (49, 1.0),
        (560, 1.0),
        (650, 0.625),
        (950, 0.0),
        (960, 0.4),
        (1100, 0.0),
    )
    # Text is generated this many steps at a time, each stretch from its own seed, so that a
    # resumed run sees the text that an unbroken one would have seen.
    stretch: int = 50
    save_every: int = 50
    # The first steps drill copying, see `corpus.DRILL_MIXTURE`.
    drill: int = 100
    # The steps from this one on revise facts, see `corpus.REVISION_MIXTURE`.
    revision: int = 950
    # How strongly some heads look back, match and copy before training begins.
    look_back: float = 6.0
    match: float = 10.0
    copy: float = 6.0


def build_model(recipe: Recipe, tokenizer: Tokenizer) -> LlamaForCausalLM:
    """Create the untrained model."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=recipe.width,
        intermediate_size=recipe.inner,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.key_value_heads,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=special_id(tokenizer, BOS),
        eos_token_id=special_id(tokenizer, EOS),
        pad_token_id=special_id(tokenizer, PAD),
    )
    model = LlamaForCausalLM(config)
    start_induction(model, recipe)
    return model


def start_induction(model: LlamaForCausalLM, recipe: Recipe) -> None:
    """Give copying a head start: begin with faint heads that look back and copy.

    From a random start no such heads had formed after 1,250 steps of a trial run. Here two heads
    of the first layer begin by looking at the previous token, and two of the third by looking for
    places whose previous token is the present one, and by copying what stands there. Training is
    free to strengthen, move or undo this; the model card says that the start was not blank.
    """
    import torch

    size, quarter = recipe.width // recipe.heads, recipe.width // recipe.heads // 4
    group = recipe.heads // recipe.key_value_heads
    frequencies = model.model.rotary_emb.inv_freq[: size // 4].float()
    with torch.no_grad():
        # All embeddings get a part in common, which changes no probability as output weights do.
        # From it the first layer's heads get a query and a key that do not depend on the token,
        # and that the rotary positions turn into a preference for the place before.
        common = torch.randn(recipe.width) * model.config.initializer_range
        model.model.embed_tokens.weight += common
        read = common / common.norm() / (recipe.width / 2) ** 0.5 * recipe.look_back
        first: Any = model.model.layers[0].self_attn
        for at, frequency in enumerate(frequencies):
            first.k_proj.weight[at] += frequency.cos() * read
            first.k_proj.weight[at + size // 2] += frequency.sin() * read
            for head in range(group):
                first.q_proj.weight[head * size + at] += read
        # The third layer compares what its query sees of the present token with what the first
        # layer wrote of the token before. It uses the slow rotary dimensions, which distance
        # hardly turns, and so half of what a head of the first layer passes on.
        third: Any = model.model.layers[2].self_attn
        slow = [*range(quarter, 2 * quarter), *range(3 * quarter, 4 * quarter)]
        seen = first.v_proj.weight[: size // 2]
        out = first.o_proj.weight.view(recipe.width, recipe.heads, size)
        written = out[:, :group, : size // 2].sum(1)
        third.k_proj.weight[slow] = written.T * recipe.match
        for head in range(group):
            third.q_proj.weight[[head * size + at for at in slow]] = seen * recipe.match
            # What is read there is written back along the same directions.
            copied = third.v_proj.weight[:size].T * recipe.copy
            third.o_proj.weight[:, head * size : (head + 1) * size] = copied


def build_optimizers(model: LlamaForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Use Muon for the matrices inside the layers, and AdamW for the embedding and the norms.

    Muon learns from markedly fewer tokens than AdamW alone, and tokens are what a CPU lacks.
    """
    import torch

    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    inside = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in inside]
    muon = torch.optim.Muon(
        matrices,
        lr=recipe.muon_rate,
        weight_decay=recipe.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )
    adam = torch.optim.AdamW(others, lr=recipe.adam_rate, betas=(0.9, 0.98), weight_decay=0.0)
    return [muon, adam]


def rate_factor(step: int, recipe: Recipe) -> float:
    """Interpolate the learning rate's factor: warm up, stay level, and fall to nothing.

    The turning points are those of a full run; one of another length stretches them.
    """
    at = step * Recipe().steps / recipe.steps
    (begin, low), *rest = recipe.rates
    for end, high in rest:
        if at <= end:
            return low + (high - low) * (at - begin) / (end - begin)
        begin, low = end, high
    return low


def batches(recipe: Recipe, tokenizer: Tokenizer, stretch: int) -> packing.Batch:
    """Generate and pack the text of one stretch of steps."""
    seed = Random(f"{recipe.seed}-{stretch}").getrandbits(48)
    step = stretch * recipe.stretch
    stage: corpus.Stage = "main"
    if step < recipe.drill:
        stage = "drill"
    elif step >= recipe.revision:
        stage = "revision"
    encoded = packing.encode(corpus.documents(seed, stage=stage), tokenizer)
    return packing.pack(encoded, recipe.stretch * recipe.rows, special_id(tokenizer, PAD))


def batch_loss(model: LlamaForCausalLM, batch: packing.Batch, rows: slice) -> torch.Tensor:
    """Weighted next-token loss of some packed rows, each document on its own."""
    import torch

    ids, owner = torch.from_numpy(batch.ids[rows]), torch.from_numpy(batch.owner[rows])
    positions = torch.from_numpy(batch.positions[rows])
    weights = torch.from_numpy(batch.weights[rows])[:, 1:]
    causal = torch.ones(CONTEXT, CONTEXT, dtype=torch.bool).tril()
    mask = (owner[:, :, None] == owner[:, None, :]) & causal
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model.model(
            input_ids=ids, attention_mask=mask[:, None], position_ids=positions, use_cache=False
        ).last_hidden_state
        # Only positions whose next token counts need logits.
        counted = weights > 0
        logits = model.lm_head(hidden[:, :-1][counted])
    losses = torch.nn.functional.cross_entropy(
        logits.float(), ids[:, 1:][counted], reduction="none"
    )
    return (losses * weights[counted]).sum() / weights.sum()


def accumulate(
    model: LlamaForCausalLM,
    batch: packing.Batch,
    first: int,
    rows: int,
    workers: ThreadPoolExecutor,
) -> float:
    """Leave the gradient of `rows` rows in the parameters, each worker computing an equal share.

    Whole shares run side by side rather than every operation being split over the cores: a core
    that is busy with other work then delays its share once, not every operation.
    """
    import torch

    parameters = list(model.parameters())
    share = rows // WORKERS

    def compute(worker: int) -> tuple[float, tuple[torch.Tensor, ...]]:
        begin = first + worker * share
        loss = batch_loss(model, batch, slice(begin, begin + share)) / WORKERS
        return loss.item(), torch.autograd.grad(loss, parameters)

    results = list(workers.map(compute, range(WORKERS)))
    for index, parameter in enumerate(parameters):
        parameter.grad = torch.stack([gradients[index] for _, gradients in results]).sum(0)
    return sum(loss for loss, _ in results)


def export(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the Hugging Face folder: float16 weights, to be run in float32."""
    from safetensors.torch import save_file
    from transformers import GenerationConfig

    save_tokenizer(tokenizer, folder)
    # The head shares the embedding's weights, which are stored once.
    weights = {
        name: tensor.detach().half().contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    config: dict[str, Any] = model.config.to_dict()
    config["architectures"] = ["LlamaForCausalLM"]
    config["dtype"] = "float32"
    text = json.dumps(config, indent=2, sort_keys=True)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")
    GenerationConfig(
        bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
        do_sample=False,
        max_length=CONTEXT,
    ).save_pretrained(str(folder))


def _save(
    path: Path,
    model: LlamaForCausalLM,
    optimizers: list[torch.optim.Optimizer],
    step: int,
    seconds: float,
) -> None:
    """Write a checkpoint under another name first, so that a kill leaves the old one whole."""
    import torch

    path.parent.mkdir(parents=True, exist_ok=True)
    state = {
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "step": step,
        "seconds": seconds,
    }
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def train(recipe: Recipe, out: Path, checkpoints: Path, resume: bool) -> dict[str, Any]:
    """Train, export to `out`, and return what is to be known about the run."""
    import torch

    torch.set_float32_matmul_precision("medium")
    # One thread per worker, and one for the optimizer: see `accumulate`.
    torch.set_num_threads(1)
    tokenizer = build_tokenizer(recipe.seed)
    model = build_model(recipe, tokenizer)
    optimizers = build_optimizers(model, recipe)
    checkpoint = checkpoints / "last.pt"
    step, seconds = 0, 0.0
    if resume and checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step, seconds = state["step"], state["seconds"]
        _log.info("resumed at step %d", step)
    workers = ThreadPoolExecutor(WORKERS, initializer=partial(torch.set_num_threads, 1))
    base_rates = [recipe.muon_rate, recipe.adam_rate]
    began, data, total = time.monotonic() - seconds, None, 0.0
    while step < recipe.steps:
        if data is None or step % recipe.stretch == 0:
            data = batches(recipe, tokenizer, step // recipe.stretch)
        factor = rate_factor(step, recipe)
        for optimizer, rate in zip(optimizers, base_rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * factor
        value = accumulate(model, data, step % recipe.stretch * recipe.rows, recipe.rows, workers)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        total += value
        if step % 25 == 0:
            spent = time.monotonic() - began
            _log.info("step %d loss %.4f seconds %.0f", step, total / 25, spent)
            total = 0.0
        if step % recipe.save_every == 0 or step == recipe.steps:
            _save(checkpoint, model, optimizers, step, time.monotonic() - began)
            _log.info("saved step %d", step)
            export(model, tokenizer, checkpoints / "model")
    export(model, tokenizer, out)
    return {
        "recipe": asdict(recipe),
        "tokens": recipe.steps * recipe.rows * CONTEXT,
        "parameters": sum(p.numel() for p in model.parameters()),
        "minutes": round((time.monotonic() - began) / 60, 1),
    }


def main() -> None:
    """Train, evaluate and document the model."""
    parser = argparse.ArgumentParser(description="Train the embedded model.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the finished model")
    parser.add_argument("--steps", type=int, default=Recipe().steps)
    parser.add_argument("--seed", type=int, default=corpus.SEED)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--checkpoints", type=Path, help="folder for checkpoints (OUT.checkpoints)")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    out: Path = options.out
    checkpoints: Path = options.checkpoints or out.with_name(out.name + ".checkpoints")
    recipe = Recipe(steps=options.steps, seed=options.seed)
    run = train(recipe, out, checkpoints, options.resume)
    (out / "training.json").write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")

    from layerscope.demo.card import document

    document(out)


if __name__ == "__main__":
    main()
