"""Does a model attend to what its answer hangs on? Rank correlation of received attention and saliency.

Attention is what a key receives from the rows of the tower's default token set, on average; keys are those of
the set, or of cross-attention all that are real. No token × token matrix is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float64
from torch import Tensor, nn

from diag.attention.call import AttentionCall
from diag.attention.positions import Geometry
from diag.attention.sampling import RowSampling
from diag.attention.softmax_statistics import CallStatistics
from diag.errors import UserError
from diag.measure.batch_readings import BatchReadings
from diag.measure.loop import told_if_the_model_fails
from diag.metrics.default import Selection
from diag.metrics.pattern_pass import pattern_pass
from diag.models.base import Batch, Tower
from diag.models.cross import CROSS
from diag.models.families.from_module import from_module
from diag.results.agreement import ALL, rank_correlation
from diag.results.looks import MEAN
from diag.studies.attend.saliency import Explained, explained_by_default, saliency

Received = tuple[Float64[Tensor, "batch head key"], Bool[Tensor, "#batch key"]]
"""Mean attention that keys receive from the rows that count, and which keys are compared."""


def agreement_in(
    module: nn.Module,
    batches: Iterable[Tensor | Mapping[str, Tensor]],
    *,
    of: Callable[[Any], Tensor] | None,
    cross: bool,
    limit: int,
) -> pd.DataFrame:
    """What `diag.studies.attend.agreements` returns. Raises UserError as it does."""
    model, towers, samples = from_module(module, batches, limit, cross=cross)
    made = list[pd.DataFrame]()
    for tower in towers:
        for sample in samples:
            batch = tower.encode([sample])
            explained = of or partial(explained_by_default, data=batch.data)
            made.append(agreement_of(module, tower, batch, explained).assign(model=model.name))
    return pd.concat(made, ignore_index=True)


def agreement_of(module: nn.Module, tower: Tower, batch: Batch, explained: Explained) -> pd.DataFrame:
    """The rows of one tower and batch, without the column `model`.

    Raises UserError where no layer has attention weights over the tokens of which saliency is.
    """
    found = received(tower, batch)
    salient = {name: x.cpu() for name, x in saliency(module, tower, batch, explained).items()}
    some = next(iter(salient.values()))
    fitting = {layer: one for layer, one in found.items() if one[0].shape[::2] == some.shape}
    if not fitting:
        raise UserError(
            f"no layer of the {tower.name} tower attends over the {some.shape[1]} tokens that enter its "
            "first block",
            "give a model whose layers have the same tokens, in softmax attention over all of them",
        )
    paths = {layer.index: layer.path for layer in tower.layers}
    rows = list[dict[str, Any]]()
    for i, name in enumerate(batch.ids):
        maps = {layer: (share[i], keys[i % len(keys)]) for layer, (share, keys) in fitting.items()}
        for kind, values in salient.items():
            for layer, head, count, rho in _correlations(maps, values[i]):
                rows.append(
                    {
                        "input": name,
                        "tower": tower.name,
                        "kind": CROSS if tower.meaning.get(CROSS) else "self",
                        "saliency": kind,
                        "layer": layer,
                        "module": "" if layer is None else paths[layer],
                        "head": head,
                        "n_keys": count,
                        "rho": rho,
                    }
                )
    return pd.DataFrame(rows).astype({"layer": "Int64"})


def _correlations(
    maps: Mapping[int, tuple[Tensor, Tensor]], values: Tensor
) -> list[tuple[int | None, str, int, float]]:
    """Layer, head, number of keys and ρ, for each head, a layer's mean map, and that of all layers."""
    found = list[tuple[int | None, str, int, float]]()
    for layer, (share, keys) in maps.items():
        with_mean = torch.cat([share, share.mean(0, keepdim=True)])[:, keys].numpy()
        heads = [*map(str, range(len(share))), MEAN]
        rhos = rank_correlation(with_mean, values[keys].numpy()[None])
        found += [(layer, head, int(keys.sum()), float(rho)) for head, rho in zip(heads, rhos, strict=True)]
    # of layers that hide other keys, the keys that all of them compare
    keys = torch.stack([keys for _, keys in maps.values()]).all(0)
    whole = torch.stack([share.mean(0) for share, _ in maps.values()]).mean(0)[keys]
    rho = rank_correlation(whole.numpy()[None], values[keys].numpy()[None])
    return [*found, (None, ALL, int(keys.sum()), float(rho[0]))]


def received(tower: Tower, batch: Batch) -> dict[int, Received]:
    """What keys receive, by number of the layer, of layers that call one softmax over whole inputs."""
    readings = BatchReadings((), tower.default_sets[:1], tower, batch, RowSampling())
    found, several = dict[int, Received](), set[int]()

    def on_call(call: AttentionCall) -> None:
        if call.layer in found:
            several.add(call.layer)
        if call.batch == len(batch.ids) and call.has_pattern and not call.maps:
            found[call.layer] = received_in(call, readings.tokens(tower.default_sets[0], call))

    layers = batch.layers(tower.layers)
    with torch.inference_mode(), told_if_the_model_fails(tower, batch), tower.capture(layers, on_call):
        tower.forward(batch)
    return {layer: one for layer, one in found.items() if layer not in several}


def received_in(call: AttentionCall, among: Bool[Tensor, "#batch token"]) -> Received:
    """`r_j = Σ_i A_ij / n` over the n rows of a token set that count, and its keys. On the CPU."""
    statistics = CallStatistics(call)
    on = Selection(call, among, statistics)
    live = on.rows.expand(call.output.shape[:3])
    found = pattern_pass(statistics, {"received"}, [on.rows], live, geometry=Geometry.unknown())
    share = found["received"][0].double() / live.sum(-1).clamp(min=1)[..., None]
    return share.cpu(), on.keys.expand(-1, call.keys).cpu()
