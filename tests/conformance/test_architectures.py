"""Every architecture of the table: each default, and each linear layer, moves the output in train and in eval."""

import pytest
import torch
import transformers
from architecture_checks import PAGE, row
from zoo import ZOO


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("kind", ZOO, ids=[kind.name for kind in ZOO])
def test_a_row_of_the_table(kind):
    try:
        with torch.no_grad():
            kind.build()(**kind.batch())
    except AttributeError as error:  # Llama 4 in transformers 5.24
        pytest.skip(f"transformers {transformers.__version__} fails without an adapter too: {error}")
    found = row(kind)
    assert "| no |" not in found
    assert found in PAGE.read_text(encoding="utf-8").splitlines()
