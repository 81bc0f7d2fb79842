"""A model's state as names and tensors that can be written to a file, with tied weights stored once."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def collect(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str], dict[str, Any]]:
    """What a checkpoint must hold of a model, sorted by how it is stored.

    Returns:
        Tensors (on the CPU, contiguous, each with memory of its own); aliases {name: stored name} of tensors that are
        one memory (tied weights); state that is no tensor (`get_extra_state`).
    """
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    extra: dict[str, Any] = {}
    owners: dict[tuple[Any, ...], str] = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            extra[name] = value
            continue
        memory = (
            value.device,
            value.untyped_storage().data_ptr(),
            value.storage_offset(),
            value.shape,
            value.stride(),
            value.dtype,
        )
        owner = owners.setdefault(memory, name) if value.numel() else name
        if owner != name:
            aliases[name] = owner
            continue
        stored = value.detach().cpu().contiguous()
        # Views into a larger tensor (fused weights split by name): safetensors wants memory that belongs to one name.
        shares = stored.untyped_storage().nbytes() != stored.numel() * stored.element_size()
        tensors[name] = stored.clone() if shares else stored
    return tensors, aliases, extra


def kind_of(tensor: Tensor) -> str:
    """Data type and shape as text, such as `float32[128, 256]`."""
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
