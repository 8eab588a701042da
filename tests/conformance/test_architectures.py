"""Every architecture of the table: each default, and each linear layer, moves the output in train and in eval."""

import pytest
from architecture_checks import PAGE, row
from zoo import ZOO


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("kind", ZOO, ids=[kind.name for kind in ZOO])
def test_a_row_of_the_table(kind):
    found = row(kind)
    assert "| no |" not in found
    assert found in PAGE.read_text(encoding="utf-8").splitlines()
