"""A module with pool adapters mixed by masks."""

from __future__ import annotations

from collections.abc import MutableMapping

from torch import Tensor, nn

from ...core.adapter import AdapterForm, AdapterPair
from ...pool import PoolSlice
from ..sites.layer import SiteLayer
from ..sites.places import device_of
from .table import MaskTable, XPEFTModule


class XPEFTSite(nn.Module):
    """What one adapter has at one site: its slice of the pool and its place in the mask table.

    Attributes:
        pool: shared with every other adapter of the same pool.
        index: position among the adapter's sites.
        form: how the mixed adapter is applied.
    """

    def __init__(self, pool: PoolSlice, index: int, form: AdapterForm) -> None:
        super().__init__()
        self.pool = pool
        self.index = index
        self.form = form

    @property
    def down(self) -> Tensor:
        """The pool's down-projections."""
        return self._modules["pool"]._buffers["down"]  # type: ignore[union-attr, return-value]  # faster than by attribute


class XPEFTLayer(SiteLayer, XPEFTModule):
    """One linear module and, for each adapter, the pool slice and masks that make it up.

    It has no parameters: the masks are in the :class:`~peft_xmask.tuners.xpeft.table.MaskTable` at the model's root,
    and the pool is frozen and not saved.
    """

    xpeft_sites: MutableMapping[str, XPEFTSite]
    adapter_layer_names = ("xpeft_sites",)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.add_module("xpeft_sites", nn.ModuleDict())
        self._table: tuple[MaskTable, ...] = ()

    def add(self, adapter_name: str, site: XPEFTSite, table: MaskTable) -> None:
        """Enter an adapter. ``table`` is held in a tuple: it belongs to the root, not to this module."""
        self._table = (table,)
        self.xpeft_sites[adapter_name] = site
        device = device_of(self.get_base_layer())
        if device is not None:
            site.to(device)
        self.set_adapter(self.active_adapters)

    def form(self, adapter_name: str) -> AdapterForm | None:
        """How the adapter is applied here; None if the adapter is not at this site."""
        return self.xpeft_sites[adapter_name].form if adapter_name in self.xpeft_sites else None

    def pair(self, adapter_name: str) -> AdapterPair:
        """The mixed adapter, with the gain in the up-projection."""
        site = self.xpeft_sites[adapter_name]
        return self._table[0].active(adapter_name).pair(site)
