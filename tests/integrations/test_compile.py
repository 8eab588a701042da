"""torch.compile: one graph without breaks, the same numbers, and no new graph for another profile."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments

from peft_xmask import BottleneckConfig, XPEFTCallback, XPEFTConfig, as_base


@pytest.fixture(autouse=True)
def no_graphs_of_others():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def xpeft(**fields) -> XPEFTConfig:
    return XPEFTConfig(**{"task_type": "SEQ_CLS", "num_adapters": 20, "bottleneck_size": 4, "scale": 1.0, **fields})


def many(model: PeftModel, count: int = 4) -> PeftModel:
    """Gives each profile masks of its own."""
    table = model.base_model.table
    with torch.no_grad():
        table.adapters["default"].logits.weight.normal_(generator=torch.Generator().manual_seed(1))
    assert table.adapters["default"].spec.num_profiles == count
    return model


def compiled(model: torch.nn.Module, backend: str = "aot_eager"):
    return torch.compile(model, backend=backend, fullgraph=True)


def logits(model, batch, **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch, **kwargs).logits


CONFIGS = {
    "hard": xpeft,
    "soft": lambda: xpeft(mask_type="soft"),
    "softmax estimator": lambda: xpeft(estimator="softmax", learn_gain=False),
    "bottleneck": lambda: BottleneckConfig(task_type="SEQ_CLS", bottleneck_size=4, init_weights=False),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_training_gives_the_gradients_of_a_model_that_is_not_compiled(name, tiny_bert, tiny_batch):
    gradients = []
    for compile_it in (False, True):
        torch.manual_seed(0)
        model = get_peft_model(tiny_bert(), CONFIGS[name]()).train()
        run = compiled(model) if compile_it else model
        run(**tiny_batch, labels=torch.tensor([0, 1, 2, 3])).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    plain, found = gradients
    assert plain.keys() == found.keys()
    for key in plain:
        torch.testing.assert_close(found[key], plain[key])


def test_steps_are_seen_by_the_graph(tiny_bert, tiny_batch):
    """Masks are computed anew when the optimizer has moved them, from one graph for training and one for evaluation."""
    model = get_peft_model(tiny_bert(problem_type="single_label_classification"), xpeft())
    run = compiled(model)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    seen = []
    for step in range(4):
        with torch.compiler.set_stance("default" if step == 0 else "fail_on_recompile"):
            model.train()
            run(**tiny_batch, labels=torch.tensor([0, 1, 2, 3])).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            model.eval()
            seen.append(logits(run, tiny_batch))
        torch.testing.assert_close(seen[-1], logits(model, tiny_batch))
    assert not torch.allclose(seen[0], seen[-1])


@pytest.mark.parametrize("loaded", [False, True])
def test_another_profile_is_no_other_graph(loaded, tiny_bert, tiny_batch, tmp_path):
    model = many(get_peft_model(tiny_bert(), xpeft(num_profiles=4))).eval()
    if loaded:
        model.save_pretrained(tmp_path)
        model = PeftModel.from_pretrained(tiny_bert(), tmp_path).eval()
        model.cache_profiles(10**6)  # a graph mixes for itself
    run = compiled(model)
    for step, row in enumerate((2, 0, 3, 1)):
        model.set_profile(row)
        expected = logits(model, tiny_batch)
        with torch.compiler.set_stance("default" if step == 0 else "fail_on_recompile"):
            torch.testing.assert_close(logits(run, tiny_batch), expected)
    rows = [torch.tensor([3, 1, 1, 0]), torch.tensor([0, 0, 2, 2])]
    for step, batch_rows in enumerate(rows):
        expected = logits(model, tiny_batch, adapter_names=batch_rows)
        with torch.compiler.set_stance("default" if step == 0 else "fail_on_recompile"):
            torch.testing.assert_close(logits(run, tiny_batch, adapter_names=batch_rows), expected)


@pytest.fixture(params=[["query"], ["query", r"output.dense"]], ids=["other modules", "the same module"])
def over_lora(request, tiny_bert):
    """A tiny model with four profiles over a LoRA that is not merged."""
    torch.manual_seed(0)
    lora = LoraConfig(task_type="SEQ_CLS", target_modules=request.param, init_lora_weights=False)
    base = as_base(get_peft_model(tiny_bert(), lora, adapter_name="task"))
    return many(get_peft_model(base, xpeft(num_profiles=4)))


def test_training_over_a_lora_gives_the_gradients_of_a_model_that_is_not_compiled(over_lora, tiny_batch):
    gradients = []
    for run in (over_lora.train(), compiled(over_lora)):
        over_lora.zero_grad()
        run(**tiny_batch, labels=torch.tensor([0, 1, 2, 3]), adapter_names=torch.tensor([3, 1, 1, 0])).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in over_lora.named_parameters() if p.grad is not None})
    plain, found = gradients
    assert plain.keys() == found.keys()
    assert any("logits" in name for name in plain)
    for key in plain:
        torch.testing.assert_close(found[key], plain[key])


def test_another_profile_over_a_lora_is_no_other_graph(over_lora, tiny_batch):
    model = over_lora.eval()
    run = compiled(model)
    seen = []
    for step, row in enumerate((2, 0, 3, 1)):
        model.set_profile(row)
        with torch.compiler.set_stance("default" if step == 0 else "fail_on_recompile"):
            seen.append(logits(run, tiny_batch))
        torch.testing.assert_close(seen[-1], logits(model, tiny_batch))
    with_lora = logits(model, tiny_batch)
    model.set_lora([])  # one more graph
    without = logits(run, tiny_batch)
    torch.testing.assert_close(without, logits(model, tiny_batch))
    assert not torch.allclose(without, with_lora)
    model.set_lora("task")
    torch.testing.assert_close(logits(run, tiny_batch), with_lora)
    with model.disable_adapter():
        torch.testing.assert_close(logits(run, tiny_batch), logits(model, tiny_batch))


def test_what_a_graph_cannot_check_before_it_asserts(tiny_bert, tiny_batch, tmp_path):
    get_peft_model(tiny_bert(), xpeft()).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny_bert(), tmp_path).eval()
    run = compiled(model)
    logits(run, tiny_batch)
    model.masks("default").bits.weight.fill_(255)
    with pytest.raises(RuntimeError, match="not masks of its kind"):
        logits(run, tiny_batch)
    model = get_peft_model(tiny_bert(), xpeft(num_profiles=2)).eval()
    with pytest.raises(RuntimeError, match="rows from 0 to 1"):
        logits(compiled(model), tiny_batch, adapter_names=torch.tensor([0, 1, 2, 0]))


def test_disabling_and_switching_adapters(tiny_bert, tiny_batch):
    model = get_peft_model(tiny_bert(), xpeft()).eval()
    model.add_adapter("other", xpeft(pool_seed=5))
    run = compiled(model)
    for name in ("default", "other", "default"):
        model.set_adapter(name)
        torch.testing.assert_close(logits(run, tiny_batch), logits(model, tiny_batch))
    with model.disable_adapter():
        torch.testing.assert_close(logits(run, tiny_batch), logits(model, tiny_batch))


def test_inductor_gives_the_same_outputs(tiny_bert, tiny_batch):
    """The compiler that users get by default, on this machine's processor."""
    model = many(get_peft_model(tiny_bert(), xpeft(num_profiles=4))).eval()
    run = compiled(model, "inductor")
    for row in (0, 3):
        model.set_profile(row)
        torch.testing.assert_close(logits(run, tiny_batch), logits(model, tiny_batch))


def test_checkpointed_blocks_see_the_masks_of_their_forward_pass(tiny_bert, tiny_batch):
    """With noise in the masks, a block that is run again in backward must not draw again."""
    model = get_peft_model(tiny_bert(), xpeft(gumbel_noise=0.5, estimator="softmax")).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    gradients = []
    for run in (model, torch.compile(model, backend="aot_eager")):
        torch.manual_seed(4)
        model.zero_grad()
        run(**tiny_batch, labels=torch.tensor([0, 1, 2, 3])).loss.backward()
        gradients.append(model.masks("default").logits.weight.grad.clone())
    torch.testing.assert_close(*gradients)


def test_the_trainer_compiles(tiny_bert, tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(tiny_bert(), xpeft())
    rows = [{"input_ids": torch.arange(1, 7) + i, "labels": i % 4} for i in range(16)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=8, num_train_epochs=6, learning_rate=1e-2, use_cpu=True,
        torch_compile=True, torch_compile_backend="aot_eager", report_to=[], logging_steps=2, disable_tqdm=True,
        save_strategy="no",
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[XPEFTCallback(temperature=(2.0, 0.5))])
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(tiny_bert(), tmp_path / "adapter").eval()
    batch = {"input_ids": torch.stack([row["input_ids"] for row in rows[:4]])}
    assert torch.equal(logits(model.eval(), batch), logits(loaded, batch))


def test_nobody_can_be_chosen_of_an_adapter_with_one_profile(tiny_bert, tiny_batch):
    """Its graph may leave the choice out only until there is one."""
    model = get_peft_model(tiny_bert(), xpeft(scale=100.0)).eval()
    run = compiled(model)
    first = logits(run, tiny_batch)
    torch.testing.assert_close(first, logits(model, tiny_batch))
    for row in (-1, 0):
        model.set_profile(row)
        torch.testing.assert_close(logits(run, tiny_batch), logits(model, tiny_batch))
    model.set_profile(-1)
    assert not torch.allclose(logits(run, tiny_batch), first, atol=1e-3, rtol=0.0)
