"""What one pass over a person's labels gives, without an optimizer: a gradient of each label, and closed forms.

Everybody starts at the common part, so the change of a text's score with the weights of a mask is the same for all
people there, and is computed once.

Of n labels with gradients ``G_i`` in the weights of a mask, at a gain of 1, the mask is ``m = top_k(-sum_i G_i)``;
without label i it would be ``m_i``, which changes the loss of label i by ``q_i = <m_i, G_i>`` by unit of gain. The gain
is the most likely one under a normal prior: ``max(0, -sum_i q_i) / (sum_i c_i q_i^2 + precision)``, where c is the
curvature of a loss over the square of its slope. So a mask that helps only with the labels that chose it gets no gain.
"""

import torch
from people_methods import padded
from people_prior import layers_of
from people_tail import logits, losses

from peft_xmask.core.masks import hard_weights, mix, select_top_k

PRECISIONS = (10, 100, 1000)
STEP = 4096


class PassFeatures:
    """Derivatives of every text's score in the weights of a mask of up-projections, ``[U, N]``, at a gain of 1.

    All people have the down-projections of one random mask.
    """

    def __init__(self, tail, pool, seed):
        self.pool, number = pool, len(pool.up)
        start = select_top_k(torch.randn(1, number, generator=torch.Generator().manual_seed(seed)), number // 2)
        self.down = mix(hard_weights(start, number // 2, "signed"), pool.down)[0]
        up = pool.up - pool.up.mean(1, keepdim=True)
        ways = torch.einsum("kd,ndb->kbn", tail.w, up)
        flat = up.permute(1, 2, 0).flatten(1)  # [384, b N]
        sigma = (tail.square / tail.x.shape[1] + tail.texts.eps).sqrt()
        self.features = torch.zeros(len(tail.lengths), number)
        for at in range(0, len(tail.text), STEP):
            now = slice(at, at + STEP)
            read = torch.relu(tail.output[now] @ self.down.T)
            along = (torch.einsum("tb,kbn->tkn", read, ways) * tail.share[now, :, None]).sum(1)
            across = ((tail.x[now] @ flat).view(len(read), -1, number) * read[:, :, None]).sum(1)
            bend = (tail.u[now] / sigma[now].pow(3) / tail.x.shape[1])[:, None]
            self.features.index_add_(0, tail.text[now], along / sigma[now, None] - bend * across)


def gradients(kind, tail, features, said, offsets):
    """Of each person's labels: gradients ``[n, N]`` and curvatures ``[n]``."""
    first, second, label, real = padded(said)
    score = tail.base[first.clamp_min(0)].clone().requires_grad_()
    other = tail.base[second.clamp_min(0)].clone().requires_grad_() if kind == "pair" else None
    each = losses(kind, logits(kind, score, other, tail.head, offsets), label) * real
    slopes = torch.autograd.grad(each.sum(), [score] if other is None else [score, other])
    found = slopes[0][..., None] * features[first.clamp_min(0)]
    if other is not None:
        found = found + slopes[1][..., None] * features[second.clamp_min(0)]
    bend = 0.5 / each.detach().clamp_min(1e-6) if kind == "value" else torch.ones_like(each)
    return [(found[p, real[p]], bend[p, real[p]]) for p in range(len(said))]


def one_pass(found, seed, random):
    """Each person's mask, as weights ``[P, N]``, and by precision of the prior its gain ``[P]``.

    Args:
        found: gradients and curvatures of each person.
        random: masks that are drawn instead of chosen; only whether they are added or subtracted is learnt.
    """
    number = found[0][0].shape[1]
    half, generator = number // 2, torch.Generator().manual_seed(seed)
    masks, gains = [], {precision: [] for precision in PRECISIONS}
    for own, bend in found:
        total = own.sum(0)
        if random:
            drawn = hard_weights(select_top_k(torch.randn(number, generator=generator), half), half, "signed")
            mask = -drawn * (total @ drawn).sign()
            changes = -(own @ drawn) * ((total - own) @ drawn).sign()
        else:
            mask = hard_weights(select_top_k(-total, half), half, "signed")
            changes = (hard_weights(select_top_k(own - total, half), half, "signed") * own).sum(1)
        masks.append(mask)
        for precision in PRECISIONS:
            gains[precision].append((-changes.sum()).clamp_min(0) / ((bend * changes.square()).sum() + precision))
    return torch.stack(masks), {precision: torch.stack(each) for precision, each in gains.items()}


def one_step(said, offsets, priors, variance):
    """Coefficients of few directions by one Newton step from zero, ``[P, D]``, rounded to half precision."""
    own = torch.zeros(len(said.first), said.features.shape[-1])
    free = layers_of(priors)[1]

    def likely(coefficients):
        return said.minus_log_posterior(offsets * free, coefficients, layers_of(priors)[0], variance).sum()

    start = own.clone().requires_grad_()
    (slope,) = torch.autograd.grad(likely(start), start, create_graph=True)
    rows = [torch.autograd.grad(slope[:, d].sum(), start, retain_graph=True)[0] for d in range(own.shape[1])]
    return -torch.linalg.solve(torch.stack(rows, 1), slope.detach()[..., None])[..., 0].half().float()
