"""One edge by two full passes with everything else frozen: slow, and sharing no code with sweeps.

The algorithm as published: Wang et al., Interpretability in the Wild, 2022, appendix B.
"""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from layerscope.interventions.patching import Recording
from layerscope.interventions.patching.paths import Edge
from layerscope.models import Apply, Capture, Edit, EditContext, Site

_RECEIVERS = {"q": "attn.q", "k": "attn.k", "v": "attn.v", "mlp": "mlp_out", "attn": "attn_out"}


def two_passes(
    runs: Recording, edge: Edge, *, base_row: int, donor_row: int, position: int | None
) -> Float[Tensor, " d_model"]:
    """Return what is unembedded at the last position when one receiver alone hears a sender.

    In the first pass the sender says what it says in the donor, every other sublayer what it says
    in the base run, and the receiver is read. In the second, the receiver alone is replaced.

    Args:
        runs: of `record_for_paths`. position: of the sender's change; None for all.
    """
    model, sender, receiver = runs.model, edge.sender, edge.receiver
    ids = runs.batch.ids[base_row : base_row + 1]
    places = slice(None) if position is None else slice(position, position + 1)
    speaking = {
        "embed": Site("resid_pre", 0),
        "head": Site("attn.z", sender.layer),
        "attn": Site("attn_out", sender.layer),
        "mlp": Site("mlp_out", sender.layer),
    }[sender.part]
    heard = None if receiver.input == "logits" else Site(_RECEIVERS[receiver.input], receiver.layer)
    through = Site("attn_out", sender.layer) if sender.part == "head" else speaking
    edits: list[Edit] = [
        Apply(site, _put(runs.value(site)[base_row], slice(None), None))
        for layer in range(model.n_layers)
        for site in (Site("attn_out", layer), Site("mlp_out", layer))
        if site in runs.activations and site not in (heard, through)
    ]
    edits.append(Apply(speaking, _put(runs.value(speaking)[donor_row], places, sender.head)))
    end = Capture("final_norm", positions=-1)
    if heard is None:
        return model.run(ids, edits=edits, capture=end, logits=None, products=runs.products)[
            "final_norm"
        ][0, -1]
    said = model.run(ids, edits=edits, capture=heard, logits=None, products=runs.products)[heard]
    last = [Apply(heard, _put(said[0], slice(None), receiver.head))]
    result = model.run(ids, edits=last, capture=end, logits=None, products=runs.products)
    return result["final_norm"][0, -1]


def _put(value: Tensor, places: slice, unit: int | None) -> Callable[[Tensor, EditContext], Tensor]:
    def put(values: Tensor, _context: EditContext) -> Tensor:
        if unit is None:
            values[0, places] = value[places]
        else:
            values[0, places, unit] = value[places, unit]
        return values

    return put
