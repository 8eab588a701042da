"""Which rows move, in which order examples come, and what that takes of memory."""

import pytest
import torch
from peft import get_peft_model

from peft_xmask import XPEFTConfig
from peft_xmask.errors import ConfigError
from peft_xmask.profiles import RowAdamW
from peft_xmask.training.sampler import ProfileBatchSampler, draws_per_epoch
from peft_xmask.tuners.base.state import lazy_zeros


def model_of(tiny_bert, profiles: int):
    config = XPEFTConfig(task_type="SEQ_CLS", num_adapters=20, bottleneck_size=4, scale=1.0, num_profiles=profiles)
    return get_peft_model(tiny_bert(initializer_range=0.4), config).train()


def step(model, optimizer, batch, rows, times: int = 1) -> None:
    labels = torch.tensor([0, 1, 2, 3])
    for _ in range(times):
        model(**batch, labels=labels, adapter_names=torch.tensor(rows)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def weights(model) -> dict[str, torch.Tensor]:
    table = model.base_model.table
    return {name: getattr(table, f"xpeft_{name}")["default"].weight for name in ("logits", "gain")}


def test_rows_of_the_batch_move_and_others_keep_every_bit(tiny_bert, tiny_batch):
    """Also those that were in an earlier batch, whose momentum and weight decay an ordinary Adam would go on with."""
    model = model_of(tiny_bert, 6)
    optimizer = RowAdamW.for_model(model, lr=1e-2, weight_decay=0.5)
    step(model, optimizer, tiny_batch, [0, 1, 2, 3])
    before = {name: weight.detach().clone() for name, weight in weights(model).items()}
    moments = {name: optimizer.state[weight]["exp_avg"].clone() for name, weight in weights(model).items()}
    step(model, optimizer, tiny_batch, [2, 4, -1, 2])
    for name, weight in weights(model).items():
        state = optimizer.state[weight]
        assert (weight != before[name]).any(1).tolist() == [False, False, True, False, True, False]
        assert (state["exp_avg"] != moments[name]).any(1).tolist() == [False, False, True, False, True, False]
        assert state["step"].tolist() == [1, 1, 2, 1, 1, 0]
        assert weight.grad is None


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_row_steps_as_adamw_would(accumulated, tiny_bert, tiny_batch):
    model, other = model_of(tiny_bert, 3), model_of(tiny_bert, 3)
    optimizer = RowAdamW.for_model(model, lr=1e-2, weight_decay=0.1)
    plain = torch.optim.AdamW([p for p in other.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for _ in range(4):
        step(model, optimizer, tiny_batch, [1, 1, 1, 1], accumulated)
        step(other, plain, tiny_batch, [1, 1, 1, 1], accumulated)
    for name, weight in weights(model).items():
        torch.testing.assert_close(weight[1], weights(other)[name][1], rtol=1e-4, atol=1e-6)
    head = [
        dict(each.named_parameters())["base_model.model.classifier.modules_to_save.default.weight"]
        for each in (model, other)
    ]
    torch.testing.assert_close(*head, rtol=1e-4, atol=1e-6)


def test_optimizer_state_is_of_rows_touched_and_goes_on_exactly(tiny_bert, tiny_batch):
    model, other = model_of(tiny_bert, 50), model_of(tiny_bert, 50)
    optimizer, resumed = (RowAdamW.for_model(each, lr=1e-2) for each in (model, other))
    step(model, optimizer, tiny_batch, [7, 30, 7, 2])
    state = optimizer.state_dict()
    assert [entry["step"][0].tolist() for entry in state["state"].values() if entry["step"].dim() == 2] == [
        [2, 7, 30]
    ] * 2
    assert all(tensor.shape[0] <= 16 for entry in state["state"].values() for tensor in entry.values() if tensor.dim())
    with torch.no_grad():
        for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
            mine.copy_(theirs)
    resumed.load_state_dict(state)
    for each, taker in ((model, optimizer), (other, resumed)):
        step(each, taker, tiny_batch, [2, 9, 30, 2])
    for name, weight in weights(model).items():
        assert torch.equal(weight, weights(other)[name])
        assert torch.equal(optimizer.state[weight]["exp_avg_sq"], resumed.state[weights(other)[name]]["exp_avg_sq"])


def own_memory() -> int:
    with open("/proc/self/status", encoding="ascii") as stream:
        return next(int(line.split()[1]) * 1024 for line in stream if line.startswith("RssAnon"))


def test_memory_is_of_rows_touched(tiny_bert, tiny_batch):
    """200,000 profiles of 480 bytes of logits and 960 of moments; a step touches four."""
    try:
        start = own_memory()
    except (OSError, StopIteration):
        pytest.skip("the system does not say what memory is a process's own")
    model = model_of(tiny_bert, 200_000)
    optimizer = RowAdamW.for_model(model, lr=1e-2)
    step(model, optimizer, tiny_batch, [5, 199_999, 100_000, 5])
    assert own_memory() - start < 40e6
    assert sum(weight.nbytes for weight in weights(model).values()) > 90e6


@pytest.mark.parametrize("settings", [{"lr": -1.0}, {"betas": (1.0, 0.9)}, {"eps": -1.0}, {"weight_decay": -0.1}])
def test_numbers_that_cannot_be(settings, tiny_bert):
    with pytest.raises(ConfigError, match="is invalid"):
        RowAdamW.for_model(model_of(tiny_bert, 2), **settings)
    with pytest.raises(ConfigError, match="Expected a model with an X-PEFT adapter"):
        RowAdamW.for_model(tiny_bert())


def test_lazy_zeros_are_zeros():
    zeros = lazy_zeros(1000, 700)
    assert zeros.shape == (1000, 700)
    assert not zeros.any()
    zeros[999] = 2
    assert zeros.sum() == 1400
    assert lazy_zeros(3).tolist() == [0, 0, 0]


def drawn(sampler) -> list[int]:
    return [place for batch in sampler for place in batch]


def test_draws_follow_the_formula():
    counts = torch.tensor([3, 3000])
    assert draws_per_epoch(counts, 1.0, 10.0).tolist() == pytest.approx([3, 3000])
    root = draws_per_epoch(counts, 2.0, 1000.0)
    assert root.tolist() == pytest.approx(
        [3003 * 3**0.5 / (3**0.5 + 3000**0.5), 3003 * 3000**0.5 / (3**0.5 + 3000**0.5)]
    )
    assert draws_per_epoch(counts, 1e9, 1000.0).tolist() == pytest.approx([1501.5, 1501.5])
    assert draws_per_epoch(counts, 2.0, 4.0).tolist() == pytest.approx([12, root[1].item()])


def test_an_epoch_is_drawn_as_said():
    rows = torch.tensor([0] * 3 + [1] * 40 + [2] * 9)
    plain = ProfileBatchSampler(rows, 8, temperature=1.0, max_passes=4.0, seed=0)
    assert sorted(drawn(plain)) == list(range(52))
    assert len(plain) == len(list(plain)) == 7
    assert drawn(plain) == drawn(plain)
    first = drawn(plain)
    plain.set_epoch(1)
    assert drawn(plain) != first
    sampler = ProfileBatchSampler(rows, 8, temperature=3.0, max_passes=4.0, seed=0)
    found = torch.bincount(torch.tensor(drawn(sampler)), minlength=52)
    wanted = draws_per_epoch(torch.bincount(rows), 3.0, 4.0)
    for row in range(3):
        mine = found[rows == row]
        assert abs(mine.sum() - wanted[row]) < 1
        assert mine.max() - mine.min() <= 1


def test_profiles_that_stop_leave_and_the_rest_stays():
    rows = torch.tensor([0] * 3 + [1] * 40 + [2] * 9)
    sampler = ProfileBatchSampler(rows, 8, temperature=2.0, max_passes=4.0, seed=1)
    before = list(sampler)
    sampler.stopped = torch.tensor([False, True, False])
    after = list(sampler)
    assert len(before) == len(after)
    for whole, thin in zip(before, after, strict=True):
        kept = [place for place in whole if rows[place] != 1]
        assert thin == (kept or whole[:1])


@pytest.mark.parametrize("processes", [2, 3, 5])
def test_processes_divide_each_batch_and_none_is_left_without(processes):
    rows = torch.tensor([0] * 3 + [1] * 40 + [2] * 9)

    def batches(number, of):
        sampler = ProfileBatchSampler(rows, 8, temperature=2.0, max_passes=4.0, seed=1, part=(number, of))
        sampler.stopped = torch.tensor([False, True, False])
        return list(sampler)

    whole, parts = batches(0, 1), [batches(number, processes) for number in range(processes)]
    for step, batch in enumerate(whole):
        mine = [part[step] for part in parts]
        assert all(mine)
        together = sorted(place for part in mine for place in part)
        left = [place for place in batch if rows[place] != 1]
        if len(left) >= processes:
            assert together == sorted(left)
        else:  # those that have stopped fill it up
            assert set(left) <= set(together)
            assert len(together) == processes


@pytest.mark.parametrize("fields", [{"temperature": 0.9}, {"max_passes": 0.5}])
def test_sampling_that_cannot_be(fields):
    with pytest.raises(ConfigError, match="at least 1"):
        ProfileBatchSampler(torch.tensor([0]), 4, **{"temperature": 1.0, "max_passes": 1.0, "seed": 0, **fields})
    with pytest.raises(ConfigError, match="at least one example"):
        ProfileBatchSampler(torch.tensor([], dtype=torch.long), 4, temperature=1.0, max_passes=1.0, seed=0)
