"""The options of the commands, each written once. Nothing here may import PyTorch: `--help` answers at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def _option(*names: str, help: str, panel: str | None = None, metavar: str | None = None) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, metavar=metavar, show_default=False)


DATA, TASK, MODEL, TRAINING, OUTPUT = "Data", "Task", "Backbone and deltas", "Training", "Output"

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel=OUTPUT)]
MemoryFlag = Annotated[
    bool,
    _option(
        "--memory", help="What a training step with these deltas holds: weights to kept activations.", panel=OUTPUT
    ),
]
Length = Annotated[int | None, _option("--length", help="Tokens of a text; default: 128.", panel=TRAINING, metavar="N")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.", rich_help_panel=OUTPUT)]

Train = Annotated[
    str | None,
    _option(
        "--data", help="Labelled rows: .csv .tsv .jsonl .json .parquet (.gz), or hf:name.", panel=DATA, metavar="FILE"
    ),
]
Dev = Annotated[
    str | None, _option("--dev", help="Rows to choose the best by, and to stop early by.", panel=DATA, metavar="FILE")
]
Test = Annotated[str | None, _option("--test", help="Rows to measure the result on.", panel=DATA, metavar="FILE")]
TestShare = Annotated[
    float | None,
    _option(
        "--test-share",
        help="Hold out this share of --data to measure the result on, the same rows for every seed.",
        panel=DATA,
        metavar="X",
    ),
]
Unlabelled = Annotated[
    str | None,
    _option(
        "--unlabelled",
        help="Further texts, whose labels are not read, to refine words and to calibrate by.",
        panel=DATA,
        metavar="FILE",
    ),
]
Text = Annotated[
    str | None, _option("--text", help="The column of the field {text}; default: text.", panel=DATA, metavar="COL")
]
Outside = Annotated[
    str | None,
    _option(
        "--outside",
        help="Texts that belong to none of the labels, as predict reads them: how well they are told apart (AUROC).",
        panel=DATA,
        metavar="FILE",
    ),
]
Label = Annotated[
    str | None, _option("--label", help="The column of the label; default: label.", panel=DATA, metavar="COL")
]
Fields = Annotated[
    list[str] | None,
    _option("--field", help="A further field of the template: field=column. Repeat.", panel=DATA, metavar="FIELD=COL"),
]
Support = Annotated[
    str | None,
    _option("--support", help="A few labelled rows, for what learned from episodes.", panel=DATA, metavar="FILE"),
]
Shots = Annotated[
    int | None,
    _option("--shots", help="Train on so many rows of each label, drawn by seed; 0 for none.", panel=DATA, metavar="K"),
]
NoDev = Annotated[
    bool,
    _option(
        "--no-dev", help="Hold no rows back to choose by (where no --dev is given, others are held back).", panel=DATA
    ),
]
DropEmpty = Annotated[bool, _option("--drop-empty", help="Leave out rows without a text or a label.", panel=DATA)]

Template = Annotated[str | None, _option("--template", help='Such as "{text} It was {mask}."', panel=TASK)]
Describe = Annotated[
    list[str] | None,
    _option(
        "--describe",
        "--labels",
        help="What stands for a label: label=a sentence (encoders), label=word or label=word|word (language models). "
        "Repeat, or give a file: .toml or .json with label = words in it, .txt, .csv or .jsonl with a line of words "
        "for each of the data's labels.",
        panel=TASK,
        metavar="LABEL=WORDS",
    ),
]
Order = Annotated[
    str | None,
    _option(
        "--order",
        help="The labels, with commas between, in the order of a file of words (--labels) that does not name them.",
        panel=TASK,
        metavar="A,B,…",
    ),
]
VerbalizerOption = Annotated[
    str | None,
    _option("--verbalizer", help="Such as prototypes:scale=10.", panel=TASK, metavar="KIND[:OPTION=VALUE,…]"),
]
Several = Annotated[
    bool,
    _option("--several", help="A row may have several labels: a list in the column of the label.", panel=TASK),
]
CalibrationOption = Annotated[
    str | None,
    _option(
        "--calibration",
        help="Takes away what the model would answer anyway: contextual, contextualised, batch, domain_pmi:domain=….",
        panel=TASK,
        metavar="KIND[:OPTION=VALUE,…]",
    ),
]
Generate = Annotated[
    str | None,
    _option(
        "--generate",
        help='Write texts instead: the prompt that they follow, such as "{source} =>".',
        panel=TASK,
        metavar="TEMPLATE",
    ),
]
Target = Annotated[
    str | None,
    _option(
        "--target",
        help="The column of what is to be written, a text or a list of right ones; default: target.",
        panel=DATA,
        metavar="COL",
    ),
]
ChatFlag = Annotated[
    bool, _option("--chat", help="Learn what the assistant says in conversations instead.", panel=TASK)
]
TaggingFlag = Annotated[
    bool,
    _option(
        "--tagging", help="Find spans of texts instead: named entities, slots. Rows are words and tags.", panel=TASK
    ),
]
MaxLength = Annotated[int | None, _option("--max-length", help="Tokens of a text at most.", panel=TASK, metavar="N")]

BackboneName = Annotated[
    str | None,
    _option(
        "--backbone",
        help="A folder, a name on the hub, or demo (the default): a masked language model, or where no template has a "
        "{mask} a sentence encoder.",
        panel=MODEL,
        metavar="NAME",
    ),
]
Deltas = Annotated[
    list[str] | None,
    _option(
        "--delta",
        help="Such as lora:rank=16,at=attn.q+attn.v (a list is joined by +). Repeat; none for no delta. "
        "Default: LoRA on every linear map of the layers.",
        panel=MODEL,
        metavar="KIND[:OPTION=VALUE,…]",
    ),
]
Counted = Annotated[
    list[str] | None,
    _option("--delta", help="Such as lora:rank=16: its sites and its cost. Repeat.", panel=MODEL, metavar="KIND[:…]"),
]
Device = Annotated[
    str | None, _option("--device", help="cpu, cuda, cuda:1, mps; default: the best there is.", panel=MODEL)
]
Dtype = Annotated[str | None, _option("--dtype", help="float32 (the default), bfloat16, float16, auto.", panel=MODEL)]
StoredDtype = Annotated[
    str | None,
    _option("--dtype", help="float32, bfloat16, float16; default: as stored, with --memory float32.", panel=MODEL),
]

Seeds = Annotated[
    str | None, _option("--seeds", help="Such as 0-4 or 0,3,7; default: 0.", panel=TRAINING, metavar="SEEDS")
]
Grid = Annotated[
    list[str] | None,
    _option(
        "--grid",
        help="Try several, each with each: learning_rate=1e-4,5e-4, shots=4,16, template=TEXT, labels=FILE (the last "
        "two once a value). Repeat.",
        panel=TRAINING,
        metavar="NAME=VALUE",
    ),
]
Together = Annotated[
    int | None,
    _option(
        "--together",
        help="Seeds, and cells of a grid, that train in one pass: the same result, less memory with less. Default: 8.",
        panel=TRAINING,
        metavar="N",
    ),
]
Epochs = Annotated[
    int | None,
    _option("--epochs", help="Passes over the rows; default: 6, but 30 steps at least.", panel=TRAINING, metavar="N"),
]
Steps = Annotated[
    int | None, _option("--steps", help="Optimizer steps, instead of epochs.", panel=TRAINING, metavar="N")
]
BatchSize = Annotated[
    int | None, _option("--batch-size", help="Rows at once; default: 16.", panel=TRAINING, metavar="N")
]
LearningRate = Annotated[
    float | None, _option("--learning-rate", "--lr", help="Of the deltas; default: 5e-4.", panel=TRAINING, metavar="X")
]
Precision = Annotated[
    str | None, _option("--precision", help="no (the default), bf16, fp16.", panel=TRAINING, metavar="P")
]
Checkpointing = Annotated[
    bool,
    _option("--checkpointing", help="Less memory, a third more time: layers are computed again.", panel=TRAINING),
]

Out = Annotated[
    str | None, _option("--out", help="The folder that keeps what is learned.", panel=OUTPUT, metavar="DIR")
]
Resume = Annotated[bool, _option("--resume", help="Go on with the run that was broken off in --out.", panel=OUTPUT)]

RecipeFile = Annotated[
    Path | None,
    typer.Argument(
        help="A recipe, TOML; options override it. Paths in it are relative to where you are.", metavar="[RECIPE.toml]"
    ),
]
PretrainFile = Annotated[
    Path, typer.Argument(help="A recipe, TOML. Paths in it are relative to where you are.", metavar="RECIPE.toml")
]
Folder = Annotated[Path, typer.Argument(help="The folder of a saved adaptation.", metavar="FOLDER")]
EachBatch = Annotated[int, typer.Option("--batch-size", help="Rows at once.", min=1, metavar="N")]
OtherBackbone = Annotated[
    str | None,
    _option("--backbone", help="Where the backbone is now, if not under the name it was adapted by.", metavar="NAME"),
]
