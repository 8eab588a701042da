"""Coverage-guided fuzzing of what opens a bank. ``pip install atheris``; ``python fuzz_banks.py -max_total_time=600``.

Each input is one byte that says which file it replaces, and the file: the bank, or the config for PEFT. Any error
but ours is a find. Options are those of libFuzzer. test_faults.py runs a little of it where atheris is installed.
"""

import sys
import tempfile
import warnings
from contextlib import suppress
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["peft_xmask.profiles", "peft_xmask.core.packing", "peft_xmask.core.files"]):
    from peft_xmask.profiles import ProfileBank, verify_bank

import torch
from peft import get_peft_model
from transformers import BertConfig, BertModel

from peft_xmask import PeftXMaskError, XPEFTConfig

NAMES = ["ann", "bob", "Zoë"]


def make_files(folder):
    torch.manual_seed(0)
    sizes = dict(vocab_size=10, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8)
    config = XPEFTConfig(num_adapters=12, bottleneck_size=2, num_profiles=len(NAMES))
    bank = ProfileBank.from_model(get_peft_model(BertModel(BertConfig(**sizes)), config), NAMES)
    bank.save_pretrained(folder)
    return [folder / "adapter_model.safetensors", folder / "adapter_config.json"]


def use(where):
    with suppress(PeftXMaskError):
        bank = ProfileBank.from_pretrained(where)
        for name in NAMES:
            with suppress(KeyError):
                bank[name]
                bank.similar(name, 2)
        list(bank)
    verify_bank(where)


def main():
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as temporary:
        files = make_files(Path(temporary))
        whole = [path.read_bytes() for path in files]
        corpus = Path(temporary) / "corpus"
        corpus.mkdir()
        for number, content in enumerate(whole):
            (corpus / str(number)).write_bytes(bytes([number]) + content)

        def one(data):
            which = data[0] % len(files) if data else 0
            files[which].unlink()  # the old file may be mapped
            files[which].write_bytes(data[1:])
            try:
                use(files[which].parent)
            finally:
                files[which].unlink()
                files[which].write_bytes(whole[which])

        atheris.Setup([*sys.argv, "-max_len=8192", str(corpus)], one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
