"""Files and bases that do not belong: refused in words, with the model left as it was."""

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from peft_xmask import AdapterPool, BottleneckConfig, XPEFTConfig
from peft_xmask.errors import BaseMismatchError, FileFormatError, MaskFormatError, PoolMismatchError, TargetError

FILE = "adapter_model.safetensors"
BITS = "base_model.model.mask_table.xpeft_bits.weight"
GAIN = "base_model.model.mask_table.xpeft_gain_bits.weight"


@pytest.fixture
def profile(tiny_bert, tmp_path):
    get_peft_model(tiny_bert(), XPEFTConfig(num_adapters=20, bottleneck_size=4, learn_gain=True)).save_pretrained(
        tmp_path
    )
    return tmp_path


def edit(folder, change) -> None:
    tensors = load_file(folder / FILE)
    change(tensors)
    save_file(tensors, folder / FILE, metadata={"format": "pt"})


def one_more(tensors) -> None:
    tensors[BITS][0, 0, 0, 0] ^= 1


def nan_gain(tensors) -> None:
    tensors[GAIN][..., 1] = 0x7E


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (one_more, MaskFormatError, "exactly top_k=10 of 20"),
        (lambda t: t.update({BITS: t[BITS].float()}), MaskFormatError, "torch.float32"),
        (lambda t: t.update({BITS: t[BITS][..., :2].contiguous()}), MaskFormatError, "shape (1, 2, 3, 2)"),
        (lambda t: t.update({BITS: t[BITS][:, :, :2].contiguous()}), MaskFormatError, "shape (1, 2, 2, 3)"),
        (lambda t: t.update({BITS: t[BITS].repeat(2, 1, 1, 1)}), FileFormatError, "masks of 1 profiles, found 2"),
        (nan_gain, MaskFormatError, "finite gains"),
        (lambda t: t.pop(GAIN), FileFormatError, "xpeft_bits and xpeft_gain_bits"),
        (lambda t: t.pop(BITS), FileFormatError, "xpeft_bits and xpeft_gain_bits"),
    ],
)
@pytest.mark.parametrize("is_trainable", [False, True])
def test_a_damaged_file_is_refused(profile, tiny_bert, change, error, words, is_trainable):
    edit(profile, change)
    with pytest.raises(error) as caught:
        PeftModel.from_pretrained(tiny_bert(), profile, is_trainable=is_trainable)
    assert words in str(caught.value)


def test_the_model_keeps_its_masks_when_a_file_is_refused(profile, tiny_bert, tiny_batch):
    model = PeftModel.from_pretrained(tiny_bert(), profile)
    before = model(**tiny_batch).logits
    edit(profile, one_more)
    with pytest.raises(MaskFormatError):
        model.load_adapter(profile, "default")
    assert torch.equal(model(**tiny_batch).logits, before)


def test_transformers_own_loading_refuses_at_first_use(profile, tiny_bert, tiny_batch):
    edit(profile, one_more)
    native = tiny_bert()
    native.load_adapter(str(profile))
    with pytest.raises(MaskFormatError, match="exactly top_k=10 of 20"):
        native(**tiny_batch)


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_a_truncated_file_is_refused(profile, tiny_bert, size):
    data = (profile / FILE).read_bytes()
    (profile / FILE).write_bytes(data[:size])
    with pytest.raises(Exception, match=r"(?i)header|invalid|too small|buffer|incomplete"):
        PeftModel.from_pretrained(tiny_bert(), profile)


def test_an_oversized_file_is_refused(profile, tiny_bert):
    with (profile / FILE).open("ab") as stream:
        stream.write(b"\0" * 64)
    with pytest.raises(Exception, match=r"(?i)invalid|buffer|incomplete"):
        PeftModel.from_pretrained(tiny_bert(), profile)


def test_another_base_is_refused_before_anything_is_changed(profile, tiny_bert, tiny_batch):
    other = tiny_bert(seed=1)
    names = [name for name, _ in other.named_modules()]
    before = other(**tiny_batch).logits
    with pytest.raises(BaseMismatchError) as caught:
        PeftModel.from_pretrained(other, profile)
    config = json.loads((profile / "adapter_config.json").read_text())
    assert caught.value.expected == config["base_fingerprint"]
    assert caught.value.expected in str(caught.value)
    assert caught.value.found in str(caught.value)
    assert [name for name, _ in other.named_modules()] == names
    assert torch.equal(other(**tiny_batch).logits, before)


def test_another_base_can_be_allowed_on_purpose(profile, tiny_bert):
    config = XPEFTConfig.from_pretrained(profile)
    config.allow_any_base()
    PeftModel.from_pretrained(tiny_bert(seed=1), profile, config=config)


def test_another_pool_is_refused(profile, tiny_bert):
    path = profile / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "pool_seed": 1}))
    with pytest.raises(PoolMismatchError) as caught:
        PeftModel.from_pretrained(tiny_bert(), profile)
    assert caught.value.expected == config["pool_fingerprint"]
    assert caught.value.found == AdapterPool.random(20, 4, 1).fingerprint
    assert caught.value.found in str(caught.value)


def test_nan_logits_are_refused_at_evaluation_and_at_saving(tiny_bert, tiny_batch, tmp_path):
    model = get_peft_model(tiny_bert(), XPEFTConfig(num_adapters=20, bottleneck_size=4))
    with torch.no_grad():
        model.masks("default").logits.weight[0, 3] = float("nan")
    model.eval()
    with pytest.raises(MaskFormatError, match=r"found NaN or infinity\. Training diverged"):
        model(**tiny_batch)
    with pytest.raises(MaskFormatError, match="found NaN or infinity"):
        model.save_pretrained(tmp_path)
    assert not (tmp_path / FILE).exists()


@pytest.mark.parametrize("config", [XPEFTConfig(target_modules=["nowhere"]), XPEFTConfig(target_modules=r"no.*where")])
def test_targets_that_match_nothing(tiny_bert, config):
    base = tiny_bert()
    with pytest.raises(ValueError, match=r"(?i)not found in the base model"):
        get_peft_model(base, config)
    assert not hasattr(base, "mask_table")


def test_unsupported_layer_types(tiny_bert):
    base = tiny_bert()
    with pytest.raises(
        TargetError, match=r"'bert\.embeddings\.LayerNorm' is a LayerNorm, which cannot carry an adapter"
    ):
        get_peft_model(base, XPEFTConfig(target_modules=["LayerNorm"]))
    assert type(base.bert.embeddings.LayerNorm) is nn.LayerNorm
    assert not hasattr(base, "mask_table")


def test_a_base_with_a_mask_table_of_its_own(tiny_bert):
    base = tiny_bert()
    base.mask_table = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="has an attribute 'mask_table' of its own"):
        get_peft_model(base, XPEFTConfig(num_adapters=20, bottleneck_size=4))


def test_a_gain_that_half_precision_cannot_hold_is_not_saved(tiny_bert, tmp_path):
    """It would be refused when loaded, and the profile lost."""
    model = get_peft_model(tiny_bert(), XPEFTConfig(num_adapters=20, bottleneck_size=4, learn_gain=True))
    with torch.no_grad():
        model.masks("default").gain.weight.fill_(20.0)
    with pytest.raises(MaskFormatError, match="at most 65504"):
        model.save_pretrained(tmp_path)
    assert not (tmp_path / FILE).exists()


def test_numbers_of_a_bottleneck_file_that_are_not_finite(tiny_bert, tiny_batch, tmp_path):
    get_peft_model(tiny_bert(), BottleneckConfig(bottleneck_size=4)).save_pretrained(tmp_path)
    key = next(key for key in load_file(tmp_path / FILE) if key.endswith("bottleneck_adapter_down.bias"))
    edit(tmp_path, lambda tensors: tensors[key].fill_(float("nan")))
    with pytest.raises(FileFormatError, match=r"found NaN or infinity in '.*bottleneck_adapter_down"):
        PeftModel.from_pretrained(tiny_bert(), tmp_path)
