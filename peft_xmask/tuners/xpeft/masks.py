"""Everything that belongs to one adapter of a model, but for the tensors' place among its modules.

Trained state is ``xpeft_logits.<name>.weight [P, 2*S*N]`` and ``xpeft_gain.<name>.weight [P, S]``; shipped state is
``xpeft_bits.<name>.weight`` and ``xpeft_gain_bits.<name>.weight``: bytes, see
:class:`~peft_xmask.tuners.xpeft.spec.MaskSpec`.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ...core.masks import pick_rows, require
from ...core.packing import unpack_halves
from ...errors import ConfigError, MaskFormatError, PeftXMaskWarning
from ...pool.directions import Fitting
from ..base.sharded import writable
from ..base.state import PackedTensor, TrainableTensor, lazy_zeros
from ..base.steps import count_steps, steps_taken
from .cache import MixedAdapterCache, same_source
from .logits import LogitForm
from .mixing import ActiveAdapters, MixedRows, RowMasks, masks_from_bits
from .passes import ForwardPass, choose_row, chosen_row, number_of, row_in_graph
from .spec import MaskSpec

BASE = "__base__"
"""The name of row -1, which adds no deviation."""

INIT_STD = 0.01
"""Standard deviation of the logits where a single profile over a random pool starts."""
_LOADING = threading.Lock()


class Names(Protocol):
    """Names of rows."""

    def find(self, name: str) -> int | None:
        """Row of a name; None if there is no such name."""


class AdapterMasks:
    """The masks of one adapter: as they are trained, as they are shipped, and as a forward pass uses them.

    An adapter made for training has logits, and bytes that stay zero unless a file is loaded into them; an adapter made
    for inference has bytes only. :meth:`serving` gives another object for other bytes, so whoever holds this one keeps
    seeing what it saw.

    Args:
        name: of the adapter.
        spec: what its masks are.
        trainable: whether it has logits.
        logit_scale: logits are ``logit_scale`` times what is trained.
        temperature: of the softmax, or of the estimator's surrogate.
        gumbel_noise: size of the noise on logits in training.
        fitting: of the pool, if it was fitted: where hard masks start, and the prior of how far they go.

    Attributes:
        form: how what is trained becomes masks and bytes.
        logits, gain: modules with what is trained; None if the adapter, or its gain, is not trained.
        bits, gain_bits: modules with what is shipped.
        offset_bits: a module with half-precision offsets of the outputs, ``[P, 2 * C]``; None without offsets.
        names: of rows, where they have names.
        rebuilt: whether the logits were rebuilt from bits, and so are not those that were trained.
        cache: of mixed adapters.
    """

    def __init__(
        self,
        name: str,
        spec: MaskSpec,
        *,
        trainable: bool,
        logit_scale: float,
        temperature: float,
        gumbel_noise: float,
        fitting: Fitting | None = None,
    ) -> None:
        self.form = LogitForm(name, spec, logit_scale, temperature, fitted=fitting is not None)
        self.name, self.fitting, self.gumbel_noise = name, fitting, gumbel_noise
        self.names: Names | None = None
        self.rebuilt = False
        self.cache = MixedAdapterCache()
        self.logits: TrainableTensor | None = None
        self.gain: TrainableTensor | None = None
        self.gain_bits: PackedTensor | None = None
        self.offset_bits: PackedTensor | None = None
        self._number = number_of(self)
        self._was_chosen = False
        self._inbox: tuple[Tensor, int | None] | None = None
        self._warned = False
        try:
            if trainable:
                self._start_training()
            else:
                self._start_serving()
        except (OSError, MemoryError, OverflowError, RuntimeError) as error:
            width = math.prod(spec.logits_shape[1:]) * 4 if trainable else math.prod(spec.bits_shape[1:])
            raise ConfigError(
                f"num_profiles={spec.num_profiles:,} is too large for this machine: their masks take "
                f"{spec.num_profiles * width:,} bytes. Train fewer profiles at a time; a bank joins them."
            ) from error

    def _start_training(self) -> None:
        """The masks of one profile start at random (torch's generator), unless the pool was fitted.

        Of several, all start from the first ``top_k`` adapters (logits of zero): no start is better than another, and a
        head that they share sees one model at first. Memory is taken row by row, as profiles are trained.
        """
        count_steps()
        spec, rows, width = self.spec, self.spec.num_profiles, math.prod(self.spec.logits_shape[1:])
        random = rows == 1 and not self.form.has_start
        drawn = torch.randn(1, width) * (INIT_STD / self.form.logit_scale) if random else lazy_zeros(rows, width)
        self.logits = TrainableTensor(drawn)
        self.bits = PackedTensor(lazy_zeros(*spec.bits_shape, dtype=torch.uint8))
        if spec.learn_gain:
            self.gain = TrainableTensor(lazy_zeros(rows, spec.num_sites))
            self.gain_bits = PackedTensor(lazy_zeros(*spec.gain_shape, dtype=torch.uint8))

    def _start_serving(self) -> None:
        spec = self.spec
        drawn = torch.randn(1, math.prod(spec.logits_shape[1:])) * (INIT_STD / self.form.logit_scale)
        bits, gain_bits = self.form.pack(drawn, torch.zeros(1, spec.num_sites))
        self.bits = PackedTensor(bits.repeat(spec.num_profiles, 1, 1, 1))
        if spec.learn_gain:
            self.gain_bits = PackedTensor(gain_bits.repeat(spec.num_profiles, 1, 1))

    @property
    def spec(self) -> MaskSpec:
        """What its masks are."""
        return self.form.spec

    @property
    def is_trained(self) -> bool:
        """Whether the adapter has logits."""
        return self.logits is not None

    # Choosing rows

    @property
    def row(self) -> int | None:
        """The row that serves whole batches in this context; None if several could and none was chosen."""
        chosen = chosen_row(self._number)
        return 0 if chosen is None and self.serves_unchosen else chosen

    @property
    def serves_unchosen(self) -> bool:
        """Whether row 0 serves until another one is chosen: the only profile, unless it is a person of a bank."""
        return self.spec.num_profiles == 1 and self.names is None

    def choose(self, row: int) -> None:
        """Let a row serve whole batches in this context from now on; -1 is none. O(1).

        Raises:
            ConfigError: no such row.
        """
        if isinstance(row, bool) or not isinstance(row, int) or not -1 <= row < self.spec.num_profiles:
            raise ConfigError(
                f"Row {row!r} is not in adapter '{self.name}', which has {self.spec.num_profiles} profiles. Expected a "
                f"row from 0 to {self.spec.num_profiles - 1}, or -1 for none."
            )
        choose_row(self._number, row)
        self._was_chosen = True  # a graph looks at this, since it cannot look at what a context has chosen

    def find_rows(self, names: Sequence[str]) -> Tensor:
        """Rows of profiles by name, -1 for ``"__base__"``. Long, ``[len(names)]``.

        Raises:
            ConfigError: an unknown name, or an adapter whose profiles have none.
        """
        if self.names is None and any(name != BASE for name in names):
            raise ConfigError(f"The profiles of adapter '{self.name}' have no names. Choose them by row.")
        rows = [-1 if name == BASE else self.names.find(name) for name in names]  # type: ignore[union-attr]
        unknown = sorted({str(name) for name, row in zip(names, rows, strict=True) if row is None})
        if unknown:
            raise ConfigError(
                f"No such profiles in adapter '{self.name}', which has {self.spec.num_profiles}: "
                f"{', '.join(map(repr, unknown[:5]))}{' and others' if len(unknown) > 5 else ''}."
            )
        return torch.tensor(rows)

    def no_profile(self) -> ConfigError:
        """The error of a pass for which no row was chosen."""
        return ConfigError(
            f"Adapter '{self.name}' holds {self.spec.num_profiles} profiles and none was chosen. Call "
            "model.set_profile(row), which holds for the thread (or asyncio task) that calls it, or pass "
            "adapter_names, a LongTensor with one row for each example."
        )

    # A forward pass

    def active(self, now: ForwardPass) -> ActiveAdapters:
        """The mixed adapters of a forward pass. All sites of the pass share them: masks are computed once.

        Raises:
            ConfigError: an adapter of several profiles, and none was chosen.
            MaskFormatError: invalid masks, in bytes that were loaded or in logits that were trained.
        """
        key = (self.name, torch.is_grad_enabled())
        found = now.active.get(key)
        if found is None:
            in_graph = torch.compiler.is_compiling()
            found = now.active[key] = self._active_in_graph(now) if in_graph else self._active(now)
        return found

    def _active(self, now: ForwardPass) -> ActiveAdapters:
        self._take_in()
        self._warn(now)
        batch = now.batch if now.batch is not None and now.batch.masks is self else None
        row = self.row if batch is None else None
        if batch is None and row is None:
            raise self.no_profile()
        source = None if now.table.training or self._wants_gradients() else self.source(row)
        if source is None:
            self.cache.clear()  # what is being learnt may change before the next pass, by an optimizer of any kind
        keeper = self.cache if batch is None else batch
        if keeper.last is not None and same_source(keeper.last.source, source):
            return keeper.last
        if batch is None:
            rows, index = None if self.spec.num_profiles == 1 and row == 0 else torch.tensor([row]), None
        else:
            rows, index = _distinct(batch.rows)
        active = ActiveAdapters(self._mixed(rows, source, now), index, each=batch is not None, source=source)
        if source is not None:
            keeper.last = active
        return active

    def _mixed(self, rows: Tensor | None, source: tuple[Any, ...] | None, now: ForwardPass) -> MixedRows:
        """From the cache, where there is one and nothing is being learnt; otherwise to be mixed site by site."""
        if source is not None and self.cache.max_bytes:
            wanted = torch.tensor([0]) if rows is None else rows
            found = self.cache.find(wanted, (None, *source[1:-1]), lambda missing: self.masks(missing, now))
            if found is not None:
                return found
        return self.masks(rows, now)

    def _active_in_graph(self, now: ForwardPass) -> ActiveAdapters:
        """As :meth:`_active`, for ``torch.compile``.

        A graph cannot look at versions and values, so it computes the masks in each pass and asserts what is otherwise
        checked before. Rows are tensors: another profile is another input to the same graph.
        """
        if self.is_trained:
            require(~self.bits.weight.any(), MaskFormatError(self._not_taken_in()))
        if now.batch is not None and now.batch.masks is self:
            return ActiveAdapters(self.masks(now.batch.rows, now), index=None, each=True)
        if self._ignores_choice():
            return ActiveAdapters(self.masks(None, now), index=None, each=False)
        rows = row_in_graph(self.bits.weight, self._number)
        return ActiveAdapters(self.masks(rows, now), index=None, each=False)

    def _ignores_choice(self) -> bool:
        """Whether a graph may always use row 0, because no other row was ever chosen."""
        return self.serves_unchosen and not self._was_chosen

    def offsets(self, now: ForwardPass) -> Tensor | None:
        """Offsets of a forward pass: float32 ``[B, C]`` by example or prompt, or ``[1, C]`` for whole batches.

        None if the profiles have no offsets; zeros for row -1.

        Raises:
            ConfigError: an adapter of several profiles, and none was chosen.
            MaskFormatError: offsets that are not finite.
        """
        if self.offset_bits is None:
            return None
        stored, rows = self.offset_bits.weight, self._rows(now)
        picked = unpack_halves(stored[rows.clamp_min(0).to(stored.device)])
        if not torch.compiler.is_compiling() and not picked.isfinite().all():
            raise MaskFormatError("Expected finite offsets, found NaN or infinity. The file is damaged.")
        return torch.where((rows >= 0).unsqueeze(1).to(stored.device), picked, 0.0)

    def _rows(self, now: ForwardPass) -> Tensor:
        if now.batch is not None and now.batch.masks is self:
            return now.batch.rows
        if torch.compiler.is_compiling():
            if self._ignores_choice():
                return torch.tensor([0])
            chosen: Tensor = row_in_graph(self.bits.weight, self._number)
            return chosen
        if self.row is None:
            raise self.no_profile()
        return torch.tensor([self.row])

    def source(self, row: int | None) -> tuple[Any, ...]:
        """What mixed adapters without gradients are computed from: equal sources give equal adapters.

        The first item is the row. The last says whether inference mode is on, whose tensors cannot serve a backward
        pass.
        """
        stored = [each.weight for each in (self.logits, self.gain, self.bits, self.gain_bits) if each is not None]
        versions = [None if each.is_inference() else each._version for each in stored]
        forms = tuple((version, each.dtype, each.device) for version, each in zip(versions, stored, strict=True))
        facts = (self.form, forms, steps_taken() if self.is_trained else 0)
        return (row, *facts, *stored, torch.is_inference_mode_enabled())

    def masks(self, rows: Tensor | None, now: ForwardPass) -> RowMasks:
        """The current masks of rows.

        Args:
            rows: long ``[R]``, of which -1 has masks and gains of zero: no deviation; None: all of them.
            now: the pass that uses them.

        Raises:
            MaskFormatError: invalid masks, in bytes that were loaded or in logits that were trained.
        """
        masks = self._from_logits(rows, now) if self.is_trained else self._from_bits(rows)
        if rows is None or not (torch.compiler.is_compiling() or bool((rows < 0).any())):
            return masks
        there = (rows >= 0).to(masks.gain.device)
        return RowMasks(masks.mask * there.view(-1, 1, 1, 1), masks.gain * there.unsqueeze(1))

    def _from_logits(self, rows: Tensor | None, now: ForwardPass) -> RowMasks:
        assert self.logits is not None
        logits = self.form.logits(pick_rows(self.logits.weight, rows))
        gain = None if self.gain is None else pick_rows(self.gain.weight, rows)
        if self._is_noisy(now):
            logits = logits + self._noise(logits, now) / self.form.logit_scale
        elif not now.table.training:
            require(logits.isfinite().all(), self.form.not_finite())
        return self.form.masks(logits, gain)

    def minus_log_prior(self, rows: Tensor) -> Tensor:
        """How unlikely the masks of rows are under the prior of a fitted pool, in nats, shape ``[R]``.

        ``sum_k c_k^2 / 2``, averaged over sites and projections, where ``c = g m @ coefficients`` is standard normal
        for the groups that the pool was fitted to. Averaged, because a group's deviations at all sites belong
        together: they count as one draw of K numbers, not as one for each site.

        Args:
            rows: long ``[R]``; -1 gives 0.

        Raises:
            ConfigError: the adapter is not trained, or its pool was not fitted.
        """
        if self.fitting is None or self.logits is None:
            raise ConfigError(f"Adapter '{self.name}' has no prior: expected one in training, over a fitted pool.")
        gain = None if self.gain is None else pick_rows(self.gain.weight, rows)
        masks = self.form.masks(self.form.logits(pick_rows(self.logits.weight, rows)), gain)
        weights = masks.mask * masks.gain[:, None, :, None]
        own = weights @ self.fitting.coefficients.to(weights.device)
        found: Tensor = own.square().sum(-1).mean((1, 2)) / 2 * (rows >= 0).to(weights.device)
        return found

    def _from_bits(self, rows: Tensor | None) -> RowMasks:
        bits = pick_rows(self.bits.weight, rows)
        gain_bits = None if self.gain_bits is None else pick_rows(self.gain_bits.weight, rows)
        check = self.spec.check_in_graph if torch.compiler.is_compiling() else self.spec.check
        check(bits, gain_bits)
        return masks_from_bits(self.spec, bits, gain_bits)

    def _is_noisy(self, now: ForwardPass) -> bool:
        """Noise is for learning: a pass without gradients, as that of trl's reference model, sees the masks themselves.

        A checkpointed block runs without gradients during a pass that learns.
        """
        return now.table.training and self.gumbel_noise > 0 and (torch.is_grad_enabled() or now.learns)

    def _noise(self, logits: Tensor, now: ForwardPass) -> Tensor:
        noise = now.noise.get(self.name)
        if noise is None:
            noise = -torch.empty_like(logits).exponential_().log()
            now.noise[self.name] = noise
        return noise * self.gumbel_noise

    def _wants_gradients(self) -> bool:
        trained = [each.weight for each in (self.logits, self.gain) if each is not None]
        return torch.is_grad_enabled() and any(weight.requires_grad for weight in trained)

    def _take_in(self) -> None:
        """Turn bytes into logits that transformers' ``load_adapter`` put into an adapter that trains."""
        if self.logits is None:
            return
        inbox = self.bits.weight
        version = None if inbox.is_inference() else inbox._version
        if self._inbox is not None and self._inbox[0] is inbox and self._inbox[1] == version:
            return
        with _LOADING:
            if inbox.any():
                gain_bits = None if self.gain_bits is None else self.gain_bits.weight
                self.spec.check(inbox, gain_bits)
                self.load(inbox, gain_bits)
                inbox.zero_()
            self._inbox = (inbox, None if inbox.is_inference() else inbox._version)

    def _warn(self, now: ForwardPass) -> None:
        if not (now.table.training and torch.is_grad_enabled()):
            return
        if self.rebuilt and self.is_trained:
            self.rebuilt = False
            warnings.warn(
                f"Adapter '{self.name}' was loaded from bits, which say which adapters are chosen but not how nearly "
                "others were: its training state is not in the file. Logits were rebuilt that choose the same "
                "adapters. To resume exactly, train with XPEFTCallback, which keeps the logits beside each checkpoint.",
                PeftXMaskWarning,
                stacklevel=2,
            )
        if not self.is_trained and not self._warned:
            self._warned = True
            warnings.warn(
                f"Adapter '{self.name}' was loaded for inference: it has masks and no logits, so training does not "
                "change them. To train it, load it with is_trainable=True.",
                PeftXMaskWarning,
                stacklevel=2,
            )

    # Shipping and loading

    def trained_state(self) -> dict[str, nn.Parameter]:
        """What is trained, by the names under which a checkpoint keeps it: ``"logits"`` and ``"gain"``."""
        found = {"logits": self.logits, "gain": self.gain}
        return {name: holder.weight for name, holder in found.items() if holder is not None}

    def shipped(self) -> tuple[Tensor, Tensor | None]:
        """The bytes that say what the adapter is now: ``bits``, and ``gain_bits`` if the gain is learnt."""
        if self.logits is None:
            return self.bits.weight, None if self.gain_bits is None else self.gain_bits.weight
        bits, gain_bits = self.form.pack(self.logits.weight, None if self.gain is None else self.gain.weight)
        return bits, gain_bits if self.spec.learn_gain else None

    def load(self, bits: Tensor, gain_bits: Tensor | None) -> None:
        """Give a trained adapter the masks and gains of checked bytes."""
        logits, gain = self.form.unpack(bits, gain_bits)
        with torch.no_grad():
            for name, value in (("logits", logits), ("gain", gain)):
                if value is not None:
                    self.trained_state()[name].copy_(value)
        self.rebuilt = True

    def serving(
        self, bits: Tensor, gain_bits: Tensor | None, spec: MaskSpec, names: Names, offset_bits: Tensor | None = None
    ) -> AdapterMasks:
        """The masks of an adapter that is not trained, with these bytes instead. Nothing is copied.

        Shapes: ``bits [P, 2, S, W]``, ``gain_bits [P, S, 2]``, see :class:`~peft_xmask.tuners.xpeft.spec.MaskSpec`.
        """
        spec.check_shapes(bits, gain_bits)
        twin = AdapterMasks.__new__(AdapterMasks)
        twin.__dict__.update(self.__dict__)
        device = self.bits.weight.device
        twin.form, twin.names = replace(self.form, spec=spec), names
        twin.bits = PackedTensor(bits.to(device))
        twin.gain_bits = None if gain_bits is None else PackedTensor(gain_bits.to(device))
        twin.offset_bits = None if offset_bits is None else PackedTensor(offset_bits.to(device))
        twin.cache = MixedAdapterCache(self.cache.sites, self.cache.max_bytes)
        twin._number = number_of(twin)
        return twin

    def rescale_logits(self, logit_scale: float) -> None:
        """Train on another scale from here on, with the same masks and gains."""
        if logit_scale == self.form.logit_scale:
            return
        ratio = self.form.logit_scale / logit_scale
        weights = self.trained_state().values()
        with writable(weights):
            for weight in weights:
                weight.mul_(ratio)
        self.form = replace(self.form, logit_scale=logit_scale)

    def cast(self, dtype: torch.dtype) -> None:
        """Hold what is trained in another dtype. Bytes stay bytes."""
        for holder in (self.logits, self.gain):
            if holder is not None:
                holder.to(dtype)

    def copy_bytes(self, source: AdapterMasks) -> None:
        """Take the masks and gains of another adapter of the same spec, where neither is trained."""
        if self.is_trained or source.is_trained:
            return
        self.bits.weight.copy_(source.bits.weight)
        if self.gain_bits is not None and source.gain_bits is not None:
            self.gain_bits.weight.copy_(source.gain_bits.weight)

    def _not_taken_in(self) -> str:
        return (
            f"Adapter '{self.name}' is trained and a file was loaded into its bits. Run one forward pass that is not "
            "compiled, which turns them into its logits."
        )

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy: with the row that was chosen in this context, without what is computed anew."""
        return {**self.__dict__, "_number": None, "_inbox": None, "_chosen": chosen_row(self._number)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """See :meth:`__getstate__`."""
        chosen = state.pop("_chosen")
        self.__dict__.update(state)
        self._number = number_of(self)
        if chosen is not None:
            choose_row(self._number, chosen)


def _distinct(rows: Tensor) -> tuple[Tensor, Tensor | None]:
    """Distinct rows, and for each example which of them; None where every example has one of its own, in order."""
    distinct, index = torch.unique(rows, return_inverse=True)
    return (rows, None) if len(distinct) == len(rows) else (distinct, index)
