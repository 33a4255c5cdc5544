"""A backbone's layers: what transformers can compute again, and what can be spread over processes (FSDP2).

Spread, every process keeps a share of each layer's frozen weights and has the others' only while that layer runs. All
else stays whole on each: embeddings, head, and the deltas, which are no part of the layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from deltaprompt.backbone.maps import is_plain
from deltaprompt.errors import ConfigError

DIGEST = "_deltaprompt_digest"  # where the fingerprint is kept of a model that is spread


def layers_of(model: nn.Module) -> Iterator[nn.Module]:
    """The layers that transformers can compute again."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return (module for module in model.modules() if isinstance(module, GradientCheckpointingLayer))


def is_spread(model: nn.Module) -> bool:
    """Whether a model's layers are spread over processes."""
    return DIGEST in vars(model)


def spread(model: nn.Module, device: torch.device, digest: str) -> None:
    """Spreads a frozen model's layers over all processes, for good; `digest` is the fingerprint that it keeps."""
    from torch.distributed import get_world_size
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    layers: list[Any] = list(layers_of(model))
    if not layers or not all(is_plain(p) for p in model.parameters()):
        what = "its weights are quantised" if layers else "it has no layers that transformers can name"
        raise ConfigError(f"{type(model).__name__} cannot be spread over processes (FSDP): {what}. Train it without")
    mesh = init_device_mesh(device.type, (get_world_size(),))
    for layer in reversed(layers):  # one in another comes first
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=_read_elsewhere(layer))
    for (
        layer
    ) in layers:  # what FSDP gathers into is made at the first use: in inference mode it could not be trained in
        layer.unshard()
        layer.reshard()
    vars(model)[DIGEST] = digest


def _read_elsewhere(layer: nn.Module) -> set[nn.Parameter]:
    """A layer's parameters that other layers read: tables of relative positions. They are small, and stay whole."""
    return {p for module in layer.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
