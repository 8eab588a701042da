"""Plots of the quality benchmark: accuracy against bytes, accuracy against steps, and training loss against steps."""

import dataclasses
import statistics

import matplotlib
from quality_cells import chosen as measured
from quality_tasks import TASKS

matplotlib.use("agg")
import matplotlib.pyplot as plt


def draw(folder, task, chosen):
    """Write ``quality-TASK-bytes.svg``, ``quality-TASK-loss.svg``, and ``quality-TASK-steps.svg`` if it was trained
    for several numbers of steps.

    Args:
        chosen: lines of each method, one a seed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    relatives = {TASKS[name].steps: found for name in same_but_for_steps(task) if (found := measured(name, chosen, 3))}
    paints = {"bytes": lambda axes: against_bytes(axes, chosen), "loss": lambda axes: losses(axes, chosen)}
    if len(relatives) > 1:
        paints["steps"] = lambda axes: against_steps(axes, relatives)
    for kind, paint in paints.items():
        figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
        paint(axes)
        axes.grid(alpha=0.25)
        axes.set_title(task)
        figure.savefig(folder / f"quality-{task}-{kind}.svg", metadata={"Date": None})
        plt.close(figure)


def against_bytes(axes, chosen):
    """Mean test accuracy over seeds, its range, and the bytes of a profile without the head."""
    for name, lines in chosen.items():
        scores = [line["test_accuracy"] for line in lines]
        mean, payload = statistics.mean(scores), lines[0]["payload_bytes"]
        if payload == 0:
            axes.axhline(mean, color="grey", linestyle=":", label=f"{name} (0 bytes)")
            continue
        below, above = mean - min(scores), max(scores) - mean
        axes.errorbar(payload, mean, yerr=[[below], [above]], fmt="o", capsize=3)
        axes.annotate(name, (payload, mean), textcoords="offset points", xytext=(3, 3), fontsize=7, rotation=35)
    axes.set_xscale("log")
    axes.set_xlabel("bytes of a profile, without head and pool")
    axes.set_ylabel("test accuracy: mean and range over seeds")
    axes.legend(loc="lower right", fontsize=7) if axes.get_legend_handles_labels()[0] else None


def same_but_for_steps(task):
    """Names of tasks that differ from one in the number of steps, itself among them."""

    def rest(name):
        return dataclasses.replace(TASKS[name], steps=0, rates_from=None)

    return [name for name in TASKS if rest(name) == rest(task)]


def against_steps(axes, relatives):
    """Mean test accuracy over seeds, and its range, of trainings of different lengths."""
    for number, name in enumerate(dict.fromkeys(name for found in relatives.values() for name in found)):
        steps = sorted(steps for steps, found in relatives.items() if name in found)
        scores = [[line["test_accuracy"] for line in relatives[step][name]] for step in steps]
        means = [statistics.mean(each) for each in scores]
        reach = [
            [m - min(s) for m, s in zip(means, scores, strict=True)],
            [max(s) - m for m, s in zip(means, scores, strict=True)],
        ]
        axes.errorbar(steps, means, yerr=reach, marker="o", capsize=3, label=name, color=f"C{number % 10}")
    axes.set_xscale("log")
    axes.set_xticks(sorted(relatives), [str(steps) for steps in sorted(relatives)])
    axes.minorticks_off()
    axes.set_xlabel("steps of training")
    axes.set_ylabel("test accuracy: mean and range over seeds")
    axes.legend(loc="lower right", fontsize=7)


def losses(axes, chosen):
    """Training loss, mean over seeds, of each part of the training."""
    trained = {name: lines for name, lines in chosen.items() if lines[0]["losses"]}
    for number, (name, lines) in enumerate(trained.items()):
        means = [statistics.mean(values) for values in zip(*(line["losses"] for line in lines), strict=True)]
        width = lines[0]["steps"] / len(means)
        steps = [width * (index + 0.5) for index in range(len(means))]
        axes.plot(steps, means, label=name, color=f"C{number % 10}", linestyle="-" if number < 10 else "--")
    axes.set_xlabel("steps")
    axes.set_ylabel("training loss in nats, mean over seeds")
    axes.legend(loc="upper right", fontsize=7)
