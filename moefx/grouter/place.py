"""Placement: which place (device or node) holds an expert, and which place trains on a sample.

After sections on expert grouping and sample placement of arXiv 2603.06626. A preemptive router knows the routing of a
data set before training, so experts that a kind of text uses can share a place, and the text can be read there.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import InputError
from ..files import replacing
from ..packages import optional
from .affinity import Floats, Ints
from .clusters import check_kmeans, kmeans
from .partial import Partial, stage
from .traffic import (
    check_routing,
    max_over_mean,
    profiles,
    remote,
    slot_hits,
    token_hits,
    uniform_traffic,
)

CLUSTERS = 100  # of samples, before they are joined to one per place; the published number
CHUNK = 2048  # samples per capacity-constrained assignment, which takes time cubic in it


@dataclass(frozen=True)
class PlacementReport:
    """Remote sends per token and balance, before (experts in contiguous blocks, samples round-robin) and after.

    Attributes:
        tokens_before, tokens_after: remote sends of tokens (once per remote place) per token.
        slots_before, slots_after: remote sends of slots (once per remote expert) per token.
        tokens_uniform, slots_uniform: the same expected for uniform routing.
        work_before, work_after: slots computed per place, largest over mean. Grouping experts can unbalance it.
        samples: samples per place.
        samples_max_over_mean: 1 where counts are equal.
    """

    tokens_before: float
    tokens_after: float
    tokens_uniform: float
    slots_before: float
    slots_after: float
    slots_uniform: float
    work_before: float
    work_after: float
    samples: tuple[int, ...]
    samples_max_over_mean: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, eq=False)
class Placement:
    """Places of experts and homes of samples.

    Attributes:
        place: int64 [E], the place of each expert; every place has E / num_places.
        home: int64 [samples], the place that trains on each sample.
        report: see `PlacementReport`.
    """

    place: Ints
    home: Ints
    num_places: int
    report: PlacementReport

    @property
    def slot(self) -> Ints:
        """int64 [E], a permutation: the new number of each expert, place * E / N + rank within the place.

        With training from scratch, moving an expert is this table on the routing, `slot[idx]`, and no weight moves. For
        weights that exist, row slot[i] of the new stack is row i of the old: `new = old[numpy.argsort(slot)]`.
        """
        return relabel(self.place)

    def samples_of(self, n: int) -> Ints:
        """The samples of place n, in the order of the data. Raises InputError where there is no such place."""
        if not 0 <= n < self.num_places:
            raise InputError(f"there is no place {n}", todo=f"choose one from 0 to {self.num_places - 1}")
        return np.flatnonzero(self.home == n)

    def save(self, path: str | Path) -> None:
        """Write places, homes, slots and the report as JSON. After InputError, an earlier file is unchanged."""
        entries = {
            "num_places": self.num_places,
            "place": self.place.tolist(),
            "slot": self.slot.tolist(),
            "home": self.home.tolist(),
            "report": self.report.to_dict(),
        }
        path = Path(path)
        with replacing(path.parent, "the placement") as new:
            (new / path.name).write_text(json.dumps(entries) + "\n", encoding="utf-8")

    @classmethod
    def open(cls, path: str | Path) -> Placement:
        """Read what `save` wrote. Raises InputError for another file."""
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
            report = PlacementReport(**{**found["report"], "samples": tuple(found["report"]["samples"])})
            place, home = (np.asarray(found[name], dtype=np.int64) for name in ("place", "home"))
            return cls(place, home, int(found["num_places"]), report)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                "no placement can be read from this file",
                where=str(path),
                why=f"it lacks {error}" if isinstance(error, KeyError) else str(error),
                todo="name the placement.json that moefx grouter place wrote",
            ) from error


def place(
    idx: npt.NDArray[Any],
    num_experts: int,
    num_places: int,
    *,
    equal: bool = True,
    clusters: int = CLUSTERS,
    max_entropy: float | None = None,
    seed: int = 42,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 16,
    resume: bool = False,
    progress: bool = True,
) -> Placement:
    """Place experts (`place_experts`), then samples (`place_samples`), and report what it changes.

    Args:
        idx: expert ids, integer [samples, length, k]; `RoutingRecords.idx`.
        num_places: N, a divisor of `num_experts`; devices of one node, or nodes.
        equal: equally many samples per place (or counts that differ by one). Without it, every sample goes where it is
            cheapest, as published, and counts differ.
        checkpoint: folder for `places.npz`: the places of experts once they are found, and then the homes of samples,
            every `checkpoint_every` chunks of 2048 samples and on Ctrl-C and SIGTERM. Before that a signal stops at
            once. Unless `resume`, one that is there is moved to `previous-N` inside.
        resume: go on from there, with the same routing and options, to the same placement.
        progress: what goes on, on a terminal.

    Raises:
        CheckpointError: what is there is of other routing or options.
        TrainingInterrupted: after Ctrl-C or SIGTERM while samples are placed, with a `checkpoint` folder.
        InputError: N does not divide E, there are fewer samples than places, or `idx` or `seed` is not usable.
        MissingPackageError: scikit-learn or scipy is not installed.
    """
    check_routing(idx, num_experts)
    check_kmeans(1, seed)
    _check_places(num_experts, num_places)  # before an earlier result is moved
    origin = {
        "experts": num_experts, "places": num_places, "equal": equal, "clusters": clusters, "max_entropy": max_entropy,
        "seed": seed, "routing": _digest(idx) if checkpoint is not None else "",
    }  # fmt: skip
    partial = Partial("places", checkpoint, checkpoint_every, origin)
    reached = partial.begin(resume)
    if reached:
        where, homes = reached["where"], [reached["home"]]
    else:
        with stage("place: clustering samples and placing experts", progress):
            phi = profiles(idx, num_experts)
            where = place_experts(phi, num_places, clusters=clusters, max_entropy=max_entropy, seed=seed)
        homes = [np.empty(0, dtype=np.int64)]
        partial.save({"where": where, "home": homes[0]})
    with stage("place: counting what samples send", progress):
        parts = _chunks(token_hits(idx, where, num_places))
    partial.run(
        parts[partial.done :],
        lambda part: homes.append(place_samples(part, equal=equal)),
        lambda: {"where": where, "home": np.concatenate(homes)},
        len(parts),
        progress,
    )
    home = np.concatenate(homes)
    with stage("place: counting the traffic", progress):
        return Placement(where, home, num_places, placement_report(idx, where, home, num_places))


def place_experts(
    phi: Floats, num_places: int, *, clusters: int = CLUSTERS, max_entropy: float | None = None, seed: int = 42
) -> Ints:
    """Give each place E / N experts that the same kind of samples uses.

    Samples are clustered by their profiles (k-means), the clusters joined to N by complete linkage on 1 - cosine, and
    experts assigned to the N mean profiles by linear assignment, with E / N seats per place.

    Args:
        phi: [samples, E] share of a sample's slots per expert, see `profiles`.
        clusters: of k-means; at most one per different sample.
        max_entropy: samples whose profile has more bits of entropy say nothing about topics and are not clustered. The
            published thresholds are 6.85 and 5.9 bits for 128 experts, whose maximum is 7.
        seed: of k-means, below 2^32.

    Returns:
        int64 [E], the place of each expert.
    """
    samples, experts = phi.shape
    _check_places(experts, num_places)
    used = phi
    if max_entropy is not None:
        bits = -(phi * np.log2(np.where(phi > 0, phi, 1.0))).sum(1)
        used = phi[bits <= max_entropy]
    different = len(np.unique(used, axis=0))
    if different < num_places:
        raise InputError(
            f"{different} different samples are too few to tell {num_places} places apart",
            why=f"of {samples} samples, {len(used)} are within the limit of entropy"
            if max_entropy is not None
            else None,
            todo="give more samples, or raise max_entropy" if max_entropy is not None else "give more samples",
        )
    if num_places == 1:
        return np.zeros(experts, dtype=np.int64)
    purpose = "to group experts by the samples that use them"
    count = max(min(clusters, different), num_places)
    found = kmeans(count, purpose, starts=10, seed=seed).fit(used)
    join = optional("sklearn.cluster", purpose).AgglomerativeClustering
    joined = join(num_places, metric="cosine", linkage="complete").fit_predict(found.cluster_centers_)
    topic = joined[found.labels_]
    centres = np.stack([used[topic == n].mean(0) for n in range(num_places)])
    seats = np.repeat(np.arange(num_places), experts // num_places)
    rows, columns = optional("scipy.optimize", "to assign experts to places").linear_sum_assignment(-centres[seats])
    where = np.empty(experts, dtype=np.int64)
    where[columns] = seats[rows]
    return where


def _check_places(experts: int, num_places: int) -> None:
    if num_places < 1 or experts % num_places:
        raise InputError(
            f"{experts} experts cannot be placed evenly on {num_places} places",
            todo=f"choose a divisor of {experts}",
        )


def place_samples(hits: Ints, *, equal: bool = True) -> Ints:
    """The home of each sample: where its remote sends, sum of hits[s, n] over n != home, are fewest.

    Args:
        hits: int64 [samples, N], see `token_hits` (or `slot_hits`, for plain all-to-all).
        equal: counts per place differ by at most one, at the least total of remote sends: exact within consecutive
            chunks of 2048 samples, so a chunk never has more than round-robin homes have.

    Returns:
        int64 [samples]; the first place of equally good ones where counts are free.
    """
    if not equal:
        cheapest: Ints = np.argmax(hits, axis=1)
        return cheapest
    assign = optional("scipy.optimize", "to assign samples to places").linear_sum_assignment
    places = hits.shape[1]
    home, start = np.empty(len(hits), dtype=np.int64), 0
    for part in _chunks(hits):
        each, extra = divmod(len(part), places)
        # Every place has `each` seats, and one more at a price above any other cost, so that none is taken in vain.
        seats = np.concatenate([np.repeat(np.arange(places), each), np.arange(places if extra else 0)])
        cost = -part[:, seats].astype(np.float64)
        cost[:, each * places :] += 1.0 + float(part.sum())
        rows, columns = assign(cost)
        home[start + rows] = seats[columns]
        start += len(part)
    return home


def _chunks(hits: Ints) -> list[Ints]:
    """Consecutive samples that are assigned together: as many to each place, but in the last chunk."""
    step = max(CHUNK // hits.shape[1], 1) * hits.shape[1]
    return [hits[start : start + step] for start in range(0, len(hits), step)]


def _digest(idx: npt.NDArray[Any]) -> str:
    """Of shape, dtype and content; a memory map is read piece by piece."""
    digest = hashlib.sha256(f"{idx.dtype} {idx.shape}".encode())
    for start in range(0, len(idx), CHUNK):
        digest.update(np.ascontiguousarray(idx[start : start + CHUNK]).tobytes())
    return digest.hexdigest()


def placement_report(idx: npt.NDArray[Any], where: Ints, home: Ints, num_places: int) -> PlacementReport:
    """Count what `PlacementReport` says, for experts at `where` [E] and samples at `home` [samples]."""
    experts, k, tokens = len(where), idx.shape[2], idx.shape[0] * idx.shape[1]
    contiguous = np.arange(experts) // (experts // num_places)
    robin = np.arange(len(idx)) % num_places
    slots_before, slots_after = (slot_hits(idx, w, num_places) for w in (contiguous, where))
    samples = np.bincount(home, minlength=num_places)
    return PlacementReport(
        tokens_before=remote(token_hits(idx, contiguous, num_places), robin) / tokens,
        tokens_after=remote(token_hits(idx, where, num_places), home) / tokens,
        tokens_uniform=uniform_traffic(experts, k, num_places),
        slots_before=remote(slots_before, robin) / tokens,
        slots_after=remote(slots_after, home) / tokens,
        slots_uniform=uniform_traffic(experts, k, num_places, count="slots"),
        work_before=max_over_mean(slots_before.sum(0)),
        work_after=max_over_mean(slots_after.sum(0)),
        samples=tuple(int(n) for n in samples),
        samples_max_over_mean=max_over_mean(samples),
    )


def relabel(where: Ints) -> Ints:
    """slot = place * E / N + rank within the place, ranks by ascending expert; int64 [E], a permutation."""
    slot = np.empty(len(where), dtype=np.int64)
    slot[np.argsort(where, kind="stable")] = np.arange(len(where))
    return slot
