"""vLLM's engine in this process, with the plugin: who answers in a mixed batch, under churn, and what is refused."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

vllm = pytest.importorskip("vllm", reason="vLLM is not installed: VLLM=yes .ci/run makes an environment with it")

from vllm.config.lora import LoRAConfig
from vllm.lora.request import LoRARequest
from vllm_stories import TOKENS, Story, expected, make_bank, make_base, prompts_of

from peft_xmask.errors import BaseMismatchError, ConfigError
from peft_xmask.integrations.vllm import lora_request
from peft_xmask.integrations.vllm.bank_source import BankSource
from peft_xmask.integrations.vllm.settings import ServingSettings
from peft_xmask.profiles import ProfileBank

PEOPLE = 200


@dataclass
class World:
    """A base, a bank over it and an engine that serves both.

    Attributes:
        base, folder: of the model and the bank.
        bank: open.
        prompts: tokens.
        llm: vLLM's engine, with slots for 50 people and memory for 60.
    """

    base: Path
    folder: Path
    bank: ProfileBank
    prompts: list[list[int]]
    llm: Any

    def write(self, wanted: list[tuple[Any, list[int]]]) -> list[list[int]]:
        """Greedy continuations for requests (None: the base) and prompts, in one call."""
        sampling = vllm.SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
        prompts = [{"prompt_token_ids": list(prompt)} for _, prompt in wanted]
        requests = [request for request, _ in wanted]
        answers = self.llm.generate(prompts, sampling, lora_request=requests, use_tqdm=False)
        return [list(answer.outputs[0].token_ids) for answer in answers]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    root = tmp_path_factory.mktemp("vllm")
    make_base(root / "base")
    bank = make_bank(root / "base", root / "bank", PEOPLE)
    variables = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1",
        "PEFT_XMASK_VLLM_BANK": str(root / "bank"),
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        llm = vllm.LLM(
            str(root / "base"), enable_lora=True, max_loras=50, max_cpu_loras=60, max_lora_rank=8, max_model_len=128,
            max_num_seqs=64, dtype="float32", enforce_eager=True,
        )  # fmt: skip
        yield World(root / "base", root / "bank", bank, prompts_of(root / "base"), llm)


def check(world: World, wanted: list[tuple[str | None, list[int]]], bank: ProfileBank | None = None) -> list[Story]:
    bank = bank or world.bank
    stories = expected(world.base, bank, wanted)
    answers = world.write([(lora_request(bank, name) if name else None, prompt) for name, prompt in wanted])
    wrong = [
        name for (name, _), story, tokens in zip(wanted, stories, answers, strict=True) if not story.agrees(tokens)
    ]
    assert not wrong
    return stories


def test_people_and_the_base_in_one_batch(world):
    people = [(f"person-{number}", world.prompts[number % 5]) for number in range(50)]
    stories = check(world, [*people, *((None, prompt) for prompt in world.prompts)])
    assert len({tuple(story.tokens) for story in stories}) == 55  # no two of them alike: a mix-up would be seen
    assert sum(story.sure for story in stories) > 0.9 * 55 * TOKENS


def test_names_that_come_and_go(world):
    """More people than memory has room for, in an order without a pattern, the base among them, twice."""
    draws = random.Random(0)
    for _ in range(2):
        names = [None if draws.random() < 0.2 else f"person-{draws.randrange(PEOPLE)}" for _ in range(120)]
        check(world, [(name, draws.choice(world.prompts)) for name in names])


def test_two_versions_of_one_name_in_one_batch(world, tmp_path):
    """As when a bank was replaced while a request for the old profile is being answered."""
    new = ProfileBank.from_pretrained(world.folder)
    new.add("person-0", world.bank["person-1"])
    prompt = world.prompts[0]
    old_story, new_story = expected(world.base, world.bank, [("person-0", prompt), ("person-1", prompt)])
    assert old_story.tokens != new_story.tokens
    first, second = lora_request(world.bank, "person-0"), lora_request(new, "person-0")
    assert first.lora_int_id != second.lora_int_id
    for order in ((first, second), (second, first)):
        answers = world.write([(request, prompt) for request in order])
        for request, tokens in zip(order, answers, strict=True):
            assert (old_story if request is first else new_story).agrees(tokens)


def test_folders_are_the_same_as_memory(world, tmp_path):
    from peft_xmask.integrations.vllm.folders import FolderStore

    settings = ServingSettings(str(world.folder), folder=tmp_path / "shm")
    store = FolderStore(BankSource(str(world.folder)), settings)
    names = [f"person-{number}" for number in range(60, 64)]
    stories = expected(world.base, world.bank, [(name, world.prompts[1]) for name in names])
    found = [store.find(name) for name in names]
    requests = [
        LoRARequest(name, 900 + number, each.path) for number, (name, each) in enumerate(zip(names, found, strict=True))
    ]
    answers = world.write([(request, world.prompts[1]) for request in requests])
    assert all(story.agrees(tokens) for story, tokens in zip(stories, answers, strict=True))


def test_a_path_that_cannot_be_loaded_leaves_the_engine_alone(world):
    good = lora_request(world.bank, "person-5")
    for path in (good.lora_path[:-8], good.lora_path.replace("/1/", "/1/0", 1), f"{good.lora_path[:-4]}****"):
        with pytest.raises(ValueError, match=r"Expected|settings|base64"):
            world.llm.llm_engine.add_lora(LoRARequest("damaged", 1000, path))
    check(world, [("person-5", world.prompts[2]), (None, world.prompts[2])])


def test_the_kernels_are_mended_where_they_are_faulty(world):
    from vllm.lora.ops.torch_ops import lora_ops

    from peft_xmask.integrations.vllm import cpu_kernels

    assert vllm.platforms.current_platform.is_cpu()
    assert not cpu_kernels.is_faulty(lora_ops)
    assert not cpu_kernels.fix()  # nothing to do


def loader(world: World, folder: Path, *, rank: int = 8, targets: list[str] | None = None, base: Path | None = None):
    """The worker's part, as it is made when a server starts with these flags."""
    from peft_xmask.integrations.vllm.worker import ProfileLoader

    adapted = {f"model.layers.{layer}.mlp.{name}": None for layer in range(5) for name in targets or ["down_proj"]}
    manager = SimpleNamespace(
        lora_config=LoRAConfig(max_lora_rank=rank),
        _adapter_manager=SimpleNamespace(modules=adapted, packed_modules={}, model=SimpleNamespace()),
    )
    config = SimpleNamespace(
        model_config=SimpleNamespace(model=str(base or world.base), revision=None),
        load_config=SimpleNamespace(download_dir=None),
        parallel_config=SimpleNamespace(pipeline_parallel_size=1),
    )
    return ProfileLoader(manager, config, BankSource(str(folder)), ServingSettings(str(folder)))


def test_what_cannot_be_served_is_refused_at_the_start(world, tmp_path):
    loader(world, world.folder)
    with pytest.raises(ConfigError, match="--lora-target-modules down_proj"):
        loader(world, world.folder, targets=["q_proj"])
    make_bank(world.base, tmp_path / "wide", 2, bottleneck=12)
    with pytest.raises(ConfigError, match="--max-lora-rank 16"):
        loader(world, tmp_path / "wide")
    loader(world, tmp_path / "wide", rank=16)
    other = tmp_path / "other"
    make_base(other)
    tensors = load_file(other / "model.safetensors")
    tensors = {key: -each if "down_proj" in key else each for key, each in tensors.items()}
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseMismatchError):
        loader(world, world.folder, base=other)


def test_a_server_that_would_never_ask_is_refused_at_the_start(monkeypatch):
    from peft_xmask.integrations.vllm.api_server import _refuse_settings

    def models(lora_config: object) -> SimpleNamespace:
        return SimpleNamespace(engine_client=SimpleNamespace(vllm_config=SimpleNamespace(lora_config=lora_config)))

    allowed = SimpleNamespace(VLLM_ALLOW_RUNTIME_LORA_UPDATING=True)
    monkeypatch.setattr("peft_xmask.integrations.vllm.api_server.envs", allowed)
    _refuse_settings(models(LoRAConfig()))
    with pytest.raises(ConfigError, match="--enable-lora"):
        _refuse_settings(models(None))
    allowed.VLLM_ALLOW_RUNTIME_LORA_UPDATING = False
    with pytest.raises(ConfigError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING"):
        _refuse_settings(models(LoRAConfig()))
