"""`moefx inspect --routing`: what a model's routing does on example inputs, as tables, pictures and numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import InputError
from ..grouter.affinity import affinity
from ..grouter.traffic import max_over_mean, remote, slot_hits, token_hits, uniform_traffic
from ..losses import RoutingMetrics
from ..optimize import optimize
from ..routing import vocab_size_of
from ..view import routing as view
from ..view.routing_numbers import RoutingSum, numbers
from .data import BYTES, TokenDataset, open_dataset
from .models import load_model, load_weights
from .parts import device_of


def inspect_routing(
    model: str,
    *,
    batch: int = 2,
    seq: int = 32,
    batches: int = 16,
    data: Sequence[str | Path] = (),
    weights: Path | None = None,
    places: int | None = None,
    out: Path | None = None,
    options: Mapping[str, Any] | None = None,
    router: str = "",
) -> tuple[dict[str, Any], str]:
    """Measure routing over `batches` batches int64 [batch, seq], and draw it into the folder `out` if that is given.

    Args:
        model, data: as `load_model` and `open_dataset` take them. Without data, a model whose vocabulary is not that of
            bytes is given random ids.
        weights: as `load_weights` takes them; without, weights are random.
        places: add the traffic of expert parallelism over so many places.
        options: for `optimize`; with a `router` of token ids, the routing is that of the model routed by it.
        router: what it is called in the text.

    Returns:
        `routing_numbers.numbers`, with `model`, `router`, `inputs`, `tokens`, and if asked for `places`, `traffic` and
        `files`; and the text to print.

    Raises:
        MissingPackageError: `out` is given and matplotlib is not installed.
        MoefxError: whatever is wrong with the model, its weights or the data.
    """
    if out is not None:
        view.matplotlib()  # missing, it would be noticed after the work
    module = load_model(model, 0)
    if weights is not None:
        load_weights(module, weights)
    texts = open_dataset(data) if data or vocab_size_of(module) == BYTES else None
    routing, paths = observe(module, example_batches(module, texts, batches, batch, seq), **(options or {}))
    inputs = "random ids" if texts is None else texts.name
    about_run = {"model": model, "router": router or None, "inputs": inputs, "tokens": batches * batch * seq}
    found = {**about_run, **numbers(routing, paths)}
    if places is not None:
        found |= {"places": places, "traffic": traffic(routing, batches, places)}
    about = f"{found['tokens']:,} tokens: {inputs}, {batches} batches of {batch} x {seq}"
    about += "; weights are random" if weights is None else f"; weights of {weights}"
    name = f"{model} by {router}" if router else model
    said = f"routing of {name}, {about}\n\n{view.text(found)}"
    if out is not None:
        counts = routing["transitions"].numpy() if "transitions" in routing else None
        images = view.pictures(found, counts, together(routing))
        files = view.write(out, images, view.page(found, images, f"Routing of {name}", about))
        found["files"] = [str(f) for f in files]
        said += f"\n\nwritten: {', '.join(found['files'])}"
    return found, said


def example_batches(model: nn.Module, data: TokenDataset | None, count: int, batch: int, seq: int) -> list[Tensor]:
    """int64 [batch, seq] token ids: of the validation split of `data`, or random ones for None."""
    vocab = vocab_size_of(model)
    if data is not None:
        data.check(seq=seq, model_vocab=vocab)
        return list(islice(data.batches("val", batch, seq, 0), count))
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, vocab or 256, (batch, seq), generator=generator) for _ in range(count)]


def observe(model: nn.Module, batches: Iterable[Tensor], **options: Any) -> tuple[dict[str, Tensor], list[str]]:
    """Routing metrics of a model over batches int64 [batch, seq], in eval mode, and the paths of its layers.

    `choices` are those of all batches, one behind the other. `options` are for `optimize`.
    """
    given = [ids.to(device_of(model)) for ids in batches]
    if not given:
        raise InputError("there are no batches to look at", todo="ask for at least one")
    mode, seen = model.training, RoutingSum()
    try:
        with torch.no_grad():
            opt = optimize(model.eval(), {"input_ids": given[0]}, losses=[RoutingMetrics(choices=True)], **options)
            for ids in given:
                if (check := getattr(opt.router, "check_ids", None)) is not None:
                    check(ids)  # a graph looks at no values
                opt(input_ids=ids)
                seen.add(opt.routing)
    finally:
        model.train(mode)
    names = [b["path"] for b in opt.report.blocks if b["raised"]]
    found = seen.result()
    return found, names if len(names) == len(found["load"]) else []


def together(routing: Mapping[str, Tensor]) -> list[np.ndarray[Any, np.dtype[np.int64]]]:
    """Per layer [E, E]: tokens that chose both experts. Empty without `choices`."""
    found = []
    for idx_Tk, E in _by_layer(routing):
        k = idx_Tk.shape[1]
        # A token may have several choices that no expert got; each column's are counted as one more expert.
        distinct = torch.where(idx_Tk < 0, E + torch.arange(k), idx_Tk)
        found.append(affinity(distinct, E + k).pairs[:E, :E])
    return found


def traffic(routing: Mapping[str, Tensor], batches: int, places: int) -> list[dict[str, float]]:
    """What expert parallelism over `places` would send, were the experts of each layer laid out in order.

    A batch lies on one place, batches in turn; a token is sent once to every other place that holds one of its experts
    (`moefx.grouter.traffic`). A choice that no expert got, -1, is sent nowhere and is no row.

    Returns:
        Per layer: `remote`, sends per token; `uniform`, the same were all sets of k experts equally likely;
        `max_over_mean`, of the rows that places compute.
    """
    rows = []
    for layer, (idx_Tk, E) in enumerate(_by_layer(routing)):
        if places < 1 or E % places:
            raise InputError(f"{E} experts cannot be laid out on {places} places", todo="choose a divisor of it")
        idx = idx_Tk.unflatten(0, (batches, -1)).numpy()
        place = np.append(np.arange(E) // (E // places), -1)  # the last entry is that of choices of -1: no place
        home = np.arange(batches) % places
        sent = remote(token_hits(idx, place, places), home) / len(idx_Tk)
        rows.append({
            "layer": layer, "remote": sent, "uniform": uniform_traffic(E, idx_Tk.shape[1], places),
            "max_over_mean": max_over_mean(slot_hits(idx, place, places).sum(0)),
        })  # fmt: skip
    return rows


def _by_layer(routing: Mapping[str, Tensor]) -> list[tuple[Tensor, int]]:
    """Choices [T, k], -1 for none, and number of experts of every layer, without the columns of a larger k."""
    choices, experts = routing.get("choices", ()), routing["experts"].tolist()
    return [(idx[:, (idx >= 0).any(0)], round(E)) for idx, E in zip(choices, experts, strict=False)]
