"""People's texts and a real causal language model: one adapter for all, then a mask for each of them."""

import gzip
import json
import shutil

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_xmask import AdapterPool, ProfileBank
from peft_xmask.bank.live import LiveBank
from peft_xmask.bank.verification import verify_bank
from peft_xmask.errors import ConfigError, PeftXMaskError
from peft_xmask.people.personalize import personalize
from peft_xmask.people.predictor import Predictor
from peft_xmask.people.settings import PersonalizeSettings
from peft_xmask.people.table import PeopleTable
from peft_xmask.people.tokens import IGNORED, encode
from peft_xmask.people.writer import Writer

TEXT = "transfer ten dollars to my savings account"
WHO = ("banking", "travel")


@pytest.fixture(scope="module")
def stories(shared_data):
    return shared_data / "stories260k-llama"


@pytest.fixture(scope="module")
def texts(shared_data, tmp_path_factory):
    """Questions of two domains of clinc150, whose askers stand for people."""
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    counts = dict.fromkeys(WHO, 0)
    with gzip.open(shared_data / "clinc150" / "train.jsonl.gz", "rt") as stream, path.open("w") as out:
        for line in stream:
            row = json.loads(line)
            if counts.get(row["domain"], 60) < 60:
                counts[row["domain"]] += 1
                out.write(json.dumps({"text": row["text"], "user": row["domain"]}) + "\n")
    return path


@pytest.fixture(scope="module")
def settings():
    return PersonalizeSettings(max_length=48, num_adapters=64, epochs=3.0, layers=None, batch_size=16)


@pytest.fixture(scope="module")
def written(stories, texts, settings, tmp_path_factory):
    out = tmp_path_factory.mktemp("language") / "bank"
    return out, personalize(stories, PeopleTable.read(str(texts), task="causal-lm"), out, settings)


def test_each_layer_makes_texts_likelier(written):
    out, done = written
    base, common, mask = (layer.overall for layer in done.report.layers)
    assert [layer.name for layer in done.report.layers] == ["base model", "common part", "+ mask"]
    assert mask < common - 0.05
    assert common < base - 0.3
    assert (done.report.measure, done.report.lower_is_better) == ("nats per token", True)
    assert done.report.gain == pytest.approx(common - mask)
    assert list(ProfileBank.from_pretrained(out)) == list(done.bank)


def test_the_bank_knows_whose_text_it_is(written, stories):
    writer = Writer.from_pretrained(written[0])
    mine, other, nobody = writer.score([TEXT] * 3, ["banking", "travel", None])
    assert mine.nats_per_token < min(other.nats_per_token, nobody.nats_per_token)
    assert [each.personal for each in (mine, other, nobody)] == [True, True, False]
    tokenizer, base = AutoTokenizer.from_pretrained(stories), AutoModelForCausalLM.from_pretrained(stories)
    ids = torch.tensor([[*tokenizer(TEXT)["input_ids"], tokenizer.eos_token_id]])
    served = PeftModel.from_pretrained(base, str(written[0])).eval()
    served.set_profile(list(written[1].bank).index("banking"))
    with torch.no_grad():
        loss = float(served(input_ids=ids, labels=ids).loss)
    assert mine.nats_per_token == pytest.approx(loss, rel=1e-4)
    assert mine.tokens == ids.shape[1] - 1


def test_texts_are_continued_alike_alone_and_in_a_mixed_batch(written):
    writer = Writer.from_pretrained(written[0])
    asked = [("what is", "banking"), ("i need to go to", "travel"), ("what is", None), ("what is", "eve")]
    mixed = writer.write([text for text, _ in asked], [who for _, who in asked], max_new_tokens=8)
    alone = [writer.write([text], who, max_new_tokens=8)[0] for text, who in asked]
    assert mixed == alone
    assert mixed[0].text != mixed[2].text
    assert [each.personal for each in mixed] == [True, True, False, False]
    with pytest.raises(ConfigError, match="text 2"):
        writer.write(["a", ""])


def test_the_command_line_scores_and_continues(written, capsys, tmp_path):
    from peft_xmask.cli import run

    lines = tmp_path / "lines.jsonl"
    lines.write_text(json.dumps({"text": TEXT, "who": "banking"}) + "\n" + TEXT + "\n")
    assert run(["predict", "--bank", str(written[0]), "--score", str(lines)]) == 0
    mine, nobody = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert mine["nats_per_token"] < nobody["nats_per_token"]
    assert run(["predict", "--bank", str(written[0]), "--max-new-tokens", "5", str(lines)]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[0])["continuation"]


def test_the_folder_needs_nothing_but_the_base(written, stories, tmp_path):
    """Its pool has a common part, so it stands beside the masks and goes with them wherever they go."""
    moved = tmp_path / "moved"
    shutil.copytree(written[0], moved)
    expected = Writer.from_pretrained(written[0]).score([TEXT], "banking")
    assert json.loads((moved / "adapter_config.json").read_text())["pool"].startswith("./pool-")
    bank = ProfileBank.from_pretrained(moved)
    assert str(bank.config.pool).startswith(str(moved))
    assert not verify_bank(moved, deep=True).problems
    bank.save_pretrained(tmp_path / "copy")
    LiveBank.create(tmp_path / "live", bank).freeze(tmp_path / "frozen")
    shutil.rmtree(moved)
    for name in ("copy", "frozen"):
        assert Writer.from_pretrained(tmp_path / name).score([TEXT], "banking") == expected
    live = LiveBank.open(tmp_path / "live")
    assert str(live.kind.config.pool).startswith(str(tmp_path / "live"))
    served = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(stories), str(tmp_path / "copy"))
    assert served.peft_config["default"].pool_fingerprint == bank.config.pool_fingerprint


def test_a_pool_with_a_common_part_is_used_and_not_trained_again(written, stories, texts, settings, tmp_path):
    (folder,) = written[0].glob("pool-*")
    pool = AdapterPool.from_pretrained(folder)
    table = PeopleTable.read(str(texts), task="causal-lm")
    again = personalize(stories, table, tmp_path / "bank", settings, pool=str(folder))
    assert again.bank.config.pool_fingerprint == pool.fingerprint
    assert again.report.layers[1].overall == pytest.approx(written[1].report.layers[1].overall, abs=1e-5)
    with pytest.raises(PeftXMaskError, match=r"neither a folder here nor a Hub repository"):
        personalize(stories, table, tmp_path / "no", settings, pool=str(tmp_path / "none"))


def test_a_pool_is_fitted_to_the_texts_of_people(stories, texts, settings, tmp_path):
    table = PeopleTable.read(str(texts), task="causal-lm")
    changed = PersonalizeSettings(**{**settings.__dict__, "group_steps": 20, "epochs": 1.0})
    done = personalize(stories, table, tmp_path / "bank", changed, pool="fit")
    layers = {layer.name: layer.overall for layer in done.report.layers}
    assert layers["common part"] < layers["base model"] - 0.3
    mine, other = Writer.from_pretrained(tmp_path / "bank").score([TEXT] * 2, WHO)
    assert mine.nats_per_token <= other.nats_per_token


def test_a_base_or_a_bank_of_another_kind_is_refused(written, texts, settings, minilm, tmp_path):
    table = PeopleTable.read(str(texts), task="causal-lm")
    with pytest.raises(ConfigError, match=r"cannot continue texts.*BertModel"):
        personalize(minilm, table, tmp_path / "bank", settings)
    with pytest.raises(ConfigError, match="language model"):
        Predictor.from_pretrained(written[0])
    (folder,) = written[0].glob("pool-*")
    labelled = tmp_path / "labelled.jsonl"
    rows = [{"text": f"text {n}", "label": "ab"[n % 2], "user": "ann"} for n in range(10)]
    labelled.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ConfigError, match=r"does not fit the base .*down_proj"):
        personalize(minilm, PeopleTable.read(str(labelled)), tmp_path / "bank", settings, pool=str(folder))
    assert not (tmp_path / "bank").exists()


def test_only_what_follows_a_prompt_is_learnt(stories):
    tokenizer = AutoTokenizer.from_pretrained(stories)
    row = encode(tokenizer, "once upon", " a time", 64)
    learnt = [label for label in row["labels"] if label != IGNORED]
    assert tokenizer.decode(learnt, skip_special_tokens=True).strip() == "a time"
    assert row["input_ids"][-len(learnt) :] == learnt
    assert learnt[-1] == tokenizer.eos_token_id
    cut = encode(tokenizer, "once upon a time there was a dog " * 20, " a time", 16)
    assert len(cut["input_ids"]) == 16
    assert [label for label in cut["labels"] if label != IGNORED] == learnt
    whole = encode(tokenizer, "once upon", "", 64)
    assert whole["labels"] == whole["input_ids"]
