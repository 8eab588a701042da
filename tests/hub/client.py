"""What users do with adapters, pools and the Hub. A script: ``client.py push|load|stranger FOLDER``."""

import json
import sys
from pathlib import Path

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.constants import HF_HUB_OFFLINE
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification, TrainingArguments

from peft_xmask import AdapterPool, BottleneckConfig, MagnitudeMaskConfig, WeightAdapterConfig, XPEFTConfig

BASE = "sentence-transformers/all-MiniLM-L6-v2"
BATCH = {"input_ids": torch.arange(1, 21).reshape(4, 5), "attention_mask": torch.ones(4, 5).long()}
ADAPTERS = {
    "xpeft": ("ann/xpeft", {}),
    "xpeft on a branch": ("ann/xpeft", {"revision": "second"}),
    "private": ("ann/private", {}),
    "bottleneck": ("ann/bottleneck", {}),
    "masked": ("ann/masked", {}),
    "biases": ("ann/biases", {}),
    "default of two": ("ann/two", {}),
    "other of two": ("ann/two", {"subfolder": "other"}),
    "over a pool": ("ann/over-pool", {}),
    "over a pool on a branch": ("ann/over-branch", {}),
    "over a pool in a subfolder": ("ann/over-subfolder", {}),
    "around a common part": ("ann/over-common", {}),
    "over a fitted pool": ("ann/over-fitted", {}),
}
POOLS = {
    "pool": ("ann/pool", {}),
    "pool on a branch": ("ann/pool", {"revision": "larger"}),
    "pool in a subfolder": ("ann/pools", {"subfolder": "some/larger"}),
    "random pool": ("ann/random-pool", {}),
    "pool that was another": ("ann/private-pool", {}),
    "pool with a common part": ("ann/common-pool", {}),
    "fitted pool": ("ann/fitted-pool", {}),
}


def base() -> torch.nn.Module:
    return AutoModelForSequenceClassification.from_pretrained(BASE).eval()


def shake(model: torch.nn.Module) -> torch.nn.Module:
    """As after a training: nothing is as it was initialised."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def adapted(config) -> torch.nn.Module:
    return shake(get_peft_model(base(), config))


def outputs(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**BATCH).logits


def xpeft(**fields) -> XPEFTConfig:
    return XPEFTConfig(task_type="SEQ_CLS", **{"num_adapters": 12, "bottleneck_size": 4, **fields})


def bottleneck() -> BottleneckConfig:
    return BottleneckConfig(task_type="SEQ_CLS", bottleneck_size=4)


def push_adapters() -> dict[str, Tensor]:
    model = adapted(xpeft())
    model.push_to_hub("ann/xpeft")
    expected = {"xpeft": outputs(model)}
    shake(model).push_to_hub("ann/xpeft", revision="second")
    expected["xpeft on a branch"] = outputs(model)
    model.push_to_hub("ann/private", private=True)
    expected["private"] = outputs(model)
    model = adapted(bottleneck())
    model.push_to_hub("ann/bottleneck")
    expected["bottleneck"] = outputs(model)
    model = adapted(MagnitudeMaskConfig(task_type="SEQ_CLS", density=0.1, storage_dtype="bfloat16"))
    model.push_to_hub("ann/masked")
    expected["masked"] = outputs(model)
    model = adapted(WeightAdapterConfig(task_type="SEQ_CLS", r=4, storage_dtype="float16"))
    model.push_to_hub("ann/biases")
    expected["biases"] = outputs(model)
    model = adapted(xpeft())
    model.add_adapter("other", xpeft(pool_seed=5))
    model.push_to_hub("ann/two")
    expected["default of two"] = outputs(model)
    model.set_adapter("other")
    expected["other of two"] = outputs(model)
    return expected


def push_pools(folder: Path) -> dict[str, str]:
    for index in range(4):
        adapted(bottleneck()).save_pretrained(folder / f"source-{index}")
    first, larger = (
        AdapterPool.from_bottleneck([folder / f"source-{index}" for index in which]) for which in ([0, 1], [1, 2, 3])
    )
    address = first.push_to_hub("ann/pool")
    assert address.endswith(f"/ann/pool/commit/{HfApi().repo_info('ann/pool').sha}"), address
    larger.push_to_hub("ann/pool", revision="larger")
    assert larger.name_or_path == "ann/pool@larger"
    larger.save_pretrained(folder / "larger")
    HfApi().create_repo("ann/pools")
    HfApi().upload_folder(repo_id="ann/pools", folder_path=folder / "larger", path_in_repo="some/larger")
    random = AdapterPool.random(7, 3, seed=11)
    random.push_to_hub("ann/random-pool")
    larger.push_to_hub("ann/private-pool", private=True)
    random.push_to_hub("private-pool")
    assert random.name_or_path == "ann/private-pool"
    common = random.with_common(folder / "source-0")
    common.push_to_hub("ann/common-pool")
    fitted = fit(folder / "fitting")
    fitted.push_to_hub("ann/fitted-pool")
    pools = [first, larger, larger, random, random, common, fitted]
    return {name: pool.fingerprint for name, pool in zip(POOLS, pools, strict=True)}


def fit(folder: Path) -> AdapterPool:
    """A pool fitted to three people, in a few steps."""
    rows = torch.randint(1, 60, (24, 5), generator=torch.Generator().manual_seed(0)).tolist()
    data = [
        {"input_ids": ids, "attention_mask": [1] * 5, "labels": (ids[0] + place) % 3, "user": "abc"[place % 3]}
        for place, ids in enumerate(rows)
    ]
    args = TrainingArguments(str(folder), num_train_epochs=1, learning_rate=1e-2, report_to=[], use_cpu=True)
    return AdapterPool.fit(
        base(), data, args=args, config=bottleneck(), size=12, group_steps=3, min_examples=2, progress=False
    )


def push_over_pools() -> dict[str, Tensor]:
    pools = {
        "over a pool": "ann/pool",
        "over a pool on a branch": AdapterPool.from_pretrained("ann/pool", revision="larger"),
        "over a pool in a subfolder": AdapterPool.from_pretrained("ann/pools", subfolder="some/larger"),
        "around a common part": "ann/common-pool",
        "over a fitted pool": "ann/fitted-pool",
    }
    expected = {}
    for name, pool in pools.items():
        model = adapted(xpeft(pool=pool))
        model.push_to_hub(ADAPTERS[name][0])
        expected[name] = outputs(model)
    return expected


def push(folder: Path) -> None:
    torch.manual_seed(0)
    expected = push_adapters()
    fingerprints = push_pools(folder)
    save_file(expected | push_over_pools(), folder / "expected.safetensors")
    (folder / "fingerprints.json").write_text(json.dumps(fingerprints))


def load_adapter(where: str, subfolder: str | None = None, **kwargs) -> torch.nn.Module:
    if subfolder and HF_HUB_OFFLINE:  # PEFT 0.21.2 then looks for <subfolder>/<subfolder>
        where, subfolder = f"{snapshot_download(where, allow_patterns=f'{subfolder}/*')}/{subfolder}", None
    return PeftModel.from_pretrained(base(), where, subfolder=subfolder, **kwargs).eval()


def load(folder: Path) -> None:
    found = {name: load_adapter(where, **kwargs) for name, (where, kwargs) in ADAPTERS.items()}
    save_file({name: outputs(model) for name, model in found.items()}, folder / "found.safetensors")
    pools = {name: AdapterPool.from_pretrained(where, **kw) for name, (where, kw) in POOLS.items()}
    facts = {name: [pool.fingerprint, pool.name_or_path] for name, pool in pools.items()}
    (folder / "pools.json").write_text(json.dumps(facts))


def stranger(folder: Path) -> None:
    """What someone without the right token, or with a wrong name, is told."""
    calls = {
        "private pool": lambda: AdapterPool.from_pretrained("ann/private-pool"),
        "private pool, wrong token": lambda: AdapterPool.from_pretrained("ann/private-pool", token="no-token"),
        "private pool, other user": lambda: AdapterPool.from_pretrained("ann/private-pool", token="token-of-ben"),
        "private pool in a config": lambda: get_peft_model(base(), xpeft(pool="ann/private-pool")),
        "missing revision": lambda: AdapterPool.from_pretrained("ann/pool", revision="third"),
        "missing revision in the name": lambda: AdapterPool.from_pretrained("ann/pool@third"),
        "two revisions": lambda: AdapterPool.from_pretrained("ann/pool@larger", revision="third"),
        "an adapter, not a pool": lambda: AdapterPool.from_pretrained("ann/xpeft"),
        "no id": lambda: AdapterPool.from_pretrained("not//an id"),
        "push without a token": lambda: AdapterPool.random(5, 2).push_to_hub("ann/new-pool"),
        "push to another's": lambda: AdapterPool.random(5, 2).push_to_hub("ann/new-pool", token="token-of-ben"),
        "private adapter": lambda: PeftModel.from_pretrained(base(), "ann/private"),
    }
    told = {}
    for name, call in calls.items():
        try:
            call()
        except Exception as error:
            told[name] = [type(error).__name__, str(error)]
        else:
            told[name] = ["nothing", ""]
    opened = AdapterPool.from_pretrained("ann/private-pool", token="token-of-ann")
    told["with the token"] = ["nothing", opened.fingerprint]
    (folder / "told.json").write_text(json.dumps(told))


if __name__ == "__main__":
    {"push": push, "load": load, "stranger": stranger}[sys.argv[1]](Path(sys.argv[2]))
