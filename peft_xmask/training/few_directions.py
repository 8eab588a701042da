"""A pool of a few directions that a head reads, made without training: for people who say little.

Twenty labels show little more of a person than a few numbers. So a profile may deviate in a few ways only: what a
module gives, along K principal directions of texts, raises or lowers each of the model's outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
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
from .collator import LABELS, forward_columns
from .defaults import padding_collator

MOST_OUTPUTS = 4
"""J at most: of a model with many outputs, those combinations of them that its head tells apart best."""

_PLACES = ("task_type", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")


def few_directions(
    model: nn.Module,
    dataset: Sequence[Mapping[str, Any]],
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
    """A pool in which profiles deviate in a few ways that the model's head reads.

    At an adapted module with output y, a profile with coefficients c ``[K, J]`` adds
    ``sum_kj c_kj (d_k . (y - mean y)) w_j``. The d_k are the K principal directions in which texts differ in their mean
    y. A step of y along w_j changes the model's outputs by 1 along the j-th of J combinations of them: of a model with
    one output J is 1, of one with C classes at most C - 1 (what raises all classes alike changes nothing). Under the
    prior of the pool, which ``prior_strength`` weighs in training and learning, coefficients are standard normal, and
    one of 1 changes the output for a typical text by ``deviation``. A mask chooses among ``size`` random mixtures of
    the K J ways. There is a common part that adds nothing, so profiles start at the model as it is.

    Args:
        model: with a trained head, and outputs ``logits [n, C]``. It is not modified.
        dataset: tokenised texts; labels are not looked at.
        config: says which modules are adapted; nothing else of it is used. The last block is usually enough.
        principal: K.
        size: N.
        deviation: see above; in logits, or in the unit of the labels.
        processing_class: tokenizer that pads batches.
        data_collator: makes a batch of examples. None: pads with ``processing_class`` if there is one.
        batch_size: texts in a forward pass.
        seed: of the mixtures.

    Raises:
        ConfigError: fewer than two texts; a number that is too small; outputs of another form, or that do not depend on
            the adapted modules.

    Source: ours; docs/study.md, "Few directions and a prior".
    """
    kept = forward_columns(model) - set(LABELS)
    texts = [{key: each[key] for key in each if key in kept} for each in dataset]
    if len(texts) < 2 or principal < 1 or not deviation > 0:
        raise ConfigError(
            "Expected at least two texts, principal= of at least 1 and a deviation= above 0, found "
            f"{len(texts)} texts, principal={principal!r} and deviation={deviation!r}."
        )
    collate = data_collator or padding_collator(processing_class)
    batches = (collate(texts[at : at + batch_size]) for at in range(0, len(texts), batch_size))
    common, ways = {}, {}
    for name, seen in _read(model, _sites(model, config), batches).items():
        common[name], ways[name] = _at_site(seen, principal, deviation)
    return _pool(common, ways, size, seed, {"texts": len(texts), "deviation": deviation})


@dataclass
class _Seen:
    """What was seen of one module.

    Attributes:
        means: of each text, the mean of the module's output over its tokens; ``[n, d]`` in parts.
        slopes: ``[C, d]``: how much each output of the model changes, summed over texts, if the module's output takes a
            step at every token.
    """

    means: list[Tensor] = field(default_factory=list)
    slopes: Tensor | float = 0.0


def _sites(model: nn.Module, config: XPEFTConfig) -> list[str]:
    """Names of the modules that a config adapts."""
    places = {name: getattr(config, name) for name in _PLACES}
    adapted: Any = get_peft_model(model, XPEFTConfig(num_adapters=2, bottleneck_size=1, **places))
    names = [name for name, module in adapted.base_model.model.named_modules() if isinstance(module, XPEFTLayer)]
    adapted.unload()
    return names


def _read(model: nn.Module, names: Sequence[str], batches: Any) -> dict[str, _Seen]:
    """Run the model over texts, to see what modules give and how the model's outputs depend on that."""
    seen = {name: _Seen() for name in names}
    given: dict[str, Tensor] = {}

    def keep(name: str, _: nn.Module, __: Any, output: Tensor) -> Tensor:
        given[name] = output if output.requires_grad else output.detach().requires_grad_()
        return given[name]

    hooks = [model.get_submodule(name).register_forward_hook(partial(keep, name)) for name in names]
    training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        for each in batches:
            batch = {key: value.to(device) for key, value in each.items() if isinstance(value, Tensor)}
            with torch.enable_grad():
                _see(model(**batch).logits, given, batch.get("attention_mask"), seen)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return seen


def _see(logits: Tensor, given: Mapping[str, Tensor], mask: Tensor | None, seen: Mapping[str, _Seen]) -> None:
    if logits.dim() != 2:
        raise ConfigError(
            f"Expected one row of outputs for each text, found logits of shape {tuple(logits.shape)}. Pass a model for "
            "classification or regression."
        )
    for name, states in given.items():
        there = states.new_ones(states.shape[:2]) if mask is None else mask.to(states)
        means = torch.einsum("ntd,nt->nd", states.detach(), there / there.sum(1, keepdim=True))
        seen[name].means.append(means.float().cpu())
        slopes = [torch.autograd.grad(output, states, retain_graph=True)[0] for output in logits.sum(0)]
        total = torch.stack([torch.einsum("ntd,nt->d", slope, there) for slope in slopes])
        seen[name].slopes = seen[name].slopes + total.float().cpu()


def _at_site(seen: _Seen, principal: int, deviation: float) -> tuple[SiteTensors, SiteTensors]:
    """The common part, which reads the K directions and writes nothing; and the K J ways."""
    means = torch.cat(seen.means)
    slopes = torch.as_tensor(seen.slopes) / len(means)
    if len(slopes) > 1:
        slopes = slopes - slopes.mean(0)
    _, sizes, combined = torch.linalg.svd(slopes, full_matrices=False)
    if not sizes[0] > 0:
        raise ConfigError("Expected outputs that depend on the adapted modules, found none. Train the head first.")
    found = int((sizes > sizes[0] * 1e-4).sum().clamp_max(MOST_OUTPUTS))
    writes = combined[:found] / sizes[:found, None]  # [J, d]
    centre = means.mean(0)
    reads = torch.linalg.svd(means - centre, full_matrices=False).Vh[:principal]  # [K, d]
    spread = ((means - centre) @ reads.T).std(0).mean()
    count, width = reads.shape
    up = means.new_zeros(count, found, width, count)
    for number in range(count):
        up[number, :, :, number] = writes * (deviation / spread)
    common = SiteTensors(
        reads[None], means.new_zeros(1, width, count), -(reads @ centre)[None], means.new_zeros(1, width)
    )
    ways = count * found
    zeros = means.new_zeros(ways, count, width), means.new_zeros(ways, count), means.new_zeros(ways, width)
    return common, SiteTensors(zeros[0], up.view(ways, width, count), zeros[1], zeros[2])


def _pool(
    common: dict[str, SiteTensors], ways: dict[str, SiteTensors], size: int, seed: int, facts: dict[str, Any]
) -> AdapterPool:
    one = {name: SiteTensors(**{part: tensor[0] for part, tensor in each.parts()}) for name, each in ways.items()}
    form = stack("bottleneck", [TrainedAdapter("few directions", {}, one, "sequential", "identity", False)], None)
    count = len(next(iter(ways.values())).up)
    coefficients = mixing_coefficients(size, count, seed)
    names = tuple(f"direction {number}" for number in range(1, size + 1))
    made = replace(remade(form, ways, names, mask_weighting="signed"), coefficients=coefficients)
    fitting = Fitting({"kind": "few directions", **facts, "peft_xmask": __version__, "principal": count}, coefficients)
    return AdapterPool(made, None, CommonPart(remade(form, common, ("nothing",)), inside=True), fitting)
