"""`moefx inspect --routing`: what a model's routing does on example inputs, as tables, pictures and numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..view import routing as view
from ..view.routing_numbers import numbers
from .data import BYTES, open_dataset
from .models import load_model, load_weights, vocab_size_of
from .routing import example_batches, observe, together, traffic


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
) -> tuple[dict[str, Any], str]:
    """Measure routing over `batches` batches int64 [batch, seq], and draw it into the folder `out` if that is given.

    Args:
        model, data: as `load_model` and `open_dataset` take them. Without data, a model whose vocabulary is not that of
            bytes is given random ids.
        weights: as `load_weights` takes them; without, weights are random.
        places: add the traffic of expert parallelism over so many places.
        options: for `optimize`.

    Returns:
        `routing_numbers.numbers`, with `model`, `inputs`, `tokens`, and if asked for `places`, `traffic` and `files`;
        and the text to print.

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
    found = {"model": model, "inputs": inputs, "tokens": batches * batch * seq, **numbers(routing, paths)}
    if places is not None:
        found |= {"places": places, "traffic": traffic(routing, batches, places)}
    about = f"{found['tokens']:,} tokens: {inputs}, {batches} batches of {batch} x {seq}"
    about += "; weights are random" if weights is None else f"; weights of {weights}"
    said = f"routing of {model}, {about}\n\n{view.text(found)}"
    if out is not None:
        counts = routing["transitions"].numpy() if "transitions" in routing else None
        images = view.pictures(found, counts, together(routing))
        files = view.write(out, images, view.page(found, images, f"Routing of {model}", about))
        found["files"] = [str(f) for f in files]
        said += f"\n\nwritten: {', '.join(found['files'])}"
    return found, said
