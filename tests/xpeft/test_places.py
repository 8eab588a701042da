"""Adapters at modules that are not linear: convolutions and embeddings."""

from dataclasses import replace

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from peft_xmask import BottleneckConfig, MagnitudeMaskConfig, WeightAdapterConfig, XPEFTConfig, export_lora
from peft_xmask.errors import MergeError, TargetError
from peft_xmask.tuners.sites.layer import SiteLayer


class Sound(nn.Module):
    """Tokens, then convolutions over one and two dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 6)
        self.narrow = nn.Conv1d(6, 8, 3, stride=2, padding=1)
        self.wide = nn.ConvTranspose1d(8, 6, 4, stride=2, padding=1, groups=2)
        self.plane = nn.Conv2d(1, 4, 3)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.relu(self.narrow(self.embed(tokens).transpose(1, 2)))
        x = self.plane(self.wide(x).unsqueeze(1))
        return self.head(self.norm(x.mean((2, 3))))


TOKENS = torch.randint(20, (4, 8), generator=torch.Generator().manual_seed(1))
PLACES = ("embed", "narrow", "wide", "plane")
CONFIGS = {
    "hard": XPEFTConfig(num_adapters=20, bottleneck_size=4, scale=1.0),
    "many profiles": XPEFTConfig(num_adapters=20, bottleneck_size=4, scale=1.0, num_profiles=3),
    "bottleneck": BottleneckConfig(bottleneck_size=4, init_weights=False, scale=20.0),
    "linear bottleneck": BottleneckConfig(bottleneck_size=4, init_weights=False, scale=20.0, activation="identity"),
}


def base() -> nn.Module:
    torch.manual_seed(0)
    return Sound().eval()


def adapted(kind: str, *places: str) -> PeftModel:
    config = CONFIGS[kind]
    torch.manual_seed(2)
    config.target_modules = set(places)
    model = get_peft_model(base(), config).eval()
    if kind == "many profiles":
        with torch.no_grad():
            logits = model.base_model.masks().logits.weight
            logits.copy_(torch.randn(logits.shape))
        model.base_model.set_profile(0)
    return model


def run(model: nn.Module, **kwargs: Tensor) -> Tensor:
    """Without gradients: convolutions are computed by another kernel where one of them wants a gradient."""
    with torch.no_grad():
        return model(TOKENS, **kwargs)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("place", PLACES)
def test_the_module_and_then_a_kernel_of_size_one(kind, place):
    """By hand: what comes out of the module goes through the two matrices, position by position, and is added."""
    model = adapted(kind, place)
    layer: SiteLayer = model.base_model.model.get_submodule(place)
    seen: dict[str, Tensor] = {}
    layer.base_layer.register_forward_hook(lambda _, __, y: seen.update(own=y))
    layer.register_forward_hook(lambda _, __, y: seen.update(found=y))
    with torch.no_grad():
        model(TOKENS)
        pair, act = layer.pair("default"), torch.relu if layer.form("default").activation == "relu" else nn.Identity()
        expected = seen["own"].clone()
        channels_first = place != "embed"
        for position in torch.cartesian_prod(
            *(torch.arange(n) for n in seen["own"].shape[2 if channels_first else 1 :])
        ):
            where = position.reshape(-1)[: seen["own"].dim() - 2].tolist()
            index = (slice(None), slice(None), *where) if channels_first else (slice(None), *where)
            y = seen["own"][index]
            hidden = act(
                y @ pair.down.reshape(pair.down.shape[-2:]).T + (0 if pair.down_bias is None else pair.down_bias)
            )
            change = hidden @ pair.up.reshape(pair.up.shape[-2:]).T + (0 if pair.up_bias is None else pair.up_bias)
            expected[index] = y + change
    assert not torch.allclose(seen["own"], expected, atol=1e-3)
    torch.testing.assert_close(seen["found"], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", CONFIGS)
def test_saved_loaded_disabled_and_unloaded(kind, tmp_path):
    model, own = adapted(kind, *PLACES), run(base())
    found = run(model)
    assert not torch.allclose(found, own, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(run(model), own)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path).eval()
    if kind == "many profiles":
        loaded.base_model.set_profile(0)
    assert torch.equal(run(loaded), found)
    assert torch.equal(run(loaded.unload()), own)


@pytest.mark.parametrize("place", PLACES)
def test_each_example_is_served_by_its_own_profile(place):
    model = adapted("many profiles", place)
    together = run(model, adapter_names=torch.tensor([2, 0, -1, 1]))
    own = run(base())
    for example, row in enumerate([2, 0, -1, 1]):
        if row == -1:
            torch.testing.assert_close(together[example], own[example])
            continue
        model.base_model.set_profile(row)
        torch.testing.assert_close(together[example], run(model)[example], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["hard", "bottleneck"])
def test_it_trains(kind):
    model = adapted(kind, *PLACES).train()
    model(TOKENS).square().sum().backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in trained.values())


@pytest.mark.parametrize(("place", "why"), [("embed", "numbers of tokens"), ("narrow", "positions do not correspond")])
@pytest.mark.parametrize("config", [XPEFTConfig, BottleneckConfig])
def test_a_parallel_adapter_is_refused(config, place, why):
    with pytest.raises(TargetError, match=rf"'{place}' is a \w+, which cannot carry a parallel adapter: .*{why}"):
        get_peft_model(base(), config(target_modules=[place], insertion_form="parallel"))


LINEAR = {
    "xpeft": XPEFTConfig(num_adapters=20, bottleneck_size=4, scale=1.0, activation="identity"),
    "bottleneck": CONFIGS["linear bottleneck"],
}


def linear(kind: str, model: nn.Module, *places: str) -> PeftModel:
    """A linear adapter, with biases if it is a bottleneck adapter."""
    torch.manual_seed(2)
    model = get_peft_model(model, replace(LINEAR[kind], target_modules=set(places))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "bias" in name:
                parameter.normal_()
    return model


def of_one_group() -> nn.Module:
    model = base()
    torch.manual_seed(3)
    model.wide = nn.ConvTranspose1d(8, 6, 4, stride=2, padding=1)
    return model.eval()


@pytest.mark.parametrize("kind", LINEAR)
@pytest.mark.parametrize("places", [*([place] for place in PLACES), PLACES], ids=" ".join)
def test_linear_adapters_are_merged(kind, places, tmp_path):
    model = linear(kind, of_one_group(), *places)
    own, found = run(of_one_group()), run(model)
    assert not torch.allclose(found, own, atol=1e-3)
    model.merge_adapter(safe_merge=True)
    merged = run(model)
    torch.testing.assert_close(merged, found, atol=1e-5, rtol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(run(model), found)
    plain = model.merge_and_unload()
    assert type(plain.plane) is nn.Conv2d
    assert torch.equal(run(plain), merged)


@pytest.mark.parametrize("place", PLACES)
def test_the_change_of_the_weight_is_what_merging_adds(place):
    model = linear("xpeft", of_one_group(), place)
    layer: SiteLayer = model.base_model.model.get_submodule(place)
    before, delta = layer.weight.clone(), layer.get_delta_weight("default")
    model.merge_adapter()
    torch.testing.assert_close(layer.weight - before, delta, atol=1e-6, rtol=1e-5)


class Scaled(nn.Embedding):
    """As the word embeddings of Gemma."""

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) * 3


def tied() -> nn.Module:
    model = base()
    model.head = nn.Linear(4, 4)
    model.other = nn.Linear(4, 4)
    model.other.weight = model.head.weight
    return model


def changed(**modules: nn.Module) -> nn.Module:
    model = base()
    for name, module in modules.items():
        setattr(model, name, module)
    return model.eval()


@pytest.mark.parametrize(
    ("build", "place", "why"),
    [
        (base, "wide", "a ConvTranspose1d of 2 groups"),
        (lambda: changed(embed=Scaled(20, 6)), "embed", "a Scaled, which computes its output in another way"),
        (lambda: changed(embed=nn.Embedding(20, 6, max_norm=1.0)), "embed", "Embedding with max_norm"),
        (lambda: changed(narrow=nn.Conv1d(6, 8, 3, stride=2, padding=1, bias=False)), "narrow", "biases"),
        (tied, "head", r"that of 'other' \(tied weights\)"),
    ],
)
def test_what_a_weight_cannot_hold_is_refused_before_anything_changes(build, place, why):
    model = linear("bottleneck", build(), "plane", place)
    before, state = run(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(MergeError, match=rf"Cannot merge into '{place}': .*{why}"):
            merge()
    assert torch.equal(run(model), before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_only_the_adapters_that_are_merged_are_checked():
    model = linear("xpeft", base(), "plane")
    model.add_adapter("grouped", replace(LINEAR["xpeft"], target_modules={"plane", "wide"}))
    found = run(model)
    with pytest.raises(MergeError, match="groups"):
        model.merge_adapter(adapter_names=["grouped"])
    assert torch.equal(run(model), found)
    model.merge_adapter()
    model.unmerge_adapter()
    model.set_adapter("grouped")
    torch.testing.assert_close(run(model.merge_and_unload(adapter_names=["default"])), found, atol=1e-5, rtol=1e-5)


def test_no_lora_at_an_embedding(tmp_path):
    """PEFT has one, of another form than that of a linear layer."""
    model = linear("xpeft", base(), "embed")
    assert not model.base_model.model.embed.supports_lora_conversion()
    with pytest.raises(
        MergeError, match="Cannot export 'embed' as a LoRA: its module is no linear layer but Embedding"
    ):
        export_lora(model, tmp_path / "lora")


def test_other_modules_are_refused_and_the_error_names_methods_that_take_them():
    with pytest.raises(
        TargetError, match="MagnitudeMaskConfig adapts any module with a weight, and WeightAdapterConfig"
    ):
        get_peft_model(base(), XPEFTConfig(target_modules=["norm"]))
    for config in (
        MagnitudeMaskConfig(target_modules=["norm", *PLACES], density=0.5, init_weights=False),
        WeightAdapterConfig(target_modules=["norm", *PLACES], target="weight", init_weights=False),
    ):
        model = get_peft_model(base(), config).eval()
        assert not torch.allclose(model(TOKENS), base()(TOKENS), atol=1e-6)
        assert torch.equal(model.unload()(TOKENS), base()(TOKENS))
