"""Four clients train one magnitude mask together with Flower; no client shows its texts to anybody.

    python -m pip install "peft_xmask[demo,federated]"
    python docs/examples/federated.py

The texts are docstrings of the Python standard library, the labels are chapters of its reference (docs/demo.md). Each
chapter has a home: one client has most of its texts, the others have a few each. So a client knows some chapters well
and the others hardly at all, while the test texts are of all chapters.

A magnitude mask is a function of the base alone. Every client has the base, so all find the same mask, and what travels
is the values in its places, and the head. The server averages them, weighted by the clients' numbers of texts. Nothing
is approximated by that, and the average is a profile like any other.

Flower's simulation runs the clients in processes of its own (with Ray), as many at a time as there are cores. Each
client also trains alone, for as many steps. Prints accuracies, and the bytes that travel beside those of LoRA.
"""

import argparse
import json
import os
import random
from functools import lru_cache
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")  # neither Flower nor Ray is to report runs over the network
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from rich import box
from rich.console import Console
from rich.table import Table

from peft_xmask import MagnitudeMaskConfig
from peft_xmask.cli.classify import TextClassifier
from peft_xmask.cli.corpus import docstring_corpus
from peft_xmask.cli.demo import minilm_folder
from peft_xmask.cli.methods import HEAD_LEARNING_RATE, LEARNING_RATES
from peft_xmask.cli.train_settings import TrainSettings
from peft_xmask.tuners.in_place.combining import combine

CLIENTS = 4
AT_HOME = 0.85
"""Share of a chapter's texts that are with its home client."""
LINEAR_LAYERS = ["query", "key", "value", "dense"]
"""Of the blocks: what the mask targets by default."""


# What all parties have: the base, the same first profile, and the way it is written in a message.


@lru_cache
def corpus():
    return docstring_corpus(seed=0)


@lru_cache
def texts_of(client):
    """A client's own texts."""
    draws, mine = random.Random(1), []
    for text, label in corpus().train:
        home = label % CLIENTS
        owner = home if draws.random() < AT_HOME else draws.choice([each for each in range(CLIENTS) if each != home])
        if owner == client:
            mine.append((text, label))
    return mine


def new_classifier(seed=0, config=None):
    """The frozen base with a fresh adapter, which changes nothing yet, and a head: the same ones for equal seeds."""
    config = config or MagnitudeMaskConfig(task_type="SEQ_CLS", density=0.005)
    return TextClassifier.create(minilm_folder(), corpus().label_names, config, max_length=48, seed=seed)


def profile_of(classifier):
    """What travels: all trained tensors."""
    return ArrayRecord(get_peft_model_state_dict(classifier.model))


def with_profile(classifier, profile):
    set_peft_model_state_dict(classifier.model, profile.to_torch_state_dict())
    return classifier


# The clients.

client_app = ClientApp()
model_of_process = lru_cache(new_classifier)
"""Clients of one process can share it: all that is trained in it comes with each message."""


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """Put the profile into the model, train it on one's own texts, send it back."""
    client, told = int(context.node_config["partition-id"]), message.content["config"]
    texts = texts_of(client)
    classifier = with_profile(model_of_process(), message.content["arrays"])
    settings = TrainSettings(
        max_steps=told["steps"],
        batch_size=16,
        learning_rate=LEARNING_RATES["magnitude-mask"],
        head_learning_rate=HEAD_LEARNING_RATE,
        seed=1000 * told["seed"] + 10 * told.get("server-round", 0) + client,
    )
    loss = classifier.train(texts, settings)
    facts = MetricRecord({"num-examples": len(texts), "client": client, "loss": loss})
    return Message(RecordDict({"arrays": profile_of(classifier), "metrics": facts}), reply_to=message)


# The server.


class ExactFedAvg(FedAvg):
    """Flower's federated averaging, but in float64 and rounded once: what `add_weighted_adapter` gives, bit for bit.

    Flower itself adds in float32 and rounds for each client. `from_flower` is how far its numbers were from these.
    """

    from_flower = 0.0

    def aggregate_train(self, server_round, replies):
        self.replies = in_order(replies)
        flowers, facts = super().aggregate_train(server_round, self.replies)
        profiles = [reply.content["arrays"].to_torch_state_dict() for reply in self.replies]
        weights = [reply.content["metrics"]["num-examples"] for reply in self.replies]
        exact = {name: combine([each[name] for each in profiles], weights, "avg") for name in profiles[0]}
        far = max(float((tensor - exact[name]).abs().max()) for name, tensor in flowers.to_torch_state_dict().items())
        self.from_flower = max(self.from_flower, far)
        return ArrayRecord(exact), facts


def in_order(replies):
    """Replies by client; they come as they are ready.

    Raises:
        RuntimeError: a client failed.
    """
    replies = list(replies)
    for reply in replies:
        if reply.has_error():
            raise RuntimeError(f"A client failed: {reply.error.reason}")
    return sorted(replies, key=lambda reply: reply.content["metrics"]["client"])


def simulate(options):
    """Let the clients train together, and then each alone.

    Returns:
        The profile they made together, the replies of its last round, those of the clients alone, and the strategy.
    """
    server_app, results = ServerApp(), []

    @server_app.main()
    def serve(grid: Grid, context: Context) -> None:
        first = profile_of(new_classifier(options.seed))
        strategy = ExactFedAvg(fraction_evaluate=0.0, min_train_nodes=CLIENTS, min_available_nodes=CLIENTS)
        told = ConfigRecord({"steps": options.local_steps, "seed": options.seed})
        together = strategy.start(grid, first, num_rounds=options.rounds, train_config=told).arrays
        told = ConfigRecord({"steps": options.rounds * options.local_steps, "seed": options.seed})
        content = RecordDict({"arrays": first, "config": told})
        alone = grid.send_and_receive([Message(content, node, "train") for node in grid.get_node_ids()])
        results.extend([together, strategy, in_order(alone)])

    one_core = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    run_simulation(server_app, client_app, num_supernodes=CLIENTS, backend_config=one_core)
    return results


# What came out.


def bytes_of(profile):
    """Of a profile in a message, as Flower writes it: the adapter's and the head's."""
    sizes = {name: len(array.data) for name, array in profile.items()}
    adapter = sum(size for name, size in sizes.items() if "magnitude_mask_" in name or "lora_" in name)
    return adapter, sum(sizes.values()) - adapter


def lora_profile(**fields):
    return profile_of(new_classifier(config=LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, **fields)))


def print_accuracies(console, accuracies, texts):
    table = Table(title="Test accuracy", title_justify="left", box=box.SIMPLE_HEAD)
    for name, side in (("trained by", "left"), ("texts", "right"), ("accuracy", "right")):
        table.add_column(name, justify=side, no_wrap=True)
    for name, accuracy in accuracies.items():
        table.add_row(name, f"{texts[name]:,}", f"{accuracy:.3f}")
    console.print(table)


def print_bytes(console, moved, rounds):
    table = Table(title="Bytes that travel", title_justify="left", box=box.SIMPLE_HEAD)
    columns = "method", "adapter", "head", "client and round, both ways", f"client, {rounds} rounds"
    for name in columns:
        table.add_column(name, justify="left" if name == "method" else "right")
    for name, (adapter, head) in moved.items():
        both = 2 * (adapter + head)
        table.add_row(name, f"{adapter:,}", f"{head:,}", f"{both:,}", f"{both * rounds:,}")
    console.print(table)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="(5)")
    parser.add_argument("--local-steps", type=int, default=16, help="steps of each client in a round (16)")
    parser.add_argument("--seed", type=int, default=0, help="of heads, the order of texts and dropout (0)")
    parser.add_argument("--test-texts", type=int, help="how many to test on (all)")
    parser.add_argument("--out", type=Path, help="keep result.json, the profile and the clients' last ones here")
    options = parser.parse_args()
    console = Console(width=100)

    together, strategy, alone = simulate(options)
    classifier, test = new_classifier(), corpus().test[: options.test_texts]
    profiles = {f"client {i + 1} alone": reply.content["arrays"] for i, reply in enumerate(alone)}
    profiles["all together"] = together
    accuracies = {name: with_profile(classifier, each).evaluate(test).accuracy for name, each in profiles.items()}
    counts = [int(reply.content["metrics"]["num-examples"]) for reply in alone]
    print_accuracies(console, accuracies, dict(zip(profiles, [*counts, sum(counts)], strict=True)))
    moved = {
        "magnitude mask, 0.5 %": bytes_of(together),
        "LoRA r=8, the same layers": bytes_of(lora_profile(target_modules=LINEAR_LAYERS)),
        "LoRA r=8, query and value": bytes_of(lora_profile()),
    }
    print_bytes(console, moved, options.rounds)
    console.print(f"Flower's own averages, in float32, were up to {strategy.from_flower:.1e} away from the exact ones.")
    *singles, federated = accuracies.values()
    console.print(f"Together {federated:.3f}, the best client alone {max(singles):.3f}.")
    if options.out is not None:
        keep(options.out, classifier, together, strategy.replies, {"accuracies": accuracies, "texts": counts})


def keep(folder, classifier, together, replies, facts):
    """Each profile as a PEFT adapter's folder."""
    with_profile(classifier, together).save(folder / "together")
    for i, reply in enumerate(replies):
        with_profile(classifier, reply.content["arrays"]).save(folder / f"client-{i + 1}")
    (folder / "result.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    import federated  # by its name, as the clients' processes will: caches are that module's

    federated.main()
