"""The ledger of casts as text: what a recipe asks for on the left, what is left of it on the right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moefx.precision.spec import QuantSpec


def cast_table(casts: dict[str, Any]) -> str:
    """The `casts` of a report as a table; layers in which the same became of the same cast share a line.

    One line per cast: forward or backward, tensor, from, to; then `kept`, `fused` or `removed`, with the reason or the
    rule, and bytes moved by the cast over all layers that the line is for.
    """
    grouped: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in casts["rows"]:
        keys = ("direction", "op", "tensor", "use", "from", "to", "now", "fate", "kept_because")
        grouped.setdefault(tuple(row[k] for k in keys), []).append(row)
    left = ["as written"]
    right = ["now"]
    for (direction, op, tensor, use, source, target, now, fate, why), rows in grouped.items():
        sign = "Q " if op == "quantize" else "DQ"
        times = f" x{len(rows)}" if len(rows) > 1 else ""
        left.append(f"{direction} {sign} {tensor:<3}{times:<5} {_short(source)} > {_short(target)} ({use})")
        size = f"{sum(r['bytes'] for r in rows):,} bytes"
        right.append(f"{sign} {_short(now)}, {size}: {why}" if fate in ("kept", "added") else f"- {fate}")
    width = max(map(len, left))
    lines = [f"{a:<{width}}   {b}".rstrip() for a, b in zip(left, right, strict=True)]
    return "\n".join([*lines, "", summary(casts)])


def summary(casts: dict[str, Any]) -> str:
    """One line with the counts."""
    extra = [f"{casts[k]} {text}" for k, text in _EXTRA.items() if casts.get(k)]
    return (
        f"casts: {casts['before']} before, {casts['after']} after"
        f"{' (' + ', '.join(extra) + ')' if extra else ''}"
        f"{_weights(casts)}"
    )


_EXTRA = {
    "fused": "fused into activations",
    "transposes": "turned or converted on codes",
    "stored": "stored encodings written by activations",
    "recomputed": "made again in the backward",
}


def _weights(casts: dict[str, Any]) -> str:
    before, after = casts["weights_before"], casts["weights_after"]
    return f"; of weights {before} before, {after} after" if before or after else ""


def _short(text: str) -> str:
    """A dtype or spec without its options: `e4m3 1x128`."""
    parts: Sequence[str] = text.split(" & ")
    return " & ".join(
        _block(p) if " " in p else p.replace("float32", "fp32").replace("bfloat16", "bf16") for p in parts
    )


def _block(text: str) -> str:
    spec = QuantSpec.parse(text)
    return f"{spec.elem} {spec.block}"
