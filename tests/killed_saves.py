"""Kills a save at each of its steps: ``python killed_saves.py METHOD FOLDER`` prints what every kill left.

A step is an audit event of Python that touches the folder (opening, renaming, making and removing files), or one of
three moments of safetensors' own writing. Each kill happens in a forked child; the last child is not killed.
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import peft.peft_model
import torch
from peft import PeftModel, get_peft_model
from transformers import BertConfig, BertForSequenceClassification

from peft_xmask import BottleneckConfig, MagnitudeMaskConfig, WeightAdapterConfig, XPEFTConfig

CONFIGS = {
    "xpeft": lambda: XPEFTConfig(task_type="SEQ_CLS", num_adapters=12, bottleneck_size=2),
    "bottleneck": lambda: BottleneckConfig(task_type="SEQ_CLS", bottleneck_size=2),
    "magnitude_mask": lambda: MagnitudeMaskConfig(task_type="SEQ_CLS", density=0.1),
    "weight_adapter": lambda: WeightAdapterConfig(task_type="SEQ_CLS", r=2),
}
EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "shutil.copyfile")


def base() -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = dict(vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    return BertForSequenceClassification(BertConfig(**sizes)).eval()


def perturbed(model: torch.nn.Module) -> torch.nn.Module:
    """Other weights, and another config."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.1)
    model.peft_config["default"].training = {"steps": 7}
    return model


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def killed_at(step: int, model: torch.nn.Module, folder: Path) -> bool:
    """Whether a save was killed before it came to its end."""
    child = os.fork()
    if not child:
        left = [step]

        def count(*_: object) -> None:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)

        def audit(event: str, arguments: tuple) -> None:
            if event in EVENTS and str(folder) in str(arguments[:2]):
                count()

        write = peft.peft_model.safe_save_file

        def slowly(tensors, path, metadata):
            write(tensors, path, metadata)
            whole = Path(path).read_bytes()
            Path(path).write_bytes(b"")
            Path(path).write_bytes(whole[: len(whole) // 2])
            count()
            Path(path).write_bytes(whole)

        peft.peft_model.safe_save_file = slowly
        sys.addaudithook(audit)
        model.save_pretrained(folder)
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def main(method: str, temporary: Path) -> None:
    torch.set_num_threads(1)
    model = get_peft_model(base(), CONFIGS[method]()).eval()
    start, end = temporary / "old", temporary / "new"
    model.save_pretrained(start)
    readme = start / "README.md"
    readme.write_text(readme.read_text() + "\nMy own words.\n")
    perturbed(model)
    shutil.copytree(start, end)
    model.save_pretrained(end)
    old, new = files_of(start), files_of(end)
    assert old.keys() == new.keys()
    differ = [name for name in old if old[name] != new[name]]
    mixed, step, seen = [], 0, set()
    while True:
        folder = temporary / str(step)
        shutil.copytree(start, folder)
        killed = killed_at(step, model, folder)
        found = {name: content for name, content in files_of(folder).items() if not name.startswith(".")}
        which = tuple(
            "old" if found[name] == old[name] else "new" if found[name] == new[name] else "DAMAGED" for name in differ
        )
        if found.keys() != old.keys() or "DAMAGED" in which:
            mixed.append((step, which, sorted(found)))
        if killed and which not in seen and not mixed:
            PeftModel.from_pretrained(base(), folder)
        seen.add(which)
        if killed and step % 4 == 0:
            model.save_pretrained(folder)  # the next save removes what the killed one left
            if files_of(folder) != new:
                mixed.append((step, "next save", sorted(files_of(folder))))
        shutil.rmtree(folder)
        if not killed:
            break
        step += 1
    print(json.dumps({"steps": step, "files": differ, "states": sorted(seen), "damaged": mixed}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
