"""Random programs of nested runs, edits and exceptions leave a model exactly as they found it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import layerscope
from layerscope.errors import CapabilityError, SiteError
from layerscope.models import Apply, LanguageModel, Scale, Start, ZeroAblate
from layerscope.models.sites import Site
from support.loaded import hf, state_of
from support.tiny_models import tiny, tiny_tokenizer

# Spread over the families; LAYERSCOPE_PROGRAMS=100 makes a quick run.
PROGRAMS = int(os.environ.get("LAYERSCOPE_PROGRAMS", "10000"))
FAMILIES = ("llama", "gpt2", "gemma2", "gpt_neox")
PROMPT = torch.tensor([[1, 17, 40, 5]])


class Boom(Exception):
    """What a program raises in the middle of a run."""


@dataclass(frozen=True)
class Program:
    """One run: what it captures and edits, and what happens inside it."""

    captures: tuple[str, ...]
    edits: tuple[tuple[str, str], ...]
    start: bool
    stop_after: int | None
    own_hook: bool
    inside: tuple[str, Program] | None
    raises_at: str | None


@cache
def subject(family: str) -> tuple[LanguageModel, tuple[str, ...], tuple[str, ...]]:
    """Return a two-layer model, and the names of what it offers and of what can be edited."""
    overrides = {"num_hidden_layers": 2}
    if family == "gemma2":
        overrides["layer_types"] = ["sliding_attention", "full_attention"]
    model = layerscope.load(tiny(family, **overrides), tokenizer=tiny_tokenizer())
    heads = [
        Site.parse(f"attn.{layer}.head.1.{leaf}")
        for layer in range(2)
        for leaf in ("q", "k", "v", "pattern", "z", "out")
    ]
    sites = [*model.sites(), *heads]
    editable = [site for site in sites if model.backend.why_not_edit(site) is None]
    return model, tuple(map(str, sites)), tuple(map(str, editable))


def programs(family: str) -> st.SearchStrategy[Program]:
    _, sites, editable = subject(family)
    site, change = st.sampled_from(sites), st.sampled_from(editable)
    kinds = st.sampled_from(("add", "scale", "zero", "replace"))
    return st.recursive(
        st.none(),
        lambda inner: st.builds(
            Program,
            captures=st.lists(site, max_size=3).map(tuple),
            edits=st.lists(st.tuples(kinds, change), max_size=3).map(tuple),
            start=st.sampled_from((False, False, False, True)),
            stop_after=st.sampled_from((None, None, None, None, 0, 1)),
            own_hook=st.booleans(),
            inside=st.one_of(st.none(), st.tuples(change, inner)),
            raises_at=st.one_of(st.none(), st.none(), change),
        ),
        max_leaves=3,
    ).filter(lambda program: program is not None)


def light_state(module: torch.nn.Module) -> list[object]:
    """Return what tells, cheaply, that a module was touched."""
    state: list[object] = [id(part._parameters) for part in module.modules()]
    for part in module.modules():
        tables = (part._forward_hooks, part._forward_pre_hooks, part._forward_hooks_with_kwargs)
        state += [sorted(map(id, table.values())) for table in tables[:2]]
        state += ["forward" in part.__dict__, part.training, len(tables[2])]
    state += [(p.data_ptr(), p._version) for p in module.parameters()]
    for part in module.modules():
        names = getattr(type(part).forward, "__globals__", {})
        state.append(id(names.get("ALL_ATTENTION_FUNCTIONS")))
    return state


def edit_of(kind: str, site: str):
    return {
        "add": lambda: Apply(site, lambda x, _: x + 0.5),
        "scale": lambda: Scale(site, 0.5),
        "zero": lambda: ZeroAblate(site),
        "replace": lambda: Apply(site, lambda x, _: x.flip(0) * 0 + 0.25),
    }[kind]()


def run(model: LanguageModel, program: Program) -> bool:
    """Carry a program out, with whatever it nests; return False for a request that is refused."""
    edits = [edit_of(kind, site) for kind, site in program.edits]
    if program.inside is not None:
        site, inner = program.inside

        def nest(values, _):
            if isinstance(inner, Program):
                run(model, inner)
            return values

        edits.insert(len(edits) // 2, Apply(site, nest))
    if program.raises_at is not None:

        def explode(_values, _context):
            raise Boom

        edits.append(Apply(program.raises_at, explode))
    handle, calls = None, []
    if program.own_hook:
        handle = hf(model).register_forward_hook(lambda *_: calls.append(1))
    try:
        start = Start(1, torch.zeros(1, 4, model.d_model)) if program.start else None
        model.run(
            PROMPT,
            capture=program.captures,
            edits=edits,
            start=start,
            stop_after=program.stop_after,
        )
    except Boom:
        return True
    except (CapabilityError, SiteError):
        return False
    finally:
        if handle is not None:
            assert handle.id in hf(model)._forward_hooks, "a run removed a hook that is not its own"
            handle.remove()
    return True


@pytest.mark.filterwarnings("ignore:an edit of an attention pattern")
@pytest.mark.parametrize("family", FAMILIES)
def test_random_programs_leave_the_model_as_it_was(family):
    model, _, _ = subject(family)
    module = hf(model)
    thorough, before = state_of(module), light_state(module)
    plain = model.run(PROMPT).logits
    ran: list[bool] = []

    @settings(
        max_examples=max(1, PROGRAMS // len(FAMILIES)),
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(programs(family))
    def check(program):
        ran.append(run(model, program))
        assert light_state(module) == before

    check()
    assert sum(ran) > len(ran) / 2  # most programs are requests that can be met
    assert state_of(module) == thorough
    assert torch.equal(model.run(PROMPT).logits, plain)
