"""What all people share: a head, and one LoRA of the last feed-forward layer, merged into the base.

Both learn from other people than those who are tested, and not from any text (or pair of texts) on which those are
tested; film titles are an exception, which others rate too. First the head alone, by Newton-like steps on frozen
states; then LoRA and head together, for as many steps as did best on people who had no part in it.
"""

from dataclasses import dataclass

import torch
from people_data import INNER, WIDTH
from people_tail import SUM, Head, logits, losses
from torch.nn import functional as F

RANK, RATE, HEAD_RATE, BATCH = 16, 1e-3, 1e-3, 64
STEPS = {"pair": 400, "binary": 25, "value": 50}
RIDGE = {"pair": 1e-3, "binary": 1.0, "value": 1e-3}


@dataclass
class Votes:
    """What others said: texts, and how often each answer came (pairs: three; else: how often, and the mean of them)."""

    first: torch.Tensor
    second: torch.Tensor
    count: torch.Tensor
    mean: torch.Tensor


def votes_of(people, learn, tested):
    """Votes of the people ``learn`` and of the anonymous others, without what ``tested`` people are tested on."""
    size = len(people.texts.start) - 1
    parts = [part for number in learn for part in (people.persons[number].train, people.persons[number].test)]
    pair = people.kind == "pair"
    empty = torch.zeros(0, dtype=torch.long)
    first, second = (torch.cat([empty, *(getattr(part, name) for part in parts)]) for name in ("first", "second"))
    label = torch.cat([torch.zeros(0), *(part.label for part in parts)])
    answers = F.one_hot(label.long(), 3).float() if pair else torch.stack([label, torch.ones_like(label)], 1)
    if people.others is not None:
        first, second = torch.cat([first, people.others.first]), torch.cat([second, people.others.second])
        more = people.votes
        if more is None:
            more = torch.stack([people.others.label, torch.ones(len(people.others))], 1)
        answers = torch.cat([answers, more])
    turned = first > second
    if pair:  # the same pair may come in both orders
        answers = torch.where(turned[:, None], answers[:, [1, 0, 2]], answers)
        first, second = torch.where(turned, second, first), torch.where(turned, first, second)
    key, where = torch.unique(first * size + (second + 1 if not pair else second), return_inverse=True)
    total = torch.zeros(len(key), answers.shape[1]).index_add_(0, where, answers)
    first = torch.zeros(len(key), dtype=torch.long).scatter_(0, where, first)
    second = torch.zeros(len(key), dtype=torch.long).scatter_(0, where, second)
    if people.kind != "value":
        kept = [people.persons[number].test for number in tested]
        a, b = torch.cat([part.first for part in kept]), torch.cat([part.second for part in kept])
        low, high = (torch.minimum(a, b), torch.maximum(a, b)) if pair else (a, b + 1)
        free = ~torch.isin(key, low * size + high)
        first, second, total = first[free], second[free], total[free]
    count = total.sum(1) if pair else total[:, 1]
    return Votes(first, second, count, total / count[:, None] if pair else total[:, 0] / count)


def pooled(texts, before):
    """Mean and sum of the last states of texts, ``[U, 768]``."""
    states = F.layer_norm(before, (WIDTH,), texts.weight, texts.bias, texts.eps)
    lengths = texts.start.diff()
    text = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    total = torch.zeros(len(lengths), WIDTH).index_add_(0, text, states)
    return torch.cat([total / lengths[:, None], total / SUM], 1)


def constant(people, learn, tested):
    """A head that reads nothing: the same answer for everybody, as often as others gave it."""
    votes = votes_of(people, learn, tested)
    weight = votes.count / votes.count.sum()
    mean = weight @ votes.mean
    bias = {"pair": mean.log(), "binary": mean.logit(), "value": mean}[people.kind]
    return Head(torch.zeros(2, WIDTH), bias.view(-1))


def loss_of(kind, score, other, head, votes):
    predicted = logits(kind, score[:, None], None if other is None else other[:, None], head, None).squeeze(1)
    pair = kind == "pair"
    found = -(votes.mean * predicted.log_softmax(-1)).sum(-1) if pair else losses(kind, predicted, votes.mean)
    return (found * votes.count).sum() / votes.count.sum()


def fit_head(people, votes):
    """The head on frozen states: L-BFGS with a little ridge."""
    features = pooled(people.texts, people.texts.before)
    centre, spread = features.mean(0), features.std(0)
    scaled = (features - centre) / spread
    weight = torch.zeros(2 * WIDTH, requires_grad=True)
    bias = torch.zeros(3 if people.kind == "pair" else 1, requires_grad=True)
    if people.kind == "value":
        bias.data.fill_(float((votes.mean * votes.count).sum() / votes.count.sum()))
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=150, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        score = scaled @ weight
        other = score[votes.second] if people.kind == "pair" else None
        loss = loss_of(people.kind, score[votes.first], other, Head(weight, bias), votes)
        loss = loss + RIDGE[people.kind] * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    weight, bias = (weight / spread).detach(), bias.detach()
    if people.kind != "pair":
        bias = bias - centre @ weight
    return Head(weight.view(2, WIDTH), bias)


def fit(people, learn, tested, seed):
    """Head alone, and head with LoRA: ``(head, None), (head, LoRA)``."""
    votes, texts = votes_of(people, learn, tested), people.texts
    head = fit_head(people, votes)
    generator = torch.Generator().manual_seed(seed)
    down = (torch.randn(RANK, INNER, generator=generator) / INNER**0.5).requires_grad_()
    up = torch.zeros(WIDTH, RANK, requires_grad=True)
    weight, bias = head.weight.clone().requires_grad_(), head.bias.clone().requires_grad_()
    optimizer = torch.optim.Adam([{"params": [down, up], "lr": RATE}, {"params": [weight, bias], "lr": HEAD_RATE}])
    share = votes.count / votes.count.sum()
    steps = STEPS[people.kind]
    for step in range(steps):
        for group, rate in zip(optimizer.param_groups, (RATE, HEAD_RATE), strict=True):
            group["lr"] = rate * (1 - step / steps)
        chosen = torch.multinomial(share, BATCH, generator=generator)
        if people.kind == "pair":  # all pairs of a few texts that are judged together
            near = torch.isin(votes.first, votes.first[chosen[:6]]) | torch.isin(votes.second, votes.first[chosen[:6]])
            chosen = near.nonzero().flatten()
        part = Votes(*(getattr(votes, name)[chosen] for name in ("first", "second", "count", "mean")))
        if people.kind != "pair":
            part.count = torch.ones_like(part.count)  # drawn by how often they were said
        numbers, where = torch.unique(torch.cat([part.first, part.second.clamp_min(0)]), return_inverse=True)
        token = torch.cat([torch.arange(texts.start[n], texts.start[n + 1]) for n in numbers.tolist()])
        lengths = texts.start.diff()[numbers]
        change = texts.inner[token].float() @ down.T @ up.T
        states = F.layer_norm(texts.before[token] + change, (WIDTH,), texts.weight, texts.bias, texts.eps)
        text = torch.repeat_interleave(torch.arange(len(numbers)), lengths)
        ways = torch.stack([weight[0] / n + weight[1] / SUM for n in lengths.float()])[text]
        score = torch.zeros(len(numbers)).index_add(0, text, (states * ways).sum(-1))
        a, b = score[where[: len(chosen)]], score[where[len(chosen) :]]
        loss = loss_of(people.kind, a, b if people.kind == "pair" else None, Head(weight, bias), part)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return (head, None), (Head(weight.detach(), bias.detach()), (down.detach(), up.detach()))
