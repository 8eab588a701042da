"""The card of a saved adapter: what it says, and that it never costs a user anything."""

import json
import shutil
import warnings

import pytest
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments

from peft_xmask import (
    AdapterPool,
    BottleneckConfig,
    PeftXMaskWarning,
    RecordCallback,
    XPEFTCallback,
    XPEFTConfig,
    profile_size,
)
from peft_xmask.tuners.base.model_card import END, complete_card, complete_cards_of_peft


def xpeft(**fields) -> XPEFTConfig:
    return XPEFTConfig(**{"task_type": "SEQ_CLS", "num_adapters": 20, "bottleneck_size": 4, **fields})


@pytest.fixture
def model(tiny_bert):
    return get_peft_model(tiny_bert(), xpeft(pool_seed=7))


@pytest.fixture
def saved(model, tmp_path):
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def trained_pool(tiny_bert, tmp_path) -> AdapterPool:
    folders = [tmp_path / f"source-{index}" for index in range(3)]
    for folder in folders:
        get_peft_model(tiny_bert(), BottleneckConfig(bottleneck_size=4, init_weights=False)).save_pretrained(folder)
    return AdapterPool.from_bottleneck(folders)


def text(folder) -> str:
    return (folder / "README.md").read_text()


def rows(folder) -> dict[str, str]:
    cells = [line.strip("| ").split(" | ") for line in text(folder).splitlines() if line.startswith("| ")]
    return {cell[0]: cell[1] for cell in cells if len(cell) == 2 and cell[0] != "---"}


def test_after_the_metadata_comes_how_to_load(saved, model):
    card = ModelCard(text(saved))
    assert card.text.startswith("\n```python\nimport peft_xmask\nfrom peft import PeftModel\n")
    assert "num_labels=4" in card.text
    assert card.data.library_name == "peft"
    assert {"peft", "transformers", "x-peft"} <= set(card.data.tags)
    assert "More Information Needed" not in text(saved)
    assert len(text(saved)) < 2000


def test_the_table_has_what_a_profile_belongs_to_and_its_bytes(saved, model):
    config, size = model.peft_config["default"], profile_size(saved)
    assert rows(saved) == {
        "method": "XPEFT: relu, sequential",
        "base model": "not named",
        "base fingerprint": f"`{config.base_fingerprint}`",
        "pool": "random, seed 7",
        "pool fingerprint": f"`{config.pool_fingerprint}`",
        "adapters per site, bottleneck size": "20, 4",
        "masks": "hard, 10 of 20 adapters",
        "profiles": "1",
        "masks and gains": f"{size.payload_bytes} bytes",
        "modules saved whole, such as a head": f"{size.head_bytes} bytes",
        "file `adapter_model.safetensors`": f"{size.file_bytes} bytes",
        "pool, once for all profiles": "0 bytes",
        "trained": "not recorded. Add `peft_xmask.RecordCallback` to the Trainer to record it.",
        "made with": rows(saved)["made with"],
    }
    assert rows(saved)["made with"].startswith("peft_xmask ")


def test_a_bottleneck_adapter_has_no_pool(tiny_bert, tmp_path):
    get_peft_model(tiny_bert(), BottleneckConfig(bottleneck_size=4)).save_pretrained(tmp_path)
    found = rows(tmp_path)
    assert found["method"].startswith("BOTTLENECK_ADAPTER")
    assert found["bottleneck size"] == "4"
    assert found["adapter weights"] == f"{profile_size(tmp_path).payload_bytes:,} bytes"
    assert not any("pool" in name for name in found)
    assert "import BertForSequenceClassification" in text(tmp_path)  # no task type: PEFT noted the class


@pytest.mark.parametrize("how", ["by folder", "as an object"])
def test_a_trained_pool_is_named_and_measured_without_its_path(how, trained_pool, tiny_bert, tmp_path):
    trained_pool.save_pretrained(tmp_path / "my-pool")
    pool = str(tmp_path / "my-pool") if how == "by folder" else trained_pool
    get_peft_model(tiny_bert(), xpeft(pool=pool)).save_pretrained(tmp_path / "adapter")
    found = rows(tmp_path / "adapter")
    assert found["pool"] == "`my-pool`, a folder where this was made"
    assert found["pool, once for all profiles"] == f"{trained_pool.nbytes:,} bytes"
    assert 'config.pool = "path-or-hub-id-of-the-pool"' in text(tmp_path / "adapter")
    assert str(tmp_path) not in text(tmp_path / "adapter")


def test_a_base_in_a_folder_is_not_named_by_its_path(tiny_bert, tmp_path):
    """The Hub refuses a card whose base_model is no model id."""
    tiny_bert().save_pretrained(tmp_path / "my-base")
    base = type(tiny_bert()).from_pretrained(tmp_path / "my-base")
    get_peft_model(base, xpeft()).save_pretrained(tmp_path / "adapter")
    assert ModelCard(text(tmp_path / "adapter")).data.base_model is None
    assert rows(tmp_path / "adapter")["base model"] == "`my-base`, a folder where this was made"
    assert str(tmp_path) not in text(tmp_path / "adapter")


def test_saving_again_changes_nothing(saved, model):
    before = text(saved)
    model.save_pretrained(saved)
    assert text(saved) == before


def test_what_a_user_wrote_stays_and_the_rest_is_renewed(saved, model, tiny_bert):
    head, body = text(saved).split("\n```python", 1)
    (saved / "README.md").write_text(
        f"{head}\n# Mine\n\n```python{body}\n## Results\n\n[More Information Needed] soon.\n"
    )
    get_peft_model(tiny_bert(), xpeft(pool_seed=8)).save_pretrained(saved)
    after = text(saved)
    assert "pool | random, seed 8" in after
    assert "seed 7" not in after
    assert after.index("# Mine") < after.index("```python") < after.index(END) < after.index("## Results")
    assert after.count("import peft_xmask") == after.count(END) == 1
    again = get_peft_model(tiny_bert(), xpeft(pool_seed=8))
    again.save_pretrained(saved)
    assert text(saved) == after


def test_a_card_of_ones_own_gets_the_section_first(model, tmp_path):
    tmp_path.joinpath("README.md").write_text("---\nlicense: mit\n---\n# Mine\n\nAll about it.\n")
    model.save_pretrained(tmp_path)
    card = ModelCard(text(tmp_path))
    assert card.data.license == "mit"
    assert card.text.startswith("\n```python\nimport peft_xmask\n")
    assert "# Mine\n\nAll about it.\n" in card.text


def test_a_card_that_was_removed_is_written_anew(saved, model):
    before = text(saved)
    (saved / "README.md").unlink()
    model.peft_config["default"].save_pretrained(saved)
    assert ModelCard(text(saved)).text == ModelCard(before).text
    assert ModelCard(text(saved)).data.library_name == "peft"


def test_without_an_adapter_nothing_is_written(model, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "README.md").write_text("mine")
    model.peft_config["default"].save_pretrained(bare)
    assert sorted(path.name for path in bare.iterdir()) == ["README.md", "adapter_config.json"]
    assert text(bare) == "mine"


@pytest.mark.parametrize("broken", [b"---\n- no mapping\n---\n", b"\xff\xfe\x00", b"---\na: [\n---\n"])
def test_a_card_that_cannot_be_read_is_left_alone_with_a_warning(broken, saved, model):
    (saved / "README.md").write_bytes(broken)
    with pytest.warns(PeftXMaskWarning, match="The adapter is saved, but its model card"):
        complete_card(saved, model.peft_config["default"])
    assert (saved / "README.md").read_bytes() == broken


def test_other_methods_keep_their_cards(tiny_bert, tmp_path):
    model = get_peft_model(tiny_bert(), LoraConfig(r=2, target_modules=["query"]))
    model.save_pretrained(tmp_path)
    model.create_or_update_model_card(str(tmp_path))
    assert "peft_xmask" not in text(tmp_path)


def test_an_adapter_in_a_folder_of_its_own_has_a_card_of_its_own(model, tmp_path):
    """PEFT writes one card, beside the adapter called "default": the others' folders may be shared alone."""
    model.add_adapter("other", xpeft(pool_seed=9))
    model.save_pretrained(tmp_path)
    assert rows(tmp_path)["pool"] == "random, seed 7"
    assert rows(tmp_path / "other")["pool"] == "random, seed 9"
    assert ModelCard(text(tmp_path / "other")).text.startswith("\n```python\nimport peft_xmask\n")


@pytest.mark.parametrize("kind", ["xpeft", "bottleneck"])
def test_the_card_says_how_the_adapter_was_trained(kind, tiny_bert, tmp_path):
    config = xpeft() if kind == "xpeft" else BottleneckConfig(task_type="SEQ_CLS", bottleneck_size=4)
    model = get_peft_model(tiny_bert(), config)
    rows_of_data = [{"input_ids": [1, 2, 3 + i], "labels": i % 4} for i in range(8)]
    arguments = TrainingArguments(
        str(tmp_path / "run"), use_cpu=True, report_to=[], max_steps=3, per_device_train_batch_size=2, seed=5,
        gradient_accumulation_steps=2, logging_steps=1, learning_rate=1e-3, disable_tqdm=True, save_steps=2,
        eval_strategy="steps", eval_steps=3,
    )  # fmt: skip
    callback = XPEFTCallback(0.2) if kind == "xpeft" else RecordCallback()
    trainer = Trainer(model, arguments, train_dataset=rows_of_data, eval_dataset=rows_of_data[:4], callbacks=[callback])
    trainer.train()
    model.save_pretrained(tmp_path / "adapter")
    said = rows(tmp_path / "adapter")["trained"]
    assert said.startswith("3 steps, 1.5 epochs, 4 examples a step, optimizer adamw")
    assert "learning rate 0.001" in said
    assert ("mask learning rate 0.2" in said) == (kind == "xpeft")
    assert ", loss 2." in said
    assert ", eval loss 1." in said
    assert "runtime" not in said
    assert PeftModel.from_pretrained(tiny_bert(), tmp_path / "adapter").peft_config["default"].training["seed"] == 5
    assert rows(tmp_path / "run" / "checkpoint-2")["trained"].startswith("2 steps, 1.0 epochs")


def test_the_trainers_card_comes_below(model, tmp_path):
    """The Trainer overwrites the folder's card before it pushes, then lets PEFT complete it."""
    trainer = Trainer(model, TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]))
    trainer.save_model()
    trainer.create_model_card(model_name="of-alice")
    card = ModelCard(text(tmp_path)).text
    assert card.startswith("\n```python\nimport peft_xmask\n")
    assert card.index(END) < card.index("### Training hyperparameters")


def test_installing_twice_wraps_once():
    before = PeftModel.create_or_update_model_card, PeftModel._upload_modified_files
    complete_cards_of_peft()
    assert (PeftModel.create_or_update_model_card, PeftModel._upload_modified_files) == before
    assert all(hasattr(method, "completes_cards") for method in before)


def test_a_pool_that_is_not_at_hand_is_not_fetched(saved, model, tmp_path):
    """From the Hub's cache or not at all: this would be an error offline, and slow online."""
    config = XPEFTConfig.from_pretrained(saved)
    config.pool = "somebody/some-pool@main/inside"
    shutil.copytree(saved, tmp_path / "copy")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        complete_card(tmp_path / "copy", config)
    found = rows(tmp_path / "copy")
    assert found["pool"] == "`somebody/some-pool@main/inside`"
    assert found["pool, once for all profiles"] == "not known"
    assert json.loads((tmp_path / "copy" / "adapter_config.json").read_text())["pool"] is None
