"""Any sequence of what a user may do to a model: the base stays the base, and files hold all there is."""

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from outputs import copied_state, run, same_state
from peft import PeftModel, get_peft_model

NAMES = ["ann", "anna", "bob"]  # one is the beginning of another
PLACES = {row.name: row for row in ARCHITECTURES}


class Sequences(RuleBasedStateMachine):
    """One model and the adapters put into it; subclasses say of which method and on which base."""

    method: Any
    architecture: Any
    model: PeftModel

    def __init__(self) -> None:
        super().__init__()
        self.work = tempfile.TemporaryDirectory()
        base = self.architecture.build()
        self.base_state = copied_state(base)
        self.base_output = run(base, self.architecture.batch)
        self.base = base
        self.disabled = False
        self.count = 0

    # what is the case

    @property
    def adapters(self) -> list[str]:
        return sorted(self.model.peft_config)

    @property
    def active(self) -> list[str]:
        return list(self.model.base_model.active_adapters) if self.adapters else []

    @property
    def merged(self) -> bool:
        return any(getattr(module, "merged", False) for module in self.model.modules())

    def output(self) -> torch.Tensor:
        return run(self.model.eval(), self.architecture.batch)

    def config(self) -> Any:
        self.count += 1
        torch.manual_seed(self.count)
        return self.method.config(**self.architecture.fields)

    # what a user may do

    @initialize()
    def wrap(self) -> None:
        self.model = get_peft_model(self.base, self.config(), adapter_name=NAMES[0]).eval()

    @precondition(lambda self: len(self.adapters) < len(NAMES) and not self.merged)
    @rule()
    def add(self) -> None:
        name = next(name for name in NAMES if name not in self.adapters)
        self.model.add_adapter(name, self.config())

    @precondition(lambda self: self.adapters and not self.merged)
    @rule(data=st.data())
    def activate(self, data: st.DataObject) -> None:
        names = data.draw(st.lists(st.sampled_from(self.adapters), min_size=1, unique=True))
        self.model.base_model.set_adapter(names)

    @precondition(lambda self: self.adapters)
    @rule()
    def disable(self) -> None:
        self.model.base_model.disable_adapter_layers()
        self.disabled = True

    @precondition(lambda self: self.disabled)
    @rule()
    def enable(self) -> None:
        self.model.base_model.enable_adapter_layers()
        self.disabled = False

    @precondition(lambda self: self.method.linear and self.active and not self.disabled and not self.merged)
    @rule(safe=st.booleans())
    def merge(self, safe: bool) -> None:
        before = self.output()
        self.model.merge_adapter(safe_merge=safe)
        torch.testing.assert_close(self.output(), before, atol=1e-4, rtol=1e-3)

    @precondition(lambda self: self.merged)
    @rule()
    def unmerge(self) -> None:
        self.model.unmerge_adapter()

    @precondition(lambda self: len(self.adapters) > 1 and not self.merged)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        self.model.delete_adapter(data.draw(st.sampled_from(self.adapters)))

    @precondition(lambda self: self.active and not self.disabled and not self.merged)
    @rule()
    def train_a_step(self) -> None:
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        if not trained:
            return
        optimizer = torch.optim.Adam(trained, lr=0.01)
        self.model.train()
        output = self.model(**self.architecture.batch)
        (output if isinstance(output, torch.Tensor) else output[0]).float().pow(2).mean().backward()
        optimizer.step()
        self.model.zero_grad()

    @precondition(lambda self: self.adapters and not self.merged)
    @rule(data=st.data(), trainable=st.booleans())
    def save_and_load_again(self, data: st.DataObject, trainable: bool) -> None:
        name = data.draw(st.sampled_from(self.adapters))
        others = [other for other in self.adapters if other != name]
        if not others:
            return
        active, before = self.active, self.output()
        self.model.save_pretrained(self.work.name, selected_adapters=[name])
        self.model.base_model.set_adapter(others[:1])
        self.model.delete_adapter(name)
        self.model.load_adapter(Path(self.work.name) / name, name, is_trainable=trainable)
        self.model.base_model.set_adapter(active)
        if self.disabled:
            self.model.base_model.disable_adapter_layers()
        assert torch.equal(self.output(), before)

    @precondition(lambda self: self.active and not self.merged)
    @rule()
    def a_model_made_from_the_files_says_the_same(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            self.model.save_pretrained(folder)
            first, *others = self.adapters
            fresh = PeftModel.from_pretrained(self.architecture.build(), Path(folder) / first, adapter_name=first)
            for name in others:
                fresh.load_adapter(Path(folder) / name, name)
            fresh.base_model.set_adapter(self.active)
            if self.disabled:
                fresh.base_model.disable_adapter_layers()
            assert torch.equal(run(fresh.eval(), self.architecture.batch), self.output())

    # what always holds

    @invariant()
    def a_model_without_active_adapters_is_the_base_bit_for_bit(self) -> None:
        if not hasattr(self, "model"):
            return
        if self.disabled:
            assert torch.equal(self.output(), self.base_output)
        elif not self.merged:
            with self.model.disable_adapter():
                assert torch.equal(self.output(), self.base_output)

    def teardown(self) -> None:
        if hasattr(self, "model"):
            base = self.model.base_model.unload()
            assert same_state(copied_state(base), self.base_state)
            assert torch.equal(run(base, self.architecture.batch), self.base_output)
        self.work.cleanup()


@pytest.mark.parametrize("place", ["mlp", "bert"])
def test_any_sequence(method, place):
    machine = type("Machine", (Sequences,), {"method": method, "architecture": PLACES[place]})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=12 if place == "mlp" else 4,
            stateful_step_count=15,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )
