"""Bytes per profile and load time of X-PEFT and of PEFT's own methods, measured on a BERT-base shape without a head.

Every method gets its own PEFT model on the same base, is saved with `save_pretrained`, and is loaded back. Weights are
random: neither bytes nor load times depend on what was learnt. Peers stand at PEFT's defaults unless the setting says
otherwise; where a default stores what could be made again from a seed, both ways are shown.

Columns:
  trained     numbers that receive gradients
  payload     bytes of all tensors in adapter_model.safetensors
  file        bytes of adapter_model.safetensors: payload and header
  folder      bytes of all saved files: tensor file, adapter_config.json, model card
  in file     part of the payload that is the same for every profile trained on one base (a projection, a vector bank)
  shared      memory the first profile takes and the second does not: what profiles of one model have in common
  own         memory every further profile takes
  first load  PeftModel.from_pretrained into a bare base; for X-PEFT it makes the pool
  one more    model.load_adapter of one more profile into a model that holds one

Load times are medians over rounds in which every method is loaded in turn, with their quartiles. Prints two tables and,
last, one JSON line.
"""

import argparse
import gc
import os
import tempfile
import time
import warnings
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import peft
import torch
import transformers
from peft import (
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    PeftModel,
    ShiraConfig,
    TinyLoraConfig,
    UniLoraConfig,
    VBLoRAConfig,
    VeraConfig,
    get_peft_model,
)
from rich.table import Table
from safetensors.torch import load_file
from timing import Summary, out, print_json, progress, seconds, twin

import peft_xmask
from peft_xmask import BottleneckConfig, XPEFTConfig, profile_size

METHODS = {
    # name: (setting, config, parts of the keys whose tensors are the same for every profile)
    "LoRA": ("r=8, q,v", lambda: LoraConfig(r=8, target_modules=["query", "value"]), ()),
    "LoRA r=1": ("r=1, q,v", lambda: LoraConfig(r=1, target_modules=["query", "value"]), ()),
    "VeRA": ("r=256, projections saved", lambda: VeraConfig(), ("vera_A", "vera_B")),
    "VeRA seed": ("r=256, save_projection=False", lambda: VeraConfig(save_projection=False), ("vera_A", "vera_B")),
    "VB-LoRA": ("save_only_topk_weights", lambda: VBLoRAConfig(save_only_topk_weights=True), ("vector_bank",)),
    "IA3": ("default", lambda: IA3Config(), ()),
    "TinyLoRA": ("u=64, projections saved", lambda: TinyLoraConfig(), ("tinylora_P",)),
    "TinyLoRA seed": ("u=64, save_projection=False", lambda: TinyLoraConfig(save_projection=False), ("tinylora_P",)),
    "Uni-LoRA": ("d=256", lambda: UniLoraConfig(theta_d_length=256), ()),
    "SHiRA": ("r=32, random mask", lambda: ShiraConfig(random_seed=0), ("shira_indices",)),
    "LN tuning": ("default", lambda: LNTuningConfig(), ()),
    "bottleneck": ("b=48 (ours)", lambda: BottleneckConfig(bottleneck_size=48), ()),
    "X-PEFT hard": ("N=100, b=48", lambda: XPEFTConfig(num_adapters=100), ()),
    "X-PEFT hard, no gain": ("N=100, b=48", lambda: XPEFTConfig(num_adapters=100, learn_gain=False), ()),
    "X-PEFT hard N=400": ("N=400, b=12", lambda: XPEFTConfig(num_adapters=400, bottleneck_size=12), ()),
    "X-PEFT soft": ("N=100, b=48", lambda: XPEFTConfig(num_adapters=100, mask_type="soft"), ()),
}


def bert_base():
    config = transformers.BertConfig(vocab_size=256)
    return transformers.BertModel(config, add_pooling_layer=False).eval().requires_grad_(False)


def held_bytes(model):
    """Bytes of every tensor the modules hold: parameters, buffers, and plain tensors kept in dicts."""
    storages = {}
    for module in model.modules():
        tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        for value in vars(module).values():
            if isinstance(value, dict):
                tensors += [tensor for tensor in value.values() if isinstance(tensor, torch.Tensor)]
        for tensor in tensors:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def save(base, make_config, folder):
    """Save one profile; returns how many numbers were trained."""
    torch.manual_seed(0)
    model = get_peft_model(twin(base), make_config())
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def measure_bytes(base, folder, shared_keys):
    size = profile_size(folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    in_file = sum(t.nbytes for key, t in tensors.items() if any(part in key for part in shared_keys))
    before = held_bytes(base)
    model = PeftModel.from_pretrained(twin(base), folder)
    one = held_bytes(model) - before
    model.load_adapter(folder, "second")
    own = held_bytes(model) - before - one
    return {
        "payload_bytes": size.payload_bytes,
        "file_bytes": size.file_bytes,
        "folder_bytes": size.folder_bytes,
        "shared_bytes_in_file": in_file,
        "shared_bytes_held": one - own,
        "own_bytes_held": own,
    }


def time_loads(base, folder):
    """Seconds of the first load into a bare base, and of one more profile."""
    bare, models = twin(base), []
    gc.collect()
    first = seconds(lambda: models.append(PeftModel.from_pretrained(bare, folder)))
    more = seconds(lambda: models[0].load_adapter(folder, "second"))
    return first, more


def bytes_table(results):
    table = Table(title="Bytes per profile, BERT-base shape, no head")
    table.add_column("method")
    table.add_column("setting")
    for title in ("trained", "payload", "file", "folder", "in file", "shared", "own"):
        table.add_column(title, justify="right")
    keys = ("payload_bytes", "file_bytes", "folder_bytes", "shared_bytes_in_file", "shared_bytes_held", "own_bytes_held")
    for name, facts in results.items():
        table.add_row(name, facts["setting"], *(f"{facts[key]:,}" for key in ("trained", *keys)))
    return table


def loads_table(results, loads):
    table = Table(title="Load time, ms: median (quartiles)")
    table.add_column("method")
    for title in ("first load", "one more", "rounds"):
        table.add_column(title, justify="right")
    for name in results:
        first, more = (Summary.of([1000 * pair[which] for pair in loads[name]]) for which in (0, 1))
        results[name] |= {"first_load_ms": first.as_dict(1), "one_more_load_ms": more.as_dict(1)}
        cells = (f"{s.median:.0f} ({s.quartiles[0]:.0f}-{s.quartiles[1]:.0f})" for s in (first, more))
        table.add_row(name, *cells, str(first.count))
    return table


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="rounds of loading (7)")
    parser.add_argument("--limit", type=float, default=80.0, help="no new round after this many seconds (80)")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (2)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=UserWarning)  # VeRA's and VB-LoRA's hints about what was not saved

    base, results, loads = bert_base(), {}, {name: [] for name in METHODS}
    names = list(METHODS)
    with tempfile.TemporaryDirectory() as directory, progress() as bar:
        task = bar.add_task("saving", total=len(METHODS))
        for name, (setting, make_config, shared_keys) in METHODS.items():
            folder = Path(directory) / name.replace(" ", "_")
            trained = save(base, make_config, folder)
            results[name] = {"setting": setting, "trained": trained, **measure_bytes(base, folder, shared_keys)}
            bar.advance(task)
        task = bar.add_task("loading", total=options.rounds * len(METHODS))
        start = time.perf_counter()
        for done in range(options.rounds):
            if done and time.perf_counter() - start > options.limit:
                break
            for name in names[done % len(names) :] + names[: done % len(names)]:
                loads[name].append(time_loads(base, Path(directory) / name.replace(" ", "_")))
                bar.advance(task)

    console = out()
    console.print(bytes_table(results))
    console.print(loads_table(results, loads))
    versions = f"peft {peft.__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
    console.print(f"{versions}, peft_xmask {peft_xmask.__version__}; {options.threads} threads")
    print_json(
        {
            "benchmark": "bytes_per_profile",
            "shape": "bert-base, 12 x 768, no head",
            "threads": options.threads,
            "peft": peft.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peft_xmask": peft_xmask.__version__,
            "methods": results,
        }
    )


if __name__ == "__main__":
    main()
