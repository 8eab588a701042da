"""A base model on disk: the modules that an adapter changes, and their weights. The model itself is never built."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import transformers
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..core.hub import Folder, HubOptions, find_folder
from ..core.sites import partners
from ..errors import ConfigError, FileFormatError, TargetError
from ..tuners.base.tuner import TargetTuner
from ..tuners.sites.places import module_widths
from ..tuners.xpeft import XPEFTConfig

AUTO_CLASSES: Mapping[str, str] = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
"""The class of transformers that an adapter of a task was made on, by PEFT's task type."""

INDEX_FILE = "model.safetensors.index.json"
WEIGHTS_FILE = "model.safetensors"


@dataclass(frozen=True)
class AdaptedModule:
    """One linear module that an adapter sits on.

    Attributes:
        name: dotted name in the base model.
        in_features: width of its input.
        out_features: width of its output.
        fan_in_fan_out: whether its weight is stored as ``[in_features, out_features]`` (transformers' ``Conv1D``).
    """

    name: str
    in_features: int
    out_features: int
    fan_in_fan_out: bool


@dataclass(frozen=True)
class BaseFolder:
    """A saved base model.

    Args:
        path: folder with ``config.json`` and, where weights are needed, safetensors files.
    """

    path: Path

    @classmethod
    def find(cls, where: str | os.PathLike[str], hub: HubOptions, *, weights: bool) -> BaseFolder:
        """A folder, or a repository of the Hub, of which the config and, if they are needed, the weights are fetched.

        Raises:
            ConfigError: there is no such folder, and no such repository can be reached.
        """
        return cls(find_folder(where, ["config.json", *(["*.safetensors*"] if weights else [])], hub).path)

    def adapted_modules(self, config: XPEFTConfig) -> list[AdaptedModule]:
        """The modules that an adapter with this config sits on, in the order of its masks.

        Raises:
            TargetError: there are none, or one of them is not linear.
            ConfigError: the folder has no config of a known architecture.
        """
        if config.target_modules is None:
            raise ConfigError("Expected the config of a saved adapter, found one without target_modules.")
        model, is_target = self._skeleton(config), TargetTuner._check_target_module_exists
        targets = [(name, each) for name, each in model.named_modules() if name and is_target(config, name)]
        found = []
        for name, module in targets:
            widths = module_widths(module)
            if widths is None:
                raise TargetError(f"Expected a linear module at '{name}', found a {type(module).__name__}.")
            found.append(AdaptedModule(name, *widths, isinstance(module, Conv1D)))
        if not found:
            raise TargetError(
                f"The adapter's target_modules name no module of the {type(model).__name__} in '{self.path}'. Pass the "
                "base that the profiles were trained on."
            )
        return found

    def weights(self, names: Sequence[str]) -> dict[str, tuple[Tensor, Tensor | None]] | None:
        """Weight and bias of some modules as they are stored, mapped from disk; None if the base is quantised.

        Raises:
            FileFormatError: a module's weight is in no safetensors file here, or a file is damaged.
        """
        if getattr(self._config(), "quantization_config", None) is not None:
            return None
        files = self._tensor_files()
        stored = [key.removesuffix(".weight") for key in files if key.endswith(".weight")]
        found = {}
        for name, matches in zip(names, partners(names, stored), strict=True):
            if len(matches) != 1:
                raise FileFormatError(
                    f"Expected the weight of '{name}' in the safetensors files of '{self.path}', found "
                    f"{matches or 'none'} among {len(files)} tensors. Pass the folder of the base that the profiles "
                    "were trained on, saved by transformers."
                )
            key = matches[0]
            bias = f"{key}.bias"
            weight = _read(files[f"{key}.weight"], f"{key}.weight")
            found[name] = weight, _read(files[bias], bias) if bias in files else None
        return found

    def _config(self) -> Any:
        try:
            return transformers.AutoConfig.from_pretrained(self.path)
        except (OSError, ValueError) as error:
            raise ConfigError(f"Expected the config of a model of transformers in '{self.path}': {error}") from error

    def _skeleton(self, config: XPEFTConfig) -> nn.Module:
        """The base as a module tree on the meta device."""
        base = self._config()
        cls: Any = _model_class(config, base)
        try:
            with init_empty_weights():
                made = cls.from_config(base) if cls.__name__.startswith("Auto") else cls(base)
        except ValueError as error:
            raise ConfigError(f"'{self.path}' is not the base of these profiles: {error}") from error
        model: nn.Module = made
        return model

    def _tensor_files(self) -> dict[str, Path]:
        """The file of each tensor of the checkpoint."""
        index, whole = self.path / INDEX_FILE, self.path / WEIGHTS_FILE
        if index.is_file():
            listed = Folder(self.path, self.path.name).read_json(INDEX_FILE).get("weight_map")
            if not isinstance(listed, dict):
                raise FileFormatError(f"Expected a weight_map in '{index}', found none.")
            return {key: self.path / str(name) for key, name in listed.items()}
        files = [whole] if whole.is_file() else sorted(self.path.glob("*.safetensors"))
        if not files:
            raise FileFormatError(
                f"Expected the base's weights as *.safetensors in '{self.path}', found none. They are needed to check "
                "the base's fingerprint and to bake sequential profiles."
            )
        found: dict[str, Path] = {}
        for path in files:
            try:
                with safetensors.safe_open(str(path), framework="pt") as opened:
                    found.update(dict.fromkeys(opened.keys(), path))
            except (safetensors.SafetensorError, OSError) as error:
                raise FileFormatError(f"'{path}' is not a readable safetensors file: {error}.") from error
        return found


def _model_class(config: XPEFTConfig, base: Any) -> Any:
    """The class of transformers on which the adapter was made, as far as its config says."""
    task = str(getattr(config.task_type, "value", config.task_type))
    if task in AUTO_CLASSES:
        return getattr(transformers, AUTO_CLASSES[task])
    recorded = (config.auto_mapping or {}).get("base_model_class")
    for name in (recorded, *(getattr(base, "architectures", None) or ())):
        if name and hasattr(transformers, name):
            return getattr(transformers, name)
    return transformers.AutoModel


def _read(path: Path, key: str) -> Tensor:
    try:
        with safetensors.safe_open(str(path), framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(key)
    except (safetensors.SafetensorError, OSError) as error:
        raise FileFormatError(f"Cannot read '{key}' of '{path}': {error}.") from error
    return tensor
