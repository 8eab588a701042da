"""Few directions and a prior: what a person may have of their own, and how far it may go.

A person's own part is a linear adapter of the last feed-forward layer's output. It reads K principal directions of what
that layer gives (found on texts without labels) and a constant, and it writes along the two directions that the head
reads, the mean's and the sum's: 2 K + 1 coefficients. They have a Gaussian prior of one variance, or of one each,
fitted to people. As real numbers they are 2 bytes each; as masks, adapters with random coefficients are averaged, and
the pool's start is part of what is common, so that nobody begins away from it.

Since little is added, what is learnt is learnt on the change of a text's score to first order, which is linear in the
coefficients; what is tested is the model itself.
"""

from dataclasses import dataclass

import torch
from people_data import WIDTH
from people_methods import SPREAD, SharedAdam, padded
from people_tail import logits, losses

from peft_xmask.core.masks import hard_mask, mix, scaled_gain
from peft_xmask.core.packing import packed_size

STEPS, RATE = 80, 0.1


@dataclass
class Directions:
    """An adapter's fixed part, and first-order features of every text, ``[U, 2 K + 1]``, with their centre."""

    down: torch.Tensor
    bias: torch.Tensor
    ways: torch.Tensor
    size: torch.Tensor
    features: torch.Tensor
    centre: torch.Tensor

    @classmethod
    def of(cls, tail, number):
        states = tail.output[:: max(1, len(tail.output) // 20_000)]
        centre = states.mean(0)
        found = torch.linalg.eigh((states - centre).T @ (states - centre) / len(states))
        down = found.eigenvectors[:, -number:].T / found.eigenvalues[-1].sqrt()
        head = tail.w - tail.w.mean(1, keepdim=True)
        ways = torch.linalg.pinv(head)  # [384, 2]: a step along one moves one part of the score
        down, bias = torch.cat([torch.zeros(1, WIDTH), down]), torch.cat([torch.ones(1), -down @ centre])
        read = tail.output @ down.T + bias
        sigma = (tail.square / WIDTH + tail.texts.eps).sqrt()
        parts = [
            torch.zeros(len(tail.lengths), number + 1).index_add_(0, tail.text, read * (share / sigma)[:, None])
            for share in tail.share.T
        ]
        features = torch.cat([parts[0][:, 1:], parts[1]], 1)
        size = features.std(0).mean()
        features = features / size
        return cls(down, bias, ways, size, features - features.mean(0), features.mean(0))

    def up(self, coefficients):
        """Up-projections of people's coefficients: ``[P, 2 K + 1] -> [P, 384, K + 1]``."""
        number = len(self.down) - 1
        mean, total = coefficients[:, :number], coefficients[:, number:]
        mean = torch.cat([torch.zeros(len(mean), 1), mean], 1)
        return (self.ways[:, 0, None] * mean[:, None] + self.ways[:, 1, None] * total[:, None]) / self.size


@dataclass
class Said:
    """What people said, with the features of the texts."""

    kind: str
    tail: object
    parts: tuple
    first: torch.Tensor
    second: torch.Tensor | None
    features: torch.Tensor
    others: torch.Tensor | None

    @classmethod
    def of(cls, kind, tail, ways, said):
        parts = padded(said)
        a, b = parts[0].clamp_min(0), parts[1].clamp_min(0)
        pair = kind == "pair"
        other = (tail.base[b], ways.features[b]) if pair else (None, None)
        return cls(kind, tail, parts, tail.base[a], other[0], ways.features[a], other[1])

    def predicted(self, offsets, coefficients):
        first = self.first + torch.einsum("ped,pd->pe", self.features, coefficients)
        second = None
        if self.second is not None:
            second = self.second + torch.einsum("ped,pd->pe", self.others, coefficients)
        return logits(self.kind, first, second, self.tail.head, offsets)

    def minus_log_posterior(self, offsets, coefficients, layers, variance):
        """Of each person, in nats: labels, offsets (variances ``layers``), coefficients (``variance``, one or each)."""
        nats = 1.0 if self.kind != "value" else 1 / (2 * SPREAD)
        likely = (losses(self.kind, self.predicted(offsets, coefficients), self.parts[2]) * self.parts[3]).sum(1) * nats
        below = (offsets.square() / (2 * layers.clamp_min(1e-9))).sum(1)
        return likely + below + (coefficients.square() / (2 * variance)).sum(1)


def layers_of(priors):
    variance = torch.tensor([priors[0], priors[0], priors[1]])
    return variance, variance > 0


def numbers(said, priors, variance):
    """Offsets ``[P, 3]`` and coefficients ``[P, D]`` as real numbers, rounded to half precision."""
    layers, free = layers_of(priors)
    people, size = len(said.first), said.features.shape[-1]
    offsets, own = torch.zeros(people, 3, requires_grad=True), torch.zeros(people, size, requires_grad=True)
    optimizer = torch.optim.LBFGS([offsets, own], max_iter=80, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = said.minus_log_posterior(offsets * free, own, layers, variance).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return (offsets.detach() * free).half().float(), own.detach().half().float()


def masks(said, priors, variance, number, seed):
    """The same as masks over ``number`` adapters whose coefficients are drawn from the prior; the best of all steps."""
    layers, free = layers_of(priors)
    people, size = len(said.first), said.features.shape[-1]
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(number, size, generator=generator) * torch.as_tensor(variance).sqrt()
    table = table - table.mean(0)
    bits = torch.randn(1, 1, number, generator=generator).expand(people, -1, -1).clone().requires_grad_()
    gain = torch.zeros(people, requires_grad=True)
    offsets = numbers(said, priors, torch.as_tensor(1e-6))[0].requires_grad_()
    scale = 1.5 * (size / number) ** 0.5 * number**0.5

    def mask():
        return hard_mask(bits, number // 2, estimator="straight_through", weighting="mean")[:, 0]

    start = mix(mask()[:1].detach(), table)
    rates = (RATE, RATE, 0.02)
    optimizer = SharedAdam([{"params": [p], "lr": rate} for p, rate in zip((bits, gain, offsets), rates, strict=True)])
    best = None
    for step in range(STEPS + 1):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * (1 - step / (STEPS + 1))
        own = (mix(mask(), table) - start) * scaled_gain(gain, scale, 1.0)[:, None]
        each = said.minus_log_posterior(offsets * free, own, layers, variance)
        now = each.detach(), (offsets * free).detach().half().float(), own.detach()
        if best is None:
            best = now
        else:
            better = now[0] < best[0]
            best = tuple(
                torch.where(better.view(-1, *[1] * (a.dim() - 1)), a, b) for a, b in zip(now, best, strict=True)
            )
        optimizer.zero_grad()
        each.sum().backward()
        optimizer.step()
    return best[1], best[2]


def mask_payload(number):
    return 2 * packed_size(number) + 2


def fitted(said, priors, size, rounds=25, start=0.003, weight=2.0):
    """Variance of each coefficient, by expectation maximisation from what people said; ``weight`` more at ``start``."""
    variance = torch.full((size,), start)
    for _ in range(rounds):
        offsets, own = numbers(said, priors, variance)
        predicted = said.predicted(offsets, own).detach()
        change = said.features if said.others is None else said.others - said.features
        if said.kind == "pair":
            p = predicted.softmax(-1)
            curve = ((p[..., 0] + p[..., 1]) - (p[..., 1] - p[..., 0]).square()) / 4
        elif said.kind == "binary":
            p = predicted.sigmoid()
            curve = p * (1 - p)
        else:
            curve = torch.full_like(predicted, 1 / SPREAD)
        hessian = torch.einsum("ped,pef,pe->pdf", change, change, curve * said.parts[3])
        left = torch.linalg.inv(hessian + torch.diag(1 / variance)).diagonal(dim1=1, dim2=2)
        variance = ((own.square() + left).sum(0) + weight * start) / (len(own) + weight)
    return variance
