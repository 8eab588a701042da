"""Changes to the file of a bank, with or without the checksums that belong to them."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from peft_xmask.bank.names import NameIndex
from peft_xmask.bank.storage import BITS, DATA_KEY, HEADER_KEY
from peft_xmask.core.adapter_folder import NAMES_PREFIX
from peft_xmask.core.files import read_tensors, write_atomically
from peft_xmask.core.tensor_file import map_tensors, write_tensor_stream

MODEL = "adapter_model.safetensors"
NAMES = ["ann", "bob", "Zoë", "ann.b", "张伟"]


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object] = lambda tensors: None, **metadata) -> None:
    """Change tensors or metadata, and write the checksums anew: what only checks of the content find."""
    tensors, notes = read_tensors(folder / MODEL)
    change(tensors)
    notes |= metadata
    write_atomically(folder / MODEL, lambda path: write_tensor_stream(path, tensors, {}, notes, DATA_KEY, HEADER_KEY))


def flip(folder: Path, key: str = BITS, byte: int = 0, bits: int = 1) -> None:
    """Flip bits of a tensor where it lies in the file, as a bad disk does."""
    path = folder / MODEL
    found = map_tensors(path)
    start = 8 + len(found.header)
    for name, tensor in found.tensors.items():
        if name == key:
            break
        start += tensor.nbytes
    content = bytearray(path.read_bytes())
    content[start + byte] ^= bits
    path.unlink()  # the old file is mapped
    path.write_bytes(content)


def set_names(tensors: dict[str, Tensor], names: list[bytes], **changed: Tensor) -> None:
    """Other names, valid or not, and an index of other ones."""
    index = NameIndex.build([f"{row}" for row in range(len(names))]).tensors
    ends = torch.tensor([len(name) for name in names]).cumsum(0)
    content = torch.frombuffer(bytearray(b"".join(names)), dtype=torch.uint8)
    index |= {"names": content, "ends": ends, **changed}
    tensors |= {NAMES_PREFIX + name: tensor for name, tensor in index.items()}
