"""Where a backbone looks up learned positions: the site `embed.position`, for encoders and decoders that have one."""

from __future__ import annotations

import re

from torch import nn

from deltaprompt.backbone.sites import Site

NAME = "embed.position"
CALLED = re.compile(r"pos(ition)?_?emb|wpe")  # what tables of positions, and no others, are called
DISTANCES = re.compile(r"rel(ative)?_|bias")


def position_sites(model: nn.Module, base: nn.Module) -> dict[str, Site]:
    """The site by its name; none where positions are rotations or distances, or are looked up by code of their own."""
    inside = {id(module) for module in base.modules()}
    tables = [
        (path, module)
        for path, module in model.named_modules()
        if type(module) is nn.Embedding and id(module) in inside and _is_called(path.rpartition(".")[2])
    ]
    if len(tables) != 1:
        return {}
    path, table = tables[0]
    return {NAME: Site(NAME, path, "embed", table.num_embeddings, table.embedding_dim)}


def _is_called(leaf: str) -> bool:
    return CALLED.search(leaf) is not None and DISTANCES.search(leaf) is None
