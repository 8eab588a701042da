"""A bank in a model: by name, by row, mixed in one batch, in training mode and in generate."""

import gc

import pytest
import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from peft_xmask import XPEFTConfig
from peft_xmask.core.packing import pack_halves
from peft_xmask.errors import BaseMismatchError, ConfigError
from peft_xmask.profiles import ProfileBank
from peft_xmask.tuners.xpeft.table import find_table


def logits(model, batch, **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch, **kwargs).logits


@pytest.fixture
def saved(bank, tmp_path) -> ProfileBank:
    bank.save_pretrained(tmp_path)
    return ProfileBank.from_pretrained(tmp_path)


@pytest.fixture
def expected(many_profiles, bank, tiny_batch) -> dict[str, torch.Tensor]:
    """What each profile says to the batch, and the base with the same head."""
    model = many_profiles()
    found = {}
    for row, name in enumerate(bank):
        model.set_profile(row)
        found[name] = logits(model, tiny_batch)
    with model.disable_adapter():
        found["__base__"] = logits(model, tiny_batch)
    return found


@pytest.mark.parametrize("how", ["base", "beside another adapter"])
def test_profiles_are_chosen_by_name(how, saved, expected, tiny_bert, tiny_batch):
    model = tiny_bert()
    if how == "beside another adapter":
        model = get_peft_model(model, XPEFTConfig(task_type="SEQ_CLS", num_adapters=8, bottleneck_size=2))
    served = saved.attach(model)
    for name in saved:
        served.set_profile(name)
        assert torch.equal(logits(served, tiny_batch), expected[name])
    assert served.peft_config["bank"].num_profiles == 5
    with pytest.raises(ConfigError, match="'nobody'"):
        served.set_profile("nobody")


def test_each_example_may_have_its_own(saved, expected, tiny_bert, tiny_batch):
    served = saved.attach(tiny_bert())
    names = ["张伟", "ann", "ann.b", "ann"]
    together = logits(served, tiny_batch, adapter_names=names)
    torch.testing.assert_close(together, torch.stack([expected[name][i] for i, name in enumerate(names)]))
    by_row = logits(served, tiny_batch, adapter_names=torch.tensor([4, 0, 3, 0]))
    assert torch.equal(by_row, together)
    assert torch.equal(logits(served, tiny_batch, adapter_names=[4, 0, 3, 0]), together)


def test_some_examples_may_have_none(saved, expected, tiny_bert, tiny_batch):
    served = saved.attach(tiny_bert())
    names = ["ann", "__base__", "bob", "__base__"]
    together = logits(served, tiny_batch, adapter_names=names)
    torch.testing.assert_close(together, torch.stack([expected[name][i] for i, name in enumerate(names)]))
    assert torch.equal(together, logits(served, tiny_batch, adapter_names=[0, -1, 1, -1]))


def test_nobody_is_answered_alike_at_every_door(many_profiles, tiny_bert, tiny_batch):
    """The base with the head that the profiles share, which is not the base's own."""
    trained = many_profiles()
    with torch.no_grad():
        head = next(each for name, each in trained.named_parameters() if "classifier.modules_to_save" in name)
        head.normal_(generator=torch.Generator().manual_seed(7))
    served = ProfileBank.from_model(trained, ["ann", "bob", "cy", "dee", "eve"]).attach(tiny_bert())
    by_row = logits(served, tiny_batch, adapter_names=torch.tensor([-1, -1, -1, -1]))
    assert torch.equal(logits(served, tiny_batch, adapter_names=["__base__"] * 4), by_row)
    torch.testing.assert_close(logits(served, tiny_batch, adapter_names=["ann", *["__base__"] * 3])[1:], by_row[1:])
    for choice in ("__base__", -1):
        served.set_profile("bob")
        served.set_profile(choice)
        assert torch.equal(logits(served, tiny_batch), by_row)
    own = logits(tiny_bert(), tiny_batch)
    assert not torch.allclose(own, by_row, atol=1e-3)
    with served.disable_adapter():
        assert torch.equal(logits(served, tiny_batch), own)
        assert torch.equal(logits(served, tiny_batch, adapter_names=["__base__"] * 4), own)


def test_the_only_person_of_a_bank_is_not_everybody(single_profile, tiny_bert, tiny_batch):
    served = ProfileBank.from_profiles({"ann": single_profile(1)}).attach(tiny_bert())
    with pytest.raises(ConfigError, match="none was chosen"):
        served(**tiny_batch)
    nobody = logits(served, tiny_batch, adapter_names=["__base__"] * 4)
    served.set_profile("ann")
    assert not torch.equal(logits(served, tiny_batch), nobody)
    served.set_profile("__base__")
    assert torch.equal(logits(served, tiny_batch), nobody)


def test_nobody_has_no_offset_in_a_bank_of_one_person(single_profile, tiny_bert, tiny_batch):
    bank = ProfileBank.from_profiles({"ann": single_profile(1)})
    offset_bits = pack_halves(torch.full((1, 4), 3.0))
    bank = ProfileBank(bank.config, *bank.content().tensors[:2], ["ann"], bank.shared, offset_bits)
    served = bank.attach(tiny_bert())
    found = {}
    for who in ("ann", "__base__"):
        served.set_profile(who)
        found[who] = logits(served, tiny_batch)
        torch.testing.assert_close(found[who], logits(served, tiny_batch, adapter_names=[who] * 4))
    assert (found["ann"] - found["__base__"]).mean() > 2


def test_a_person_called_like_an_adapter_is_a_person(many_profiles, tiny_bert, tiny_batch):
    bank = ProfileBank.from_model(many_profiles(), ["ann", "bank", "cy", "dee", "eve"])
    served = bank.attach(tiny_bert())
    served.set_profile("ann")
    expected = logits(served, tiny_batch, adapter_names=[1, 1, 1, -1])
    assert torch.equal(logits(served, tiny_batch, adapter_names=["bank", "bank", "bank", "__base__"]), expected)


def test_transformers_loads_a_bank_but_for_the_names(saved, expected, tmp_path, tiny_bert, tiny_batch):
    model = tiny_bert()
    info = model.load_adapter(str(tmp_path))
    assert info.unexpected_keys == {f"profile_names.{part}" for part in ("hashes", "rows", "ends", "names")}
    assert not info.missing_keys
    row = list(saved).index("bob")
    find_table(model).adapters["default"].choose(row)
    torch.testing.assert_close(logits(model, tiny_batch), expected["bob"])


def test_unknown_names_are_refused_before_anything_runs(saved, tiny_bert, tiny_batch):
    served = saved.attach(tiny_bert())
    for names, words in (
        (["ann", "nobody", "bob", "x"], "'nobody', 'x'"),
        (["ann", "bob"], "got 2 and 4"),
        ([0, 1, 5, 0], "rows from 0 to 4"),
        ([0, -2, 1, 0], "rows from 0 to 4"),
    ):
        with pytest.raises(ConfigError, match=words):
            served(**tiny_batch, adapter_names=names)


def test_a_bank_of_another_base_or_name_is_refused(saved, tiny_bert):
    with pytest.raises(BaseMismatchError):
        saved.attach(tiny_bert(seed=1))
    served = saved.attach(tiny_bert())
    with pytest.raises(ConfigError, match="'bank' already"):
        saved.attach(served)
    with pytest.raises(ConfigError, match="empty"):
        saved.select([]).attach(tiny_bert())


def test_edits_are_served_and_do_not_reach_models_served_before(saved, expected, tiny_bert, tiny_batch):
    before = saved.attach(tiny_bert())
    saved.add("twin", saved["bob"])
    saved.remove("ann")
    after = saved.attach(tiny_bert())
    after.set_profile("twin")
    assert torch.equal(logits(after, tiny_batch), expected["bob"])
    for model, name in ((before, "twin"), (after, "ann")):
        with pytest.raises(ConfigError, match=f"'{name}'"):
            model.set_profile(name)


def test_a_million_rows_are_served_from_where_they_lie(saved, tiny_bert, tiny_batch, tmp_path):
    """Attaching copies nothing: the model's bytes are the bank's."""
    served = saved.attach(tiny_bert())
    assert served.masks("bank").bits.weight.data_ptr() == saved.content().bits.data_ptr()
    del served
    gc.collect()


@pytest.mark.parametrize("cache", [0, 10**6])
def test_a_bank_takes_the_place_of_another(cache, saved, expected, tiny_bert, tiny_batch):
    served = saved.attach(tiny_bert())
    served.cache_profiles(cache)
    logits(served, tiny_batch, adapter_names=list(saved)[:4])
    served.set_profile("ann")
    saved.add("twin", saved["bob"])
    saved.remove("ann")
    saved.replace(served)
    with pytest.raises(ConfigError, match="profile"):
        served(**tiny_batch)  # the row that was chosen was one of the other bank
    served.set_profile("twin")
    assert torch.equal(logits(served, tiny_batch), expected["bob"])
    names = ["张伟", "twin", "ann.b", "__base__"]
    together = logits(served, tiny_batch, adapter_names=names)
    expected["twin"] = expected["bob"]
    torch.testing.assert_close(together, torch.stack([expected[name][i] for i, name in enumerate(names)]))
    with pytest.raises(ConfigError, match="'ann'"):
        served(**tiny_batch, adapter_names=["ann"] * 4)
    assert served.peft_config["bank"].num_profiles == 5


def test_a_bank_that_does_not_belong_does_not_take_the_place(saved, expected, many_profiles, tiny_bert, tiny_batch):
    served = saved.attach(tiny_bert())
    other = ProfileBank.from_model(many_profiles())
    other.shared = {key: tensor + 1 for key, tensor in other.shared.items()}
    for bank, words in (
        (ProfileBank.from_model(many_profiles(pool_seed=5)), "pool_fingerprint"),
        (other, "head"),
        (saved.select([]), "empty"),
    ):
        with pytest.raises(ValueError, match=words):
            bank.replace(served)
    with pytest.raises(ConfigError, match="serves a bank"):
        saved.replace(many_profiles(), "default")
    served.set_profile("bob")
    assert torch.equal(logits(served, tiny_batch), expected["bob"])


def llama() -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = dict(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    return LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.2, pad_token_id=0, eos_token_id=None)).eval()


def t5() -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = dict(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, initializer_factor=5.0)
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, eos_token_id=None)).eval()


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize(("make", "task"), [(llama, "CAUSAL_LM"), (t5, "SEQ_2_SEQ_LM")])
def test_generating_for_different_profiles(make, task, beams):
    config = XPEFTConfig(task_type=task, num_adapters=12, bottleneck_size=8, scale=2.0, num_profiles=3)
    torch.manual_seed(2)
    model = get_peft_model(make(), config)
    with torch.no_grad():
        model.masks("default").logits.weight.normal_(std=0.1)
    served = ProfileBank.from_model(model, ["ann", "bob", "carol"]).attach(make())
    prompt = torch.randint(3, 40, (1, 5), generator=torch.Generator().manual_seed(3))

    def written(prompts: torch.Tensor, **kwargs) -> torch.Tensor:
        return served.generate(
            input_ids=prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=6, num_beams=beams,
            do_sample=False, **kwargs,
        )  # fmt: skip

    alone = {}
    for name in ("ann", "bob", "carol"):
        served.set_profile(name)
        alone[name] = written(prompt)[0]
    alone["__base__"] = make().generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, num_beams=beams, do_sample=False
    )[0]
    names = ["carol", "__base__", "ann", "carol"]
    for cache in (0, 10**6):
        served.cache_profiles(cache)
        for _ in range(1 + bool(cache)):  # then from what is kept
            mixed = written(prompt.repeat(4, 1), adapter_names=names)
            assert torch.equal(mixed, torch.stack([alone[name] for name in names]))
    assert len({tuple(row.tolist()) for row in alone.values()}) > 2
