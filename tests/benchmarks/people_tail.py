"""The end of the model, computed exactly and cheaply for many people at once.

A text's score is ``w . [mean, sum / 32]`` of its last states, where a state is the LayerNorm of ``before + B r``:
``before`` is kept, and ``B r`` is what a method adds, ``B [384, b]`` of a person and ``r [b]`` of a token. A score
is linear in a state, so what is needed of a token are a few products of width b and nothing of width 384:
``sum_t (u_t + r_t . p_t) / sigma_t`` with ``sigma_t^2 = (|x|^2 + 2 r . B'x + r . B'B r) / 384``. ``direct_scores`` is
the same by PyTorch's own LayerNorm, for tests.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

SUM = 32.0  # tokens that the sum of states is divided by


@dataclass
class Head:
    """Weights of the score, ``[2, 384]`` of mean and sum; what is added to it; of pairs the classes' biases ``[3]``."""

    weight: torch.Tensor
    bias: torch.Tensor


class Tail:
    """Tokens of all texts with what is common to all people merged in, and the head.

    Attributes:
        inner, output: what a LoRA and an adapter of the last feed-forward layer read, ``[T, 1536]`` and ``[T, 384]``.
        base: score of every text, ``[U]``.
    """

    def __init__(self, texts, head, common=None):
        self.texts, self.head = texts, head
        self.inner, output, before = texts.inner, texts.output, texts.before
        if common is not None:
            change = torch.cat([part.float() @ common[0].T @ common[1].T for part in texts.inner.split(8192)])
            output, before = output + change, before + change
        self.output = output
        self.x = before - before.mean(-1, keepdim=True)
        self.square = self.x.square().sum(-1)
        self.lengths = texts.start.diff()
        self.text = torch.repeat_interleave(torch.arange(len(self.lengths)), self.lengths)
        self.w = head.weight * texts.weight  # [2, 384]
        per_length = self.lengths[self.text].float()
        self.share = torch.stack([1 / per_length, torch.full_like(per_length, 1 / SUM)], 1)  # [T, 2]
        self.u = ((self.x @ self.w.T) * self.share).sum(-1)
        shift = head.weight @ texts.bias  # [2]
        self.constant = shift[0] + shift[1] * self.lengths / SUM
        sigma = (self.square / self.x.shape[1] + texts.eps).sqrt()
        self.base = torch.zeros(len(self.lengths)).index_add_(0, self.text, self.u / sigma) + self.constant

    def gather(self, numbers, reads):
        """Tokens of the texts ``numbers [P, S]`` (-1: none) for :meth:`scores`; ``reads``: "inner", "output", None."""
        people, slots = numbers.shape
        lengths = torch.where(numbers >= 0, self.lengths[numbers.clamp_min(0)], 0)
        most = int(lengths.sum(1).max())
        ends = lengths.cumsum(1)
        place = torch.arange(most).expand(people, most)
        slot = torch.searchsorted(ends, place.contiguous(), right=True).clamp_max(slots - 1)
        within = place - (ends - lengths).gather(1, slot)
        token = self.texts.start[numbers.clamp_min(0)].gather(1, slot) + within
        real = place < ends[:, -1:]
        token = torch.where(real, token, 0)
        found = {
            "x": self.x[token], "square": self.square[token], "u": self.u[token] * real,
            "share": self.share[token] * real[..., None], "numbers": numbers,
            "flat": (slot + torch.arange(people)[:, None] * slots).flatten(),
        }  # fmt: skip
        if reads:
            found["read"] = getattr(self, reads)[token].float()
        return found

    def scores(self, batch, r, up, strengths=(1.0,)):
        """Scores of the texts of a batch, ``[P, S]`` for each strength by which ``up`` is multiplied.

        Shapes: ``r [P, M, b]`` of M tokens, ``up [P, 384, b]``.
        """
        up = up - up.mean(1, keepdim=True)
        across = (batch["x"] @ up).mul(r).sum(-1)
        own = ((r @ (up.transpose(1, 2) @ up)) * r).sum(-1)
        ways = torch.einsum("kd,pdb->pkb", self.w, up)
        along = ((r @ ways.transpose(1, 2)) * batch["share"]).sum(-1)
        numbers = batch["numbers"]
        constant = self.constant[numbers.clamp_min(0)]
        found = []
        for g in strengths:
            sigma = ((batch["square"] + 2 * g * across + g * g * own) / up.shape[1] + self.texts.eps).sqrt()
            token = ((batch["u"] + g * along) / sigma).flatten()
            total = token.new_zeros(numbers.numel()).index_add(0, batch["flat"], token)
            found.append(total.view_as(numbers) + constant)
        return found


def direct_scores(tail, number, r, up):
    """Score of one text by the plain way, for tests. Shapes: ``r [tokens, b]``, ``up [384, b]``."""
    at = slice(int(tail.texts.start[number]), int(tail.texts.start[number + 1]))
    states = F.layer_norm(tail.x[at] + r @ up.T, (up.shape[0],), tail.texts.weight, tail.texts.bias, tail.texts.eps)
    return (states.mean(0) * tail.head.weight[0]).sum() + (states.sum(0) / SUM * tail.head.weight[1]).sum()


def logits(kind, score, other, head, offset):
    """What a person is predicted to say.

    ``offset [P, 3]`` or None: numbers of a person. Pairs: added to "second" and "equal", and the logarithm of what the
    difference of the scores is multiplied by. Else: added to the prediction, unused, and that logarithm.
    """
    add = score.new_zeros(len(score), 3) if offset is None else offset
    slope = add[:, 2:3].exp()
    if kind == "pair":
        half = (other - score) * slope / 2
        tie = torch.zeros_like(half)
        return torch.stack([-half, half + add[:, :1], tie + add[:, 1:2]], -1) + head.bias
    return score * slope + head.bias + add[:, :1]


def losses(kind, predicted, label):
    """Loss of each label: nats, or for ratings the squared error while learning."""
    if kind == "pair":
        return F.cross_entropy(predicted.flatten(0, 1), label.long().flatten(), reduction="none").view_as(label)
    if kind == "binary":
        return F.binary_cross_entropy_with_logits(predicted, label, reduction="none")
    return (predicted - label).square()


def figures(kind, predicted, label):
    """What the tables show of each label: nats and whether it is right; of ratings the absolute error, twice."""
    if kind == "pair":
        return losses(kind, predicted, label), (predicted.argmax(-1) == label).float()
    if kind == "binary":
        return losses(kind, predicted, label), ((predicted > 0) == (label > 0.5)).float()
    error = (predicted.clamp(0, 10) - label).abs()
    return error, error
