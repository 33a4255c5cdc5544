"""`python -m benchmarks.masked_lm [FOLDER|demo]`: how well a masked language model guesses WikiText-2's test words.

Rows of 128 tokens, paragraphs one after the other, 15 % and 20 % of the tokens masked, always the same, in float32: the
text as it stands in the file, where `<unk>` is pieces to be guessed, and the text with `<unk>` as [UNK], which is never
masked nor counted, and with the marks in `@-@`, `@,@` and `@.@` undone.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from contextlib import nullcontext
from pathlib import Path

import torch

import deltaprompt as dp
from deltaprompt.pretrain import Texts
from deltaprompt.pretrain.objectives import Masked, packed
from deltaprompt.pretrain.scoring import Scorer, measured
from deltaprompt.pretrain.text import tokens_of

DATA = Path(os.environ.get("DELTAPROMPT_DATA") or Path(__file__).parents[2] / "shared" / "data")
FILE = DATA / "wikitext2" / "test.jsonl.gz"
LENGTH, BATCH, RATES = 128, 48, (0.15, 0.20)
MARK = re.compile(r" @([-,.])@ ")


def cleaned(document: str, unknown: str) -> str:
    """A paragraph without WikiText's marks."""
    return MARK.sub(r"\1", document).replace("<unk>", unknown)


def main() -> None:
    """Prints a line for each text and rate, and all of them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="demo", help="a folder, a name on the hub, or demo")
    parser.add_argument("--rows", type=int, help="rows at most, for a quick look")
    given = parser.parse_args()
    backbone = dp.load(given.model, kind="masked")
    scorer, tokenizer = Scorer(backbone, None).eval(), backbone.tokenizer
    documents = Texts(str(FILE)).read()
    texts = {"as in the file": documents, "cleaned": [cleaned(d, tokenizer.unk_token) for d in documents]}
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, own in texts.items():
        objectives = {rate: Masked.of(tokenizer, LENGTH, rate) for rate in RATES}
        first = objectives[RATES[0]]
        rows = packed(tokens_of(own, tokenizer, first.end), first.room)[: given.rows]
        for rate, objective in objectives.items():
            told = measured(scorer, objective, rows, BATCH, nullcontext)
            found.setdefault(name, {})[f"{rate:.2f}"] = told
            print(f"{name:15} {rate:.0%} masked  accuracy {told['accuracy']:.4f}  loss {told['loss']:.4f}", flush=True)
    print(json.dumps({"model": given.model, "fingerprint": backbone.fingerprint, "length": LENGTH, **found}))


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
