"""What a person may have of their own: numbers of an offset, a LoRA, an added vector, or masks over a pool.

Every kind trains many people side by side: a tensor's first dimension is the person, and Adam keeps them apart. The
mathematics of masks are the package's own (``peft_xmask.functional``).
"""

from dataclasses import dataclass

import torch
from people_data import INNER, WIDTH
from people_tail import figures, logits, losses
from torch.nn import functional as F

from peft_xmask.core.masks import hard_mask, mix, scaled_gain
from peft_xmask.core.packing import packed_size

BATCH = 16
MARKS = (3, 6, 12, 20)
STRENGTHS = (0.1, 0.25, 0.5, 1.0, 2.0)
SPREAD = 3.0  # variance of ratings around what is predicted: squared errors over twice this are nats


class Lora:
    """LoRA r=8 of the last feed-forward layer, alpha 16, as PEFT starts it."""

    reads, rank = "inner", 8

    def __init__(self, people, seed):
        generator = torch.Generator().manual_seed(seed)
        self.down = (torch.rand(people, self.rank, INNER, generator=generator) * 2 - 1).div_(INNER**0.5)
        self.down.requires_grad_()
        self.up = torch.zeros(people, WIDTH, self.rank, requires_grad=True)
        self.payload = 4 * self.rank * (INNER + WIDTH)

    def groups(self, rate):
        return [{"params": [self.down, self.up], "lr": rate}]

    def parts(self, batch):
        return batch["read"] @ self.down.transpose(1, 2), 2 * self.up


class Vector:
    """A user embedding: one vector added to the last feed-forward layer's output."""

    reads, payload = None, 4 * WIDTH

    def __init__(self, people, seed):
        self.up = torch.zeros(people, WIDTH, 1, requires_grad=True)

    def groups(self, rate):
        return [{"params": [self.up], "lr": rate}]

    def parts(self, batch):
        return batch["x"].new_ones(*batch["x"].shape[:2], 1), self.up


@dataclass
class Pool:
    """Adapters of one site: ``up [N, 384, b]``, and ``down [N, b, 384]`` with ReLU, one after the layer.

    Linear and beside the layer, as LoRA is, if ``down`` is ``[N, b, 1536]``. Linear, with one ``down`` for all of them:
    of one for all, ``down [b, 384]`` and ``down_bias [b]``, averages are taken (``mask_weighting="mean"``): signs would
    cancel it.
    """

    down: torch.Tensor
    up: torch.Tensor
    down_bias: torch.Tensor | None = None

    @property
    def weighting(self):
        return "signed" if self.down.dim() == 3 else "mean"

    @property
    def scale(self):
        """Start of the gain: an average of half of N moves as signs do if it is sqrt(N) times as large."""
        start = min(0.3, 40 / len(self.up))
        return start if self.weighting == "signed" else start * len(self.up) ** 0.5


class Masks:
    """Hard masks over a pool: signs, half of the adapters added and half subtracted, and a learnt gain.

    Two ways to start. ``zero=False`` is how the package starts: logits close to zero, so that the first step sets every
    bit, and a mix that is as large as any other from the beginning. ``zero=True``: all people start at one random mask
    with logits of size 1, and its mix of up-projections is part of what is common, with the opposite sign; nothing is
    added until bits flip, and few flip at a time.
    """

    def __init__(self, people, seed, pool, zero=False):
        self.reads = "inner" if pool.down.shape[-1] == INNER else "output"
        self.pool, self.number, self.start = pool, len(pool.up), None
        generator = torch.Generator().manual_seed(seed)
        size = (1 if zero else people, 2, self.number)
        logits = torch.randn(size, generator=generator) * (1.0 if zero else 0.01)
        self.logits = logits.expand(people, -1, -1).clone().requires_grad_()
        self.gain = torch.zeros(people, requires_grad=True)
        self.scale = pool.scale
        self.payload = 2 * packed_size(self.number) + 2
        if zero:
            self.start = mix(self.masks()[:1, 1].detach(), pool.up)

    def groups(self, rate):
        return [{"params": [self.logits, self.gain], "lr": rate}]

    def masks(self):
        return hard_mask(self.logits, self.number // 2, estimator="straight_through", weighting=self.pool.weighting)

    def parts(self, batch):
        mask = self.masks()
        up = mix(mask[:, 1], self.pool.up)
        if self.start is not None:
            up = up - self.start
        up = up * scaled_gain(self.gain, self.scale, 1.0)[:, None, None]
        if self.pool.weighting == "mean":  # an average of equal down-projections is any of them
            return batch["read"] @ self.pool.down.T + self.pool.down_bias, up
        hidden = batch["read"] @ mix(mask[:, 0], self.pool.down).transpose(1, 2)
        return hidden if self.reads == "inner" else torch.relu(hidden), up


class SharedAdam(torch.optim.Optimizer):
    """Adam whose second moment is the mean over a mask: bits with large gradients flip first, not all at once."""

    def __init__(self, groups, betas=(0.8, 0.95)):
        super().__init__(groups, {"lr": 0.1, "betas": betas})
        self.steps = 0

    @torch.no_grad()
    def step(self):
        self.steps += 1
        for group in self.param_groups:
            first, second = group["betas"]
            for parameter in group["params"]:
                gradient, state = parameter.grad, self.state[parameter]
                square = gradient.square()
                if gradient.dim() == 3:
                    square = square.mean(-1, keepdim=True).expand_as(gradient)
                if not state:
                    state["mean"], state["square"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
                state["mean"].mul_(first).add_(gradient, alpha=1 - first)
                state["square"].mul_(second).add_(square, alpha=1 - second)
                size = (state["square"] / (1 - second**self.steps)).sqrt() + 1e-12
                parameter.sub_(group["lr"] * state["mean"] / (1 - first**self.steps) / size)


def padded(parts):
    """Labels of several people side by side: numbers of texts ``[P, E]`` with -1, labels, and which are real."""
    most = max(map(len, parts))

    def together(name, fill):
        return torch.stack([F.pad(getattr(p, name), (0, most - len(p)), value=fill) for p in parts])

    real = torch.arange(most) < torch.tensor([len(part) for part in parts])[:, None]
    return together("first", -1), together("second", -1), together("label", 0.0), real


def texts_of(kind, first, second):
    return torch.cat([first, second], 1) if kind == "pair" else first


def predict(tail, kind, batch, method, offsets, strengths=(1.0,)):
    """Predictions for a batch, one for each strength."""
    found = []
    for scores in tail.scores(batch, *method.parts(batch), strengths):
        score, other = scores.chunk(2, 1) if kind == "pair" else (scores, None)
        found.append(logits(kind, score, other, tail.head, offsets))
    return found


def train(tail, kind, said, tested, method, rate, offsets, seed, marks=MARKS):
    """Train what is each person's own; the figures of each person at every mark and strength.

    Args:
        said, tested: labels of each person.
        offsets: ``[P, 3]`` that each person has, or None.

    Returns:
        By ``"step/strength"`` the figures ``[P, 2]``.
    """
    first, second, label, real = padded(said)
    test = padded(tested)
    testing = tail.gather(texts_of(kind, test[0], test[1]), method.reads)
    slow = isinstance(method, Masks) and method.start is not None
    optimizer = (SharedAdam if slow else torch.optim.Adam)(method.groups(rate))
    generator = torch.Generator().manual_seed(seed)
    found, batch = {}, None
    whole = first.shape[1] <= BATCH
    for step in range(1, marks[-1] + 1):
        if not whole or batch is None:
            size = min(BATCH, first.shape[1])
            order = (torch.rand(first.shape, generator=generator) + ~real * 2.0).argsort(1)[:, :size]
            now = [part.gather(1, order) for part in (first, second, label, real)]
            batch = tail.gather(texts_of(kind, now[0], now[1]), method.reads)
        predicted = predict(tail, kind, batch, method, offsets)[0]
        each = losses(kind, predicted, now[2]) * now[3]
        loss = (each.sum(1) / now[3].sum(1)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step in marks:
            with torch.no_grad():
                for strength, guess in zip(
                    STRENGTHS, predict(tail, kind, testing, method, offsets, STRENGTHS), strict=True
                ):
                    found[f"{step}/{strength:g}"] = averaged(kind, guess, test)
    return found


def averaged(kind, predicted, test):
    """Figures of each person, ``[P, 2]``."""
    real = test[3]
    both = figures(kind, predicted, test[2])
    return torch.stack([(part * real).sum(1) / real.sum(1) for part in both], 1)


def fit_offsets(tail, kind, said, priors):
    """A person's numbers by their most likely values under a Gaussian prior, ``[P, 3]``.

    Args:
        priors: variance of the two offsets, and of the logarithm of the slope (0: the slope stays 1).
    """
    first, second, label, real = padded(said)
    score = tail.base[first.clamp_min(0)]
    other = tail.base[second.clamp_min(0)] if kind == "pair" else None
    offsets = torch.zeros(len(said), 3, requires_grad=True)
    variance = torch.tensor([priors[0], priors[0], priors[1]])
    free = variance > 0
    nats = 1.0 if kind != "value" else 1 / (2 * SPREAD)
    optimizer = torch.optim.LBFGS([offsets], max_iter=60, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        kept = offsets * free
        loss = (losses(kind, logits(kind, score, other, tail.head, kept), label) * real).sum() * nats
        loss = loss + (kept.square() / (2 * variance.clamp_min(1e-9))).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return (offsets.detach() * free).half().float()


def offset_payload(kind, priors):
    return 2 * ((2 if kind == "pair" else 1) * (priors[0] > 0) + (priors[1] > 0))


def random_pool(number, width, seed, reads=WIDTH):
    """The package's own random pool, for one site."""
    from peft_xmask import AdapterPool
    from peft_xmask.core.sites import Site

    site = Site("encoder.layer.5.output.dense", reads, WIDTH)
    drawn = AdapterPool.random(number, width, seed).bind([site])[0]
    return Pool(drawn.down, drawn.up)


def principal_pool(tail, number, width, seed):
    """A random pool that reads principal directions of the site's own output, found on texts without any label.

    All N adapters have the same linear down-projection, onto ``width`` directions, each as large as the texts make it;
    the up-projections are those of :func:`random_pool`.
    """
    generator = torch.Generator().manual_seed(seed)
    states = tail.output[torch.randperm(len(tail.output), generator=generator)[:20_000]]
    centre = states.mean(0)
    ways = torch.linalg.eigh((states - centre).T @ (states - centre) / len(states))
    down = ways.eigenvectors[:, -width:].T / ways.eigenvalues[-1].sqrt()
    return Pool(down, random_pool(number, width, seed).up, -down @ centre)
