"""Plots of the quality benchmark: accuracy against bytes, and training loss against steps."""

import statistics

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt


def draw(folder, task, chosen):
    """Write two SVG files for a task: ``quality-TASK-bytes.svg`` and ``quality-TASK-steps.svg``.

    Args:
        chosen: lines of each method, one a seed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for kind, paint in (("bytes", against_bytes), ("steps", against_steps)):
        figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
        paint(axes, chosen)
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
        axes.annotate(name, (payload, mean), textcoords="offset points", xytext=(6, 4), fontsize=7)
    axes.set_xscale("log")
    axes.set_xlabel("bytes of a profile, without head and pool")
    axes.set_ylabel("test accuracy: mean and range over seeds")
    axes.legend(loc="lower right", fontsize=7) if axes.get_legend_handles_labels()[0] else None


def against_steps(axes, chosen):
    """Training loss, mean over seeds, of each part of the training."""
    for number, (name, lines) in enumerate(chosen.items()):
        means = [statistics.mean(values) for values in zip(*(line["losses"] for line in lines), strict=True)]
        width = lines[0]["steps"] / len(means)
        steps = [width * (index + 0.5) for index in range(len(means))]
        axes.plot(steps, means, label=name, color=f"C{number % 10}", linestyle="-" if number < 10 else "--")
    axes.set_xlabel("steps")
    axes.set_ylabel("training loss in nats, mean over seeds")
    axes.legend(loc="upper right", fontsize=7)
