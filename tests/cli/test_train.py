"""`train` and `eval`: files in, a plain PEFT folder out, the same numbers from the saved file."""

import json

import pytest
from peft import PeftConfig

from peft_xmask.cli.classify import TextClassifier
from peft_xmask.cli.data import label_names_of, number_labels, read_rows
from peft_xmask.cli.methods import HEAD_LEARNING_RATE, LEARNING_RATES, method_config
from peft_xmask.cli.train_settings import TrainSettings

COLUMNS = ("--text", "doc", "--label", "chapter")
QUICK = ("--max-steps", 3, "--batch-size", 8, "--max-length", 24)


@pytest.mark.parametrize("method", ["xpeft", "bottleneck", "magnitude-mask", "weight-adapter", "lora", "head"])
def test_train_writes_a_peft_folder_that_eval_reads(method, adapters, data, cli):
    folder = adapters[method]
    config = PeftConfig.from_pretrained(str(folder))
    expected = {"bottleneck": "BOTTLENECK_ADAPTER", "lora": "LORA", "head": "LORA"}
    assert config.peft_type == expected.get(method, method.replace("-", "_").upper())
    assert not (folder / "checkpoints").exists()
    done = cli("eval", "--adapter", folder, "--data", data["csv"], *COLUMNS, "--json")
    assert done.status == 0
    facts = json.loads(done.out)
    assert facts["examples"] == 60
    assert 0.0 <= facts["macro_f1"] <= 1.0
    assert facts["loss"] > 0.0


def test_training_learns(data, minilm, cli, tmp_path):
    out = tmp_path / "adapter"
    done = cli(
        "train", "--base", minilm, "--data", data["jsonl"], *COLUMNS, "--method", "head", "--max-steps", 40,
        "--batch-size", 16, "--max-length", 24, "--out", out,
    )  # fmt: skip
    assert done.status == 0
    facts = json.loads(cli("eval", "--adapter", out, "--data", data["jsonl"], *COLUMNS, "--json").out)
    assert facts["accuracy"] > 0.8


def test_predictions_name_labels_and_agree_with_the_accuracy(adapters, data, rows, cli, tmp_path):
    target = tmp_path / "predictions.jsonl"
    done = cli(
        "eval", "--adapter", adapters["xpeft"], "--data", data["jsonl"], *COLUMNS, "--json", "--predictions", target
    )
    records = [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]
    assert [(record["text"], record["label"]) for record in records] == rows
    share = sum(record["label"] == record["predicted"] for record in records) / len(records)
    assert json.loads(done.out)["accuracy"] == share


def test_whole_number_labels_from_parquet_and_a_held_out_share(data, minilm, cli, tmp_path):
    out = tmp_path / "adapter"
    done = cli(
        "train", "--base", minilm, "--data", data["parquet"], *COLUMNS, *QUICK, "--method", "head", "--eval-fraction",
        0.2, "--out", out,
    )  # fmt: skip
    assert done.status == 0
    assert "48 examples, 3 labels" in done.out
    assert "accuracy" in done.out
    assert json.loads((out / "config.json").read_text())["id2label"] == {"0": "0", "1": "1", "2": "2"}


def test_the_models_own_pooling_and_soft_masks(data, minilm, cli, tmp_path):
    out = tmp_path / "adapter"
    done = cli(
        "train", "--base", minilm, "--data", data["csv"], *COLUMNS, *QUICK, "--pooling", "model", "--mask-type", "soft",
        "--num-adapters", 10, "--bottleneck-size", 4, "--eval-data", data["jsonl"], "--out", out,
    )  # fmt: skip
    assert done.status == 0
    shown = json.loads(cli("inspect", out, "--json").out)
    assert shown["masks"]["mask_type"] == "soft"
    assert cli("eval", "--adapter", out, "--data", data["csv"], *COLUMNS).status == 0


def test_resume_continues_to_the_very_weights_of_an_uninterrupted_run(data, rows, minilm, cli, tmp_path):
    common = (
        "train", "--base", minilm, "--data", data["jsonl"], *COLUMNS, *QUICK[2:], "--max-steps", 4,
        "--num-adapters", 10, "--bottleneck-size", 4,
    )  # fmt: skip
    assert cli(*common, "--out", tmp_path / "whole").status == 0

    examples = read_rows(str(data["jsonl"]), "doc", "chapter")
    names = label_names_of(examples)
    config = method_config("xpeft", num_adapters=10, bottleneck_size=4)
    classifier = TextClassifier.create(minilm, names, config, max_length=24)
    rates = {"learning_rate": LEARNING_RATES["xpeft"], "head_learning_rate": HEAD_LEARNING_RATE}
    settings = TrainSettings(max_steps=4, batch_size=8, checkpoint_every=2, **rates)

    def stop_after_three(done, total):
        if done == 3:
            raise KeyboardInterrupt

    checkpoints = tmp_path / "resumed" / "checkpoints"
    with pytest.raises(KeyboardInterrupt):
        classifier.train(
            number_labels(examples, names, "rows"), settings, checkpoints=checkpoints, progress=stop_after_three
        )
    assert sorted(path.name for path in checkpoints.iterdir()) == ["checkpoint-2", "run.json"]
    again = (*common, "--checkpoint-every", 2, "--out", tmp_path / "resumed")
    swapped = tmp_path / "swapped.jsonl"
    one, other = names[:2]
    turned = data["jsonl"].read_text().replace(one, "\0").replace(other, one).replace("\0", other)
    swapped.write_text(turned)
    refused = cli(*[swapped if part == data["jsonl"] else part for part in again], "--resume")
    assert refused.status == 2
    assert "are of another run: it had other examples." in refused.err
    refused = cli(*again, "--resume", "--seed", 1)
    assert "it had other settings." in refused.err
    refused = cli(*again)
    assert refused.status == 2
    assert "Pass --resume to continue that run" in refused.err
    done = cli(*again, "--resume")
    assert done.status == 0, done.err
    whole, resumed = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "resumed"))
    assert whole == resumed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data", "missing.jsonl"), "Expected a data file at 'missing.jsonl', found none"),
        (("--text", "prose"), "Expected a column 'prose'"),
        (("--method", "prompt"), "'prompt' is not one of"),
        (("--top-k", 21), "top_k=21 is invalid"),
        (("--max-length", 1), "max_length=1 is invalid: expected at least 3"),
        (("--batch-size", 0), "batch_size=0 is invalid"),
        (("--base", "/no/such/base"), "/no/such/base"),
        (("--resume",), "Expected a checkpoint to resume from"),
        (("--eval-fraction", 1.5), "--eval-fraction 1.5 is invalid"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, message, data, minilm, cli, tmp_path):
    good = {"--base": minilm, "--data": data["jsonl"], "--text": "doc", "--label": "chapter", "--num-adapters": 20}
    given = [part for name, value in good.items() if name not in arguments for part in (name, value)]
    done = cli("train", *given, *QUICK[:2], *arguments, "--out", tmp_path / "out")
    assert done.status == 2
    errors = [line for line in done.err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in done.err


def test_data_that_cannot_be_read_is_refused(data, minilm, cli, tmp_path):
    broken = {
        "torn.jsonl": b'{"doc": "a", "chapter": "x"}\n{"doc": ',
        "short.parquet": data["parquet"].read_bytes()[:100],
        "gap.csv": b"doc,chapter\nsome text,\nmore text,x\n",
        "empty.jsonl": b"",
        "rows.xml": b"<rows/>",
        "one.jsonl": b'{"doc": "a", "chapter": "x"}\n',
    }
    for name, content in broken.items():
        path = tmp_path / name
        path.write_bytes(content)
        done = cli("train", "--base", minilm, "--data", path, *COLUMNS, *QUICK, "--out", tmp_path / "out")
        assert done.status == 2, name
        assert done.err.startswith("error:"), name
        assert done.err.count("\n") == 1, name
        assert not (tmp_path / "out" / "adapter_config.json").exists()


def test_labels_that_were_not_trained_on_are_refused(adapters, cli, tmp_path):
    path = tmp_path / "other.jsonl"
    path.write_text('{"doc": "a text", "chapter": "Cooking"}\n')
    done = cli("eval", "--adapter", adapters["lora"], "--data", path, *COLUMNS)
    assert done.status == 2
    assert "Cooking" in done.err


def test_an_existing_adapter_is_not_overwritten(adapters, data, minilm, cli):
    before = (adapters["lora"] / "adapter_model.safetensors").read_bytes()
    done = cli("train", "--base", minilm, "--data", data["jsonl"], *COLUMNS, *QUICK, "--out", adapters["lora"])
    assert done.status == 2
    assert "already holds" in done.err
    assert (adapters["lora"] / "adapter_model.safetensors").read_bytes() == before


def test_debug_shows_where_an_error_came_from(cli_process, tmp_path):
    quiet = cli_process("eval", "--adapter", tmp_path, "--data", "x.jsonl")
    assert quiet.status == 2
    assert quiet.err.startswith("error:")
    assert quiet.err.count("\n") == 1
    loud = cli_process("--debug", "eval", "--adapter", tmp_path, "--data", "x.jsonl")
    assert loud.status != 0
    assert "Traceback" in loud.err
