"""`python -m deltaprompt.pretrain.ship DIR [FILE]`: what the demo learned, as the file that `dp.load("demo")` reads.

The sites' names in `DIR/delta.safetensors` become paths of modules, which is all that `backbone/demo.py` knows.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from deltaprompt import registry
from deltaprompt.backbone import Backbone, load
from deltaprompt.backbone.demo import DELTAS, HEAD, RULES, SHIPPED, as_masked_lm
from deltaprompt.backbone.load import DEMO
from deltaprompt.deltas._base import Delta
from deltaprompt.deltas.lora import LoRA
from deltaprompt.errors import ConfigError, DeltaPromptError
from deltaprompt.pretrain.keep import DELTA, LEARNED

MOST = 2_000_000  # bytes
CLOSE = 1e-5  # of the folder's weights to the file's: sums in another order


def ship(folder: str | Path, file: str | Path = SHIPPED) -> int:
    """Writes the file of a run on the demo, and says its bytes; the model that it makes is the folder's.

    Raises:
        ConfigError: the folder holds no such run, or deltas that the demo has no rule for, or too large ones.
    """
    tensors, told = _read(Path(folder) / DELTA)
    published = load(DEMO, new_head=True, device="cpu")
    if told["fingerprint"] != published.fingerprint:
        raise ConfigError(f"{folder} was not trained on the demo with new_head = true; train recipes/demo-mlm.toml")
    deltas: list[Delta] = [registry.from_description("deltas", each) for each in told["deltas"]]
    rules = [{"kind": registry.describe("deltas", delta)["kind"], "scale": repr(_scale(delta))} for delta in deltas]
    if odd := [rule["kind"] for rule in rules if rule["kind"] not in RULES]:
        raise ConfigError(f"the demo's file has no rule for {odd[0]}; possible: {', '.join(RULES)}")
    moved = {_moved(name, published): tensor for name, tensor in tensors.items()}
    data = safetensors.torch.save(moved, {DELTAS: json.dumps(rules)})
    if len(data) > MOST:
        raise ConfigError(
            f"{folder}: its delta takes {len(data):,} bytes, at most {MOST:,} are shipped; lower the rank"
        )
    file = Path(file)
    part = file.with_name(f".{file.name}")
    part.write_bytes(data)
    try:
        _check(published, part, Path(folder))
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)
    return len(data)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a delta's file, and what it tells of them."""
    if not path.is_file():
        raise ConfigError(
            f"there is no {path}; give the folder of a finished run by deltas (deltaprompt pretrain --out)"
        )
    try:
        with safe_open(path, "pt") as f:
            told = json.loads(f.metadata()[LEARNED])
            return {name: f.get_tensor(name) for name in f.keys()}, told  # noqa: SIM118
    except (SafetensorError, TypeError, KeyError, ValueError) as e:
        raise ConfigError(f"{path} is damaged ({e}); train again, or finish the run with --resume") from e


def _scale(delta: Delta) -> float:
    return delta.scale if isinstance(delta, LoRA) else 1.0


def _moved(name: str, backbone: Backbone) -> str:
    """`0.layers.1.attn.q.a` with its module's path in place of its site's name."""
    number, _, rest = name.partition(".")
    if number == HEAD:
        return name
    site, _, tensor = rest.rpartition(".")
    return f"{number}.{backbone.sites[site].path}.{tensor}"


def _check(published: Backbone, file: Path, folder: Path) -> None:
    """The file makes of the published model what is in the folder."""
    as_masked_lm(published.model, file)
    learned: Mapping[str, Tensor] = safetensors.torch.load_file(folder / "model.safetensors")
    for name, tensor in published.model.state_dict().items():
        if name in learned and not torch.allclose(tensor, learned[name], atol=CLOSE, rtol=CLOSE):
            raise ConfigError(f"{folder}: {name} is not what its delta makes of the demo; train again")


def main() -> None:
    """The command."""
    if not 2 <= len(sys.argv) <= 3:
        sys.exit("usage: python -m deltaprompt.pretrain.ship DIR [FILE]")
    try:
        size = ship(*sys.argv[1:])
    except DeltaPromptError as e:
        sys.exit(str(e))
    print(f"{size:,} bytes in {sys.argv[2] if sys.argv[2:] else SHIPPED}")


if __name__ == "__main__":
    main()
