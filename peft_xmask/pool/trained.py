"""Down- and up-projections read from files, checked, with the scale folded in."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ..core.files import STORAGE_DTYPES
from ..core.fingerprint import digest_of, sample_signs
from ..core.sites import Site, match_names
from ..errors import ConfigError, FileFormatError, PoolMismatchError
from .slice import PoolSlice


def site_of_projections(
    where: str, parts: Mapping[str, Tensor], bottleneck_size: int, bias: bool, scale: float | Tensor
) -> SiteTensors:
    """One adapter at one site.

    Args:
        where: site and folder, for error messages.
        parts: ``down.weight [b, d_in]``, ``up.weight [d_out, b]`` and, with ``bias``, ``down.bias [b]``,
            ``up.bias [d_out]``.
        bottleneck_size: b.
        bias: whether biases are required.
        scale: a number, or a tensor of shape ``[1]`` or ``[d_out]``.

    Raises:
        FileFormatError: a part is missing or unexpected, or a shape is wrong.
    """
    names = {"down.weight", "up.weight", *(("down.bias", "up.bias") if bias else ())}
    if set(parts) != names:
        raise FileFormatError(f"Expected the tensors {sorted(names)} at {where}, found {sorted(parts)}.")
    down, up = parts["down.weight"], parts["up.weight"]
    fits = down.dim() == up.dim() == 2 and down.shape[0] == up.shape[1] == bottleneck_size
    if fits and bias:
        fits = parts["down.bias"].shape == down.shape[:1] and parts["up.bias"].shape == up.shape[:1]
    if not fits:
        shapes = {name: tuple(tensor.shape) for name, tensor in sorted(parts.items())}
        raise FileFormatError(f"Expected a bottleneck of {bottleneck_size} at {where}, found shapes {shapes}.")
    rows = scale.float().view(-1, 1) if isinstance(scale, Tensor) else scale
    return SiteTensors(
        down=down,
        up=(up.float() * rows).to(up.dtype),
        down_bias=parts.get("down.bias"),
        up_bias=(parts["up.bias"].float() * scale).to(up.dtype) if bias else None,
    )


NORM_TOLERANCE = 0.01
"""How far, relatively, a cast may move a tensor's norm."""


PARTS = ("down", "up", "down_bias", "up_bias")


@dataclass(frozen=True)
class SiteTensors:
    """Matrices at one site.

    Shapes of one adapter: ``down [b, d_in]``, ``up [d_out, b]``, ``down_bias [b]`` or None, ``up_bias [d_out]`` or
    None. Stacked, each has a leading dimension N.
    """

    down: Tensor
    up: Tensor
    down_bias: Tensor | None = None
    up_bias: Tensor | None = None

    def parts(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors that exist, by name."""
        for name in PARTS:
            tensor = getattr(self, name)
            if tensor is not None:
                yield name, tensor

    @property
    def in_features(self) -> int:
        """Width the adapters read."""
        return int(self.down.shape[-1])

    @property
    def out_features(self) -> int:
        """Width the adapters write."""
        return int(self.up.shape[-2])


@dataclass(frozen=True)
class TrainedAdapter:
    """One adapter, as read from its files.

    Attributes:
        source: folder name or Hub id.
        facts: properties that must agree before adapters can be mixed, by name.
        sites: by module name.
        insertion_form, activation, layer_norm: how the adapter is applied.
    """

    source: str
    facts: Mapping[str, object]
    sites: Mapping[str, SiteTensors]
    insertion_form: str
    activation: str
    layer_norm: bool


@dataclass(frozen=True)
class TrainedAdapters:
    """N trained adapters, stacked at each site.

    Attributes:
        kind: ``"lora"`` or ``"bottleneck"``.
        sites: stacked tensors by module name, sorted by name.
        sources: names of the N adapters.
        norms: 2-norm of each tensor when the pool was created, before any cast, to six digits.
        identity: equal only for equal tensors.
        mask_weighting: of masks over them: ``"mean"``, or ``"signed"`` for deviations from a common adapter.
        coefficients: float32 ``[N, K]``, of adapters that are mixtures: ``sites`` then has K tensors in place of N, and
            adapter n is ``sum_k coefficients[n, k] sites[k]``. None: ``sites`` has the adapters themselves.
    """

    kind: str
    insertion_form: str
    activation: str
    layer_norm: bool
    sites: Mapping[str, SiteTensors]
    sources: tuple[str, ...]
    norms: tuple[float, ...]
    identity: Hashable
    mask_weighting: str = "mean"
    coefficients: Tensor | None = None

    seed = None

    @property
    def num_adapters(self) -> int:
        """N."""
        return int((self._first.down if self.coefficients is None else self.coefficients).shape[0])

    @property
    def bottleneck_size(self) -> int:
        """Width b."""
        return int(self._first.down.shape[1])

    @property
    def dtype(self) -> torch.dtype:
        """Of all tensors."""
        return self._first.down.dtype

    @property
    def target_modules(self) -> list[str]:
        """Names of the sites, sorted."""
        return list(self.sites)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        own = 0 if self.coefficients is None else self.coefficients.nbytes
        return own + sum(tensor.nbytes for site in self.sites.values() for _, tensor in site.parts())

    @property
    def _first(self) -> SiteTensors:
        return next(iter(self.sites.values()))

    @cached_property
    def fingerprint(self) -> str:
        """Of how the adapters are applied, site names, shapes, the sign bits of all values, and the norms.

        Signs detect other adapters and norms another scale; a cast changes neither. Coefficients are never cast, so all
        of their bits count.
        """
        parts = [f"{self.kind} {self.insertion_form} {self.activation} {self.layer_norm} {self.norms}".encode()]
        if self.coefficients is not None:
            parts += [
                f"coefficients {tuple(self.coefficients.shape)}".encode(),
                self.coefficients.cpu().numpy().tobytes(),
            ]
        for name, tensor in self.tensors():
            parts += [f"{name} {tuple(tensor.shape)}".encode(), sample_signs(tensor, limit=None)]
        return digest_of(parts)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors, named ``<site>.<part>``, in the order of ``norms``."""
        for name, site in self.sites.items():
            for part, tensor in site.parts():
                yield f"{name}.{part}", tensor

    def norm_differs_at(self) -> str | None:
        """Name of a tensor whose norm differs from the recorded one by more than a cast explains; None if all agree."""
        for (name, tensor), norm in zip(self.tensors(), self.norms, strict=True):
            if not math.isclose(norm_of([tensor]), norm, rel_tol=NORM_TOLERANCE, abs_tol=NORM_TOLERANCE):
                return name
        return None

    def bind(self, sites: Sequence[Site]) -> list[PoolSlice]:
        """The slices of ``sites``, in order; see :meth:`AdapterPool.bind`."""
        partners = match_names([site.name for site in sites], list(self.sites))
        for site, partner in zip(sites, partners, strict=True):
            there = self.sites[partner]
            widths = (there.in_features, there.out_features)
            if widths != (site.in_features, site.out_features):
                raise PoolMismatchError(
                    f"The pool's adapters at '{partner}' read width {widths[0]} and write width {widths[1]}; the "
                    f"module '{site.name}' has {site.in_features} and {site.out_features}. Use a base model of "
                    "the size the pool was made for, or another pool.",
                    expected=widths,
                    found=(site.in_features, site.out_features),
                )
        return [
            PoolSlice(
                there.down, there.up, there.down_bias, there.up_bias, coefficients=self.coefficients,
                origin=(self.identity, partner),
            )
            for partner, there in ((partner, self.sites[partner]) for partner in partners)
        ]  # fmt: skip


def norm_of(tensors: Iterable[Tensor]) -> float:
    """2-norm of all values together, to six digits."""
    return float(f"{math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors)):.6g}")


class _Unique:
    """Equal only to itself: the identity of tensors created in this process."""


def stack(kind: str, adapters: Sequence[TrainedAdapter], dtype: torch.dtype | None) -> TrainedAdapters:
    """Stack adapters that agree in form, sites and rank.

    Args:
        kind: of the pool.
        adapters: as they were read.
        dtype: to store them in; None: the adapters' own if they agree on one, else float32.

    Raises:
        ConfigError: there are no adapters, they differ (the message lists each difference), values are not finite, or
            all up-projections are zero.
    """
    if not adapters:
        raise ConfigError("Expected at least one adapter to make a pool of, found none.")
    _check_agreement(adapters)
    first = adapters[0]
    renamed = [_rename(adapter, list(first.sites)) for adapter in adapters]
    dtype = dtype or _common_dtype(adapters)
    sites = {name: _stack_site([adapter.sites[name] for adapter in renamed], dtype) for name in sorted(first.sites)}
    stacked = TrainedAdapters(
        kind=kind,
        insertion_form=first.insertion_form,
        activation=first.activation,
        layer_norm=first.layer_norm,
        sites=sites,
        sources=tuple(adapter.source for adapter in adapters),
        norms=tuple(
            norm_of(getattr(adapter.sites[name], part) for adapter in renamed)
            for name, site in sites.items()
            for part, _ in site.parts()
        ),
        identity=_Unique(),
    )
    _check_values(stacked)
    return stacked


def _check_agreement(adapters: Sequence[TrainedAdapter]) -> None:
    first = adapters[0]
    differences = []
    for adapter in adapters[1:]:
        found = [
            f"{name}={adapter.facts.get(name)!r} instead of {value!r}"
            for name, value in first.facts.items()
            if None not in (value, adapter.facts.get(name)) and adapter.facts.get(name) != value
        ]
        found += _site_differences(adapter, first)
        if found:
            differences.append(f"  '{adapter.source}': {'; '.join(found)}")
    if differences:
        raise ConfigError(
            f"Expected adapters that agree with the first, '{first.source}'; {len(differences)} of {len(adapters)} do "
            "not. Leave them out, or make a pool of their own:\n" + "\n".join(differences)
        )


def _site_differences(adapter: TrainedAdapter, first: TrainedAdapter) -> list[str]:
    try:
        partners = match_names(list(adapter.sites), list(first.sites))
    except PoolMismatchError:
        extra, missing = sorted(set(adapter.sites) - set(first.sites)), sorted(set(first.sites) - set(adapter.sites))
        return [f"targets: {len(extra)} more ({extra[:3]}), {len(missing)} missing ({missing[:3]})"]
    for name, partner in zip(adapter.sites, partners, strict=True):
        shapes = {part: tuple(tensor.shape) for part, tensor in adapter.sites[name].parts()}
        expected = {part: tuple(tensor.shape) for part, tensor in first.sites[partner].parts()}
        if shapes != expected:
            return [f"shapes at '{name}': {shapes} instead of {expected}"]
    return []


def _rename(adapter: TrainedAdapter, names: list[str]) -> TrainedAdapter:
    """The adapter with the site names of the first one."""
    partners = match_names(list(adapter.sites), names)
    return replace(adapter, sites=dict(zip(partners, adapter.sites.values(), strict=True)))


def _common_dtype(adapters: Sequence[TrainedAdapter]) -> torch.dtype:
    dtypes = {part.dtype for adapter in adapters for site in adapter.sites.values() for _, part in site.parts()}
    only = dtypes.pop()
    return only if not dtypes and only in STORAGE_DTYPES else torch.float32


def _stack_site(members: Sequence[SiteTensors], dtype: torch.dtype) -> SiteTensors:
    stacked = {
        part: torch.stack([getattr(member, part).to(dtype) for member in members]) for part, _ in members[0].parts()
    }
    return SiteTensors(**stacked)


def _check_values(adapters: TrainedAdapters) -> None:
    for name, site in adapters.sites.items():
        for part, tensor in site.parts():
            if not tensor.isfinite().all():
                wrong = (~tensor.flatten(1).isfinite().all(1)).nonzero().flatten().tolist()
                names = [adapters.sources[index] for index in wrong]
                raise ConfigError(
                    f"Expected finite numbers, found inf or NaN in '{name}.{part}' of {names} "
                    f"stored as {adapters.dtype}. Leave these adapters out, or choose a dtype with more range."
                )
    if not any(site.up.any() for site in adapters.sites.values()):
        raise ConfigError(
            "The up-projections (lora_B) of all adapters are zero: every mix of them would do nothing. Expected "
            "trained adapters; these look as freshly made."
        )
