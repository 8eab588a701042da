"""Several adapters, several profiles, merging, and what must never change."""

import copy
import gc
import weakref

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2Model

from peft_xmask import BottleneckConfig, XPEFTConfig
from peft_xmask.errors import ConfigError, MergeError
from peft_xmask.tuners.xpeft import MaskTable


def xpeft(**kwargs) -> XPEFTConfig:
    return XPEFTConfig(**{"num_adapters": 20, "bottleneck_size": 4, **kwargs})


def run(model: nn.Module, batch, **kwargs) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(**batch, **kwargs).logits


def base_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: tensor.clone()
        for name, tensor in model.state_dict().items()
        if "xpeft" not in name and "bottleneck" not in name
    }


@pytest.mark.parametrize(
    ("weighting", "chosen", "rest"), [("variance", 5**-0.5, 0.0), ("signed", 20**-0.5, -(20**-0.5))]
)
def test_the_mixed_adapter_is_the_weighted_sum_of_matrices(weighting, chosen, rest, tiny_bert, tiny_batch):
    """By hand, at one site: ``y + B act(A y)`` with ``A = sum m_A A_i`` and ``B = g sum m_B B_i``."""
    base = tiny_bert()
    model = get_peft_model(base, xpeft(layers_to_transform=[2], top_k=5, mask_weighting=weighting)).eval()
    layer = model.base_model.model.bert.encoder.layer[2].output.dense
    seen = {}
    layer.base_layer.register_forward_hook(lambda module, args, out: seen.update(y=out))
    layer.register_forward_hook(lambda module, args, out: seen.update(out=out))
    run(model, tiny_batch)
    table = model.base_model.table
    logits = table.adapters["default"].logits.weight.view(2, 20)
    pool = layer.xpeft_sites["default"].pool
    weights = torch.full_like(logits, rest).scatter_(1, logits.topk(5).indices, chosen)
    down, up = (
        sum(weight * matrix for weight, matrix in zip(weights[which], matrices, strict=True))
        for which, matrices in enumerate((pool.down, pool.up))
    )
    y = seen["y"]
    gain = torch.tensor(0.3).half().float()
    torch.testing.assert_close(seen["out"], y + gain * torch.relu(y @ down.T) @ up.T)


def test_the_first_forward_is_a_few_tenths_away(minilm_classifier, minilm_batch):
    """The documented default scale: the change is a few tenths of the module's own output."""
    model = get_peft_model(minilm_classifier(), XPEFTConfig()).eval()
    ratios = []
    for layer in model.modules():
        if hasattr(layer, "xpeft_sites"):
            kept = {}
            layer.base_layer.register_forward_hook(lambda m, a, out, kept=kept: kept.update(y=out))
            layer.register_forward_hook(
                lambda m, a, out, kept=kept: ratios.append(float((out - kept["y"]).norm() / kept["y"].norm()))
            )
    run(model, minilm_batch)
    assert len(ratios) == 6
    assert all(0.1 < ratio < 0.5 for ratio in ratios), ratios


def test_switch_disable_delete_and_unload_leave_the_base_bit_identical(tiny_bert, tiny_batch):
    base = tiny_bert()
    before, weights = run(base, tiny_batch), base_tensors(base)
    torch.manual_seed(1)
    model = get_peft_model(base, xpeft())
    first = run(model, tiny_batch)
    model.add_adapter("other", xpeft(layers_to_transform=[0, 1], mask_type="soft", insertion_form="parallel"))
    assert torch.equal(run(model, tiny_batch), first)
    model.set_adapter("other")
    other = run(model, tiny_batch)
    assert not torch.equal(other, first)
    with model.disable_adapter():
        assert torch.equal(run(model, tiny_batch), before)
    assert torch.equal(run(model, tiny_batch), other)
    model.set_adapter("default")
    assert torch.equal(run(model, tiny_batch), first)
    model.delete_adapter("other")
    assert torch.equal(run(model, tiny_batch), first)
    assert list(model.base_model.table.adapters) == ["default"]
    plain = model.unload()
    assert torch.equal(run(plain, tiny_batch), before)
    assert not any(isinstance(module, MaskTable) for module in plain.modules())
    after = plain.state_dict()
    assert weights.keys() == after.keys()
    assert all(torch.equal(weights[name], after[name]) for name in weights)
    torch.manual_seed(1)
    assert torch.equal(run(get_peft_model(plain, xpeft()), tiny_batch), first)


def test_several_active_adapters_add_up(tiny_bert, tiny_batch):
    kinds = dict(activation="identity", layers_to_transform=[2])
    model = get_peft_model(tiny_bert(), xpeft(**kinds))
    model.add_adapter("other", xpeft(**kinds, pool_seed=1))
    layer = model.base_model.model.bert.encoder.layer[2].output.dense
    x = torch.randn(3, 24)
    model.eval()
    with torch.no_grad():
        outs = {}
        for names in (["default"], ["other"], ["default", "other"]):
            model.base_model.set_adapter(names)
            outs[len(names), names[0]] = layer(x)
        plain = layer.base_layer(x)
    both = outs[2, "default"]
    torch.testing.assert_close(both - plain, outs[1, "default"] - plain + outs[1, "other"] - plain)


def test_adapter_names_serve_a_mixed_batch(tiny_bert, tiny_batch):
    model = get_peft_model(tiny_bert(), xpeft())
    model.add_adapter("other", xpeft(pool_seed=3))
    each = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        each[name] = run(model, tiny_batch)
    with model.disable_adapter():
        each["__base__"] = run(model, tiny_batch)
    names = ["other", "__base__", "default", "other"]
    mixed = run(model, tiny_batch, adapter_names=names)
    for row, name in enumerate(names):
        torch.testing.assert_close(mixed[row], each[name][row])
    with pytest.raises(ConfigError, match=r"non-existing adapter\(s\): nobody"):
        run(model, tiny_batch, adapter_names=["nobody"] * 4)
    with pytest.raises(ValueError, match="should be the same as the number of inputs"):
        run(model, tiny_batch, adapter_names=["other"])


def test_profiles_of_one_adapter(tiny_bert, tiny_batch, tmp_path):
    model = get_peft_model(tiny_bert(), xpeft(num_profiles=5))
    with torch.no_grad():
        model.masks("default").logits.weight.normal_(std=0.01)
    with pytest.raises(ConfigError, match="holds 5 profiles and none was chosen"):
        run(model, tiny_batch)
    each = []
    for row in range(5):
        model.set_profile(row)
        each.append(run(model, tiny_batch))
    assert len({tuple(out.flatten().tolist()) for out in each}) == 5
    rows = torch.tensor([3, 0, 3, 4])
    mixed = run(model, tiny_batch, adapter_names=rows)
    for place, row in enumerate(rows.tolist()):
        torch.testing.assert_close(mixed[place], each[row][place])
    torch.testing.assert_close(run(model, tiny_batch), each[4])
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_bert(), tmp_path)
    loaded.set_profile(2)
    assert torch.equal(run(loaded, tiny_batch), each[2])
    for bad in (torch.tensor([0, 1, 2, 5]), torch.tensor([0.0] * 4)):
        with pytest.raises(ConfigError, match="LongTensor of rows from 0 to 4"):
            run(model, tiny_batch, adapter_names=bad)
    for wrong in (5, True, 1.0, -2):
        with pytest.raises(ConfigError, match=f"Row {wrong} is not in adapter"):
            model.set_profile(wrong)
    with pytest.raises(ConfigError, match="have no names"):
        model.set_profile("ann")
    with pytest.raises(ConfigError, match="No adapter 'other'"):
        model.set_profile(0, "other")
    with model.disable_adapter():
        before = run(model, tiny_batch)
    for none in (-1, "__base__"):
        model.set_profile(none)
        torch.testing.assert_close(run(model, tiny_batch), before)


def test_only_the_rows_of_a_batch_get_gradients(tiny_bert, tiny_batch):
    model = get_peft_model(tiny_bert(), xpeft(num_profiles=5)).train()
    loss = model(**tiny_batch, adapter_names=torch.tensor([3, 0, 3, 3]), labels=torch.tensor([0, 1, 2, 3])).loss
    loss.backward()
    moved = model.masks("default").logits.weight.grad.abs().sum(1)
    assert moved.gt(0).tolist() == [True, False, False, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("config", [xpeft, lambda **k: BottleneckConfig(init_weights=False, use_bias=True, **k)])
@pytest.mark.parametrize("insertion_form", ["sequential", "parallel"])
def test_merging_a_linear_adapter(config, insertion_form, dtype, tiny_bert, tiny_batch):
    base = tiny_bert().to(dtype)
    before, weights = run(base, tiny_batch), base_tensors(base)
    model = get_peft_model(base, config(activation="identity", insertion_form=insertion_form))
    unmerged = run(model, tiny_batch)
    model.merge_adapter(safe_merge=True)
    merged = run(model, tiny_batch)
    tolerance = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
    torch.testing.assert_close(merged, unmerged, atol=tolerance, rtol=tolerance)
    assert dtype != torch.float32 or not torch.equal(merged, before)
    model.unmerge_adapter()
    assert torch.equal(run(model, tiny_batch), unmerged)
    with model.disable_adapter():
        assert torch.equal(run(model, tiny_batch), before)
    model.merge_adapter()
    plain = model.merge_and_unload()
    assert torch.equal(run(plain, tiny_batch), merged)
    assert plain.state_dict().keys() == weights.keys()


def test_merging_into_conv1d(tiny_batch):
    torch.manual_seed(0)
    base = GPT2Model(GPT2Config(vocab_size=60, n_embd=16, n_layer=2, n_head=2)).eval()
    model = get_peft_model(base, xpeft(activation="identity", insertion_form="parallel")).eval()
    with torch.no_grad():
        unmerged = model(**tiny_batch)[0]
        torch.testing.assert_close(model.merge_and_unload()(**tiny_batch)[0], unmerged, atol=1e-5, rtol=1e-5)


def test_what_is_not_linear_is_not_merged(tiny_bert, tiny_batch):
    model = get_peft_model(tiny_bert(), xpeft())
    before = run(model, tiny_batch)
    with pytest.raises(MergeError, match='only activation="identity" without layer_norm is a linear map'):
        model.merge_adapter()
    assert torch.equal(run(model, tiny_batch), before)


def test_the_pool_is_held_once(tiny_bert):
    model = get_peft_model(tiny_bert(), xpeft())
    for name in ("b", "c"):
        model.add_adapter(name, xpeft(mask_type="soft"))
    copied = copy.deepcopy(model)
    pointers = {
        site.pool.down.data_ptr()
        for twin in (model, copied, get_peft_model(tiny_bert(), xpeft()))
        for layer in twin.modules()
        if hasattr(layer, "xpeft_sites")
        for site in layer.xpeft_sites.values()
    }
    assert len(pointers) == 3  # one for each of the three sites


def test_a_copy_has_masks_of_its_own(tiny_bert, tiny_batch):
    model = get_peft_model(tiny_bert(), xpeft())
    out = run(model, tiny_batch)
    model.train()(**tiny_batch, labels=torch.tensor([0, 1, 2, 3])).loss.backward()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.masks("default").logits.weight.neg_()
    assert torch.equal(run(model, tiny_batch), out)
    assert not torch.equal(run(twin, tiny_batch), out)


def test_a_deleted_model_is_freed(tiny_bert, tiny_batch):
    model = get_peft_model(tiny_bert(), xpeft(num_adapters=21))
    run(model, tiny_batch)
    layer = model.base_model.model.bert.encoder.layer[0].output.dense
    watched = [weakref.ref(model), weakref.ref(layer), weakref.ref(layer.xpeft_sites["default"].pool.down)]
    del model, layer
    gc.collect()
    assert [ref() for ref in watched] == [None, None, None]


def test_a_failed_adapter_leaves_the_model_as_it_was(tiny_bert, tiny_batch):
    model = get_peft_model(tiny_bert(), xpeft())
    before, names = run(model, tiny_batch), [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match="cannot carry an adapter"):
        model.add_adapter("bad", xpeft(target_modules=["LayerNorm"]))
    assert list(model.peft_config) == ["default"]
    assert [name for name, _ in model.named_modules()] == names
    assert torch.equal(run(model, tiny_batch), before)


def test_model_status_is_regular(tiny_bert):
    model = get_peft_model(tiny_bert(), xpeft())
    model.add_adapter("other", xpeft(mask_type="soft"))
    status = model.get_model_status()
    assert status.enabled is True
    assert status.active_adapters == ["default"]
    assert status.merged_adapters == []
    assert status.requires_grad == {"default": True, "other": False}
    assert status.available_adapters == ["default", "other"]


def test_a_base_that_runs_its_children_in_turn(tmp_path):
    """The mask table hangs on the root: an nn.Sequential runs it too, as its last child."""

    def base() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(6, 12), torch.nn.ReLU(), torch.nn.Linear(12, 3)).eval()

    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    model = get_peft_model(base(), XPEFTConfig(target_modules=["0", "2"], num_adapters=8, bottleneck_size=2, scale=1.0))
    model.eval()
    with torch.no_grad():
        adapted = model(x)
        assert not torch.equal(adapted, base()(x))
        model.save_pretrained(tmp_path)
        assert torch.equal(PeftModel.from_pretrained(base(), tmp_path).eval()(x), adapted)
        assert torch.equal(model.unload()(x), base()(x))
