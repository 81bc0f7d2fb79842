"""`moefx grouter`: every command writes what it makes and a report (JSON and Markdown) into `--out`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import typer

from ..errors import InputError
from ..files import json_text, replacing
from ..train.aside import CHECKPOINTS, make_room
from ..train.console import LastingConsole
from ..train.interrupt import terminable
from ..train.metrics import require_folder
from .affinity import AffinityResult
from .affinity import affinity as count_affinity
from .cli_training import register
from .clusters import SEEDS
from .expand import STATES, check_expansion
from .expand import expand as expand_grouter
from .fold import fold as fold_grouter
from .fold import fold_report, require_affinity_of
from .groups import check_grouping, group_experts
from .place import place as place_routing
from .precompute import precompute as write_records
from .records import RoutingRecords, read_header, sample_identity
from .reports import require_another, share, write_report
from .session import tell
from .surgery import require_unfolded
from .traffic import max_over_mean
from .windows import routed, sample_windows

if TYPE_CHECKING:
    from ..models.grouter import Grouter

BATCH = 8  # windows per forward pass of a count
app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Preemptive routing: a small frozen network decides from token ids.",
)
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
Folder = Annotated[Path, typer.Argument(help="Folder of a Grouter (save_pretrained).")]
Out = Annotated[Path, typer.Option(help="Folder for the result and its report.")]
Data = Annotated[
    list[Path] | None,
    typer.Option(help="Text files or folders (as bytes), or one .bin or .npy file of ids; none: the embedded corpus."),
]
Split = Annotated[str, typer.Option(help="train or val.")]
Window = Annotated[int, typer.Option(help="Tokens per window, as in training.", min=1)]
MaxTokens = Annotated[int, typer.Option(help="Use evenly spaced windows with up to so many tokens.", min=1)]
ClusterSeed = Annotated[int, typer.Option(help="Seed of k-means.", min=0, max=SEEDS - 1)]
K = Annotated[int, typer.Option("--k", help="Experts per token.")]
EodId = Annotated[int | None, typer.Option(help="Token that ends a document; keeps documents of a window apart.")]

Every = Annotated[int, typer.Option(help="Batches of 8 windows between savings in --out/checkpoints.", min=1)]
Resume = Annotated[bool, typer.Option(help="Go on with what was interrupted in --out.")]


@app.command()
def affinity(
    grouter: Folder,
    k: K,
    data: Data = None,
    split: Split = "train",
    window: Window = 128,
    max_tokens: MaxTokens = 1 << 20,
    eod_id: EodId = None,
    checkpoint_every: Every = 64,
    resume: Resume = False,
    out: Out = Path("runs/affinity"),
    as_json: AsJson = False,
) -> None:
    """Count which experts are chosen together: affinity.npz, for `fold`."""
    model = load_grouter(grouter)
    _check_k("--k", k, model.num_routed)
    require_folder(out)
    count = _Counting(window, max_tokens, eod_id, out / CHECKPOINTS, checkpoint_every)
    counts = count(model, _tokens(model, data, split), k, "affinity", resume)
    i, j = np.triu_indices(counts.num_experts, 1)
    top = np.argsort(-counts.P[i, j], kind="stable")[:10]
    pairs = [(int(i[n]), int(j[n])) for n in top]
    result = {
        "experts": counts.num_experts, "k": k, "tokens": counts.tokens, "window": window,
        "load": counts.load.tolist(), "max_vio": max_over_mean(counts.load) - 1,
        "pairs": [{"experts": [a, b], "share": float(counts.P[a, b])} for a, b in pairs],
    }  # fmt: skip
    rows = {
        "experts, k": f"{counts.num_experts}, {k}",
        "tokens": f"{counts.tokens}",
        "MaxVio of the load": f"{result['max_vio']:.3f}",
        "most often together": "; ".join(f"{a} and {b} ({share(float(counts.P[a, b]))})" for a, b in pairs[:3]),
    }
    _emit(out, "affinity", "Affinity of experts", result, rows, as_json, lambda new: counts.save(new / "affinity.npz"))


@app.command()
def fold(
    grouter: Folder,
    targets: Annotated[int, typer.Option(help="Experts of the target.")],
    affinity: Annotated[
        list[Path] | None, typer.Option(help="affinity.npz; several are added up. None: counted from --data.")
    ] = None,
    k: Annotated[int | None, typer.Option("--k", help="Source experts per token, to count the affinity.")] = None,
    target_k: Annotated[int | None, typer.Option(help="Measure the load of the folded router at this k.")] = None,
    method: Annotated[str, typer.Option(help="refined, greedy, balance or random.")] = "refined",
    reduce: Annotated[str, typer.Option(help="sum, mean or logsumexp of the logits of a group.")] = "sum",
    data: Data = None,
    split: Split = "train",
    window: Window = 128,
    max_tokens: MaxTokens = 1 << 20,
    eod_id: EodId = None,
    checkpoint_every: Every = 64,
    resume: Resume = False,
    out: Out = Path("runs/fold"),
    as_json: AsJson = False,
) -> None:
    """Fold a Grouter to fewer experts, by affinity."""
    model = load_grouter(grouter)
    require_another(out, grouter)
    require_folder(out)
    count = _Counting(window, max_tokens, eod_id, out / CHECKPOINTS, checkpoint_every)
    if resume and affinity and target_k is None:
        raise InputError(
            "there is nothing to resume", why="with --affinity and without --target-k, nothing is counted",
            todo="leave --resume out",
        )  # fmt: skip
    known = sum_affinities(affinity) if affinity else None
    if known is not None:
        require_affinity_of(model, known)
    elif k is None:
        raise InputError("no affinity to fold by", todo="give --affinity, or the router's --k to count it from --data")
    else:
        _check_k("--k", k, model.num_routed)
    require_unfolded(model)
    check_grouping(len(model.score.weight), targets, method)
    if target_k is not None:
        _check_k("--target-k", target_k, targets)
    if not resume:
        _clear(out, "affinity", "folded")
    counts = known if known is not None else count(model, _tokens(model, data, split), k or 0, "affinity", resume)
    groups = group_experts(counts, targets, method=method)
    folded = fold_grouter(model, groups, reduce=reduce)
    report = fold_report(counts, groups)
    result: dict[str, Any] = {"method": method, "reduce": reduce, "tokens": counts.tokens, **report.to_dict()}
    rows = {
        "experts": f"{counts.num_experts} to {targets}",
        "affinity retained": share(report.retained),
        "by the greedy procedure, at random": f"{share(report.retained_greedy)}, {share(report.retained_random)}",
        "MaxVio of summed loads": f"{report.max_vio:.3f}",
    }
    if target_k is not None:
        again = resume and (bool(affinity) or count.begun("folded"))
        after = count(folded, _tokens(folded, data, split), target_k, "folded", again)
        result["routed"] = {"k": target_k, "load": after.load.tolist(), "max_vio": max_over_mean(after.load) - 1}
        rows[f"MaxVio of the folded router, top-{target_k}"] = f"{result['routed']['max_vio']:.3f}"
    _emit(out, "fold", "Folded Grouter", result, rows, as_json, folded.save_pretrained)


@app.command()
def expand(
    grouter: Folder,
    targets: Annotated[int, typer.Option(help="Experts of the target.")],
    k: K,
    data: Data = None,
    split: Split = "train",
    window: Window = 128,
    max_tokens: MaxTokens = 1 << 18,
    eod_id: EodId = None,
    quantile: Annotated[
        float, typer.Option(help="Share of the tokens that counts as claimed by no expert.", min=0, max=1)
    ] = 0.2,
    seed: ClusterSeed = 0,
    checkpoint_every: Every = 64,
    resume: Resume = False,
    out: Out = Path("runs/expand"),
    as_json: AsJson = False,
) -> None:
    """Expand a Grouter to more experts, aimed at tokens that none claims; tune it afterwards."""
    model = load_grouter(grouter)
    require_another(out, grouter)
    require_folder(out)
    tokens = _tokens(model, data, split)
    check_expansion(model, targets)
    _check_k("--k", k, model.num_routed, " before, at which the load is measured as well")
    if not resume:
        _clear(out, STATES, "before", "after")
    larger = expand_grouter(
        model, tokens, targets, window=window, eod_id=eod_id, max_tokens=max_tokens, quantile=quantile, seed=seed,
        checkpoint=out / CHECKPOINTS, checkpoint_every=checkpoint_every, resume=resume,
    )  # fmt: skip
    count = _Counting(window, max_tokens, eod_id, out / CHECKPOINTS, checkpoint_every)
    before, after = (
        count(m, tokens, k, name, resume and count.begun(name)) for m, name in ((model, "before"), (larger, "after"))
    )
    old = before.num_experts
    result = {
        "experts_before": old, "experts": targets, "k": k, "tokens": after.tokens, "load": after.load.tolist(),
        "new_share": float(after.load[old:].sum() / k), "max_vio_before": max_over_mean(before.load) - 1,
        "max_vio": max_over_mean(after.load) - 1,
    }  # fmt: skip
    rows = {
        "experts": f"{old} to {targets}",
        f"slots of the new experts, top-{k}": share(float(after.load[old:].sum() / k)),
        "MaxVio before, after": f"{result['max_vio_before']:.3f}, {result['max_vio']:.3f}",
    }
    _emit(out, "expand", "Expanded Grouter", result, rows, as_json, larger.save_pretrained)
    (out / CHECKPOINTS / f"{STATES}.npz").unlink(missing_ok=True)  # up to max_tokens times 4 bytes of the hidden size


@app.command()
def precompute(
    grouter: Folder,
    k: K,
    data: Data = None,
    split: Split = "train",
    window: Window = 128,
    batch: Annotated[int, typer.Option(help="Windows per forward pass.", min=1)] = 8,
    scale: Annotated[float, typer.Option(help="Sum of the gates of a token.")] = 1.0,
    normalise: Annotated[str, typer.Option(help="softmax or sigmoid.")] = "softmax",
    gates: Annotated[str, typer.Option(help="Store gates as bf16 or fp32.")] = "bf16",
    eod_id: EodId = None,
    out: Out = Path("runs/records"),
    as_json: AsJson = False,
) -> None:
    """Route a data set once and store ids and gates; run again after an interruption, it goes on."""
    model = load_grouter(grouter)
    tokens = _tokens(model, data, split)
    with _kept(out), _progress() as progress:
        records = write_records(
            model, tokens, k, out, window=window, batch=batch, scale=scale, normalise=normalise, gates=gates,
            eod_id=eod_id, progress=progress,
        )  # fmt: skip
    header = records.header
    size = {f.name: f.stat().st_size for f in sorted(out.glob("*.bin"))}
    recorded = header.windows * header.window
    result = {**vars(header), "left_out": len(tokens) - recorded, "bytes": size}
    rows = {
        "windows": f"{header.windows} of {header.window} tokens; {result['left_out']} tokens at the end left out",
        "experts, k": f"{header.num_experts}, {header.k}",
        "bytes per token": f"{(size['ids.bin'] + size['gates.bin']) / recorded:g} for ids and gates",
    }
    _emit(out, "precompute", "Routing records", result, rows, as_json)


@app.command()
def place(
    records: Annotated[Path, typer.Argument(help="Folder of routing records (moefx grouter precompute).")],
    places: Annotated[int, typer.Option(help="Devices of a node, or nodes; divides the number of experts.")],
    equal: Annotated[bool, typer.Option(help="Equally many samples per place.")] = True,
    max_entropy: Annotated[float | None, typer.Option(help="Leave flatter samples (bits) out of clusters.")] = None,
    seed: ClusterSeed = 42,
    checkpoint_every: Annotated[int, typer.Option(help="Chunks of 2048 samples between savings.", min=1)] = 16,
    resume: Resume = False,
    out: Out = Path("runs/placement"),
    as_json: AsJson = False,
) -> None:
    """Place experts and samples so that fewer tokens travel: placement.json."""
    found = RoutingRecords.open(records)
    require_folder(out)
    placement = place_routing(
        found.idx, found.header.num_experts, places, equal=equal, max_entropy=max_entropy, seed=seed,
        checkpoint=out / CHECKPOINTS, checkpoint_every=checkpoint_every, resume=resume,
    )  # fmt: skip
    r = placement.report
    rows = {
        "experts, k, places": f"{found.header.num_experts}, {found.header.k}, {places}",
        "remote sends of tokens per token, before, after": f"{r.tokens_before:.3f}, {r.tokens_after:.3f}",
        "with uniform routing": f"{r.tokens_uniform:.3f}",
        "remote sends of slots per token, before, after": f"{r.slots_before:.3f}, {r.slots_after:.3f}",
        "expert work per place, max/mean, before, after": f"{r.work_before:.3f}, {r.work_after:.3f}",
        "samples per place": f"{min(r.samples)} to {max(r.samples)}",
    }
    result = {"places": places, **r.to_dict()}
    title = "Placement of experts and samples"
    _emit(out, "place", title, result, rows, as_json, lambda new: placement.save(new / "placement.json"))


def load_grouter(folder: Path) -> Grouter:
    """A frozen Grouter of a folder."""
    from ..models.grouter import Grouter

    return Grouter.from_pretrained(folder).eval().requires_grad_(False)


def sum_affinities(files: list[Path]) -> AffinityResult:
    """The affinity of all shards."""
    first, *rest = map(AffinityResult.open, files)
    for other in rest:
        first = first + other
    return first


def _tokens(model: Grouter, data: list[Path] | None, split: str) -> npt.NDArray[Any]:
    """Ids of the Grouter's vocabulary."""
    from .sources import load_data

    return load_data(data or [], model.config.vocab_size, None).tokens(split)


class _Counting(NamedTuple):
    """Counting the routing of a sample of tokens, with what was reached in a folder."""

    window: int
    max_tokens: int
    eod_id: int | None
    folder: Path
    every: int

    def __call__(self, model: Grouter, tokens: npt.NDArray[Any], k: int, label: str, resume: bool) -> AffinityResult:
        sample = sample_windows(tokens, self.window, self.max_tokens)

        def batches(first: int) -> Iterable[npt.NDArray[np.int64]]:
            rest = sample[first * BATCH :]
            return routed(model, rest, k, batch=BATCH, eod_id=self.eod_id) if len(rest) else ()

        origin = {"k": k, **sample_identity(model, sample, self.eod_id)}
        return count_affinity(
            batches, len(model.selection_bias), total=-(-len(sample) // BATCH), label=label, checkpoint=self.folder,
            checkpoint_every=self.every, resume=resume, identity=origin,
        )  # fmt: skip

    def begun(self, label: str) -> bool:
        """Whether an interrupted command had come to this count."""
        return (self.folder / f"{label}.npz").is_file()


def _check_k(option: str, k: int, experts: int, of: str = "") -> None:
    """Before anything is counted, or moved."""
    if not 1 <= k <= experts:
        raise InputError(f"{option} {k}: top-{k} of {experts} experts{of}", todo=f"choose one from 1 to {experts}")


@contextlib.contextmanager
def _kept(out: Path) -> Iterator[None]:
    """Signals end the command with 130, saying which records are kept; what has begun goes on without an option."""
    try:
        with terminable():
            yield
    except KeyboardInterrupt:
        header = read_header(out)
        done = header.windows if header else 0
        tell(f"precompute: interrupted; {out} keeps {done} windows; run the same again to go on")
        raise SystemExit(130) from None


def _clear(out: Path, *labels: str) -> None:
    """Move what earlier runs of this command reached aside: of all stages, since a later one is not begun anew yet."""
    make_room(out / CHECKPOINTS, LastingConsole(stderr=True), [f"{label}.npz" for label in labels])


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[int, int | None], None]]:
    from rich.progress import Progress

    with Progress(console=LastingConsole(stderr=True), transient=True) as bar:
        task = bar.add_task("windows")
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _emit(
    out: Path,
    name: str,
    title: str,
    result: Mapping[str, Any],
    rows: Mapping[str, str],
    as_json: bool,
    save: Callable[[Path], object] = lambda _: None,
) -> None:
    """Write what `save` puts into a folder, and its report: both or none, so that neither tells of another run."""
    with replacing(out, "the results") as new:
        save(new)
        text = write_report(new, name, title, result, rows)
    print(json_text(result) if as_json else f"{text}\nwritten to {out}")


register(app)
