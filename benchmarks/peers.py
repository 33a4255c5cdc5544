"""What others do with the same examples, for `deltaprompt compare`: functions that its methods of kind "call" name.

All begin from the demo's sentence encoder, take its mean over tokens, and see nothing but the support. `pip install
setfit peft` first. An encoder of another name or folder is the option `encoder`.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deltaprompt import Example
from deltaprompt.backbone.demo import demo_folder
from deltaprompt.errors import ConfigError, nearest
from deltaprompt.study.calling import cpu_seconds
from deltaprompt.study.probe import largest

Found = tuple[list[str], dict[str, Any]]  # the labels of the test rows; what that took, and how sure each is
LINEAR = ["query", "key", "value", "dense"]  # every linear map of a BERT layer, as peft selects them


def setfit(
    train: Sequence[Example],
    dev: Sequence[Example] | None,
    test: Sequence[Example],
    labels: tuple[str, ...],
    seed: int,
    options: Mapping[str, Any],
) -> Found:
    """SetFit as its package has it: contrastive steps on pairs, then a logistic regression.

    Options are those of its `TrainingArguments`, and `most_steps`, which bounds those of its one epoch, whose number
    grows with the square of the examples.
    """
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer
    from setfit import SetFitModel, Trainer, TrainingArguments
    from transformers import set_seed

    own = dict(options)
    length, encoder, most = own.pop("max_length", None), _encoder(own), own.pop("most_steps", None)
    if most is not None and _steps([str(e.label) for e in train], own.get("batch_size", 16)) > most:
        own["max_steps"] = most
    set_seed(seed)
    body = SentenceTransformer(encoder, device="cpu")
    if length is not None:
        body.max_seq_length = length
    model = SetFitModel(model_body=body, model_head=_regression(), labels=list(labels))
    rows = Dataset.from_dict({"text": _texts(train), "label": [labels.index(str(e.label)) for e in train]})
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, seed=seed, save_strategy="no", logging_strategy="no", show_progress_bar=False, **own
        )
        begun = cpu_seconds()
        Trainer(model=model, args=arguments, train_dataset=rows).train()
        seconds = cpu_seconds() - begun
    states = model.encode(_texts(test), show_progress_bar=False)
    head = model.model_head
    trained = sum(p.numel() for name, p in body.named_parameters() if "pooler" not in name)  # which the mean leaves out
    trained += head.coef_.size + head.intercept_.size
    told = {"cpu_seconds": seconds, "trainable": trained, "bytes": 4 * trained}
    return [labels[n] for n in head.predict(states)], {**told, "confidence": largest(head, states).tolist()}


def lora_head(
    train: Sequence[Example],
    dev: Sequence[Example] | None,
    test: Sequence[Example],
    labels: tuple[str, ...],
    seed: int,
    options: Mapping[str, Any],
) -> Found:
    """peft's LoRA on every linear map, and a linear head from nothing."""
    import peft

    own = dict(options)
    rank = own.pop("rank", 8)

    def adapted(encoder: nn.Module) -> nn.Module:
        asked = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LINEAR)
        return peft.get_peft_model(encoder, asked)

    return _classified(adapted, train, test, labels, seed, {"learning_rate": 1e-3, "head_rate": 1e-2, **own})


def full(
    train: Sequence[Example],
    dev: Sequence[Example] | None,
    test: Sequence[Example],
    labels: tuple[str, ...],
    seed: int,
    options: Mapping[str, Any],
) -> Found:
    """All weights, and a linear head from nothing."""
    return _classified(
        lambda encoder: encoder, train, test, labels, seed, {"learning_rate": 5e-5, "head_rate": 1e-2, **options}
    )


def _classified(
    adapted: Any,
    train: Sequence[Example],
    test: Sequence[Example],
    labels: tuple[str, ...],
    seed: int,
    options: Mapping[str, Any],
) -> Found:
    """Trains an encoder and a head by cross-entropy, the rate falling linearly behind a tenth of warm-up.

    Options: `epochs`, `least_steps` where epochs are fewer, `most_steps` where they are more, `batch_size`,
    `learning_rate`, `head_rate`, `max_length`.
    """
    from transformers import AutoModel, AutoTokenizer, get_linear_schedule_with_warmup, set_seed

    known = {
        "epochs": 20,
        "least_steps": 60,
        "most_steps": None,
        "batch_size": 16,
        "max_length": 256,
        "weight_decay": 0.01,
    }
    own = {**known, **options}
    folder = _encoder(own)
    if odd := sorted(own.keys() - known.keys() - {"learning_rate", "head_rate"}):
        raise ConfigError(f"there is no option {odd[0]!r}{nearest(odd[0], list(known))}")
    set_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoder = adapted(AutoModel.from_pretrained(folder, add_pooling_layer=False))
    head = nn.Linear(encoder.config.hidden_size, len(labels))
    trained = [p for p in encoder.parameters() if p.requires_grad]
    gold = torch.tensor([labels.index(str(e.label)) for e in train])

    def logits(texts: list[str]) -> Tensor:
        batch = tokenizer(texts, padding=True, truncation=True, max_length=own["max_length"], return_tensors="pt")
        states, there = encoder(**batch).last_hidden_state, batch["attention_mask"].unsqueeze(2).float()
        return head((states * there).sum(1) / there.sum(1))

    begun, size = cpu_seconds(), own["batch_size"]
    rates = ((trained, own["learning_rate"]), (list(head.parameters()), own["head_rate"]))
    optimizer = torch.optim.AdamW([{"params": p, "lr": r} for p, r in rates], weight_decay=own["weight_decay"])
    steps = max(own["least_steps"], own["epochs"] * -(-len(train) // size))
    steps = min(steps, own["most_steps"] or steps)
    schedule = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    encoder.train()
    left: list[int] = []
    for _ in range(steps):
        left = left or torch.randperm(len(train)).tolist()
        now, left = left[:size], left[size:]
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits(_texts([train[i] for i in now])), gold[now]).backward()
        nn.utils.clip_grad_norm_([*trained, *head.parameters()], 1.0)
        optimizer.step()
        schedule.step()
    seconds = cpu_seconds() - begun
    encoder.eval()
    with torch.inference_mode():
        parts = [logits(_texts(test[start : start + 64])) for start in range(0, len(test), 64)]
    sure, best = torch.cat(parts).max(1)
    count = sum(p.numel() for p in [*trained, *head.parameters()])
    told = {"cpu_seconds": seconds, "trainable": count, "bytes": 4 * count, "confidence": sure.tolist()}
    return [labels[n] for n in best.tolist()], told


def _steps(labels: Sequence[str], batch_size: int) -> int:
    """Of an epoch of SetFit: as many pairs alike (a text with itself is one) as not, the fewer ones repeated."""
    counts = Counter(labels).values()
    alike = sum(n * (n + 1) // 2 for n in counts)
    unlike = (sum(counts) ** 2 - sum(n * n for n in counts)) // 2
    return -(-2 * max(alike, unlike) // batch_size)


def _regression() -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression()  # as SetFit makes its own


def _encoder(options: dict[str, Any]) -> str:
    return str(options.pop("encoder", None) or demo_folder())


def _texts(rows: Sequence[Example]) -> list[str]:
    return [row.fields["text"] for row in rows]
