"""What an adapter records of its base: a fingerprint of the adapted weights, and one of a LoRA beneath it.

``8b1c...`` is a base without a LoRA, ``8b1c...+77aa...`` one with a LoRA, and ``+77aa...`` a quantised one with a LoRA.
"""

from __future__ import annotations

from torch import nn

from ...core.fingerprint import digest_of, fingerprint_weights
from ...errors import BaseMismatchError
from .beneath import THE_WAY, layers_of_others

_BASE_AND_LORA = "+"


def fingerprint_lora(model: nn.Module, own: type) -> str:
    """Fingerprint of the active LoRAs of a base; empty without any."""
    parts: list[bytes] = []
    for name, layer in layers_of_others(model, own):
        inside, plain = f"{name}.base_layer.", name.replace(".base_layer", "")  # which is added by an adapter on top
        for active in sorted(layer.active_adapters):
            entries = {
                key: tensor
                for key, tensor in layer.named_parameters(prefix=name)
                if not key.startswith(inside) and f".{active}." in f"{key}."
            }
            if not entries:
                continue
            scaling = float(layer.scaling[active])
            signs = fingerprint_weights(entries[key] for key in sorted(entries))
            names = sorted(key.removeprefix(name).replace(f".{active}", "") for key in entries)
            parts += [repr((plain, names, f"{scaling:.6g}", signs)).encode()]
    return digest_of(parts) if parts else ""


def joined(weights: str | None, lora: str) -> str | None:
    """What is recorded of a base: the fingerprint of its weights, and that of the LoRA beneath."""
    return f"{weights or ''}{_BASE_AND_LORA}{lora}" if lora else weights


def check_fingerprint(expected: str | None, found: str | None, base_name: str | None) -> str | None:
    """Compare what is recorded of a base with the base at hand. Both are as in :func:`joined`.

    Returns:
        What is known of the base.

    Raises:
        BaseMismatchError: they differ.
    """
    if expected is None:
        return found
    weights, _, lora = expected.partition(_BASE_AND_LORA)
    found_weights, _, found_lora = (found or "").partition(_BASE_AND_LORA)
    if weights and found_weights and weights != found_weights:
        raise BaseMismatchError(
            f"This adapter was made for a base whose adapted weights have fingerprint {expected}; the base at hand has "
            f"{found}. Load the base it was trained on (base_model_name_or_path: {base_name!r}). To use it on another "
            "base on purpose, load its config, call config.allow_any_base(), and pass that config.",
            expected=expected,
            found=found,
        )
    if lora != found_lora:
        says = [
            f"a LoRA beneath it with fingerprint {each}" if each else "no LoRA beneath it"
            for each in (lora, found_lora)
        ]
        raise BaseMismatchError(
            f"This adapter was made for a base with {says[0]}; the base at hand has {says[1]}. Load the same LoRA and "
            f"pass {THE_WAY}, or PeftModel.from_pretrained(as_base(lora_model), folder). To use it on another base on "
            "purpose, load its config, call config.allow_any_base(), and pass that config.",
            expected=expected,
            found=found,
        )
    return joined(found_weights or weights or None, lora)


def renewed(recorded: str | None, lora: str) -> str | None:
    """What is recorded of a base, with another LoRA active in it."""
    weights = (recorded or "").partition(_BASE_AND_LORA)[0]
    return joined(weights or None, lora)
