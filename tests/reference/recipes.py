"""How every method is built on the tiny models: the fields it needs, or that make it fit widths of 16 and 24."""

import contextlib
import sys
import tempfile
from pathlib import Path

import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, LoraConfig, PeftType, get_peft_model

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "conformance"))
from architectures import ARCHITECTURES

VIRTUAL = {"num_virtual_tokens": 5}
FIELDS = {
    "ADALORA": {"total_step": 10},
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 1},
    "BOFT": {"boft_block_size": 4},
    "BOTTLENECK_ADAPTER": {"bottleneck_size": 6},
    "C3A": {"block_size": 4},
    "CARTRIDGE": VIRTUAL,
    "DEFT": {"r": 3},
    "LORA": {"r": 3},
    "CPT": {"cpt_token_ids": [3, 4, 5], "cpt_mask": [1, 1, 1], "cpt_tokens_type_mask": [1, 2, 3]},
    "FOURIERFT": {"n_frequency": 20},
    "FROD": {"progressbar": False, "sparse_rate": 0.1},
    "LILY": {"r": 4},
    "MISS": {"r": 4},
    "MULTITASK_PROMPT_TUNING": {**VIRTUAL, "num_tasks": 3},
    "OFT": {"oft_block_size": 4},
    "P_TUNING": {**VIRTUAL, "encoder_hidden_size": 7},
    "POLY": {"r": 2},
    "PREFIX_TUNING": VIRTUAL,
    "PROMPT_TUNING": VIRTUAL,
    "PSOFT": {"r": 4},
    "PVERA": {"r": 6},
    "RANDLORA": {"r": 3},
    "ROAD": {"group_size": 4},
    "SHIRA": {"r": 2},
    "SUPERTUNING": {"sparsity": 0.9},
    "TINYLORA": {"u": 5},
    "TRAINABLE_TOKENS": {"token_indices": [3, 4]},
    "UNILORA": {"theta_d_length": 30},
    "VBLORA": {"num_vectors": 5, "vector_length": 4},
    "VERA": {"r": 6},
    "WAVEFT": {"n_frequency": 20},
    "XPEFT": {"num_adapters": 12, "bottleneck_size": 6},
    "MAGNITUDE_MASK": {"density": 0.05},
    "WEIGHT_ADAPTER": {"target": "weight", "r": 3, "adapter_bias": False, "activation": "gelu"},
}
BASES = {architecture.name: architecture for architecture in ARCHITECTURES if architecture.name != "mlp"}
TARGETS = {"bert": ["query", "value"], "llama": ["q_proj", "v_proj"], "gpt2": ["c_attn"], "t5": ["q", "v"]}
NORMS = {"bert": ["LayerNorm"]}


class DoesNotFitError(Exception):
    """A method cannot be placed on this base; the message is PEFT's."""


def config_of(method: str, base: str, **fields):
    config_cls = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(method)]
    return config_cls(**{"task_type": BASES[base].fields["task_type"], **FIELDS.get(method, {}), **fields})


def build_base(base: str, layers: int | None = None):
    model = BASES[base].build()
    if layers is not None:
        config = model.config
        config.num_hidden_layers = layers
        torch.manual_seed(0)
        model = type(model)(config).eval()
    return model


def build(method: str, base: str = "llama", layers: int | None = None, **fields):
    """A PEFT model with one adapter of the method, where PEFT has no default targets on q and v (BERT's norms)."""
    if method == "XLORA":
        return build_xlora(base)
    model = build_base(base, layers)
    torch.manual_seed(1)
    try:
        return get_peft_model(model, config_of(method, base, **fields))
    except (ValueError, TypeError, NotImplementedError, AttributeError) as error:
        words = str(error)
        if not any(part in words for part in ("specify `target_modules`", "Unable to automatically find")):
            raise DoesNotFitError(words) from error
    targets = NORMS.get(base, TARGETS[base]) if method == "LN_TUNING" else TARGETS[base]
    if method == "SHADOW":
        raise DoesNotFitError("blocks of a decoder only")
    try:
        return get_peft_model(build_base(base, layers), config_of(method, base, target_modules=targets, **fields))
    except (ValueError, TypeError, NotImplementedError) as error:
        raise DoesNotFitError(str(error)) from error


def build_xlora(base: str):
    """X-LoRA over two LoRA adapters, which it wants as folders."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("0", "1"):
            get_peft_model(
                build_base(base), LoraConfig(r=3, init_lora_weights=False, task_type=BASES[base].fields["task_type"])
            ).save_pretrained(f"{folder}/{name}")
        model = build_base(base)
        model.config.use_cache = False
        torch.manual_seed(1)
        adapters = {name: f"{folder}/{name}" for name in ("0", "1")}
        try:
            return get_peft_model(model, config_of("XLORA", base, hidden_size=16, adapters=adapters))
        except (ValueError, TypeError, AttributeError, NotImplementedError) as error:
            raise DoesNotFitError(str(error)) from error


def stir(model, adapter_name: str = "default", seed: int = 7) -> None:
    """Change every trainable parameter, so that no part of an adapter is idle."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


@contextlib.contextmanager
def saved(model):
    """A folder with the model's adapter in it."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        yield Path(folder)


def logits(model, base: str = "llama", **kwargs):
    with torch.no_grad():
        out = model(**BASES[base].batch, **kwargs)
    return out[0] if not hasattr(out, "logits") else out.logits
