"""Bytes per profile and load time of X-PEFT and of PEFT's own methods, measured on a BERT-base shape without a head.

Every method gets its own PEFT model on the same base, is saved with `save_pretrained`, and is loaded back. Weights are
random: neither bytes nor load times depend on what was learnt. Peers stand at PEFT's defaults unless the setting says
otherwise; where a default stores what could be made again from a seed, both ways are shown.

Columns:
  trained     numbers that receive gradients
  payload     bytes of all tensors in adapter_model.safetensors
  file        bytes of adapter_model.safetensors: payload and header
  folder      bytes of all saved files: tensor file, adapter_config.json, model card
  common      part of the payload that profiles of one base have in common or could have: projections and indices made
              from a seed, factors of the base, and VB-LoRA's vector bank if it were frozen
  shared      memory the first profile takes and the second does not: what profiles of one model have in common
  own         memory of tensors that every further profile takes
  first load  PeftModel.from_pretrained into a bare base; for X-PEFT it makes the pool
  one more    model.load_adapter of one more profile into a model that holds one

Load times are medians over rounds in which every method is loaded in turn, with their quartiles; on one thread, because
small decompositions on several suffer most from other work on the machine. Prints two tables and, last, one JSON line.
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
from timing import Summary, load_average, out, print_json, progress, seconds, twin

import peft_xmask
from peft_xmask import BottleneckConfig, XPEFTConfig, profile_size

TINY_SHARED = ("tinylora_A", "tinylora_B", "tinylora_P")
Q_V = ["query", "value"]


def xpeft(num_adapters=100, bottleneck_size=48, learn_gain=True, mask_type="hard"):
    return XPEFTConfig(
        num_adapters=num_adapters, bottleneck_size=bottleneck_size, learn_gain=learn_gain, mask_type=mask_type
    )


METHODS = {
    # name: (setting, config, key parts of tensors that profiles can have in common)
    "LoRA r=8": ("q,v", lambda: LoraConfig(r=8, target_modules=Q_V), ()),
    "LoRA r=1": ("q,v", lambda: LoraConfig(r=1, target_modules=Q_V), ()),
    "VeRA": ("r=256", VeraConfig, ("vera_A", "vera_B")),
    "VeRA, seed": ("projections from seed", lambda: VeraConfig(save_projection=False), ("vera_A", "vera_B")),
    "VB-LoRA": ("top-k weights saved", lambda: VBLoRAConfig(save_only_topk_weights=True), ("vector_bank",)),
    "IA3": ("default", IA3Config, ()),
    "TinyLoRA": ("r=2, u=64", TinyLoraConfig, TINY_SHARED),
    "TinyLoRA, seed": ("projections from seed", lambda: TinyLoraConfig(save_projection=False), TINY_SHARED),
    "Uni-LoRA": ("d=256", lambda: UniLoraConfig(theta_d_length=256), ()),
    "SHiRA": ("r=8, random mask", lambda: ShiraConfig(r=8, random_seed=0), ("shira_indices",)),
    "LN tuning": ("all LayerNorms", lambda: LNTuningConfig(target_modules=["LayerNorm"]), ()),
    "bottleneck (ours)": ("b=48", lambda: BottleneckConfig(bottleneck_size=48), ()),
    "X-PEFT hard, gain": ("N=100, b=48", xpeft, ()),
    "X-PEFT hard, no gain": ("N=100, b=48", lambda: xpeft(learn_gain=False), ()),
    "X-PEFT hard, gain, N=400": ("N=400, b=12", lambda: xpeft(num_adapters=400, bottleneck_size=12), ()),
    "X-PEFT soft, gain": ("N=100, b=48", lambda: xpeft(mask_type="soft"), ()),
}
SLOW_SECONDS, SLOW_ROUNDS = 1.0, 3
"""A method whose loads take longer than this is timed in so many rounds only."""


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


def file_facts(folder, shared_keys):
    size = profile_size(folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    return {
        "payload_bytes": size.payload_bytes,
        "file_bytes": size.file_bytes,
        "folder_bytes": size.folder_bytes,
        "common_bytes_in_file": sum(t.nbytes for key, t in tensors.items() if any(part in key for part in shared_keys)),
    }


def load_twice(base, folder):
    """Load a profile into a bare base and then once more: seconds of each, and the memory each took."""
    bare = twin(base)
    before = held_bytes(bare)
    models = []
    gc.collect()
    first = seconds(lambda: models.append(PeftModel.from_pretrained(bare, folder)))
    one = held_bytes(models[0]) - before
    more = seconds(lambda: models[0].load_adapter(folder, "second"))
    own = held_bytes(models[0]) - before - one
    return (first, more), {"shared_bytes_held": one - own, "own_bytes_held": own}


def bytes_table(results):
    table = Table(title="Bytes per profile, BERT-base shape, no head")
    table.add_column("method")
    table.add_column("setting")
    for title in ("trained", "payload", "file", "folder", "common", "shared", "own"):
        table.add_column(title, justify="right")
    on_disk = ("payload_bytes", "file_bytes", "folder_bytes", "common_bytes_in_file")
    keys = (*on_disk, "shared_bytes_held", "own_bytes_held")
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


def save_all(base, folders, bar):
    results = {}
    task = bar.add_task("saving", total=len(METHODS))
    for name, (setting, make_config, shared_keys) in METHODS.items():
        trained = save(base, make_config, folders[name])
        results[name] = {"setting": setting, "trained": trained, **file_facts(folders[name], shared_keys)}
        bar.advance(task)
    return results


def load_all(base, folders, results, rounds, limit, bar):
    """Load times of every method in every round, each round starting at the next method."""
    loads, names = {name: [] for name in METHODS}, list(METHODS)
    task = bar.add_task("loading", total=rounds * len(METHODS))
    start = time.perf_counter()
    for done in range(rounds):
        if done >= SLOW_ROUNDS and time.perf_counter() - start > limit:
            break
        for name in names[done % len(names) :] + names[: done % len(names)]:
            if done < SLOW_ROUNDS or max(loads[name][0]) < SLOW_SECONDS:
                times, held = load_twice(base, folders[name])
                loads[name].append(times)
                results[name] |= held
            bar.advance(task)
    return loads


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="rounds of loading (7)")
    parser.add_argument("--limit", type=float, default=75.0, help="no new round after this many seconds (75)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (1)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    for category in (UserWarning, FutureWarning):  # what was not saved; transformers' next version
        warnings.filterwarnings("ignore", category=category)

    load = load_average()
    base = bert_base()
    with tempfile.TemporaryDirectory() as directory, progress() as bar:
        folders = {name: Path(directory) / str(index) for index, name in enumerate(METHODS)}
        results = save_all(base, folders, bar)
        loads = load_all(base, folders, results, options.rounds, options.limit, bar)

    console = out()
    console.print(bytes_table(results))
    console.print(loads_table(results, loads))
    versions = f"peft {peft.__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
    console.print(f"{versions}, peft_xmask {peft_xmask.__version__}; threads: {options.threads}, load: {load}")
    print_json(
        {
            "benchmark": "bytes_per_profile",
            "shape": "bert-base, 12 x 768, no head",
            "threads": options.threads,
            "load_average": load,
            "peft": peft.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peft_xmask": peft_xmask.__version__,
            "methods": results,
        }
    )


if __name__ == "__main__":
    main()
