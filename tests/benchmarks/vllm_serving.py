"""A bank served by vLLM on this machine's CPU: right answers, latency of a new person, sixteen people over one.

Needs the environment that ``.ci/vllm`` makes. The model is stories260k with its heads widened. Prints a table and one
JSON line. Peers, side by side in one run: one person's requests against as many people's; a bank of ten against one of
a million.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "integrations" / "vllm"))

from vllm_api import api_server
from vllm_stories import TOKENS, expected, make_bank, prompts_of, widen_heads

from peft_xmask.profiles import ProfileBank

STORIES = Path(__file__).resolve().parents[3] / "shared" / "data" / "stories260k-llama"


def milliseconds(values):
    return round(1e3 * statistics.median(values), 3)


def new_people(api, bank, base, names, clients):
    """Answers to names that the server has not seen, and how many are right."""
    prompts = prompts_of(base)
    wanted = [(name, prompts[number % 5]) for number, name in enumerate(names)]
    stories = expected(base, bank, wanted)
    answers = api.write_all(wanted, TOKENS, clients)
    right = sum(
        status == 200 and story.agrees(tokens) for story, (status, tokens) in zip(stories, answers, strict=True)
    )
    return f"{right}/{len(wanted)}"


def opening(banks, rounds):
    """What the plugin does with a bank when a process of the server starts, and its first look-up: milliseconds."""
    from peft_xmask.integrations.vllm.bank_source import BankSource

    found = {name: [] for name in banks}
    for _ in range(rounds):
        for name, folder in banks.items():
            start = time.perf_counter()
            BankSource(str(folder)).find("person-7")
            found[name].append(time.perf_counter() - start)
    return {name: milliseconds(values) for name, values in found.items()}


def engine(base, folder):
    """vLLM's engine in this process, with slots for 16 people."""
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0", PEFT_XMASK_VLLM_BANK=str(folder), VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_NO_USAGE_STATS="1",
    )  # fmt: skip
    import vllm

    return vllm.LLM(
        str(base), enable_lora=True, max_loras=16, max_cpu_loras=64, max_lora_rank=8, max_model_len=128,
        max_num_seqs=32, dtype="float32", enforce_eager=True, lora_target_modules=["down_proj"],
    )  # fmt: skip


def resolve_and_load(llm, base, count):
    """Medians of a new person's resolution (API server's part) and load (worker's part: baking, and into a slot)."""
    from vllm.lora.resolver import LoRAResolverRegistry

    from peft_xmask.integrations.vllm.worker import ProfileLoader

    resolver = LoRAResolverRegistry.get_resolver("peft_xmask")
    baking, plain = [], ProfileLoader.load

    def load(self, request):
        start = time.perf_counter()
        lora = plain(self, request)
        baking.append(time.perf_counter() - start)
        return lora

    ProfileLoader.load = load
    names = [f"person-{number}" for number in random.Random(1).sample(range(10_000), count)]
    resolving, loading = [], []

    async def run():
        for number, name in enumerate(names):
            start = time.perf_counter()
            request = await resolver.resolve_lora(str(base), name)
            resolving.append(time.perf_counter() - start)
            request.lora_int_id = number + 1
            start = time.perf_counter()
            assert llm.llm_engine.add_lora(request)
            loading.append(time.perf_counter() - start)

    asyncio.run(run())
    ProfileLoader.load = plain
    return {"resolve_ms": milliseconds(resolving), "bake_ms": milliseconds(baking), "load_ms": milliseconds(loading)}


def sixteen_people(llm, base, bank, rounds, length=100):
    """Tokens a second of 16 people's requests in one batch over those of 16 requests of one of them.

    In turn, after all were loaded. By the clock, and by this process's CPU time, which other programs on the machine
    disturb less.
    """
    import vllm

    from peft_xmask.integrations.vllm import lora_request

    prompts = [{"prompt_token_ids": prompts_of(base)[0]}] * 16
    sampling = vllm.SamplingParams(temperature=0, max_tokens=length, ignore_eos=True)
    people = [lora_request(bank, f"person-{number}") for number in range(16)]
    spent = {"one": [], "sixteen": []}
    for turn in range(rounds + 2):
        for which, requests in (("one", people[:1] * 16), ("sixteen", people)):
            start = time.perf_counter(), time.process_time()
            llm.generate(prompts, sampling, lora_request=requests, use_tqdm=False)
            if turn > 1:  # the first rounds warm up
                spent[which].append((time.perf_counter() - start[0], time.process_time() - start[1]))
    found = {}
    for place, clock in enumerate(("clock", "cpu")):
        ratios = sorted(one[place] / many[place] for one, many in zip(spent["one"], spent["sixteen"], strict=True))
        least, _, most = statistics.quantiles(ratios, n=4)
        found[f"sixteen_over_one_{clock}"] = {
            "median": round(statistics.median(ratios), 3),
            "quartiles": [round(least, 3), round(most, 3)],
        }
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profiles", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--stories", type=Path, default=STORIES, help="folder of stories260k-llama")
    parser.add_argument("--folder", type=Path, help="where to keep base and banks between runs")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = options.folder or Path(temporary)
        base = root / "base"
        widen_heads(options.stories, base)
        banks = {"ten": root / "bank-10", "all": root / f"bank-{options.profiles}"}
        for count, folder in ((10, banks["ten"]), (options.profiles, banks["all"])):
            if not folder.exists():
                make_bank(base, folder, count)
        bank = ProfileBank.from_pretrained(banks["all"])
        facts = {"profiles": len(bank), "cpus": os.cpu_count(), "opening_ms": opening(banks, 3 * options.rounds)}
        draws = random.Random(0)
        names = [f"person-{number}" for number in draws.sample(range(len(bank)), 50 + 108)]
        flags = ("--max-loras", 16, "--max-cpu-loras", 64, "--max-lora-rank", 8, "--max-num-seqs", 32)
        with api_server(base, banks["all"], root / "server.log", *flags, "--lora-target-modules", "down_proj") as api:
            facts["started_in_s"] = round(api.started_in, 1)
            facts["new_names_right"] = new_people(api, bank, base, names[:50], 1)
            facts["concurrent_right"] = new_people(api, bank, base, names[50:], 108)
        print(json.dumps(facts), file=sys.stderr)
        llm = engine(base, banks["all"])
        facts.update(resolve_and_load(llm, base, 100))
        facts.update(sixteen_people(llm, base, bank, 3 * options.rounds))
    table = Table(title=f"vLLM on {facts['cpus']} CPUs, a bank of {len(bank):,}")
    for column in ("figure", "value"):
        table.add_column(column)
    for name, value in facts.items():
        table.add_row(name.replace("_", " "), str(value))
    Console(width=130).print(table)
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
