"""Threads that share one model: no answer is ever another user's."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import PeftModel, get_peft_model

from peft_xmask import BottleneckConfig, ProfileBank, XPEFTConfig
from peft_xmask.errors import ConfigError

THREADS, ROWS = 8, 12
ANSWERS = int(os.environ.get("PEFT_XMASK_ANSWERS", "800"))
"""Of each case. tests/benchmarks/threads.py asks for 10,000."""


@pytest.fixture
def tiny_bert(tiny_bert):
    """With weights so large that another profile is another answer."""
    return lambda **fields: tiny_bert(**{"initializer_range": 0.3, **fields})


@pytest.fixture
def bank(tiny_bert) -> ProfileBank:
    config = XPEFTConfig(task_type="SEQ_CLS", num_adapters=20, bottleneck_size=4, scale=1.0, num_profiles=ROWS)
    model = get_peft_model(tiny_bert(), config)
    with torch.no_grad():
        weight = model.masks("default").logits.weight
        weight.normal_(std=0.01, generator=torch.Generator().manual_seed(1))
    return ProfileBank.from_model(model, [f"user {row}" for row in range(ROWS)])


def from_threads(ask, count: int = ANSWERS) -> list:
    """What ``ask(0)`` to ``ask(count - 1)`` give, from eight threads that begin together."""
    begin = threading.Barrier(THREADS)

    def part(thread: int) -> dict[int, object]:
        begin.wait(timeout=300)
        return {turn: ask(turn) for turn in range(thread, count, THREADS)}

    with ThreadPoolExecutor(THREADS) as executor:
        found = {turn: answer for part in executor.map(part, range(THREADS)) for turn, answer in part.items()}
    return [found[turn] for turn in range(count)]


def wrong(answers: list[torch.Tensor], expected: list[torch.Tensor]) -> int:
    """How many answers are not those of their row (rounding aside), which is ``turn * 5 % ROWS``."""
    return sum(
        not torch.allclose(answer, expected[turn * 5 % ROWS], rtol=1e-4, atol=1e-4)
        for turn, answer in enumerate(answers)
    )


@pytest.mark.parametrize("max_bytes", [0, 10**6, 6000])
@pytest.mark.parametrize("way", ["names", "rows", "set_profile"])
def test_profiles_of_one_bank(way, max_bytes, bank, tiny_bert, tiny_batch):
    """With a cache for all profiles, for three of them, and without one."""
    model = bank.attach(tiny_bert())
    one = {name: tensor[:1] for name, tensor in tiny_batch.items()}

    @torch.no_grad()
    def ask(turn: int) -> torch.Tensor:
        row = turn * 5 % ROWS
        if way == "names":
            return model(**one, adapter_names=[f"user {row}"]).logits
        if way == "rows":
            return model(**one, adapter_names=torch.tensor([row])).logits
        model.set_profile(f"user {row}")
        return model(**one).logits

    expected = [ask(next(turn for turn in range(ROWS) if turn * 5 % ROWS == row)) for row in range(ROWS)]
    distances = torch.pdist(torch.cat(expected))
    assert distances.min() > 1e-2  # every answer says whose it is
    model.cache_profiles(max_bytes)
    assert wrong(from_threads(ask), expected) == 0


def test_adapters_of_one_model_by_name(tiny_bert, tiny_batch):
    configs = {f"user {row}": BottleneckConfig(bottleneck_size=4, init_weights=False, scale=20.0) for row in range(4)}
    model = get_peft_model(tiny_bert(), configs["user 0"], adapter_name="user 0")
    for name in list(configs)[1:]:
        model.add_adapter(name, configs[name])
    model.eval()
    one = {name: tensor[:1] for name, tensor in tiny_batch.items()}

    @torch.no_grad()
    def ask(turn: int) -> torch.Tensor:
        row = turn * 5 % ROWS % 4
        return model(**one, adapter_names=[f"user {row}"]).logits

    alone = []
    for name in configs:
        model.set_adapter(name)
        with torch.no_grad():
            alone.append(model(**one).logits)
    assert torch.pdist(torch.cat(alone)).min() > 1e-2
    model.set_adapter("user 0")
    assert wrong(from_threads(ask), [alone[row % 4] for row in range(ROWS)]) == 0


def test_a_thread_sees_no_choice_of_another(bank, tiny_bert, tiny_batch):
    model = bank.attach(tiny_bert())
    model.set_profile("user 3")
    with ThreadPoolExecutor(1) as executor, pytest.raises(ConfigError, match="holds for the thread"):
        executor.submit(lambda: model(**tiny_batch)).result()


def test_rows_end_with_their_call(bank, tiny_bert, tiny_batch):
    """The model inside does not use the rows of the last batch."""
    model = bank.attach(tiny_bert())
    with torch.no_grad():
        mixed = model(**tiny_batch, adapter_names=torch.arange(4)).logits
        with pytest.raises(ConfigError, match="none was chosen"):
            model.get_base_model()(**tiny_batch)
        model.set_profile(2)
        chosen = model.get_base_model()(**tiny_batch).logits
        assert torch.equal(chosen, model(**tiny_batch).logits)
    assert not torch.allclose(chosen, mixed, atol=1e-6)
    with pytest.raises(ConfigError, match="one row in `adapter_names` for each example"):
        model(**tiny_batch, adapter_names=torch.arange(3))
    assert torch.equal(model.get_base_model()(**tiny_batch).logits, chosen)


def test_a_bank_that_is_replaced_while_threads_ask(bank, tiny_bert, tiny_batch):
    """Each answer is by the old bank or by the new one, whose rows have other names."""
    other = ProfileBank.from_model(bank.attach(tiny_bert()), [f"user {ROWS - 1 - row}" for row in range(ROWS)])
    model = bank.attach(tiny_bert())
    one = {name: tensor[:1] for name, tensor in tiny_batch.items()}

    @torch.no_grad()
    def answer(row: int) -> torch.Tensor:
        return model(**one, adapter_names=[f"user {row}"]).logits

    expected = [answer(row) for row in range(ROWS)]

    def ask(turn: int) -> torch.Tensor:
        if turn % 40 == 0:
            (other if turn % 80 else bank).replace(model, "bank")
        return answer(turn % ROWS)

    for turn, found in enumerate(from_threads(ask, 400)):
        row = turn % ROWS
        assert any(torch.allclose(found, expected[each], rtol=1e-4, atol=1e-4) for each in (row, ROWS - 1 - row))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_blocks_use_the_rows_of_their_own_pass(use_reentrant, tiny_bert, tiny_batch):
    """Two passes with other rows before one backward pass: the blocks of each run again with their own rows."""
    config = XPEFTConfig(task_type="SEQ_CLS", num_adapters=20, bottleneck_size=4, scale=1.0, num_profiles=8)
    gradients = []
    for checkpointed in (False, True):
        model = get_peft_model(tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), config).train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        weight = model.masks("default").logits.weight
        with torch.no_grad():
            weight.normal_(std=0.01, generator=torch.Generator().manual_seed(1))
        labels = torch.arange(4)
        losses = [
            model(**tiny_batch, labels=labels, adapter_names=rows).loss
            for rows in (torch.tensor([0, 1, 2, 3]), torch.tensor([4, 5, 4, 6]))
        ]
        (losses[0] + 2 * losses[1]).backward()
        gradients.append(weight.grad)
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().sum(1).gt(0).tolist() == [True] * 7 + [False]


def test_a_copied_model_keeps_the_choice(bank, tiny_bert, tiny_batch, tmp_path):
    import copy

    model = bank.attach(tiny_bert())
    model.set_profile(5)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(twin(**tiny_batch).logits, model(**tiny_batch).logits)
        twin.set_profile(6)
        assert not torch.equal(twin(**tiny_batch).logits, model(**tiny_batch).logits)
    assert isinstance(twin, PeftModel)
