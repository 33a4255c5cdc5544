"""A shelf of tensors by key: in memory up to a cap, then in a file without a name, so that no kill leaves it behind."""

from __future__ import annotations

import shutil
import tempfile
from math import prod
from typing import IO, Final

import torch
from torch import Tensor

MEMORY: Final = 1 << 30  # bytes: 5,000 texts of 128 tokens at width 384 in float32
OF_DISK: Final = 0.5  # of what is free in the temporary folder when the file is begun

Place = tuple[int, torch.Size, torch.dtype]  # where a tensor begins in the file


class Shelf:
    """Tensors on the CPU by key; what fits neither in memory nor on the disk is not kept.

    Args:
        memory: bytes that are kept in memory at most; MEMORY where not given.
    """

    def __init__(self, memory: int | None = None) -> None:
        self.memory = MEMORY if memory is None else memory
        self.used = 0  # bytes in memory
        self.written = 0  # bytes in the file
        self._near: dict[bytes, Tensor] = {}
        self._far: dict[bytes, Place] = {}
        self._file: IO[bytes] | None = None
        self._room = 0

    def __contains__(self, key: bytes) -> bool:
        return key in self._near or key in self._far

    def __getitem__(self, key: bytes) -> Tensor:
        near = self._near.get(key)
        return self._read(*self._far[key]) if near is None else near

    def put(self, key: bytes, tensor: Tensor) -> None:
        """Keeps a copy of a tensor, where there is room."""
        size = tensor.numel() * tensor.element_size()
        if self.used + size <= self.memory:
            self._near[key] = torch.empty_like(tensor, device="cpu").copy_(tensor)
            self.used += size
            return
        file = self._opened()
        if self.written + size <= self._room:
            try:
                file.seek(self.written)
                file.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
                file.flush()
            except OSError:  # others have filled the disk since
                self._room = self.written
                return
            self._far[key] = (self.written, tensor.shape, tensor.dtype)
            self.written += size

    def close(self) -> None:
        """Nothing is kept any longer; the file is gone."""
        self._near.clear()
        self._far.clear()
        if self._file is not None:
            self._file.close()
            self._file = None

    def _opened(self) -> IO[bytes]:
        if self._file is None:
            self._room = int(shutil.disk_usage(tempfile.gettempdir()).free * OF_DISK)
            self._file = tempfile.TemporaryFile()  # noqa: SIM115  closed by `close`
        return self._file

    def _read(self, start: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        file = self._opened()
        file.seek(start)
        size = prod(shape) * torch.empty((), dtype=dtype).element_size()
        return torch.frombuffer(bytearray(file.read(size)), dtype=dtype).view(shape)
