"""``layerscope generate``: let a model continue prompts, as text on the terminal or in a pipe."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from layerscope.cli.common import DeviceOption, DtypeOption, JsonOption, emit_json

if TYPE_CHECKING:
    from layerscope.models import Generation, LanguageModel


def register(app: typer.Typer) -> None:
    """Add the command to the application."""

    @app.command()
    def generate(  # pyright: ignore[reportUnusedFunction]
        model: Annotated[str, typer.Argument(help="Hugging Face id or local folder.")],
        prompts: Annotated[list[str], typer.Argument(metavar="PROMPT", help="Raw text.")],
        max_new_tokens: Annotated[
            int, typer.Option("--max-new-tokens", "-n", help="Most tokens per prompt.")
        ] = 64,
        temperature: Annotated[
            float, typer.Option("--temperature", help="0 takes the most likely token.")
        ] = 0.0,
        top_p: Annotated[
            float, typer.Option("--top-p", help="Draw among the likeliest of this probability.")
        ] = 1.0,
        seed: Annotated[int, typer.Option("--seed", help="Of the draws.")] = 0,
        stop: Annotated[
            list[str] | None, typer.Option("--stop", help="End before this text; may be repeated.")
        ] = None,
        stream: Annotated[
            bool | None,
            typer.Option(
                "--stream/--no-stream", help="Show text as it comes. Default: on a terminal."
            ),
        ] = None,
        device: DeviceOption = None,
        dtype: DtypeOption = None,
        as_json: JsonOption = False,
    ) -> None:
        """Let a model continue prompts.

        Writes each continuation, and nothing else, to stdout: one after the other, each ended by a
        line break. `--json` adds ids, log-probabilities in nats, and why each row ended.

        - `layerscope generate gpt2 "The capital of France is" -n 10`
        - `layerscope generate ./my-model "Once upon a time" --temperature 0.8 --seed 7`
        """
        from layerscope.models import load

        opened = load(model, device=device, dtype=dtype)
        options: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "seed": seed,
            "stop": tuple(stop or ()),
        }
        live = sys.stdout.isatty() if stream is None else stream
        if as_json:
            emit_json(_account(opened, opened.generate(prompts, **options)))
        elif live:
            # One prompt at a time: pieces of several would run into one another.
            for prompt in prompts:
                for piece in opened.stream(prompt, **options):
                    _write(piece.text)
                _write("\n")
        else:
            for text in opened.generate(prompts, **options).texts:
                _write(text + "\n")


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _account(model: LanguageModel, made: Generation) -> dict[str, Any]:
    rows = [
        {
            "prompt": made.prompts[row],
            "text": made.texts[row],
            "finish": made.finish[row],
            "ids": list(made.ids[row]),
            "logprobs": list(made.logprobs[row]),
        }
        for row in range(len(made))
    ]
    return {"model": model.provenance(), **made.provenance(), "rows": rows}
