"""Test accuracy of methods side by side on real texts with the real MiniLM. Prints a table per task and a JSON line.

Every method has the same frozen base, head, learning rate of the head, steps, batches and seeds. Its own learning rate
is searched by validation accuracy with seed 0 on a ladder of half decades, from where experience starts it, upwards or
downwards until it gets worse; some tasks take over the rates that another one found. The test part is seen only by the
rate that won. Finished trainings are kept as
JSON lines in tests/benchmarks/results/ and never run again; ``--redraw`` only prints them, and ``--plots`` draws
accuracy against bytes and against steps, and training losses.
"""

import argparse
import tempfile
from pathlib import Path

import peft
import torch
import transformers
from quality_cells import Cells, chosen
from quality_choice import methods_of, wanted
from quality_common import base_of
from quality_lm import train_lm
from quality_methods import GROUPS, METHODS
from quality_report import markdown, report
from quality_tasks import TASKS, load
from timing import print_json, progress

from peft_xmask import profile_size
from peft_xmask.cli.classify import TextClassifier
from peft_xmask.cli.train_settings import TrainSettings

HEAD_RATE = 1e-2
LADDER = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0)
MARKS = 20  # parts of a training whose mean losses are kept, for learning curves


def train(task, parts, called, rate, seed, better_than):
    """One training; the line that is kept. Tested if its validation accuracy is above ``better_than``."""
    if task.head == "lm":
        return train_lm(task, parts, called, rate, seed, better_than)
    method = METHODS[called]
    settings = TrainSettings(
        max_steps=task.steps,
        batch_size=task.batch_size,
        learning_rate=1e-2 if method.masks else rate,
        head_learning_rate=HEAD_RATE,
        mask_learning_rate=rate if method.masks else 0.1,
        warmup=method.warmup,
        seed=seed,
    )
    classifier = TextClassifier.create(base_of(task), parts.labels, method.config(), pooling=task.head, seed=seed)
    method.prepare(classifier.model)
    parameters = {name: p.numel() for name, p in classifier.model.named_parameters() if p.requires_grad}
    own = sum(count for name, count in parameters.items() if ".modules_to_save." not in name)
    losses = []
    hook = classifier.model.register_forward_hook(lambda module, args, output: losses.append(output.loss.detach()))
    classifier.train(parts.few(task.shots, seed).train, settings, optimizer=method.optimizer)
    hook.remove()
    with tempfile.TemporaryDirectory() as folder:
        classifier.save(folder)
        size = profile_size(folder)
    payload = 4 * own if method.saves_more or not size.payload_bytes else size.payload_bytes
    payload = payload if method.payload is None else method.payload
    validation = round(classifier.evaluate(parts.validation).accuracy, 4)
    line = {
        "steps": task.steps, "method": called, "rate": rate, "seed": seed, "trained": own,
        "payload_bytes": payload, "head_bytes": size.head_bytes, "pool_bytes": size.pool_bytes,
        "losses": [round(float(part.mean()), 4) for part in torch.stack(losses).chunk(MARKS)],
        "validation_accuracy": validation,
    }  # fmt: skip
    if validation > better_than:
        line["test_accuracy"] = round(classifier.evaluate(parts.test).accuracy, 4)
    return line


def taken_over(task, name):
    """The rate that won in the task whose rates this one takes over."""
    best = Cells(task).best(name)
    if best is None:
        raise SystemExit(f"{name} has not been measured on {task}, whose learning rates are taken over. Do that first.")
    return best["rate"]


def search(cells, parts, name, tick):
    """The best rate of a method by validation accuracy of seed 0; of equals, the one tried first."""
    task = TASKS[cells.task]
    method = methods_of(cells.task)[name]
    if task.rates_from is not None and method.search:
        rate = taken_over(task.rates_from, name)
        if not cells.find(method=name, rate=rate, seed=0):
            cells.keep(train(task, parts, name, rate, 0, -1.0))
            tick()
        return rate
    rates = (HEAD_RATE,) if name in ("head only", "base") else LADDER if method.search else (method.start,)
    tried = {}

    def score(index):
        if index not in tried:
            found = cells.find(method=name, rate=rates[index], seed=0)
            if not found:
                best = max(tried.values(), default=-1.0)
                cells.keep(train(task, parts, name, rates[index], 0, best))
                found = cells.lines[-1:]
                tick()
            tried[index] = found[0]["validation_accuracy"]
        return tried[index]

    here = rates.index(method.start) if len(rates) > 1 else 0
    score(here)
    while around := [index for index in (here - 1, here + 1) if 0 <= index < len(rates)]:
        there = max(around, key=score)
        if score(there) <= score(here):
            break
        here = there
    return rates[here]


def measure(task, methods, seeds):
    """Train what is missing."""
    cells, parts = Cells(task), load(TASKS[task])
    with progress() as bar:
        entry = bar.add_task(task, total=None)
        for name in methods:
            rate = search(cells, parts, name, lambda: bar.advance(entry))
            for seed in range(1, seeds):
                if not cells.find(method=name, rate=rate, seed=seed):
                    cells.keep(train(TASKS[task], parts, name, rate, seed, -1.0))
                    bar.advance(entry)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["car"], choices=list(TASKS))
    parser.add_argument("--methods", nargs="+", default=["typology"], help=f"names, or of {', '.join(GROUPS)}; or all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one small task, five methods, one seed: minutes")
    parser.add_argument("--full", action="store_true", help="every task and method: days on two cores; resumes")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (1)")
    parser.add_argument("--redraw", action="store_true", help="print what has been measured, train nothing")
    parser.add_argument("--markdown", action="store_true", help="print one Markdown table of all tasks as well")
    parser.add_argument("--losses", action="store_true", help="with training losses in it")
    parser.add_argument("--plots", type=Path, help="folder for the plots, one of each kind for each task")
    options = parser.parse_args()
    if options.quick:
        options.tasks, options.methods, options.seeds = ["car"], ["few"], 1
    if options.full:
        options.tasks, options.methods = list(TASKS), ["all"]
    try:
        chosen_methods = {task: wanted(task, options.methods) for task in options.tasks}
    except ValueError as error:
        parser.error(str(error))
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    facts = {}
    for task, methods in chosen_methods.items():
        if not options.redraw:
            measure(task, methods, options.seeds)
        facts[task] = report(task, methods, options.seeds)
        if options.plots:
            from quality_plots import draw

            draw(options.plots, task, chosen(task, methods, options.seeds))
    if options.markdown:
        print(markdown(options.tasks, chosen_methods, options.seeds, options.losses))
    print_json({"benchmark": "quality", "peft": peft.__version__, "seeds": options.seeds, "tasks": facts})


if __name__ == "__main__":
    main()
