"""A pool of a few directions that a head reads, without training: how people may differ when they say little.

A person with twenty labels shows little more than a few numbers. So the pool lets a profile differ in a few ways only:
what the adapted module gives, along K principal directions of texts, may raise or lower each of the model's outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn

from .._version import __version__
from ..errors import ConfigError
from ..pool import AdapterPool
from ..pool.common import CommonPart, remade
from ..pool.directions import Fitting, mixing_coefficients
from ..pool.trained import SiteTensors, TrainedAdapter, stack
from ..tuners.xpeft import XPEFTConfig
from ..tuners.xpeft.layer import XPEFTLayer
from .collator import forward_columns
from .defaults import padding_collator

MOST_OUTPUTS = 4
"""Of a model with many outputs, the directions among them that its head tells apart best."""
_PLACES = ("task_type", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")


def few_directions(
    model: nn.Module,
    dataset: Sequence[Any],
    *,
    config: XPEFTConfig,
    principal: int = 3,
    size: int = 104,
    deviation: float = 0.2,
    processing_class: Any = None,
    data_collator: Callable[[list[dict[str, Any]]], Any] | None = None,
    batch_size: int = 64,
    seed: int = 0,
) -> AdapterPool:
    """Make a pool of a few directions from a model with a head and texts without labels.

    At each adapted module, whose output is y, a profile with coefficients c ``[K, J]`` adds
    ``sum_kj c_kj (d_k . (y - mean y)) w_j``. The d_k are the K principal directions in which texts differ in y; a step
    of y along w_j changes the model's outputs along their j-th direction alone, by 1. For a model with one output J is
    1; for C classes at most C - 1. Coefficients are standard normal under the prior (``prior_strength`` of training):
    one of 1 changes a typical text's output by ``deviation``. A mask chooses among ``size`` random mixtures of the K J
    ways. The common part of the pool is nothing: profiles start at the model as it is.

    Args:
        model: with a trained head whose outputs are ``logits [n, C]``. It is not modified.
        dataset: tokenised texts; labels are not looked at.
        config: which modules are adapted; the last block is usually enough. The rest of it is ignored.
        principal: K.
        size: N.
        deviation: see above, in logits, or in the unit of the labels.
        processing_class: tokenizer that pads batches.
        data_collator: makes a batch of examples. None: pads with ``processing_class`` if there is one.
        batch_size: texts in a forward pass.
        seed: of the mixtures.

    Raises:
        ConfigError: no texts; outputs of another form, or that do not depend on the adapted modules.

    Source: ours; docs/study.md, "Few directions and a prior".
    """
    collate = data_collator or padding_collator(processing_class)
    kept = forward_columns(model) - {"label", "labels", "label_ids"}
    texts = [{key: each[key] for key in each if key in kept} for each in dataset]
    if len(texts) < 2:
        raise ConfigError(f"Expected at least two texts to find directions in, found {len(texts)}.")
    batches = [collate(texts[at : at + batch_size]) for at in range(0, len(texts), batch_size)]
    training = model.training
    model.eval()
    try:
        seen = _read(model, _sites(model, config), batches)
    finally:
        model.train(training)
    common, directions = {}, {}
    for name, found in seen.items():
        common[name], directions[name] = _at_site(found, principal, deviation)
    first = next(iter(directions.values()))
    one = {name: SiteTensors(**{part: each[0] for part, each in found.parts()}) for name, found in directions.items()}
    like = stack("bottleneck", [TrainedAdapter("few directions", {}, one, "sequential", "identity", False)], None)
    ways = len(first.up)
    coefficients = mixing_coefficients(size, ways, seed)
    names = tuple(f"direction {number}" for number in range(1, size + 1))
    made = replace(remade(like, directions, names, mask_weighting="signed"), coefficients=coefficients)
    facts = {"kind": "few directions", "texts": len(texts), "deviation": deviation, "peft_xmask": __version__}
    fitting = Fitting({**facts, "principal": ways}, coefficients)
    return AdapterPool(made, None, CommonPart(remade(like, common, ("nothing",)), inside=True), fitting)


@dataclass
class _Seen:
    """What was seen of one module.

    Attributes:
        means: of each text, the mean of the module's output over its tokens, ``[n, d]`` in parts.
        slopes: sum over texts of the gradient of each output of the model, ``[C, d]``: of a step that all tokens take.
    """

    means: list[Tensor] = field(default_factory=list)
    slopes: Tensor | None = None


def _sites(model: nn.Module, config: XPEFTConfig) -> list[str]:
    """Names of the modules that the config adapts."""
    given = {name: getattr(config, name) for name in _PLACES}
    adapted: Any = get_peft_model(model, XPEFTConfig(num_adapters=2, bottleneck_size=1, **given))
    names = [name for name, module in adapted.base_model.model.named_modules() if isinstance(module, XPEFTLayer)]
    adapted.unload()
    return names


def _read(model: nn.Module, names: Sequence[str], batches: Sequence[Mapping[str, Any]]) -> dict[str, _Seen]:
    """Run the model over the texts, and see what the modules give and how its outputs depend on that."""
    seen: dict[str, _Seen] = {name: _Seen() for name in names}
    given: dict[str, Tensor] = {}

    def keep(name: str, output: Tensor) -> Tensor:
        given[name] = output if output.requires_grad else output.detach().requires_grad_()
        return given[name]

    hooks = [
        model.get_submodule(name).register_forward_hook(lambda _, __, output, name=name: keep(name, output))
        for name in names
    ]
    device = next(model.parameters()).device
    try:
        for each in batches:
            batch = {key: value.to(device) for key, value in each.items() if isinstance(value, Tensor)}
            with torch.enable_grad():
                _see(model(**batch).logits, given, batch.get("attention_mask"), seen)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _see(logits: Tensor, given: Mapping[str, Tensor], mask: Tensor | None, seen: Mapping[str, _Seen]) -> None:
    if logits.dim() != 2:
        raise ConfigError(f"Expected one row of outputs for each text, found logits of shape {tuple(logits.shape)}.")
    outputs = logits.float().sum(0)
    for name, states in given.items():
        there = torch.ones(states.shape[:2], device=states.device) if mask is None else mask.to(states.device).float()
        weights = there / there.sum(1, keepdim=True)
        seen[name].means.append(torch.einsum("ntd,nt->nd", states.detach().float(), weights).cpu())
        slopes = torch.stack(
            [
                torch.einsum("ntd,nt->d", torch.autograd.grad(output, states, retain_graph=True)[0].float(), there)
                for output in outputs
            ]
        ).cpu()
        before = seen[name].slopes
        seen[name].slopes = slopes if before is None else before + slopes


def _at_site(seen: _Seen, principal: int, deviation: float) -> tuple[SiteTensors, SiteTensors]:
    """The common part, which adds nothing, and the ways ``[K J]`` in which profiles deviate."""
    means, slopes = torch.cat(seen.means), seen.slopes
    assert slopes is not None
    slopes = slopes / len(means)
    if len(slopes) > 1:
        slopes = slopes - slopes.mean(0)  # what raises all classes alike changes nothing
    left, sizes, right = torch.linalg.svd(slopes, full_matrices=False)
    there = sizes > sizes[0] * 1e-4
    if not sizes[0] > 0:
        raise ConfigError("Expected outputs that depend on the adapted modules, found none. Train the head first.")
    kept = int(there.sum().clamp_max(MOST_OUTPUTS))
    writes = right[:kept] / sizes[:kept, None]  # [J, d]: each changes the outputs by one along its own direction
    centre = means.mean(0)
    found = torch.linalg.svd(means - centre, full_matrices=False)
    reads = found.Vh[: min(principal, len(found.Vh))]  # [K, d]
    spread = ((means - centre) @ reads.T).std(0).mean()
    k, d = reads.shape
    up = means.new_zeros(k, kept, d, k)
    for number in range(k):
        up[number, :, :, number] = writes * (deviation / spread)
    common = SiteTensors(reads[None], means.new_zeros(1, d, k), -(reads @ centre)[None], means.new_zeros(1, d))
    ways = k * kept
    zeros = SiteTensors(
        means.new_zeros(ways, k, d), up.view(ways, d, k), means.new_zeros(ways, k), means.new_zeros(ways, d)
    )
    return common, zeros
