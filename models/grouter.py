"""Grouter: a small transformer from token ids to routing logits, which takes the place of a model's routers.

After "Grouter: Decoupling Routing from Representation for Accelerated MoE Training" (arXiv 2603.06626), with one
change: the network is causal by default. The published one attends to the whole window, so the routing of a token tells
what comes after it, and a language model trained on such routing reads the future through it.
"""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moefx.errors import InputError, first_line, nearest
from moefx.files import replacing
from moefx.packages import optional
from moefx.routing import FutureTokensWarning

from .grouter_blocks import make_blocks, rotated
from .grouter_config import GrouterConfig
from .grouter_view import GrouterCache, View, see, visible

__all__ = ["FutureTokensWarning", "Grouter", "GrouterCache", "GrouterConfig"]

CONFIG, WEIGHTS = "config.json", "model.safetensors"
MODEL_TYPE = "moefx_grouter"


class Grouter(nn.Module):
    """Token ids -> routing logits, one row per token for all MoE layers of a target.

    It computes in the dtype of its parameters, whatever autocast surrounds it, and its score layer in fp32: decisions
    that were stored must be those of a later run.

    Attributes:
        score: the last layer [num_experts, hidden], which folding, expansion and tuning change.
        selection_bias: fp32 [number of logits], added to the logits for the choice alone; zeros unless tuned.
    """

    selection_bias: Tensor
    fold_index: Tensor | None

    def __init__(self, config: GrouterConfig) -> None:
        super().__init__()
        self.config = c = config
        self.embed = nn.Embedding(c.vocab_size, c.hidden_size, padding_idx=c.pad_token_id)
        self.blocks = make_blocks(c)
        self.norm = nn.RMSNorm(c.hidden_size, eps=c.norm_eps)
        self.score = nn.Linear(c.hidden_size, c.num_experts, bias=False)
        self.register_buffer("selection_bias", torch.zeros(self.num_routed, dtype=torch.float32))
        self.register_buffer("fold_index", _padded(c.fold_groups, c.num_experts), persistent=False)
        self.reset_parameters()
        if not c.causal and c.kind != "linear":
            warnings.warn(
                "this Grouter is not causal: the routing of a token depends on later tokens. A causal language model "
                "trained on it reads the future through its routing, its validation loss is too good, and it cannot "
                "generate with it. Use it for comparison only, and report prefix-only validation.",
                FutureTokensWarning,
                stacklevel=2,
            )

    @classmethod
    def from_config(cls, *, vocab_size: int, num_experts: int, **options: Any) -> Grouter:
        """A Grouter with random weights; `options` are the other fields of `GrouterConfig`."""
        known = [f.name for f in fields(GrouterConfig)]
        for name in options:
            if name not in known:
                raise InputError(f"a Grouter has no option {name!r}", todo=nearest(name, known))
        return cls(GrouterConfig(vocab_size, num_experts, **options))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """All weights anew: normal with std `init_std`, norms one, biases and the padding row zero."""
        for m in self.modules():
            if isinstance(m, nn.Linear | nn.Embedding):
                m.weight.normal_(0.0, self.config.init_std)
            elif isinstance(m, nn.RMSNorm | nn.LayerNorm):
                m.reset_parameters()
            if isinstance(m, nn.Linear) and m.bias is not None:
                m.bias.zero_()
        if self.config.pad_token_id is not None:
            self.embed.weight[self.config.pad_token_id].zero_()
        self.selection_bias.zero_()

    @property
    def num_routed(self) -> int:
        """The number of logits per token: `num_experts`, or the number of `fold_groups`."""
        return len(self.config.fold_groups) if self.config.fold_groups else self.config.num_experts

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Routing logits of every token.

        Args:
            input_ids: int [B, S], below `vocab_size`.
            position_ids: int [B or 1, S]. Without `document_ids`, every 0 begins a document.
            document_ids: int [B or 1, S]; where it changes, a document begins. Tokens see their own document alone, and
                its positions begin at 0 unless given.
            attention_mask: [B, S], 0 or False for padding, which no other token sees (transformers' convention).

        Returns:
            fp32 [B, S, num_routed].
        """
        return self.logits(self.hidden(input_ids, position_ids, document_ids, attention_mask))

    def hidden(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """What enters the score layer, [B, S, hidden_size]; arguments as for the call."""
        for name, t in (
            ("input_ids", input_ids),
            ("position_ids", position_ids),
            ("document_ids", document_ids),
            ("attention_mask", attention_mask),
        ):
            if t is not None and t.dim() != 2:
                raise InputError(f"{name} has {t.dim()} dimensions", where="Grouter", todo="give [sequences, tokens]")
        view = see(
            input_ids, position_ids, document_ids, attention_mask, attends=self._attends, causal=self.config.causal
        )
        return self._run(input_ids, view, None)

    def logits(self, hidden: Tensor, weight: Tensor | None = None) -> Tensor:
        """The score layer, or another `weight` for it, on [.., hidden_size], and folding by logsumexp if any; fp32
        [.., num_routed].
        """
        with torch.autocast(hidden.device.type, enabled=False):
            scores = F.linear(hidden.float(), (self.score.weight if weight is None else weight).float())
            if self.fold_index is not None:
                scores = F.pad(scores, (0, 1), value=-math.inf)[..., self.fold_index].logsumexp(-1)
        return scores

    @torch.no_grad()
    def route(
        self, input_ids: Tensor, k: int, *, scale: float = 1.0, normalise: str = "softmax", **masks: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The experts and gates of every token. No gradient.

        Args:
            k: experts per token.
            scale: what the gates of a token add up to.
            normalise: "softmax" of the k chosen logits, or their "sigmoid" over its sum.
            masks: position_ids, document_ids, attention_mask, as for the call.

        Returns:
            idx int64 [B, S, k], the top-k of logits + `selection_bias`, best first; gates fp32 [B, S, k], of the logits
            without the bias.
        """
        return self.choose(self(input_ids, **masks), k, scale=scale, normalise=normalise)

    def choose(
        self, logits: Tensor, k: int, *, scale: float = 1.0, normalise: str = "softmax"
    ) -> tuple[Tensor, Tensor]:
        """`route` for logits [.., num_routed] that are known already."""
        if normalise not in ("softmax", "sigmoid"):
            raise InputError(f"unknown normalise={normalise!r}", todo=nearest(str(normalise), ("softmax", "sigmoid")))
        if not 1 <= k <= self.num_routed:
            raise InputError(f"top-{k} of {self.num_routed} experts", where="Grouter.route", todo="choose another k")
        idx = (logits + self.selection_bias).topk(k, dim=-1).indices
        chosen = logits.gather(-1, idx)
        # sigmoid(x) / sum = softmax(log sigmoid(x)), which does not underflow.
        gates = (F.logsigmoid(chosen) if normalise == "sigmoid" else chosen).softmax(-1)
        return idx, gates * scale

    def new_cache(self) -> GrouterCache:
        """An empty cache for `step`."""
        return GrouterCache()

    @torch.no_grad()
    def step(self, input_ids: Tensor, cache: GrouterCache, attention_mask: Tensor | None = None) -> Tensor:
        """Logits fp32 [B, S, num_routed] of the next S tokens of one document per row, with those before in `cache`
        (extended in place). The same numbers as a call with all tokens, up to rounding.

        Args:
            input_ids: int [B, S], S >= 1.
            attention_mask: [B, S] of these tokens, 0 for padding in front of a prompt.

        Raises:
            InputError: the Grouter is not causal, or the batch is not that of the cache.
        """
        if not self.config.causal and self.config.kind != "linear":
            raise InputError(
                "a Grouter that sees later tokens cannot route token by token",
                where="Grouter.step",
                todo="use a causal Grouter (the default)",
            )
        B, S = input_ids.shape
        if cache.tag is not None and cache.tag.shape[0] != B:
            raise InputError(f"{B} sequences, but the cache holds {cache.tag.shape[0]}", where="Grouter.step")
        kept = input_ids.new_ones(B, S) if attention_mask is None else attention_mask.to(torch.int64)
        begin = input_ids.new_zeros(B) if cache.positions is None else cache.positions
        positions = (begin[:, None] + kept.cumsum(1) - 1).clamp_min(0)
        old, cache.tag = len(cache), kept - 1 if cache.tag is None else torch.cat((cache.tag, kept - 1), 1)
        cache.positions = begin + kept.sum(1)
        owner = torch.zeros_like(input_ids)
        mask = visible(owner, cache.tag, old, causal=True) if self._attends else None
        cache.layers = cache.layers or [{} for _ in self.blocks]
        return self.logits(self._run(input_ids, View(positions, owner, cache.tag, mask), cache))

    def freeze(self) -> Grouter:
        """Evaluation mode, no gradients; returns self."""
        return self.eval().requires_grad_(False)

    def check_ids(self, input_ids: Tensor) -> None:
        """Raise InputError unless every id is in the vocabulary. Looks at values: not for use under tracing."""
        if input_ids.numel():
            low, high = int(input_ids.min()), int(input_ids.max())
            if low < 0 or high >= self.config.vocab_size:
                raise InputError(
                    f"token id {low if low < 0 else high} is outside of the Grouter's vocabulary of "
                    f"{self.config.vocab_size}",
                    todo="teacher, Grouter and target must share one tokenizer",
                )

    def save_pretrained(self, directory: str | Path) -> Path:
        """Write config.json and model.safetensors into a folder, which is made if need be; returns it.

        Raises:
            InputError: the system does not let us write; a Grouter that was in the folder is still there.
            MissingPackageError: safetensors is not installed.
        """
        writer = _safetensors()
        tensors = {name: t.detach().contiguous().cpu() for name, t in self.state_dict().items()}
        config = {"model_type": MODEL_TYPE, **asdict(self.config)}
        with replacing(directory, "the Grouter") as new:
            try:
                writer.save_file(tensors, new / WEIGHTS)
            except _refused() as e:  # what the system said is in its text
                raise OSError(first_line(e)) from e
            (new / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        return Path(directory)

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> Grouter:
        """Read what `save_pretrained` wrote, in the dtypes of the file. Nothing is downloaded.

        Raises:
            InputError: the folder holds no Grouter, or one whose files are damaged or do not fit together.
            MissingPackageError: safetensors is not installed.
        """
        folder = Path(directory)
        try:
            entries = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
            if not isinstance(entries, dict) or entries.pop("model_type", None) != MODEL_TYPE:
                raise ValueError(f"{CONFIG} is not that of a Grouter")
            tensors = _safetensors().load_file(folder / WEIGHTS)
            with torch.random.fork_rng():  # random weights that the file's replace
                grouter = cls.from_config(**entries)
            grouter.load_state_dict(tensors, assign=True)
        except (OSError, ValueError, TypeError, RuntimeError, _refused()) as e:
            raise InputError(
                "no Grouter can be read from this folder",
                where=str(folder),
                why=str(e),
                todo="name a folder that Grouter.save_pretrained wrote",
            ) from e
        return grouter

    @property
    def _attends(self) -> bool:
        return self.config.kind in ("mha", "mla")

    def _run(self, input_ids: Tensor, view: View, cache: GrouterCache | None) -> Tensor:
        with torch.autocast(input_ids.device.type, enabled=False):
            x: Tensor = self.embed(input_ids)
            if self.config.rope and not self._attends:
                x = rotated(x, view.positions, self.config.theta)
            for i, block in enumerate(self.blocks):
                x = block(x, view, None if cache is None else cache.layers[i])
            out: Tensor = self.norm(x)
        return out

    def _apply(self, fn: Any, recurse: bool = True) -> Grouter:
        # `grouter.to(torch.bfloat16)` must not round the bias: near ties would be decided anew.
        kept = self.selection_bias
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.selection_bias.dtype != kept.dtype:
            self.selection_bias = kept.to(self.selection_bias.device)
        return self


def _padded(groups: tuple[tuple[int, ...], ...] | None, experts: int) -> Tensor | None:
    """Members of the groups as rows of equal length, filled up with the column behind the last expert."""
    if groups is None:
        return None
    longest = max(len(g) for g in groups)
    return torch.tensor([[*g, *[experts] * (longest - len(g))] for g in groups])


def _safetensors() -> Any:
    return optional("safetensors.torch", "to save and load a Grouter")


def _refused() -> type[Exception]:
    """What safetensors raises for a file that it cannot read or write; it is no OSError."""
    found: type[Exception] = optional("safetensors", "to save and load a Grouter").SafetensorError
    return found
