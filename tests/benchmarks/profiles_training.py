"""What training very many profiles at once costs. Prints tables and, last, one JSON line.

On MiniLM's shape (random weights), measured side by side in one run: a step with 32 distinct profiles against one with
a single profile; profiles per hour of ``train_profiles`` against one PEFT LoRA run per profile, one after another in
this process with the base held in memory, and each in a process of its own, as a script per user would be; and the
memory that training 32 profiles takes of an adapter that has a thousand rows and of one that has a hundred thousand.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time

import peft
import torch
from peft import LoraConfig, get_peft_model
from rich.table import Table
from timing import Summary, in_turn, load_average, out, paired_ratio, print_json, progress, twin
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from peft_xmask import XPEFTConfig
from peft_xmask.profiles import RowAdamW, train_profiles
from peft_xmask.training.prefix import Prefix
from peft_xmask.training.states import ExamplesWithStates, StatesCollator, StatesRecorder, replaying

SHAPE = dict(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)


def base_of():
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(vocab_size=1000, num_labels=4, **SHAPE))


def config(profiles):
    return XPEFTConfig(task_type="SEQ_CLS", num_adapters=100, num_profiles=profiles)


def batch_of(rows, length):
    generator = torch.Generator().manual_seed(1)
    return {
        "input_ids": torch.randint(0, 1000, (rows, length), generator=generator),
        "labels": torch.randint(0, 4, (rows,), generator=generator),
    }


def stepping(length, profiles, rounds, limit):
    """Times of a training step of 32 examples."""
    batch = batch_of(32, length)
    model = get_peft_model(base_of(), config(profiles)).train()
    optimizer = RowAdamW.for_model(model, lr=1e-3)

    def step(rows):
        def run():
            model(**batch, adapter_names=rows).loss.backward()
            optimizer.step()
            model.zero_grad()

        return run

    distinct = torch.arange(32) * (profiles // 32)
    return in_turn({"one": step(torch.full((32,), 7)), "distinct": step(distinct)}, rounds, limit, lambda: None)


def examples_of(profiles, each, length):
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, 1000, (profiles * each, length), generator=generator)
    labels = torch.randint(0, 4, (profiles * each,), generator=generator)
    return [{"input_ids": ids[i], "labels": labels[i], "user": f"user-{i // each}"} for i in range(profiles * each)]


def arguments(folder, epochs, batch_size):
    return TrainingArguments(
        output_dir=folder, num_train_epochs=epochs, per_device_train_batch_size=batch_size, learning_rate=1e-3,
        save_strategy="no", report_to=[], logging_strategy="no", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip


def one_lora(base, examples, epochs, batch_size, folder, layers=None, *, cached=False):
    """Train and save one profile the usual way: the base is held, the Trainer makes the loop.

    ``cached``: from the states before the first adapted block, computed once for these examples.
    """
    adapter = LoraConfig(r=8, target_modules=["query", "value"], task_type="SEQ_CLS", layers_to_transform=layers)
    model = get_peft_model(twin(base), adapter)
    data = [{key: row[key] for key in ("input_ids", "labels")} for row in examples]
    args = arguments(folder, epochs, batch_size)
    args.remove_unused_columns = not cached
    prefix, collator = Prefix.of(model) if cached else None, default_data_collator
    if cached:
        states = StatesRecorder(model, prefix, collator, batch_size, {}).states(data, None, "")
        data, collator = ExamplesWithStates(data, states), StatesCollator(collator)
    trainer = Trainer(model, args, train_dataset=data, data_collator=collator)
    trainer.remove_callback(PrinterCallback)
    with replaying(model, prefix):
        trainer.train()
    model.save_pretrained(folder)


def together(base, examples, epochs, batch_size, folder, layers=None, cache=None):
    args = arguments(folder, epochs, batch_size)
    adapter = config(1)
    adapter.layers_to_transform = layers
    bank = train_profiles(
        twin(base), examples, config=adapter, args=args, sampling_temperature=1.0, cache=cache, progress=False
    )
    bank.save_pretrained(folder)


LAST = [4, 5]  # the last third of the blocks


def last_blocks(profiles, each, length, epochs, batch_size, loras):
    """Seconds a profile where only the last blocks are adapted: together with and without a cache; LoRAs likewise."""
    base, examples = base_of(), examples_of(profiles, each, length)
    found = {"together": [], "together, cached": [], "LoRA": [], "LoRA, cached": []}

    def timed(name, count, run, *args, **named):
        start = time.perf_counter()
        run(base, *args, epochs, batch_size, folder, LAST, **named)
        found[name].append((time.perf_counter() - start) / count)

    with tempfile.TemporaryDirectory() as folder:
        one_lora(base, examples[:each], 1, batch_size, folder, LAST)
        for number in range(loras):
            mine = examples[number * each : (number + 1) * each]
            for name in ("LoRA", "LoRA, cached"):
                timed(name, 1, one_lora, mine, cached="cached" in name)
            if number in (loras // 3, 2 * loras // 3):
                timed("together", profiles, together, examples)
                timed("together, cached", profiles, together, examples, cache="auto")
    return {name: round(3600 / Summary.of(seconds).median) for name, seconds in found.items()}


def lora_apart(each, length, epochs, batch_size):
    """Seconds of a LoRA run in a process of its own, which starts Python, imports, reads the base, trains and saves."""
    sizes = [str(number) for number in (each, length, epochs, batch_size)]
    start = time.perf_counter()
    subprocess.run([sys.executable, __file__, "--single", *sizes], capture_output=True, check=True)
    return time.perf_counter() - start


def single(each, length, epochs, batch_size):
    """What that process does."""
    with tempfile.TemporaryDirectory() as folder:
        one_lora(base_of(), examples_of(1, each, length), epochs, batch_size, folder)


def profiles_per_hour(profiles, each, length, epochs, batch_size, loras):
    """Of a joint run, and of LoRA runs one after another; these before and after it, to see the machine change."""
    base, examples = base_of(), examples_of(profiles, each, length)
    apart = [lora_apart(each, length, epochs, batch_size) for _ in range(loras // 2)]
    with tempfile.TemporaryDirectory() as folder:
        one_lora(base, examples[:each], 1, batch_size, folder)
        seconds = []

        def run_loras(numbers):
            for i in numbers:
                start = time.perf_counter()
                one_lora(base, examples[i * each : (i + 1) * each], epochs, batch_size, folder)
                seconds.append(time.perf_counter() - start)

        run_loras(range(loras // 2))
        start = time.perf_counter()
        together(base, examples, epochs, batch_size, folder)
        joint = (time.perf_counter() - start) / profiles
        run_loras(range(loras // 2, loras))
    apart += [lora_apart(each, length, epochs, batch_size) for _ in range(loras // 2, loras)]
    return joint, {
        name: {
            "an_hour": round(3600 / Summary.of(runs).median),
            "ratio": Summary.of([s / joint for s in runs]).as_dict(),
        }
        for name, runs in (("one_process", seconds), ("a_process_each", apart))
    }


def own_memory():
    with open("/proc/self/status", encoding="ascii") as stream:
        return next(int(line.split()[1]) * 1024 for line in stream if line.startswith("RssAnon"))


def memory(profiles, touched, steps=4):
    """In a process of its own: bytes that rows, moments and steps take beside the model; printed."""
    model = get_peft_model(base_of(), config(1)).train()
    batch = batch_of(8, 16)
    model(**batch).loss.backward()
    model.zero_grad()
    start = own_memory()
    many = get_peft_model(base_of(), config(profiles)).train()
    made = own_memory()
    optimizer = RowAdamW.for_model(many, lr=1e-3)
    order = (torch.arange(touched) * (profiles // touched)).split(8)
    for _ in range(steps):
        for rows in order:
            many(**batch, adapter_names=rows).loss.backward()
            optimizer.step()
            many.zero_grad()
    state = sum(t.nbytes for e in optimizer.state_dict()["state"].values() for t in e.values())
    print(json.dumps({"made": made - start, "trained": own_memory() - made, "optimizer_checkpoint": state}))


def memory_apart(profiles, touched):
    command = [sys.executable, __file__, "--memory", str(profiles), str(touched)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--limit", type=float, default=90.0, help="seconds for each comparison of steps")
    parser.add_argument("--profiles", type=int, default=100, help="profiles of the joint run")
    parser.add_argument("--loras", type=int, default=6, help="LoRA runs that are timed")
    parser.add_argument("--examples", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--length", type=int, default=16, help="tokens, for profiles per hour")
    parser.add_argument("--memory", type=int, nargs=2, metavar=("PROFILES", "TOUCHED"), help=argparse.SUPPRESS)
    parser.add_argument("--single", type=int, nargs=4, metavar="N", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.single:
        single(*options.single)
        return
    if options.memory:
        memory(*options.memory)
        return
    facts = {"benchmark": "profiles_training", "peft": peft.__version__, "threads": torch.get_num_threads()}
    console = out()
    with progress() as bar:
        task = bar.add_task("measuring", total=6)
        facts["step"] = {}
        for length in (16, 64):
            times = stepping(length, 1000, options.rounds, options.limit)
            facts["step"][f"32 x {length}"] = {
                "milliseconds_one": round(1e3 * Summary.of(times["one"]).median, 1),
                "distinct_over_one": paired_ratio(times, "distinct", "one").as_dict(),
            }
            bar.advance(task)
        joint, loras = profiles_per_hour(
            options.profiles, options.examples, options.length, options.epochs, options.batch_size, options.loras
        )
        facts["profiles_per_hour"] = {
            "profiles": options.profiles, "examples": options.examples, "epochs": options.epochs,
            "batch_size": options.batch_size, "length": options.length, "joint": round(3600 / joint), "lora": loras,
        }  # fmt: skip
        facts["last_blocks_an_hour"] = last_blocks(
            options.profiles, options.examples, options.length, options.epochs, options.batch_size, options.loras
        )
        bar.advance(task)
        facts["memory"] = {}
        for profiles, touched in ((1000, 32), (100_000, 32), (100_000, 320)):
            facts["memory"][f"{touched} of {profiles}"] = memory_apart(profiles, touched)
            bar.advance(task)
    facts["load_average"] = load_average()
    show(console, facts)
    print_json(facts)


def show(console, facts):
    table = Table(title="A step with 32 of 1,000 profiles over one with a single profile (MiniLM shape)")
    for column in ("examples x tokens", "a single one", "ratio", "95 % interval"):
        table.add_column(column)
    for name, each in facts["step"].items():
        found = each["distinct_over_one"]
        interval = f"{found['interval'][0]:.3f} to {found['interval'][1]:.3f}"
        table.add_row(name, f"{each['milliseconds_one']} ms", f"{found['median']:.3f}", interval)
    console.print(table)
    found = facts["profiles_per_hour"]
    table = Table(
        title=f"Profiles per hour, {found['examples']} examples of {found['length']} tokens, {found['epochs']} epochs, "
        f"batches of {found['batch_size']}"
    )
    for column in (f"{found['profiles']} together", "one PEFT LoRA r=8 run each", "an hour", "ratio (95 % interval)"):
        table.add_column(column)
    for name, lora in found["lora"].items():
        low, high = lora["ratio"]["interval"]
        ratio = f"{lora['ratio']['median']:.1f} ({low:.1f} to {high:.1f})"
        table.add_row(f"{found['joint']:,}", name.replace("_", " "), f"{lora['an_hour']:,}", ratio)
    console.print(table)
    table = Table(title="Profiles per hour, adapters in the last two blocks of six")
    for name in facts["last_blocks_an_hour"]:
        table.add_column(name)
    table.add_row(*(f"{number:,}" for number in facts["last_blocks_an_hour"].values()))
    console.print(table)
    table = Table(title="Memory of training rows (S = 6, N = 100), in a process each")
    for column in ("rows trained", "making the adapter", "training", "optimizer in a checkpoint"):
        table.add_column(column)
    for name, each in facts["memory"].items():
        table.add_row(name, *(f"{each[key] / 1e6:.1f} MB" for key in ("made", "trained", "optimizer_checkpoint")))
    console.print(table)


if __name__ == "__main__":
    main()
