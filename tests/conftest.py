"""What every test stands on: no network, one thread a worker, and the data folder where there is one."""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """`$DELTAPROMPT_DATA`, or `shared/data` beside the repository."""
    folder = Path(os.environ.get("DELTAPROMPT_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no data folder at {folder}; set DELTAPROMPT_DATA to one")
    return folder
