"""A profile as the path of a LoRA: ``/peft-xmask/1/<settings>/<masks>``. No file lies there.

``<settings>`` is a digest of all that decides what masks mean: the pool, the base, the sites and the kind of masks.
``<masks>`` are the profile's bytes in URL-safe base64: hard masks or soft logits ``[2, S, W]``, then gains ``[S, 2]``.
The path starts with a slash because vLLM leaves absolute paths alone.
"""

from __future__ import annotations

import base64
import binascii
import math

import torch

from ...bank.profile import Profile
from ...core.fingerprint import digest_of_facts
from ...errors import FileFormatError, MaskFormatError, PoolMismatchError
from ...tuners.xpeft import XPEFTConfig
from ...tuners.xpeft.spec import MaskSpec

SCHEME = "/peft-xmask/1/"


def settings_digest(config: XPEFTConfig, spec: MaskSpec) -> str:
    """16 hexadecimal digits that change with everything that decides what a profile's bytes mean."""
    return digest_of_facts(
        {
            "pool": config.pool_fingerprint,
            "base": config.base_fingerprint,
            "form": config.insertion_form,
            "sites": spec.num_sites,
            "adapters": spec.num_adapters,
            "mask_type": spec.mask_type,
            "top_k": spec.top_k,
            "weighting": spec.weighting,
            "scale": None if spec.learn_gain else spec.scale,
            "learn_gain": spec.learn_gain,
        }
    )


def path_of(profile: Profile, digest: str) -> str:
    """The path of a profile.

    Args:
        profile: with masks that were checked.
        digest: :func:`settings_digest` of its bank.
    """
    data = profile.bits.numpy().tobytes()
    if profile.gain_bits is not None:
        data += profile.gain_bits.numpy().tobytes()
    return f"{SCHEME}{digest}/{base64.urlsafe_b64encode(data).decode()}"


def is_profile(path: str) -> bool:
    """Whether a path of a LoRA is that of a profile."""
    return path.startswith(SCHEME)


def profile_at(path: str, spec: MaskSpec, digest: str) -> Profile:
    """The profile that a path holds.

    Args:
        path: from :func:`path_of`.
        spec: of the bank that is served.
        digest: :func:`settings_digest` of that bank.

    Raises:
        PoolMismatchError: a profile of a bank with other settings.
        FileFormatError, MaskFormatError: not the path of a profile, or damaged masks.
    """
    found, _, encoded = path.removeprefix(SCHEME).partition("/")
    if not is_profile(path) or not encoded:
        raise FileFormatError(f"Expected a path {SCHEME}<settings>/<masks>, found {path[:60]!r}.")
    if found != digest:
        raise PoolMismatchError(
            f"This profile belongs to a bank with other settings ({found}) than the bank that this server was started "
            f"with ({digest}). Restart the server to serve a bank of another pool or base.",
            expected=digest,
            found=found,
        )
    try:
        data = bytearray(base64.b64decode(encoded, altchars=b"-_", validate=True))
    except (binascii.Error, ValueError) as error:
        raise FileFormatError(f"The masks in a profile's path are not base64: {error}.") from error
    bits_shape, gain_shape = spec.bits_shape[1:], spec.gain_shape[1:]
    bits_size, gain_size = math.prod(bits_shape), math.prod(gain_shape) if spec.learn_gain else 0
    if len(data) != bits_size + gain_size:
        raise MaskFormatError(f"Expected {bits_size + gain_size} bytes of masks and gains, found {len(data)}.")
    flat = torch.frombuffer(data, dtype=torch.uint8)
    gains = flat[bits_size:].view(gain_shape) if spec.learn_gain else None
    profile = Profile(flat[:bits_size].view(bits_shape), gains)
    spec.check(profile.bits.unsqueeze(0), None if gains is None else gains.unsqueeze(0))
    return profile
