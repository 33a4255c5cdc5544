"""Many adaptations on one BERT of 12 layers, 768 wide: opening them, and batches whose rows have one each.

The peer is peft: `load_adapter` one after another, and `adapter_names` in forward. The bare backbone is the measure of
what a batch of one token a row, as in decoding, costs with them, and a bare linear map that of one layer.

Opening takes the same time again in the same process: the backbone's weights and tokenizer are compared every time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

import deltaprompt as dp
from benchmarks.delta_steps import encoder
from benchmarks.paired import Pair, pair, turns
from deltaprompt.backbone import Backbone
from deltaprompt.backbone.load import demo_folder, wrap
from deltaprompt.compose import Adapted
from deltaprompt.deltas._base import Delta

RANK, FEW, MANY, LOADED, ROWS, STEPS = 8, 50, 1000, 64, 16, 8
WIDTH, TOKENS, CALLS = 64, 4, 1000  # of the one layer: its width, tokens a row, calls in one round
DISTINCT = (1, 8, ROWS)  # adaptations in a batch
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
        alone = [(_one_more(ours, on), _one_more(ours[:2], on)) for _ in range(rounds)]
    return [
        pair(f"opening {few} LoRAs from disk: against peft", opened["few"], opened["peft"]),
        pair(f"opening {few}: opening {many} takes so many times that", opened["few"], opened["many"]),
        *(
            pair(f"adding one of {many} ({how}), the last tenth: the first takes so many times that", *_lists(each))
            for how, each in zip(("median", "mean"), zip(*added, strict=True), strict=True)
        ),
        pair(f"adding one to {many - 1} opened at once: one to one takes so many times that", *_lists(alone)),
    ]


def _lists(times: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Ours and the peer's of every round."""
    return [ours for ours, _ in times], [peer for _, peer in times]


def _added(folders: Sequence[Path], on: Backbone) -> tuple[tuple[float, float], tuple[float, float]]:
    """Milliseconds that adding one takes in the last tenth and in the first, as medians and as means.

    A stack that is full moves to a place with twice the room: the mean has these few dear additions, the median does
    not.
    """
    many = dp.open_many(folders[:1], on)
    took = [_milliseconds(partial(many.add, folder)) for folder in folders[1:]]
    many.remove()
    ends = max(len(took) // 10, 1)
    median, mean = ((how(took[-ends:]), how(took[:ends])) for how in (statistics.median, statistics.fmean))
    return median, mean


def _one_more(folders: Sequence[Path], on: Backbone) -> float:
    """Milliseconds that adding one takes where all others were opened at once."""
    many = dp.open_many(folders[:-1], on)
    took = _milliseconds(partial(many.add, folders[-1]))
    many.remove()
    return took


def _milliseconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1000


def one_layer(rounds: int) -> list[Pair]:
    """Microseconds of one LoRA layer in a batch of 16 rows of 4 tokens, its linear map's own among them."""
    torch.manual_seed(0)
    x = torch.randn(ROWS, TOKENS, WIDTH)
    layers = {str(n): _our_layer(x, torch.arange(ROWS) % n * (LOADED // ROWS)) for n in DISTINCT}
    layers |= {f"peft {n}": _peft_layer(x, [f"a{i % n * (LOADED // ROWS)}" for i in range(ROWS)]) for n in DISTINCT}
    layers["bare"] = partial(torch.nn.Linear(WIDTH, WIDTH), x)
    with torch.no_grad():
        took = turns({name: partial(_calls, layer) for name, layer in layers.items()}, rounds)
    peers = [("its linear map alone", n, "bare") for n in DISTINCT] + [("peft", n, f"peft {n}") for n in DISTINCT]
    return [
        replace(pair(f"one LoRA layer, {n} of {LOADED} distinct: against {peer}", took[str(n)], took[its]), unit="µs")
        for peer, n, its in peers
    ]


def _calls(layer: Callable[[], object]) -> None:
    """So many that milliseconds of all are microseconds of one."""
    for _ in range(CALLS):
        layer()


def _our_layer(x: torch.Tensor, index: torch.Tensor) -> Callable[[], object]:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(demo_folder())
    adapted = Adapted(wrap(_narrow(), tokenizer, kind="encoder", name=""), [LORA], LOADED).eval()
    adapted.routing.index, adapted.routing.gathered = index, {}  # as within `adapted.generating(index)`
    return partial(adapted.model.encoder.layer[0].attention.self.query, x)


def _peft_layer(x: torch.Tensor, names: Sequence[str]) -> Callable[[], object]:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, target_modules=["query", "value"])
    model = get_peft_model(_narrow(), config, adapter_name="a0")
    for number in range(1, LOADED):
        model.add_adapter(f"a{number}", config)
    model.eval()
    return partial(model.base_model.model.encoder.layer[0].attention.self.query, x, adapter_names=names)


def _narrow() -> BertModel:
    return BertModel(BertConfig(hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=4, intermediate_size=128))


def decoding(rounds: int) -> list[Pair]:
    """A batch of one token a row: LoRAs of which each row has its own, then four methods side by side."""
    ids = torch.arange(1000, 1000 + ROWS)[:, None]
    own, several, bare = backbone(), backbone(), encoder("base").eval()
    lora = Adapted(own, [LORA], LOADED).eval()
    groups = [Adapted(several, [delta], LOADED // len(METHODS)).eval() for delta in METHODS]
    runs = {f"{n}": partial(_one_method, lora, ids, torch.arange(ROWS) % n * (LOADED // ROWS)) for n in DISTINCT}
    runs |= {"bare": lambda: _steps(bare, ids), "mixed": lambda: _methods(groups, ids), "peft": _by_peft(ids)}
    with torch.no_grad():
        took = turns(runs, rounds, warm_up=2)
    name, bare_time = f"{STEPS} tokens for {ROWS} rows", took["bare"]
    return [
        *(pair(f"{name}, {n} of {LOADED} LoRAs: against none", took[f"{n}"], bare_time) for n in DISTINCT),
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
    return [*opening(few, many, opened), *one_layer(rounds["mini"]), *decoding(rounds["base"])]
