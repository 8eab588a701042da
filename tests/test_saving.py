"""A save is all or nothing, for every method: killed at any step, or refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from peft_xmask import BottleneckConfig, MagnitudeMaskConfig, WeightAdapterConfig, XPEFTConfig
from peft_xmask.errors import PeftXMaskError

CONFIGS = {
    "xpeft": XPEFTConfig(task_type="SEQ_CLS", num_adapters=12, bottleneck_size=2),
    "bottleneck": BottleneckConfig(task_type="SEQ_CLS", bottleneck_size=2),
    "magnitude_mask": MagnitudeMaskConfig(task_type="SEQ_CLS", density=0.1),
    "weight_adapter": WeightAdapterConfig(task_type="SEQ_CLS", r=2),
}


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("method", CONFIGS)
def test_a_save_that_is_killed_anywhere_leaves_whole_files(method, tmp_path):
    script = Path(__file__).with_name("killed_saves.py")
    done = subprocess.run(
        [sys.executable, str(script), method, str(tmp_path)], capture_output=True, text=True, timeout=1200, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["damaged"] == []
    assert found["steps"] > 10
    order = [found["files"].index(name) for name in ("adapter_model.safetensors", "adapter_config.json", "README.md")]
    states = {tuple(state[place] for place in order) for state in found["states"]}
    assert states >= {("old", "old", "old"), ("new", "new", "new")}
    assert states <= {("old",) * 3, ("new", "old", "old"), ("new", "new", "old"), ("new",) * 3}  # in this order


@pytest.mark.parametrize("method", CONFIGS)
def test_a_save_that_is_refused_changes_nothing(method, tiny_bert, tmp_path):
    model = get_peft_model(tiny_bert(), CONFIGS[method])
    model.save_pretrained(tmp_path / "there")
    (tmp_path / "there" / "README.md").write_text("My own words.")
    before = files_of(tmp_path / "there")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "classifier" not in name:
                parameter.fill_(float("nan"))
    for folder in ("there", "new"):
        try:
            model.save_pretrained(tmp_path / folder)
        except (PeftXMaskError, ValueError):
            assert files_of(tmp_path / "there") == before
            assert not (tmp_path / "new").exists()
        else:
            assert method != "xpeft"  # NaN has no masks


def test_a_full_disk_leaves_the_old_adapter(tiny_bert, tmp_path, monkeypatch):
    model = get_peft_model(tiny_bert(), CONFIGS["bottleneck"])
    model.save_pretrained(tmp_path)
    before = files_of(tmp_path)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("peft.peft_model.safe_save_file", full)
    with pytest.raises(OSError, match="No space"):
        model.save_pretrained(tmp_path)
    assert files_of(tmp_path) == before


def test_several_adapters_are_saved_into_their_folders(tiny_bert, tiny_batch, tmp_path):
    model = get_peft_model(tiny_bert(), CONFIGS["xpeft"])
    model.add_adapter("other", CONFIGS["xpeft"])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "README.md").write_text("Of the other.")
    (tmp_path / "notes.txt").write_text("not ours")
    model.save_pretrained(str(tmp_path))
    names = {"adapter_model.safetensors", "adapter_config.json", "README.md"}
    assert names <= {path.name for path in tmp_path.iterdir()}
    assert names <= {path.name for path in (tmp_path / "other").iterdir()}
    assert "Of the other." in (tmp_path / "other" / "README.md").read_text()
    assert (tmp_path / "notes.txt").read_text() == "not ours"
    assert not list(tmp_path.rglob(".*"))
    model.save_pretrained(tmp_path / "one", selected_adapters=["other"])
    assert {path.name for path in (tmp_path / "one").iterdir()} == {"other", "README.md"}
    loaded = PeftModel.from_pretrained(tiny_bert(), tmp_path / "other").eval()
    model.eval().set_adapter("other")
    with torch.no_grad():
        assert torch.equal(loaded(**tiny_batch).logits, model(**tiny_batch).logits)


def test_other_methods_of_peft_save_as_before(tiny_bert, tmp_path, monkeypatch):
    model = get_peft_model(tiny_bert(), LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
    monkeypatch.setattr("peft_xmask.tuners.base.saving.write_folder", None)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()
    with pytest.raises(ValueError, match="should be a directory"):
        get_peft_model(tiny_bert(), CONFIGS["xpeft"]).save_pretrained(tmp_path / "adapter_config.json")
