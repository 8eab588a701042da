"""Threads that share a model whose parameters hold its adapters: right answers, or an error, never another's answer."""

import copy
import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_xmask import MagnitudeMaskConfig, WeightAdapterConfig
from peft_xmask.errors import ConcurrencyError

NAMES = ("a", "b", "c")
THREADS, CALLS = 8, 150
X = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
LIMIT = 300
"""Seconds until a test that hangs fails."""


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 40), nn.Linear(40, 6)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


@pytest.fixture(params=[MagnitudeMaskConfig, WeightAdapterConfig], ids=["magnitude-mask", "weight-adapter"])
def model(request):
    """Three adapters over four blocks. No pass has run yet."""
    fields = {"density": 0.3} if request.param is MagnitudeMaskConfig else {"target": "both", "adapter_bias": True}
    torch.manual_seed(0)
    base = nn.Sequential(*(Block() for _ in range(4))).eval()
    config = request.param(target_modules=["up", "down"], init_weights=False, **fields)
    made = get_peft_model(base, copy.deepcopy(config), adapter_name=NAMES[0])
    for name in NAMES[1:]:
        made.add_adapter(name, copy.deepcopy(config))
    return made.eval()


@pytest.fixture
def expected(model):
    """What each adapter gives, and the base, of a copy that one thread uses."""
    twin, found = copy.deepcopy(model), {}
    with torch.no_grad():
        for name in NAMES:
            twin.set_adapter(name)
            found[name] = twin(X)
        with twin.disable_adapter():
            found["__base__"] = twin(X)
    assert len({float(each.sum()) for each in found.values()}) == 4
    return found


def in_threads(work) -> list:
    """Results of one call in each thread; all start at once."""
    start = threading.Barrier(THREADS)

    def run(number):
        torch.set_num_threads(1)
        start.wait(LIMIT)
        with torch.no_grad():
            return work(number)

    with ThreadPoolExecutor(THREADS) as executor:
        return [future.result(LIMIT) for future in [executor.submit(run, number) for number in range(THREADS)]]


def test_each_call_names_its_adapters(model, expected):
    """Whatever the other threads ask for, each row is what one thread alone gives for the same names."""
    twin = copy.deepcopy(model)
    choices = list(itertools.product([*NAMES, "__base__"], repeat=len(X)))
    with torch.no_grad():
        alone = {names: twin(X, adapter_names=list(names)) for names in choices}
    for names, found in alone.items():
        torch.testing.assert_close(found, torch.stack([expected[name][k] for k, name in enumerate(names)]))

    def work(number):
        wrong = 0
        for i in range(CALLS):
            names = choices[(5 * number + 3 * i) % len(choices)]
            wrong += not torch.equal(model(X, adapter_names=list(names)), alone[names])
        return wrong

    assert sum(in_threads(work)) == 0
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(model(X), expected["__base__"])


def test_one_adapter_for_all(model, expected):
    """The first passes, which write the parameters, run at once."""
    model.set_adapter("b")
    assert all(in_threads(lambda _: all(torch.equal(model(X), expected["b"]) for _ in range(CALLS))))
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(model(X), expected["__base__"])


def test_set_adapter_in_each_thread_is_right_or_refused(model, expected):
    def work(number):
        refused = 0
        for i in range(CALLS):
            name = NAMES[(number + i) % 3]
            try:
                model.set_adapter(name)
                found = model(X)
            except ConcurrencyError:
                refused += 1
            else:
                assert torch.equal(found, expected[name])
        return refused

    assert sum(in_threads(work)) > 0
    model.set_adapter("c")
    with torch.no_grad():
        assert torch.equal(model(X), expected["c"])
        with model.disable_adapter():
            assert torch.equal(model(X), expected["__base__"])


def test_set_adapter_under_a_lock_is_always_right(model, expected):
    lock = threading.Lock()

    def work(number):
        for i in range(CALLS):
            name = NAMES[(number + i) % 3]
            with lock:
                model.set_adapter(name)
                assert torch.equal(model(X), expected[name])
        return True

    assert all(in_threads(work))


def test_a_thread_that_has_set_nothing_serves_what_another_has_set(model, expected):
    model.set_adapter("b")
    with ThreadPoolExecutor(1) as executor:
        found = executor.submit(lambda: model(X).detach()).result(LIMIT)
    assert torch.equal(found, expected["b"])


def test_an_adapter_that_another_thread_has_set_is_not_served_for_one_s_own(model, expected):
    model.set_adapter("a")
    with ThreadPoolExecutor(1) as executor:
        executor.submit(model.set_adapter, "b").result(LIMIT)
    with pytest.raises(ConcurrencyError, match=r"asked for the active adapters \['a'\].* \['b'\] since"):
        model(X)
    assert torch.equal(model(X, adapter_names=["a", "a"]).detach(), expected["a"])
    model.set_adapter("a")
    assert torch.equal(model(X).detach(), expected["a"])


def test_what_one_thread_does_by_itself_is_never_refused(model, expected):
    """Layers may be set, and adapters deleted, behind the model's back."""
    with torch.no_grad():
        model.base_model.set_adapter(["a", "b"])
        model(X)
        model.delete_adapter("b")
        assert torch.equal(model(X), expected["a"])
        for module in model.modules():
            if hasattr(module, "set_adapter") and module is not model and module is not model.base_model:
                module.set_adapter("c")
        assert torch.equal(model(X), expected["c"])
