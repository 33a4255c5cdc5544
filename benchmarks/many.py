"""Many adaptations on one BERT of 12 layers, 768 wide: opening them, and batches whose rows have one each.

The peer is peft: `load_adapter` one after another, and `adapter_names` in forward. The bare backbone is the measure of
what a batch of one token a row, as in decoding, costs with them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

import deltaprompt as dp
from benchmarks.delta_steps import encoder
from benchmarks.paired import Pair, pair, turns
from deltaprompt.backbone import Backbone
from deltaprompt.backbone.load import demo_folder, wrap
from deltaprompt.compose import Adapted
from deltaprompt.deltas._base import Delta

RANK, FEW, MANY, LOADED, ROWS, STEPS = 8, 50, 1000, 64, 16, 8
LORA = dp.LoRA(rank=RANK, at=("attn.q", "attn.v"))
METHODS: tuple[Delta, ...] = (LORA, dp.Adapter(), dp.Prefix(length=10), dp.SoftPrompt(length=1))


def backbone() -> Backbone:
    """The frozen encoder with the demo's tokenizer."""
    return wrap(encoder("base"), PreTrainedTokenizerFast.from_pretrained(demo_folder()), kind="encoder", name="")


def saved(folder: Path, on: Backbone, count: int) -> list[Path]:
    """As many adaptations, each with numbers of its own."""
    task = dp.Task("{text}", ("no", "yes"), dp.SoftVerbalizer())
    model = dp.adapt(on, task, [LORA])
    folders = []
    for number in range(count):
        with torch.no_grad():
            for _, p in model.parts():
                p.normal_(0.0, 0.02)
        folders.append(folder / f"ours-{number}")
        model.save(folders[-1])
    model.adapted.remove()
    return folders


def saved_by_peft(folder: Path, count: int) -> list[Path]:
    """As many of peft's."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(encoder("base"), LoraConfig(r=RANK, target_modules=["query", "value"]))
    folders = [folder / f"peft-{number}" for number in range(count)]
    for each in folders:
        model.save_pretrained(str(each))
    return folders


def opened_by_peft(folders: Sequence[Path], bare: Any) -> None:
    """peft's model with all of them, on a model that is there."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(bare, str(folders[0]), adapter_name="a0")
    for number, folder in enumerate(folders[1:], 1):
        model.load_adapter(str(folder), adapter_name=f"a{number}")


def opening(few: int, many: int, rounds: int) -> list[Pair]:
    """Opening a few against peft; many against a few; the last of many against the second."""
    with TemporaryDirectory() as made:
        on = backbone()
        ours, peers = saved(Path(made), on, many), saved_by_peft(Path(made), few)
        bare = iter([encoder("base") for _ in range(rounds)])
        opened = turns(
            {
                "few": lambda: dp.open_many(ours[:few], on).remove,
                "many": lambda: dp.open_many(ours, on).remove,
                "peft": lambda: opened_by_peft(peers, next(bare)),
            },
            rounds,
            warm_up=0,
        )
        added = [_added(ours, on) for _ in range(rounds)]
    return [
        pair(f"opening {few} LoRAs from disk: against peft", opened["few"], opened["peft"]),
        pair(f"opening {few}: opening {many} takes so many times that", opened["few"], opened["many"]),
        pair(f"adding the last of {many}: the second takes so many times that", *zip(*added, strict=True)),  # type: ignore[arg-type]
    ]


def _added(folders: Sequence[Path], on: Backbone) -> tuple[float, float]:
    """Milliseconds that adding the last ones and the second ones take, the middle of a few each."""
    many = dp.open_many(folders[:1], on)
    took = []
    for folder in folders[1:]:
        start = time.perf_counter()
        many.add(folder)
        took.append((time.perf_counter() - start) * 1000)
    many.remove()
    ends = max(len(took) // 10, 1)
    return sum(took[-ends:]) / ends, sum(took[:ends]) / ends


def decoding(rounds: int) -> list[Pair]:
    """A batch of one token a row: LoRAs of which each row has its own, then four methods side by side."""
    ids = torch.arange(1000, 1000 + ROWS)[:, None]
    own, several, bare = backbone(), backbone(), encoder("base").eval()
    lora = Adapted(own, [LORA], LOADED).eval()
    groups = [Adapted(several, [delta], LOADED // len(METHODS)).eval() for delta in METHODS]
    runs = {f"{n}": partial(_one_method, lora, ids, torch.arange(ROWS) % n * (LOADED // ROWS)) for n in (1, 8, ROWS)}
    runs |= {"bare": lambda: _steps(bare, ids), "mixed": lambda: _methods(groups, ids), "peft": _by_peft(ids)}
    with torch.no_grad():
        took = turns(runs, rounds, warm_up=2)
    name, bare_time = f"{STEPS} tokens for {ROWS} rows", took["bare"]
    return [
        *(pair(f"{name}, {n} of {LOADED} LoRAs: against none", took[n], bare_time) for n in ("1", "8", f"{ROWS}")),
        pair(f"{name}, {ROWS} LoRAs: against peft", took[f"{ROWS}"], took["peft"]),
        pair(f"{name}, {len(METHODS)} methods: against none", took["mixed"], bare_time),
    ]


def _steps(model: Callable[..., Any], ids: torch.Tensor, **given: Any) -> None:
    for _ in range(STEPS):
        model(ids, **given)


def _one_method(adapted: Adapted, ids: torch.Tensor, index: torch.Tensor) -> None:
    with adapted.generating(index):
        _steps(adapted.model, ids)


def _methods(groups: Sequence[Adapted], ids: torch.Tensor) -> None:
    """A quarter of the rows for each method; of a soft prompt's rows the token is a virtual one."""
    each = ROWS // len(groups)
    with ExitStack() as stack:
        for number, group in enumerate(groups):
            stack.enter_context(group.routing.steady())
            rows = torch.arange(number * each, (number + 1) * each)
            group.routing.among(ROWS, rows, torch.arange(each))
            if isinstance(group.deltas[0], dp.SoftPrompt):
                ids = ids.index_fill(0, rows, group.backbone.vocabulary)
        _steps(groups[0].model, ids)


def _by_peft(ids: torch.Tensor) -> Callable[[], None]:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, target_modules=["query", "value"])
    model = get_peft_model(encoder("base"), config)
    names = ["default", *(f"a{number}" for number in range(1, ROWS))]
    for name in names[1:]:
        model.add_adapter(name, config)
    model.eval()
    return lambda: _steps(model, ids, adapter_names=names)


def run(rounds: Mapping[str, int]) -> list[Pair]:
    """All of it; fewer adaptations where there are few rounds."""
    quick = rounds["base"] < 5
    few, many, opened = (5, 20, 1) if quick else (FEW, MANY, 3)
    return [*opening(few, many, opened), *decoding(rounds["base"])]
