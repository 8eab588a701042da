"""Pools grown from other people: an adapter of each, trained on top of the common part and their offsets."""

import torch
from people_data import MOST, WIDTH
from people_methods import Pool, fit_offsets, train

SIZE, STEPS, RATE = 12, 40, 3e-3


class Adapters:
    """A bottleneck adapter of each person, with ReLU, after the last feed-forward layer; it starts at zero."""

    reads = "output"

    def __init__(self, people, seed):
        generator = torch.Generator().manual_seed(seed)
        self.down = torch.randn(people, SIZE, WIDTH, generator=generator).div_(WIDTH**0.5).requires_grad_()
        self.up = torch.zeros(people, WIDTH, SIZE, requires_grad=True)

    def groups(self, rate):
        return [{"params": [self.down, self.up], "lr": rate}]

    def parts(self, batch):
        return torch.relu(batch["read"] @ self.down.transpose(1, 2)), self.up


def grown(bench, part, priors):
    """Adapters of the people from whom pools are learnt; made once for each bench and part.

    Returns:
        ``down [P, 12, 384]`` and ``up [P, 384, 12]``.
    """
    if ("grown", part) not in bench.made:
        tail, kind, people = bench.tail(part, True), bench.people.kind, bench.people.persons
        said = [people[number].train.part(slice(-MOST, None)) for number in bench.split.learnt]
        offsets = fit_offsets(tail, kind, said, priors)
        method = Adapters(len(said), bench.seed)
        train(tail, kind, said, said, method, RATE, offsets, bench.seed, marks=(STEPS,))
        bench.made["grown", part] = method.down.detach(), method.up.detach()
    return bench.made["grown", part]


def grown_pool(bench, part, drawn, *, width=SIZE, centred=False, more=0):
    """A pool of others' adapters.

    Args:
        drawn: makes a random pool of a number of adapters and a width. Its size is what grown ones are scaled to.
        width: each adapter is cut into pieces of so many hidden units.
        centred: take the mean over people off each adapter.
        more: random adapters that are added.
    """
    down, up = grown(bench, part, (1.0, 0.1))
    if centred:
        down, up = down - down.mean(0), up - up.mean(0)
    down = down.reshape(-1, width, WIDTH)
    up = up.transpose(1, 2).reshape(-1, width, WIDTH).transpose(1, 2)
    other = drawn(max(more, 8), width)
    down, up = (part * (like.std() / part.std()) for part, like in ((down, other.down), (up, other.up)))
    if more:
        down, up = torch.cat([down, other.down]), torch.cat([up, other.up])
    return Pool(down.contiguous(), up.contiguous())
