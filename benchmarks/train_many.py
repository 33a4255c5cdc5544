"""Eight LoRAs train on one backbone: `fit_many` in one pass, against peft's adapters one after another (`set_adapter`).

Both start from the same numbers and see the same batches, rows tokenised and padded to the longest of their own batch,
the head at the mask rows only, AdamW, clipping and a falling rate; without dropout they end alike, which is checked.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

import deltaprompt as dp
from benchmarks.paired import Pair, pair, turns
from benchmarks.prompt_classification import ALPHA, LABELS, RANK, SIZES, bert
from deltaprompt.backbone.load import demo_folder, wrap
from deltaprompt.data import shipped
from deltaprompt.trainer.order import Order
from deltaprompt.trainer.progress import Silent

MANY, ROWS = 8, 64
STEPS = {"base": 2, "mini": 4}
ROUNDS = {"base": 5, "mini": 15}  # at most
BATCHES = (4, 8)


def plans(steps: int, batch: int) -> list[dp.Plan]:
    """As many as there are adaptations: the messages that the package ships, each plan in its own order."""
    names = list(LABELS)
    rows = [dp.Example(e.fields, names[i % 2]) for i, e in enumerate(shipped.load("train")[:ROWS])]
    training = dp.Training(steps=steps, batch_size=batch, weight_decay=0.0, learning_rate=1e-3)
    return [dp.Plan(rows, training=training, seed=seed) for seed in range(MANY)]


def ours(size: str, tokenizer: PreTrainedTokenizerFast) -> dp.Model:
    """A slot for each plan."""
    task = dp.Task("{text} It was {mask} .", LABELS)
    return dp.Model(wrap(bert(size), tokenizer, name="random"), task, [dp.LoRA(RANK, ALPHA)], range(MANY))


class Theirs:
    """peft's model with an adapter for each plan, and the loop that one writes for it."""

    def __init__(self, size: str, model: dp.Model, given: list[dp.Plan]) -> None:
        import peft

        config = peft.LoraConfig(r=RANK, lora_alpha=int(ALPHA), target_modules=["query", "value"])
        self.model = peft.get_peft_model(bert(size), config, "0")
        for number in range(1, MANY):
            self.model.add_adapter(str(number), config)
        self.given, self.features = given, model.features
        self.rows = model.encode(given[0].train)
        self.words = torch.tensor([model.features.answer_ids(word)[0] for word in LABELS.values()])
        self.begin(model)

    @torch.no_grad()
    def begin(self, model: dp.Model) -> None:
        """The numbers that ours start from."""
        starts = {name: tensor.clone() for name, tensor in model.parts()}
        self.starts = {
            f"encoder.layer.{name.split('.')[3]}.attention.self.{'query' if '.q.' in name else 'value'}": tensor
            for name, tensor in starts.items()
            if name.endswith(".a")
        }

    def parts(self, number: int) -> dict[str, Tensor]:
        """One adapter's own tensors."""
        return {name: p for name, p in self.model.named_parameters() if name.endswith(f".{number}.weight")}

    def run(self) -> list[float]:
        """Every adapter, one after another; their last losses."""
        return [self.one(number, plan) for number, plan in enumerate(self.given)]

    def one(self, number: int, plan: dp.Plan) -> float:
        """One adapter from its start."""
        self.model.set_adapter(str(number))
        chosen = [p for p in self.model.parameters() if p.requires_grad]
        with torch.no_grad():
            for name, p in self.parts(number).items():
                place = next((place for place in self.starts if f".{place}." in name), "")
                p.copy_(self.starts[place][number] if "lora_A" in name else torch.zeros_like(p))
        t = plan.training
        optimizer = torch.optim.AdamW(chosen, lr=t.learning_rate, weight_decay=0.0)
        order, loss = Order([row.length for row in self.rows], t.batch_size, 1, plan.seed), torch.zeros(())
        self.model.train()
        for step in range(t.total(order.epoch)):
            batch = self.features.collate([self.rows[i] for i in order.batches(step)[0]])
            optimizer.param_groups[0]["lr"] = t.learning_rate * t.rate(step, t.total(order.epoch))
            loss = functional.cross_entropy(self.scores(batch), batch.labels)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(chosen, t.clip)
            optimizer.step()
        return float(loss.detach())

    def scores(self, batch: Any) -> Tensor:
        """Scores of the label words at the masks."""
        inner = self.model.base_model.model
        states = inner.bert(**batch.inputs).last_hidden_state  # [b, s, d]
        at = states[torch.arange(len(states)), batch.answer_at[:, 0]]
        return (
            inner.cls.predictions.transform(at) @ inner.cls.predictions.decoder.weight[self.words].T
            + (inner.cls.predictions.bias[self.words])
        )


def competitors(size: str, batch: int) -> dict[str, Callable[[], object]]:
    """One call trains all of them from their start."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(demo_folder()))
    given = plans(STEPS[size], batch)
    model = ours(size, tokenizer)
    starts = {name: tensor.detach().clone() for name, tensor in model.parts()}
    theirs = Theirs(size, model, given)

    def many(together: int) -> list[float]:
        with torch.no_grad():
            for name, tensor in model.parts():
                tensor.copy_(starts[name])
        runs = dp.fit_many(model, given, together=together, progress=Silent())
        return [run.history[-1]["loss"] for run in runs]

    check(model, many, theirs)
    return {"together": lambda: many(MANY), "one by one": lambda: many(1), "peft": theirs.run}


def check(model: dp.Model, many: Callable[[int], list[float]], theirs: Theirs) -> None:
    """Both come to the same tensors."""
    many(MANY)
    theirs.run()
    learned = dict(model.parts())
    for number in range(MANY):
        for name, p in theirs.parts(number).items():
            _, layer, rest = name.partition("layer.")
            site = f"layers.{layer and rest.split('.')[0]}.attn.{'q' if '.query.' in rest else 'v'}"
            mine = learned[f"delta.0.{site}.{'a' if 'lora_A' in rest else 'b'}"][number]
            apart = float((p - mine).detach().norm() / mine.detach().norm())  # AdamW makes much of nearly nothing
            assert apart < 1e-2, f"{name} of adapter {number}: {apart:.1e} of its norm apart"


def run(rounds: dict[str, int]) -> list[Pair]:
    """All pairs: two sizes, two sizes of a batch."""
    pairs = []
    for size in SIZES:
        for batch in BATCHES:
            times = turns(competitors(size, batch), min(rounds[size], ROUNDS[size]))
            what = f"{MANY} LoRAs trained at once, {size}, batches of {batch}"
            for peer in ("peft", "one by one"):
                pairs.append(pair(f"{what}: against {peer}", times["together"], times[peer]))
            gc.collect()
    return pairs
