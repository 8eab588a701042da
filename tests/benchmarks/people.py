"""What a profile's bytes add, on real people who had no part in anything else. Prints tables and, last, one JSON line.

Three sets of judgements (which argument convinces, is a reply ironic, how good is a film), three seeds. Half of the
people are held out. Everything that is shared (head, common LoRA, pools) and every setting (priors, rates, steps, how
far a profile may leave what is common) comes from others. A held-out person's oldest 5, 20, 40 or all labels are learnt
from, and the last 30 % are tested. Trainings are kept as JSON lines in results/people-SET.jsonl and not run again;
``--redraw`` only prints them.
"""

import argparse
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import peft
import torch
from people_common import constant, fit
from people_data import MOST, SETS, load, split
from people_methods import averaged, fit_offsets, offset_payload, padded, predict, texts_of, train
from people_pass import PRECISIONS, PassFeatures, gradients, one_pass, one_step
from people_prior import Directions, Said, fitted, mask_payload, masks, numbers
from people_report import ALL, COLUMNS, TRIED, Lines, markdown, show
from people_rows import DIRECTIONS, OFFSET_ROWS, PRIORS, ROWS, VARIANCES
from people_tail import Head, Tail, logits
from safetensors.torch import load_file, save_file
from timing import print_json

from peft_xmask.core.masks import mix
from peft_xmask.core.packing import packed_size

CHUNK = 8  # people trained side by side


class Bench:
    """One set with one seed: its people, and what is common, made when it is first wanted."""

    def __init__(self, people, seed, lines, cache):
        self.people, self.seed, self.lines, self.cache = people, seed, lines, cache
        self.split, self.made = split(people, seed), {}

    def tail(self, part, common):
        """The end of the model for people of a part: those who are tested had no share in it."""
        if common is None and (part, None) not in self.made:
            self.made[part, None] = Tail(self.people.texts, constant(self.people, *self.chosen(part)))
        if (part, common) not in self.made:
            shared = "" if self.people.name == "irony" else "all"
            path = Path(self.cache) / f"people-{self.people.name}-{self.seed}-{shared or part}.safetensors"
            if not path.is_file():
                save_file(self.shared(part), path)
            found = load_file(path)
            for name in (False, True):
                key = "common" if name else "head"
                lora = (found["down"], found["up"]) if name else None
                head = Head(found[key], found[f"{key}.bias"])
                if name == common:
                    self.made[part, common] = Tail(self.people.texts, head, lora)
        return self.made[part, common]

    def chosen(self, part):
        """Whose labels are learnt from, and who is tested. Where others' judgements come with the set, nobody's own."""
        parts = self.split
        if self.people.name != "irony":
            return [], parts.tuned + parts.held
        return (parts.learnt, parts.tuned) if part == "tune" else (parts.learnt + parts.tuned, parts.held)

    def shared(self, part):
        """The head and the common part, as tensors to keep."""
        learn, tested = self.chosen(part)
        (plain, _), (head, lora) = fit(self.people, learn, tested, self.seed)
        return {
            "head": plain.weight.contiguous(), "head.bias": plain.bias, "common": head.weight.contiguous(),
            "common.bias": head.bias, "down": lora[0].contiguous(), "up": lora[1].contiguous(),
        }  # fmt: skip

    def persons(self, part, count):
        """What people of a part said first, and what they are tested on."""
        numbers = self.split.tuned if part == "tune" else self.split.held
        found = [self.people.persons[number] for number in numbers]
        kept = slice(-MOST, None) if count == ALL else slice(0, count)
        return [person.train.part(kept) for person in found], [person.test for person in found]

    def plain(self, tail, tested, offsets):
        """Figures of each person without anything but offsets."""
        kind, test = self.people.kind, padded(tested)
        score = tail.base[test[0].clamp_min(0)]
        other = tail.base[test[1].clamp_min(0)] if kind == "pair" else None
        return averaged(kind, logits(kind, score, other, tail.head, offsets), test)

    def offsets(self, part, count, common, priors):
        tail = self.tail(part, common)
        return fit_offsets(tail, self.people.kind, self.persons(part, count)[0], priors)

    def offset_line(self, row, part, count):
        tail, tested = self.tail(part, row.common), self.persons(part, count)[1]
        below = self.plain(tail, tested, None)
        grid = {}
        for priors in PRIORS if row.slope else [p for p in PRIORS if not p[1]]:
            found = self.plain(tail, tested, self.offsets(part, count, row.common, priors))
            grid["/".join(f"{number:g}" for number in priors)] = cell(found, below)
        grid["0/0"] = cell(below, below)
        return grid, offset_payload(self.people.kind, (1.0, 1.0 if row.slope else 0.0)), 0.0

    def prior_line(self, name, row, part, count):
        """Few directions and a prior: every cell for people on whom it is chosen, the chosen one for those held out."""
        tail, kind = self.tail(part, True), self.people.kind
        said, tested = self.persons(part, count)
        priors = self.lines.priors(row, self.seed)
        below = self.plain(tail, tested, self.offsets(part, count, True, priors))
        cells = [(k, v) for k in DIRECTIONS for v in VARIANCES]
        if part == "held":
            number, variance = self.lines.prior_cell(name, self.seed).split("/")
            cells = [(int(number), "fit" if row.fit else float(variance))]
        grid, payload = {"0/0": cell(below, below)}, 2 * (2 * DIRECTIONS[-1] + 1)
        for number, variance in cells:
            ways = Directions.of(tail, number)
            size = 2 * number + 1
            if variance == "fit":
                learnt = [self.people.persons[n].train.part(slice(-MOST, None)) for n in self.split.learnt]
                spread = fitted(Said.of(kind, tail, ways, learnt), priors, size)
            else:
                spread = torch.full((size,), variance)
            told = Said.of(kind, tail, ways, said)
            if row.few:
                offsets, own = masks(told, priors, spread, row.few, self.seed)
            elif row.once is not None:
                offsets = self.offsets(part, count, True, priors)
                own = one_step(told, offsets, priors, spread)
            else:
                offsets, own = numbers(told, priors, spread)
            payload = mask_payload(row.few) if row.few else 2 * size
            if part == "tune":
                test = Said.of(kind, tail, ways, tested)
                found = averaged(kind, test.predicted(offsets, own), test.parts)
            else:
                found = self.exact(tail, ways, tested, offsets, own)
            key = self.lines.prior_cell(name, self.seed) if part == "held" else f"{number}/{variance}"
            grid[key] = cell(found, below)
        return grid, payload, 0.0

    def exact(self, tail, ways, tested, offsets, own):
        """Figures of each person by the model itself."""
        kind, found = self.people.kind, []
        if kind != "pair":  # features were centred
            offsets = offsets - (own @ ways.centre * offsets[:, 2].exp())[:, None] * torch.tensor([1.0, 0.0, 0.0])
        for at in range(0, len(tested), CHUNK):
            now = slice(at, at + CHUNK)
            test = padded(tested[now])
            batch = tail.gather(texts_of(kind, test[0], test[1]), "output")
            adapter = Fixed(batch["read"] @ ways.down.T + ways.bias, ways.up(own[now]))
            found.append(averaged(kind, predict(tail, kind, batch, adapter, offsets[now])[0], test))
        return torch.cat(found)

    def pass_line(self, row, part, count):
        """Masks from one pass over the labels, at each precision of the gain's prior."""
        tail, kind = self.tail(part, True), self.people.kind
        said, tested = self.persons(part, count)
        offsets = self.offsets(part, count, True, self.lines.priors(row, self.seed))
        below = self.plain(tail, tested, offsets)
        if ("pass", part) not in self.made:
            self.made["pass", part] = PassFeatures(tail, row.pool(self, part), self.seed)
        made = self.made["pass", part]
        mask, gains = one_pass(gradients(kind, tail, made.features, said, offsets), self.seed, row.once)
        grid = {"0/0": cell(below, below)}
        for precision in PRECISIONS:
            found = []
            for at in range(0, len(tested), CHUNK):
                now = slice(at, at + CHUNK)
                test = padded(tested[now])
                batch = tail.gather(texts_of(kind, test[0], test[1]), "output")
                up = mix(mask[now] * gains[precision][now, None], made.pool.up)
                adapter = Fixed(torch.relu(batch["read"] @ made.down.T), up)
                found.append(averaged(kind, predict(tail, kind, batch, adapter, offsets[now])[0], test))
            grid[f"precision {precision}"] = cell(torch.cat(found), below)
        return grid, packed_size(mask.shape[1]) + 2, 0.0

    def line(self, row, part, count, rate):
        tail, kind = self.tail(part, row.common), self.people.kind
        said, tested = self.persons(part, count)
        offsets = None
        if row.offset:
            offsets = self.offsets(part, count, row.common, self.lines.priors(row, self.seed))
        below = self.plain(tail, tested, offsets)
        shared = row.pool(self, part) if row.pool else None
        parts = []
        for at in range(0, len(said), CHUNK):
            now = slice(at, at + CHUNK)
            method = row.make(len(said[now]), self.seed + at, *([] if shared is None else [shared]))
            mine = None if offsets is None else offsets[now]
            parts.append(train(tail, kind, said[now], tested[now], method, rate, mine, self.seed))
        grid = {key: cell(torch.cat([found[key] for found in parts]), below) for key in parts[0]}
        return grid | {"0/0": cell(below, below)}, method.payload, rate

    def ensure(self, name, row, part, count, rate):
        """Run one training, unless it is there."""
        key = {"set": self.people.name, "seed": self.seed, "part": part, "row": name, "labels": count, "rate": rate}
        if self.lines.find(**key):
            return
        start = time.process_time()
        if name in OFFSET_ROWS:
            grid, payload, _ = self.offset_line(row, part, count)
        elif row.few is not None:
            grid, payload, _ = self.prior_line(name, row, part, count)
        elif row.once is not None:
            grid, payload, _ = self.pass_line(row, part, count)
        else:
            grid, payload, _ = self.line(row, part, count, rate)
        self.lines.keep(
            key | {"payload_bytes": payload, "seconds": round(time.process_time() - start, 1), "grid": grid}
        )


def cell(found, below):
    """Means over people of both figures, and the standard error of the first one's difference to what is below."""
    difference = found[:, 0] - below[:, 0]
    error = float(difference.std() / len(difference) ** 0.5)
    return [round(float(found[:, 0].mean()), 4), round(float(found[:, 1].mean()), 4), round(error, 4)]


@dataclass
class Fixed:
    """An adapter that is not trained any more."""

    r: torch.Tensor
    up: torch.Tensor

    def parts(self, batch):
        return self.r, self.up


def measure(name, rows, seeds, counts, cache, held=True):
    """Train what is missing."""
    lines = Lines(name)
    wanted = len(seeds) * len(counts)
    if not held and len(lines.find(row=TRIED, part="tune")) >= wanted:
        return
    people = load(name, cache)
    for called in rows:
        row = ROWS[called]
        for seed in seeds:
            bench = Bench(people, seed, lines, cache)
            if row.few is None or called == TRIED:
                for count in counts:
                    for rate in row.rates:
                        bench.ensure(called, row, "tune", count, rate)
            for count in counts if held else ():
                bench.ensure(called, row, "held", count, lines.chosen_rate(called, seed, count, row.rates))
            print(name, called, seed, flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=SETS)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS), metavar="ROW")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--labels", type=int, nargs="+", default=list(COLUMNS), choices=COLUMNS, help=f"{ALL}: all")
    parser.add_argument("--quick", action="store_true", help="one set, three rows, one seed: minutes")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "peft_xmask-people")
    parser.add_argument("--redraw", action="store_true", help="print what has been measured, train nothing")
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables as well")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.quick:
        options.sets, options.seeds, options.rows = ["films"], [0], list(ROWS)[:5]
    facts = {}
    if TRIED in options.rows and not options.redraw:  # the prior of one set is chosen on the two others
        for name in SETS:
            measure(name, [TRIED], options.seeds, COLUMNS, options.cache, held=False)
    for name in options.sets:
        if not options.redraw:
            measure(name, options.rows, options.seeds, options.labels, options.cache)
        facts[name] = show(name, options.rows)
        if options.markdown:
            print(markdown(name, options.rows))
    print_json({"benchmark": "people", "peft": peft.__version__, "sets": facts})


if __name__ == "__main__":
    main()
