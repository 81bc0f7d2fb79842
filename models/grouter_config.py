"""The shape of a Grouter network."""

from __future__ import annotations

from dataclasses import dataclass, fields

from moefx.errors import InputError, nearest

KINDS = ("mha", "mla", "linear", "conv")


@dataclass(frozen=True)
class GrouterConfig:
    """The shape of a Grouter. `kind` is "mha" or "mla" attention, or an ablation: "linear" (no token sees another) or
    "conv" (a window of kernel-3 convolutions).

    Attributes:
        vocab_size: ids are below this; teacher, Grouter and target share one tokenizer.
        num_experts: rows of the score layer.
        hidden_size, num_layers, num_heads: of the blocks; heads matter to attention alone.
        intermediate_size: width of the MLP; None for the published proportion (171/32 of the width; 4 for "linear", 7/4
            for "conv", where it is the width between the first and the last block).
        causal: False lets every token see the whole window. Such a router leaks the future into a causal model.
        rope: rotary positions; "linear" and "conv" rotate the embedding itself.
        rope_theta: None for 1e6 (attention) or 1e4 (ablations).
        q_rank, kv_rank, nope_head_dim, rope_head_dim, value_head_dim: of "mla".
        pad_token_id: its embedding is zero and stays so.
        fold_groups: experts whose logits are joined by logsumexp behind the score layer, one group per routed expert.

    Raises:
        InputError: sizes that do not fit together.
    """

    vocab_size: int
    num_experts: int
    hidden_size: int = 512
    num_layers: int = 3
    num_heads: int = 8
    intermediate_size: int | None = None
    kind: str = "mha"
    causal: bool = True
    rope: bool = True
    rope_theta: float | None = None
    norm_eps: float = 1e-6
    init_std: float = 0.02
    pad_token_id: int | None = None
    q_rank: int = 512
    kv_rank: int = 512
    nope_head_dim: int = 128
    rope_head_dim: int = 64
    value_head_dim: int = 128
    fold_groups: tuple[tuple[int, ...], ...] | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"unknown kind of Grouter {self.kind!r}", todo=nearest(str(self.kind), KINDS))
        sizes = [f.name for f in fields(self) if f.type == "int"]
        small = [
            f"{n}={getattr(self, n)!r}" for n in sizes if type(getattr(self, n)) is not int or getattr(self, n) < 1
        ]
        if small or self.width < 1:
            small = small or [f"intermediate_size={self.intermediate_size}"]
            raise InputError(f"not a size: {', '.join(small)}", where="GrouterConfig", todo="give integers above 0")
        rotary = {"mha": self.hidden_size // self.num_heads, "mla": self.rope_head_dim}.get(self.kind, self.hidden_size)
        if self.kind == "mha" and self.hidden_size % self.num_heads:
            raise InputError(
                f"hidden_size {self.hidden_size} is no multiple of num_heads {self.num_heads}",
                where="GrouterConfig",
                todo="choose a width that the heads divide",
            )
        if self.rope and rotary % 2:
            raise InputError(
                f"rotary positions need an even size, not {rotary}",
                where="GrouterConfig",
                todo="choose other sizes, or rope=False",
            )
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise InputError(f"pad_token_id {self.pad_token_id} is outside of a vocabulary of {self.vocab_size}")
        if self.fold_groups is not None:
            groups = tuple(tuple(g) for g in self.fold_groups)
            object.__setattr__(self, "fold_groups", groups)
            if not all(groups) or sorted(e for g in groups for e in g) != list(range(self.num_experts)):
                raise InputError(
                    f"fold_groups must hold each of {self.num_experts} experts once, and no empty group",
                    where="GrouterConfig",
                    todo="moefx.grouter.fold makes them",
                )

    @property
    def width(self) -> int:
        """The intermediate size in use."""
        if self.intermediate_size is not None:
            return self.intermediate_size
        return {"linear": 4 * self.hidden_size, "conv": 7 * self.hidden_size // 4}.get(
            self.kind, 171 * self.hidden_size // 32
        )

    @property
    def theta(self) -> float:
        """The base of the rotary frequencies in use."""
        return self.rope_theta or (1e4 if self.kind in ("linear", "conv") else 1e6)
