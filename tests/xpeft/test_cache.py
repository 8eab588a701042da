"""Mixed adapters that are kept: the outputs of a model that keeps none, in at most so many bytes, never out of date."""

import copy
import random
from dataclasses import replace

import pytest
import torch
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file

from peft_xmask import XPEFTConfig
from peft_xmask.errors import ConfigError, MaskFormatError

ROWS = 9


@pytest.fixture
def crowd(tiny_bert):
    """Builds a model whose nine profiles differ."""

    def build(seed: int = 1, **fields) -> PeftModel:
        settings = {"num_adapters": 20, "bottleneck_size": 4, "scale": 1.0, "num_profiles": ROWS, **fields}
        model = get_peft_model(tiny_bert(), XPEFTConfig(task_type="SEQ_CLS", **settings)).eval()
        with torch.no_grad():
            weight = model.masks("default").logits.weight
            weight.normal_(std=0.01, generator=torch.Generator().manual_seed(seed))
        return model

    return build


@pytest.fixture
def served(crowd, tiny_bert, tmp_path):
    """Builds a model that has the same profiles as bytes."""

    def build(seed: int = 1, **fields) -> PeftModel:
        folder = tmp_path / str(seed)
        crowd(seed, **fields).save_pretrained(folder)
        return PeftModel.from_pretrained(tiny_bert(), folder).eval()

    return build


def kept(model: PeftModel, name: str = "default"):
    return model.masks(name).cache


def one_row(model: PeftModel) -> int:
    """Bytes of one profile's mixed adapters: b x d and d x b numbers at each of three sites, in float32."""
    assert model.peft_config["default"].bottleneck_size == 4
    return 3 * 2 * 4 * model.config.hidden_size * 4


def run(model: PeftModel, batch, rows=None) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch, **({} if rows is None else {"adapter_names": torch.tensor(rows)})).logits


@pytest.mark.parametrize("slots", [1, 3, 6, 20])
@pytest.mark.parametrize("make", ["crowd", "served"])
def test_outputs_are_those_without_a_cache(make, slots, request, tiny_batch):
    build = request.getfixturevalue(make)
    plain, cached = build(), build()
    budget = slots * one_row(cached) + 100
    cached.cache_profiles(budget)
    draws = random.Random(slots)
    for _ in range(25):
        rows = None
        if draws.random() < 0.3:
            row = draws.randrange(ROWS)
            for model in (plain, cached):
                model.set_profile(row)
        else:
            some = draws.sample(range(-1, ROWS), draws.randint(1, 4))
            rows = [draws.choice(some) for _ in range(4)]
        torch.testing.assert_close(run(cached, tiny_batch, rows), run(plain, tiny_batch, rows))
        assert kept(cached).nbytes <= budget
        assert len(kept(cached)) <= min(slots, ROWS + 1)
    assert kept(cached).nbytes == len(kept(cached)) * one_row(cached)
    assert len(kept(cached)) >= min(slots, ROWS)


def test_what_is_kept_needs_no_pool(served, tiny_batch):
    """The last three profiles are kept, and one that was used again is among them; they are not mixed again."""
    model = served(pool_seed=77)
    model.cache_profiles(3 * one_row(model))
    for row in (4, 0, 1):
        model.set_profile(row)
        run(model, tiny_batch)
    expected = run(model, tiny_batch, [4, 0, 1, 4])
    run(model, tiny_batch, [1, 1, 1, 1])
    run(model, tiny_batch, [4, 4, 4, 4])
    for layer in model.modules():
        if hasattr(layer, "xpeft_sites"):
            layer.xpeft_sites["default"].pool.down.fill_(torch.nan)
    assert torch.equal(run(model, tiny_batch, [4, 0, 1, 4]), expected)
    assert run(model, tiny_batch, [4, 2, 1, 4])[1].isnan().all()  # in the place of 0
    assert run(model, tiny_batch, [4, 2, 1, 4])[[0, 2, 3]].equal(expected[[0, 2, 3]])
    assert run(model, tiny_batch, [0, 0, 0, 0]).isnan().all()
    assert run(model, tiny_batch, [0, 1, 2, 4]).isnan().all()  # four do not fit, and are mixed as without a cache


def test_sizes_and_switching_off(crowd, tiny_batch):
    model = crowd()
    for wrong in (one_row(model) - 1, -1):
        with pytest.raises(ConfigError, match=f"takes {one_row(model):,} bytes"):
            model.cache_profiles(wrong)
    for wrong in ("1GB", True, 1e9):
        with pytest.raises(ConfigError, match="expected a whole number of bytes"):
            model.cache_profiles(wrong)
    with pytest.raises(ConfigError, match="'nobody'"):
        model.cache_profiles(10**6, "nobody")
    model.cache_profiles(10**9)
    run(model, tiny_batch, [3, 1, 1, 0])
    assert kept(model).nbytes == 3 * one_row(model)
    model.cache_profiles(0)
    assert (len(kept(model)), kept(model).max_bytes) == (0, 0)
    run(model, tiny_batch, [3, 1, 1, 0])


def step(model: PeftModel, batch) -> None:
    """Profiles 0 to 3 are trained."""
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(**batch, adapter_names=torch.arange(4), labels=torch.arange(4)).loss.backward()
    optimizer.step()
    model.eval()


def with_temperature(masks, temperature):
    masks.form = replace(masks.form, temperature=temperature)


def load_other(model: PeftModel, folder) -> None:
    set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))


def other_of_this_name(model: PeftModel, folder) -> None:
    model.load_adapter(folder, "other")
    model.set_adapter("other")
    model.delete_adapter("default")
    model.load_adapter(folder, "default")
    model.set_adapter("default")


CHANGES = {
    "trained": ("crowd", {}, lambda model, batch, folder: step(model, batch)),
    "loaded": ("served", {}, lambda model, batch, folder: load_other(model, folder)),
    "loaded into what trains": ("crowd", {}, lambda model, batch, folder: load_other(model, folder)),
    "deleted": ("served", {}, lambda model, batch, folder: other_of_this_name(model, folder)),
    "another temperature": (
        "crowd",
        {"mask_type": "soft"},
        lambda model, batch, folder: with_temperature(model.masks("default"), 0.2),
    ),
    "half precision": ("served", {}, lambda model, batch, folder: model.to(torch.bfloat16)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_nothing_is_out_of_date(change, crowd, request, tiny_batch, tmp_path):
    make, fields, apply = CHANGES[change]
    crowd(seed=2, **fields).save_pretrained(tmp_path / "other")
    outputs, chosen = [], None  # the profile for all examples
    for budget in (0, 10**6):
        model = request.getfixturevalue(make)(**fields)
        model.cache_profiles(budget)
        model.set_profile(2)
        before = [run(model, tiny_batch, rows) for rows in ([3, 0, 1, 2], chosen)]
        apply(model, tiny_batch, tmp_path / "other")
        if change == "deleted":
            model.set_profile(2)
        outputs.append([run(model, tiny_batch, rows) for rows in (chosen, [3, 0, 1, 2])])
        assert not any(torch.equal(*pair) for pair in zip(before, reversed(outputs[-1]), strict=True))
    torch.testing.assert_close(*outputs)


def test_gradients_are_those_without_a_cache(crowd, tiny_batch):
    gradients = []
    for budget in (0, 10**6):
        model = crowd()
        model.cache_profiles(budget)
        run(model, tiny_batch, [3, 0, 1, 2])
        for train in (False, True):
            model.train(train)
            model(**tiny_batch, adapter_names=torch.tensor([3, 0, 3, 2]), labels=torch.arange(4)).loss.backward()
        gradients.append(model.masks("default").logits.weight.grad)
    assert torch.equal(*gradients)
    assert gradients[0].abs().sum(1).gt(0).nonzero().flatten().tolist() == [0, 2, 3]


@pytest.mark.parametrize("budget", [0, 10**6])
def test_what_was_mixed_in_inference_mode_serves_a_backward_pass(budget, served, tiny_batch):
    """Tensors made in inference mode cannot be saved for one."""
    model = served()
    model.cache_profiles(budget)
    model.set_profile(3)
    with torch.inference_mode():
        expected = model(**tiny_batch).logits.clone()
    embeddings = model.get_input_embeddings().weight.requires_grad_(True)
    logits = model(**tiny_batch).logits
    logits.sum().backward()
    assert torch.equal(logits, expected)
    assert embeddings.grad.abs().sum() > 0


def test_a_damaged_row_spoils_no_other(served, tiny_batch):
    model = served()
    model.cache_profiles(2 * one_row(model))
    expected = run(model, tiny_batch, [1, 2, 1, 2])
    bits = model.masks("default").bits.weight
    bits[3] = 255
    first = run(model, tiny_batch, [1, 2, 1, 2])
    for rows in ([3, 3, 3, 3], [1, 3, 1, 1]):
        with pytest.raises(MaskFormatError, match="file is damaged"):
            run(model, tiny_batch, rows)
        torch.testing.assert_close(run(model, tiny_batch, [1, 2, 1, 2]), expected)
    assert torch.equal(first, expected)


def test_a_copy_keeps_its_own(served, tiny_batch):
    model = served()
    model.cache_profiles(10**6)
    expected = run(model, tiny_batch, [1, 2, 1, 2])
    twin = copy.deepcopy(model)
    assert (len(kept(model)), len(kept(twin)), kept(twin).max_bytes) == (2, 0, 10**6)
    assert kept(twin).sites[0] is not kept(model).sites[0]
    assert torch.equal(run(twin, tiny_batch, [1, 2, 1, 2]), expected)
    twin.masks("default").bits.weight[1] = twin.masks("default").bits.weight[5]
    assert not torch.equal(run(twin, tiny_batch, [1, 2, 1, 2]), expected)
    assert torch.equal(run(model, tiny_batch, [1, 2, 1, 2]), expected)


def test_each_adapter_keeps_its_own(served, crowd, tiny_batch, tmp_path):
    model = served()
    crowd(seed=2, num_adapters=12).save_pretrained(tmp_path / "other")
    model.load_adapter(tmp_path / "other", "other")
    outputs = {}
    for budget in (0, 10**6):
        for name in ("default", "other"):
            model.cache_profiles(budget, name)
        for name in ("default", "other", "default"):
            model.set_adapter(name)
            outputs[budget, name] = run(model, tiny_batch, [5, 0, 8, 0])
    for name in ("default", "other"):
        torch.testing.assert_close(outputs[0, name], outputs[10**6, name])
        assert len(kept(model, name)) == 3
