import pytest
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from peft_xmask import AdapterPool, BottleneckConfig, XPEFTConfig, profile_size
from peft_xmask.errors import ConfigError, FileFormatError


def test_each_kind_of_byte_is_counted_apart(tiny_bert, tmp_path):
    model = get_peft_model(
        tiny_bert(), XPEFTConfig(task_type="SEQ_CLS", num_adapters=20, bottleneck_size=4, learn_gain=True)
    )
    model.save_pretrained(tmp_path)
    size = profile_size(tmp_path)
    assert size.payload_bytes == 2 * 3 * 3 + 3 * 2  # two masks of three bytes at three sites; three gains
    assert size.head_bytes == (16 * 4 + 4) * 4
    file = tmp_path / "adapter_model.safetensors"
    assert size.file_bytes == file.stat().st_size
    assert size.payload_bytes + size.head_bytes == sum(tensor.nbytes for tensor in load_file(file).values())
    assert size.folder_bytes > size.file_bytes > size.payload_bytes + size.head_bytes
    assert size.pool_bytes == 0
    assert profile_size(model).payload_bytes == size.payload_bytes


def test_other_methods_are_measured_too(tiny_bert):
    lora = profile_size(get_peft_model(tiny_bert(), LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"])))
    assert lora.payload_bytes == 3 * 2 * (16 + 16) * 4
    assert lora.head_bytes == (16 * 4 + 4) * 4


def test_a_pool_is_amortised(tiny_bert, tmp_path):
    folders = []
    for index in range(3):
        config = BottleneckConfig(bottleneck_size=4, init_weights=False)
        folders.append(str(tmp_path / f"adapter-{index}"))
        get_peft_model(tiny_bert(), config).save_pretrained(folders[-1])
    pool = AdapterPool.from_bottleneck(folders)
    pool.save_pretrained(tmp_path / "pool")
    model = get_peft_model(tiny_bert(), XPEFTConfig(pool=str(tmp_path / "pool"), num_profiles=5))
    size = profile_size(model)
    assert size.pool_bytes == pool.nbytes > 0
    assert size.num_profiles == 5
    assert size.amortised_bytes(1000) == size.payload_bytes / 5 + pool.nbytes / 1000


def test_what_is_no_adapter_is_refused(tiny_bert, tmp_path):
    with pytest.raises(FileFormatError, match=r"Expected an adapter folder with adapter_config\.json"):
        profile_size(tmp_path)
    with pytest.raises(ConfigError, match="Expected a PEFT model with adapter 'default'"):
        profile_size(tiny_bert())
