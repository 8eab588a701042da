"""What writes into a base's parameters, one module at a time and with numbers placed by hand."""

import copy
import threading

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_xmask import MagnitudeMaskConfig, WeightAdapterConfig
from peft_xmask.errors import BaseMismatchError, FileFormatError, MergeError, StaleGraphError, TargetError
from peft_xmask.tuners.base.state import PackedTensor, RootTable, TrainableTensor
from peft_xmask.tuners.in_place.autograd import Change, run_changed
from peft_xmask.tuners.in_place.flat_indices import FlatIndices
from peft_xmask.tuners.in_place.guard import LayerUse, PassGuard
from peft_xmask.tuners.in_place.override import Override, combined
from peft_xmask.tuners.in_place.rows import Rows, as_rows, from_rows
from peft_xmask.tuners.in_place.sparse_gradients import DenseGradient, LinearWeightGradient, product_at
from peft_xmask.tuners.in_place.table import DeltaTable
from peft_xmask.tuners.in_place.version import TensorVersion
from peft_xmask.tuners.magnitude_mask.layer import ValueTable
from peft_xmask.tuners.weight_adapter.layer import ResultTable

WEIGHT = [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]


def linear(weight=WEIGHT, bias=(10.0, 20.0), dtype=torch.float32) -> nn.Linear:
    module = nn.Linear(3, 2, dtype=dtype).requires_grad_(False)
    with torch.no_grad():
        module.weight.copy_(torch.tensor(weight))
        module.bias.copy_(torch.tensor(bias))
    return module


def indices(*positions: int, shape=(2, 3)) -> FlatIndices:
    return FlatIndices(torch.tensor(positions), shape)


class TestOverride:
    def test_writes_the_sum_at_the_index_and_restores_the_bits(self):
        module = linear()
        override = Override(module, "weight")
        override.write(torch.tensor([1, 5]), torch.tensor([0.5, -6.0]))
        assert module.weight.tolist() == [[1.0, 2.5, 3.0], [4.0, 5.0, 0.0]]
        assert override.own.tolist() == [2.0, 6.0]
        assert override.written
        override.restore()
        assert module.weight.tolist() == WEIGHT
        assert not override.written

    def test_a_second_write_starts_from_the_own_numbers(self):
        module = linear()
        override = Override(module, "weight")
        index = torch.tensor([0, 1])
        override.write(index, torch.tensor([100.0, 100.0]))
        override.write(index, torch.tensor([1.0, 0.0]))
        assert module.weight.tolist() == [[2.0, 2.0, 3.0], [4.0, 5.0, 6.0]]
        override.write(torch.tensor([5]), torch.tensor([1.0]))  # elsewhere: the first elements are restored
        assert module.weight.tolist() == [[1.0, 2.0, 3.0], [4.0, 5.0, 7.0]]
        override.write(None, torch.full((2, 3), 1.0))
        assert module.weight.tolist() == [[2.0, 3.0, 4.0], [5.0, 6.0, 7.0]]
        override.restore()
        assert module.weight.tolist() == WEIGHT

    def test_the_sum_is_rounded_once(self):
        """1 + 2^-8 is halfway between two bf16 numbers: it rounds to 1, and so would two such halves, one by one."""
        own = torch.tensor([1.0], dtype=torch.bfloat16)
        assert combined(own, torch.tensor([2**-8])).item() == 1.0
        assert combined(own, torch.tensor([2**-8 + 2**-8])).item() == 1.0078125
        assert combined(own.float(), torch.tensor([1e-3], dtype=torch.float64)).dtype == torch.float32

    @pytest.mark.parametrize("index", [torch.tensor([1, 5]), None], ids=["elements", "whole"])
    @pytest.mark.parametrize("through_data", [False, True])
    def test_a_change_by_somebody_else_is_found_and_kept(self, index, through_data):
        module = linear()
        override = Override(module, "weight")
        override.write(index, torch.ones(2) if index is not None else torch.ones(2, 3))
        with torch.no_grad():
            (module.weight.data if through_data else module.weight)[0, 1] = 77.0
        with pytest.raises(BaseMismatchError, match="changed while an adapter was active"):
            override.restore()
        assert module.weight[0, 1] == 77.0

    def test_a_change_of_other_elements_is_no_conflict(self):
        module = linear()
        override = Override(module, "weight")
        override.write(torch.tensor([1]), torch.tensor([1.0]))
        with torch.no_grad():
            module.weight[1, 2] = 77.0
        override.check()
        override.restore()
        assert module.weight.tolist() == [[1.0, 2.0, 3.0], [4.0, 5.0, 77.0]]

    def test_own_numbers_put_back_by_somebody_else_are_no_conflict(self):
        module = linear()
        override = Override(module, "weight")
        override.write(torch.tensor([1]), torch.tensor([1.0]))
        with torch.no_grad():
            module.weight.copy_(torch.tensor(WEIGHT))
        override.restore()
        assert module.weight.tolist() == WEIGHT

    def test_a_parameter_that_is_not_contiguous(self):
        module = nn.Module()
        module.weight = nn.Parameter(torch.tensor(WEIGHT).t(), requires_grad=False)  # [[1, 4], [2, 5], [3, 6]]
        override = Override(module, "weight")
        override.write(torch.tensor([1, 4]), torch.tensor([10.0, 10.0]))
        assert module.weight.tolist() == [[1.0, 14.0], [2.0, 5.0], [13.0, 6.0]]
        override.restore()
        assert module.weight.tolist() == [[1.0, 4.0], [2.0, 5.0], [3.0, 6.0]]

    def test_edits_count_only_what_others_do(self):
        module = linear()
        override = Override(module, "weight")
        before = override.edits
        override.write(torch.tensor([0]), torch.tensor([1.0]))
        override.restore()
        assert override.edits == before
        with torch.no_grad():
            module.weight.mul_(2)
        assert override.edits != before
        before = override.edits
        module.weight = nn.Parameter(module.weight.clone())
        assert override.edits != before


READ = torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 0.0]])
WRITTEN = torch.tensor([[1.0, -1.0], [3.0, 0.0]])
GRADIENT = [[1.0, 3.0, 2.0], [-1.0, 0.0, -2.0]]  # WRITTEN^T READ


class TestGradients:
    @pytest.mark.parametrize("fan_in_fan_out", [False, True])
    @pytest.mark.parametrize("kind", ["dense", "factors"])
    def test_every_form_of_a_gradient(self, kind, fan_in_fan_out):
        whole = torch.tensor(GRADIENT).t().contiguous() if fan_in_fan_out else torch.tensor(GRADIENT)
        gradient = (
            DenseGradient(whole, Rows.LAST if fan_in_fan_out else Rows.FIRST)
            if kind == "dense"
            else LinearWeightGradient(WRITTEN, READ, fan_in_fan_out=fan_in_fan_out)
        )
        assert torch.equal(gradient.whole(), whole)
        assert gradient.at(indices(0, 2, 5, shape=whole.shape)).tolist() == whole.view(-1)[[0, 2, 5]].tolist()
        assert gradient.times(torch.tensor([[1.0], [1.0], [0.0]])).tolist() == [[4.0], [-1.0]]
        assert gradient.transpose_times(torch.tensor([[1.0], [2.0]])).tolist() == [[-1.0], [3.0], [-2.0]]

    def test_a_sparse_gradient_is_read_as_a_dense_one(self):
        sparse = torch.sparse_coo_tensor(torch.tensor([[1]]), torch.tensor([[7.0, 8.0, 9.0]]), (2, 3))
        assert DenseGradient(sparse).at(indices(0, 4)).tolist() == [0.0, 8.0]

    def test_few_entries_and_many_are_the_same_numbers(self):
        left, right = torch.randn(4, 30), torch.randn(4, 20)
        product = (left.t() @ right).view(-1)
        for positions in ([7], [0, 8, 599], list(range(0, 600, 2))):
            found = product_at(left, right, indices(*positions, shape=(30, 20)))
            torch.testing.assert_close(found, product[positions])

    def test_rows_are_outputs_and_back(self):
        forms = {(5,): (1, 5), (5, 2): (5, 2), (5, 2, 3): (5, 6)}
        for rows, shape, matrix in [
            *((Rows.FIRST, shape, matrix) for shape, matrix in forms.items()),
            (Rows.LAST, (5,), (1, 5)),
            (Rows.LAST, (5, 2), (2, 5)),
            (Rows.EXPERTS_FIRST, (4, 5, 2), (20, 2)),
            (Rows.EXPERTS_LAST, (4, 5, 2), (8, 5)),
        ]:
            numbers = torch.randn(shape)
            found = as_rows(numbers, rows)
            assert found.shape == matrix
            assert torch.equal(from_rows(found, rows, numbers), numbers)
        experts = torch.randn(4, 5, 2)
        assert torch.equal(as_rows(experts, Rows.EXPERTS_LAST)[2 * 3 + 1], experts[3, :, 1])

    def test_a_linear_module_hands_out_gradients(self):
        module, x = linear(), READ.clone().requires_grad_()
        delta, shift = torch.zeros(2, requires_grad=True), torch.zeros(1, requires_grad=True)
        changes = [Change("weight", indices(1, 5), delta), Change("bias", indices(1, shape=(2,)), shift)]
        entered = []

        class Noted:
            def __enter__(self):
                entered.append(True)

            def __exit__(self, *_):
                pass

        (run_changed(module, changes, Noted, x) * WRITTEN).sum().backward()
        assert delta.grad.tolist() == [3.0, -2.0]
        assert shift.grad.tolist() == [-1.0]
        assert x.grad.tolist() == (WRITTEN @ torch.tensor(WEIGHT)).tolist()
        assert entered == [True]

    @pytest.mark.parametrize("kind", ["hook", "subclass", "conv"])
    def test_a_module_that_does_more_than_multiply_is_differentiated_by_torch(self, kind):
        module: nn.Module = linear()
        if kind == "subclass":

            class Doubled(nn.Linear):
                def forward(self, x):
                    return 2 * super().forward(x)

            module.__class__ = Doubled
        elif kind == "hook":
            module.register_forward_hook(lambda module, args, out: 2 * out)
        else:
            module = Conv1D(2, 3).requires_grad_(False)
            module.weight.data.copy_(2 * torch.tensor(WEIGHT).t())
        delta = torch.zeros(1, requires_grad=True)
        x = READ.clone().requires_grad_()
        place = indices(2 if kind == "conv" else 1, shape=module.weight.shape)  # from input 1 to output 0
        (run_changed(module, [Change("weight", place, delta)], None if kind != "conv" else TestGuard.nothing, x)
         * WRITTEN).sum().backward()  # fmt: skip
        assert delta.grad.tolist() == [3.0 if kind == "conv" else 6.0]
        assert x.grad.tolist() == (2 * WRITTEN @ torch.tensor(WEIGHT)).tolist()


class TestDeltaTable:
    def build(self, rounding=None, cls=ValueTable) -> DeltaTable:
        table = cls().eval()
        table.add("a", torch.tensor([1.0, 2.0, 3.001]), [2, 1], rounding)
        return table

    def test_parts_and_state(self):
        table = self.build()
        assert list(table.state_dict()) == ["magnitude_mask_values.a.weight"]
        assert table["a"].part(0).tolist() == [1.0, 2.0]
        assert table["a"].part(1).tolist() == pytest.approx([3.001])
        table["a"].part(1).sum().backward()
        assert table.holders["a"].weight.grad.tolist() == [0.0, 0.0, 1.0]

    def test_rounded_in_use_and_in_the_file(self):
        table = self.build(torch.bfloat16)
        assert table["a"].whole().tolist() == [1.0, 2.0, 3.0]
        assert table["a"].stored(table.holders["a"].weight).dtype == torch.bfloat16
        assert table["a"].stored(table.holders["a"].weight).tolist() == [1.0, 2.0, 3.0]

    def test_the_version_changes_with_the_numbers_and_only_then(self):
        table = self.build()
        first = table.version("a")
        assert table.version("a") is first
        with torch.no_grad():
            table.holders["a"].weight.add_(1)
        assert table.version("a") is not first
        assert not first.is_current()
        second = table.version("a")
        table.holders["a"].weight = nn.Parameter(table.holders["a"].weight.detach())  # as PEFT does when it casts
        assert table.version("a") is not second

    def test_numbers_that_are_not_finite_are_refused_in_eval_mode(self):
        table = self.build()
        with torch.no_grad():
            table.holders["a"].weight[0] = torch.nan
        with pytest.raises(FileFormatError, match="adapter 'a'"):
            table.version("a")
        table.train()
        table.version("a")
        with pytest.raises(FileFormatError, match="adapter 'a'"):
            table["a"].stored(table.holders["a"].weight)

    @pytest.mark.parametrize(
        "vector", [torch.ones(2), torch.ones(3, dtype=torch.int32), torch.tensor([1.0, torch.inf, 1.0])], ids=repr
    )
    def test_vectors_of_a_file_are_checked(self, vector):
        with pytest.raises(FileFormatError):
            self.build()["a"].check_stored(vector)

    def test_deleting_forgets_everything(self):
        table = self.build()
        table.delete_adapter("a")
        assert list(table.state_dict()) == []
        with pytest.raises(KeyError):
            table["a"]

    def test_a_copy_has_vectors_and_a_guard_of_its_own(self):
        table = self.build()
        table.version("a")
        twin = copy.deepcopy(table)
        with torch.no_grad():
            twin.holders["a"].weight.zero_()
        assert twin["a"].whole().tolist() == [0.0, 0.0, 0.0]
        assert table["a"].part(0).tolist() == [1.0, 2.0]
        assert twin["a"].holder is twin.holders["a"]
        assert twin.guard is not table.guard

    def test_results_are_buffers(self):
        table = self.build(cls=ResultTable)
        assert not list(table.parameters())
        assert isinstance(table.holders["a"], PackedTensor)

    def test_a_version_of_a_parameter_or_a_buffer(self):
        for holder in (TrainableTensor(torch.ones(1)), PackedTensor(torch.ones(1))):
            version = TensorVersion(holder)
            assert version.is_current()
            holder.weight.data = torch.ones(1)
            assert not version.is_current()


class TestRootTable:
    def test_answers_for_a_layer_without_being_one(self):
        table = RootTable()
        assert (table.weight, table.bias, table.in_features, table.out_features) == (None,) * 4
        assert table(7) == 7  # a Sequential at the root calls it
        table.set_adapter("a")
        table.merge(adapter_names=["a"])
        assert table.merged
        table.merge(adapter_names=["a"])
        assert table.merged_adapters == ["a"]
        table.unmerge()
        assert not table.merged

    @pytest.mark.parametrize("config", [MagnitudeMaskConfig, WeightAdapterConfig])
    def test_its_name_is_refused_if_the_base_has_it(self, config):
        base = nn.Sequential(linear())
        base.delta_table = nn.Linear(1, 1)
        with pytest.raises(ValueError, match="delta_table"):
            get_peft_model(base, config(target_modules=["0"]))


def masked(**fields):
    """One linear module of which the two smallest weights, 1 and 2, are trained."""
    base = nn.Sequential(linear())
    fields = {"target_modules": ["0"], "density": 1 / 3, **fields}
    model = get_peft_model(base, MagnitudeMaskConfig(**fields)).eval()
    with torch.no_grad():
        model.base_model.table.holders["default"].weight.copy_(torch.tensor([10.0, 20.0]))
    return model, base[0]


ADAPTED = [[11.0, 22.0, 3.0], [4.0, 5.0, 6.0]]


class TestLayer:
    def test_sync_alone_decides_what_the_parameters_hold(self):
        model, layer = masked()
        layer.sync(())
        assert layer.weight.tolist() == WEIGHT
        layer.sync()
        assert layer.weight.tolist() == ADAPTED
        layer.sync(())
        assert layer.weight.tolist() == WEIGHT
        layer.sync(["default"])
        assert layer.weight.tolist() == ADAPTED
        with model.disable_adapter():
            assert layer.weight.tolist() == WEIGHT
            layer.sync()
            assert layer.weight.tolist() == WEIGHT
        layer.sync()
        assert layer.weight.tolist() == ADAPTED

    def test_what_is_read_before_a_pass_is_still_right_after_it(self):
        """A state dict is the base's own, and the next pass serves the adapter again."""
        model, layer = masked()
        x = torch.eye(3)
        before = model(x)
        assert model.state_dict()["base_model.model.0.base_layer.weight"].tolist() == WEIGHT
        assert torch.equal(model(x), before)
        assert layer.weight.tolist() == ADAPTED

    def test_loading_replaces_the_base_under_the_adapter(self):
        model, layer = masked()
        model(torch.eye(3))
        other = {"base_model.model.0.base_layer.weight": torch.zeros(2, 3)}
        model.load_state_dict(other, strict=False)
        assert layer.weight.tolist() == [[0.0] * 3] * 2
        model(torch.eye(3))
        assert layer.weight.tolist() == [[10.0, 20.0, 0.0], [0.0, 0.0, 0.0]]

    def test_a_base_that_somebody_changed_can_still_be_loaded_again(self):
        model, layer = masked()
        model(torch.eye(3))
        with torch.no_grad():
            layer.weight.fill_(99.0)
        with pytest.raises(BaseMismatchError):
            model.base_model.disable_adapter_layers()
        model.load_state_dict({"base_model.model.0.base_layer.weight": torch.tensor(WEIGHT)}, strict=False)
        model.base_model.enable_adapter_layers()
        model(torch.eye(3))
        assert layer.weight.tolist() == ADAPTED

    def test_safe_merge_leaves_the_module_as_it_was(self):
        model, layer = masked()
        with torch.no_grad():
            model.base_model.table.holders["default"].weight[0] = torch.inf
        with pytest.raises(MergeError, match="NaNs detected"):
            model.merge_adapter(safe_merge=True)
        assert layer.weight.tolist() == WEIGHT
        assert not layer.merged

    def test_a_sum_that_overflows_is_not_merged_safely(self):
        base = nn.Sequential(linear([[1.0, 2.0, 6e4], [6e4, 6e4, 6e4]], dtype=torch.float16))
        model = get_peft_model(base, MagnitudeMaskConfig(target_modules=["0"], selection="largest", density=1 / 6))
        with torch.no_grad():
            model.base_model.table.holders["default"].weight.fill_(6e4)
        with pytest.raises(MergeError, match="NaNs detected"):
            model.eval().merge_adapter(safe_merge=True)
        assert base[0].weight.isfinite().all()

    def test_a_backward_pass_is_refused_once_the_layer_has_left(self):
        model, _ = masked()
        out = model.train()(torch.eye(3, requires_grad=True)).sum()
        model.unload()
        with pytest.raises(StaleGraphError):
            out.backward()

    def test_tied_weights_are_refused_before_anything_is_changed(self):
        base = nn.Sequential(linear(), linear())
        base[1].weight = base[0].weight
        with pytest.raises(TargetError, match="shared with"):
            get_peft_model(base, MagnitudeMaskConfig(target_modules=["0"]))
        assert isinstance(base[0], nn.Linear)
        assert not hasattr(base, "delta_table")


class TestGuard:
    @staticmethod
    def nothing():
        class Nothing:
            def __enter__(self):
                pass

            def __exit__(self, *_):
                pass

        return Nothing()

    def test_a_writer_waits_until_other_threads_have_left(self):
        use, order = LayerUse(PassGuard()), []
        inside, write = threading.Event(), threading.Event()

        def reader():
            with use.guard.condition:
                use.enter()
            inside.set()
            write.wait(60)
            order.append("reader leaves")
            use.leave()

        def writer():
            with use.guard.condition:
                write.set()
                use.wait()
                order.append("writer writes")

        threads = [threading.Thread(target=reader), threading.Thread(target=writer)]
        threads[0].start()
        assert inside.wait(60)
        threads[1].start()
        for thread in threads:
            thread.join(60)
        assert order == ["reader leaves", "writer writes"]

    def test_a_thread_does_not_wait_for_itself(self):
        use = LayerUse(PassGuard())
        with use.guard.condition:
            use.enter()
            use.wait()
            assert not use.by_others
        use.leave()
