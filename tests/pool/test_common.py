"""Pools with a common part: always on, at no bytes, and saved with the pool."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from peft_xmask import AdapterPool, BottleneckConfig, ProfileBank, XPEFTConfig, export_lora
from peft_xmask.core.adapter import adapt
from peft_xmask.core.masks import hard_mask, mix
from peft_xmask.core.sites import Site
from peft_xmask.errors import ConfigError, FileFormatError, PoolMismatchError
from tests.pool.conftest import FFN_OUTPUTS, WIDTH, tiny_bert

BATCH = {"input_ids": torch.arange(1, 13).view(3, 4)}


def run(model: nn.Module, **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**BATCH, **kwargs).logits


def base() -> nn.Module:
    """With weights so large that another profile is another answer."""
    torch.manual_seed(9)
    model = tiny_bert().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)
    return model


def with_masks(pool: AdapterPool, **fields) -> PeftModel:
    """Three profiles that differ."""
    settings = {"num_profiles": 3, "top_k": max(1, pool.num_adapters // 2), **fields}
    model = get_peft_model(base(), XPEFTConfig(pool=pool, task_type="SEQ_CLS", **settings))
    with torch.no_grad():
        weight = model.base_model.table.xpeft_logits["default"].weight
        weight.normal_(std=0.01, generator=torch.Generator().manual_seed(2))
    return model.eval()


@pytest.fixture
def common(tmp_path):
    """A trained adapter of each kind on the base, and what it answers."""

    def make(kind: str):
        config = {
            "lora": LoraConfig(r=3, target_modules=FFN_OUTPUTS, init_lora_weights=False),
            "bottleneck": BottleneckConfig(
                bottleneck_size=5, target_modules=FFN_OUTPUTS, init_weights=False, scale=9.0
            ),
        }[kind]
        model = get_peft_model(base(), config)
        torch.manual_seed(3)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "bottleneck_adapter" in name and "bias" in name:
                    parameter.normal_(std=0.1)
        folder = tmp_path / f"common-{kind}"
        model.save_pretrained(folder)
        return folder, model

    return make


def test_beside_a_random_pool_by_hand(common):
    """``y + B_0 act(A_0 y) + B act(A y)``, each side with its own bottleneck."""
    folder, trained = common("bottleneck")
    pool = AdapterPool.random(12, 4, seed=1).with_common(folder)
    assert (pool.bottleneck_size, pool.mixed_size, pool.target_modules) == (4, 9, sorted(FFN_OUTPUTS))
    model = with_masks(pool)
    model.set_profile(1)
    layer = model.get_submodule(f"base_model.model.{FFN_OUTPUTS[0]}")
    seen = {}
    layer.base_layer.register_forward_hook(lambda m, a, out: seen.update(y=out))
    layer.register_forward_hook(lambda m, a, out: seen.update(out=out))
    run(model)
    masks = model.base_model.table.adapters["default"].shipped()[0][1, :, 0]
    signs = torch.tensor([[1.0 if masks[side, i // 8] >> (i % 8) & 1 else -1.0 for i in range(12)] for side in (0, 1)])
    part = layer.xpeft_sites["default"].pool
    down = torch.einsum("n,nbd->bd", signs[0], part.down) / 12**0.5
    up = torch.einsum("n,nob->ob", signs[1], part.up) / 12**0.5
    gain = torch.tensor(0.3).half().float()
    own = trained.get_submodule(f"base_model.model.{FFN_OUTPUTS[0]}").pair("default")
    with torch.no_grad():
        expected = (
            seen["y"]
            + adapt(seen["y"], own, activation="relu", layer_norm=False)
            + gain * torch.relu(seen["y"] @ down.T) @ up.T
        )
    torch.testing.assert_close(seen["out"], expected)


@pytest.mark.parametrize("kind", ["lora", "bottleneck"])
def test_a_row_of_none_is_the_common_adapter_alone(kind, common):
    folder, trained = common(kind)
    expected = run(trained)
    for pool in (AdapterPool.random(12, 4).with_common(folder), AdapterPool.random(12, 4).with_common(trained)):
        model = with_masks(pool)
        torch.testing.assert_close(run(model, adapter_names=[-1, -1, -1]), expected)
        model.set_profile("__base__")
        torch.testing.assert_close(run(model), expected)
        model.set_profile(0)
        assert not torch.allclose(run(model), expected, atol=1e-4)
        with model.disable_adapter():
            assert torch.equal(run(model), run(base()))


@pytest.fixture
def folders(make_bottleneck):
    return [make_bottleneck(f"adapter {i}", seed=i, activation="gelu")[0] for i in range(4)]


def test_centring_changes_what_masks_say_and_not_what_they_can(folders):
    """Averages over the centred pool are those over the plain one; signs are the default; none is the mean."""
    plain, centred = AdapterPool.from_adapters(folders), AdapterPool.from_adapters(folders, centre=True)
    assert (plain.mask_weighting, centred.mask_weighting) == ("mean", "signed")
    assert centred.common is not None
    assert centred.common.source == "mean of 4 adapters"
    assert plain.fingerprint != centred.fingerprint
    fields = dict(learn_gain=False, scale=1.0, mask_weighting="mean")
    models = [with_masks(pool, **fields) for pool in (plain, centred)]
    for row in range(3):
        outputs = []
        for model in models:
            model.set_profile(row)
            outputs.append(run(model))
        torch.testing.assert_close(*outputs)
    mean = with_masks(plain, **fields, num_profiles=1, top_k=4)
    torch.testing.assert_close(run(models[1], adapter_names=[-1] * 3), run(mean))
    signed = with_masks(centred)
    assert signed.peft_config["default"].scale == 1.0
    assert not torch.allclose(run(signed, adapter_names=[0, 1, 2]), run(mean), atol=1e-3)


def test_a_signed_mask_is_as_far_from_the_mean_as_the_adapters_are(folders, make_bottleneck):
    """Which is why the gain over a centred pool starts at 1; exactly, sqrt(N / (N - 1)) as far."""
    more = [make_bottleneck(f"adapter {i}", seed=i, activation="gelu")[0] for i in range(4, 20)]
    pool = AdapterPool.from_adapters([*folders, *more], centre=True)
    part = pool.bind([Site(name, WIDTH, WIDTH) for name in FFN_OUTPUTS])[0]
    generator = torch.Generator().manual_seed(0)
    masks = hard_mask(torch.randn(300, 20, generator=generator), 10, estimator="sigmoid", weighting="signed")
    for tensor in (part.down, part.up, part.up_bias):
        sizes = tensor.flatten(1).norm(dim=1).square().mean().sqrt()
        mixed = mix(masks, tensor).flatten(1).norm(dim=1).square().mean().sqrt()
        assert mixed / sizes == pytest.approx((20 / 19) ** 0.5, rel=0.05)


@pytest.mark.parametrize("kind", ["random", "centred", "beside trained"])
@pytest.mark.parametrize("max_bytes", [0, 10**6])
def test_saved_loaded_and_served_by_a_bank_bit_for_bit(kind, max_bytes, folders, make_bottleneck, common, tmp_path):
    pool = {
        "random": lambda: AdapterPool.random(12, 4, seed=2).with_common(common("lora")[0]),
        "centred": lambda: AdapterPool.from_adapters(folders, centre=True),
        "beside trained": lambda: AdapterPool.from_adapters(folders).with_common(
            make_bottleneck("common", seed=8, size=7, activation="gelu")[0]
        ),
    }[kind]()
    pool.save_pretrained(tmp_path / "pool")
    again = AdapterPool.from_pretrained(tmp_path / "pool")
    assert again == pool
    assert (again.nbytes, again.mixed_size, again.kind) == (pool.nbytes, pool.mixed_size, pool.kind)
    assert again.mask_weighting == pool.mask_weighting
    half = AdapterPool.from_pretrained(tmp_path / "pool", dtype=torch.bfloat16)
    assert (half.fingerprint, half.common.adapter.dtype) == (pool.fingerprint, torch.bfloat16)
    model = with_masks(pool)
    model.cache_profiles(max_bytes)
    rows = torch.tensor([2, -1, 1])
    expected = run(model, adapter_names=rows)
    model.save_pretrained(tmp_path / "profile")
    loaded = PeftModel.from_pretrained(base(), tmp_path / "profile")
    loaded.cache_profiles(max_bytes)
    assert torch.equal(run(loaded, adapter_names=rows), expected)
    bank = ProfileBank.from_model(model, ["ann", "bob", "cleo"])
    bank.save_pretrained(tmp_path / "bank")
    served = ProfileBank.from_pretrained(tmp_path / "bank").attach(base())
    served.cache_profiles(max_bytes)
    assert torch.equal(run(served, adapter_names=["cleo", "__base__", "bob"]), expected)


def test_merged_exported_and_as_one_lora(common, tmp_path):
    folder, _ = common("lora")
    model = with_masks(AdapterPool.random(12, 4).with_common(folder), num_profiles=1)
    expected, before = run(model), run(base())
    export_lora(model, tmp_path / "lora")
    lora = PeftModel.from_pretrained(base(), tmp_path / "lora")
    assert lora.peft_config["default"].r == 4 + 3
    torch.testing.assert_close(run(lora), expected, atol=1e-5, rtol=1e-4)
    model.merge_adapter()
    torch.testing.assert_close(run(model), expected, atol=1e-5, rtol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(run(model), expected)
    assert torch.equal(run(model.unload()), before)


def test_masks_learn_around_a_common_part(common):
    folder, _ = common("bottleneck")
    model = with_masks(AdapterPool.random(12, 4).with_common(folder)).train()
    model(**BATCH, labels=torch.tensor([0, 1, 0]), adapter_names=torch.tensor([0, -1, 2])).loss.backward()
    moved = model.base_model.table.xpeft_logits["default"].weight.grad.abs().sum(1)
    assert moved.gt(0).tolist() == [True, False, True]
    assert not any(parameter.requires_grad for name, parameter in model.named_parameters() if "pool" in name)


def test_another_common_part_is_another_pool(common, tmp_path):
    folder, _ = common("lora")
    plain = AdapterPool.random(12, 4)
    pool = plain.with_common(folder)
    pool.save_pretrained(tmp_path / "pool")
    with_masks(pool).save_pretrained(tmp_path / "profile")
    plain.save_pretrained(tmp_path / "pool")  # without the common part, in its place
    with pytest.raises(PoolMismatchError) as caught:
        PeftModel.from_pretrained(base(), tmp_path / "profile")
    assert (caught.value.expected, caught.value.found) == (pool.fingerprint, plain.fingerprint)


def test_what_cannot_be_common_is_refused(common, folders, make_bottleneck):
    folder, _ = common("lora")
    with pytest.raises(ConfigError, match="has a common part already"):
        AdapterPool.random(12, 4).with_common(folder).with_common(folder)
    with pytest.raises(ConfigError, match="insertion_form='parallel', the pool 'sequential'"):
        AdapterPool.from_adapters(folders).with_common(folder)
    with pytest.raises(ConfigError, match="invalid with layer_norm"):
        AdapterPool.random(12, 4).with_common(make_bottleneck("normed", layer_norm=True)[0])
    with pytest.raises(ConfigError, match="at least two adapters"):
        AdapterPool.from_adapters(folders[:1], centre=True)
    with pytest.raises(ConfigError, match="Only trained adapters"):
        AdapterPool.random(12, 4).centred()
    with pytest.raises(ConfigError, match="an adapter 'nobody'"):
        AdapterPool.random(12, 4).with_common(base(), adapter_name="nobody")
    with pytest.raises(PoolMismatchError, match="sites of the pool"):
        with_masks(AdapterPool.random(12, 4).with_common(folder), target_modules=["query"])


def test_a_damaged_common_part_is_refused(common, edit_json, tmp_path):
    folder, _ = common("lora")
    AdapterPool.random(12, 4).with_common(folder).save_pretrained(tmp_path)
    edit_json(tmp_path / "pool.json", format_version=1)
    with pytest.raises(FileFormatError, match="Unknown fields"):
        AdapterPool.from_pretrained(tmp_path)
    edit_json(tmp_path / "pool.json", format_version=2, seed=4)
    with pytest.raises(PoolMismatchError):
        AdapterPool.from_pretrained(tmp_path)
    (tmp_path / "pool.safetensors").write_bytes(b"")
    with pytest.raises(FileFormatError, match="bytes"):
        AdapterPool.from_pretrained(tmp_path)
