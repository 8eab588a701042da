import torch

from peft_xmask.core.fingerprint import digest_of_facts, fingerprint_weights


def weights(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(40, 30, generator=generator) * 1e-3, torch.randn(700, 50, generator=generator)]


def test_a_cast_keeps_the_fingerprint():
    plain = fingerprint_weights(weights())
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert fingerprint_weights([weight.to(dtype) for weight in weights()]) == plain
    assert fingerprint_weights([weight.half().bfloat16() for weight in weights()]) == plain


def test_an_underflow_keeps_the_fingerprint():
    tiny = torch.tensor([1e-30, -1e-30, 2.0])
    assert fingerprint_weights([tiny.half()]) == fingerprint_weights([tiny])


def test_other_weights_order_or_shape_change_it():
    plain = fingerprint_weights(weights())
    assert fingerprint_weights(weights(1)) != plain
    assert fingerprint_weights(weights()[::-1]) != plain
    assert fingerprint_weights([weights()[0].view(30, 40), weights()[1]]) != plain


def test_a_light_fine_tune_changes_it():
    tuned = [weight + 1e-3 * weight.std() * torch.randn_like(weight) for weight in weights()]
    assert fingerprint_weights(tuned) != fingerprint_weights(weights())


def test_what_cannot_be_read_has_none():
    assert fingerprint_weights([torch.empty(3, 3, device="meta")]) is None
    assert fingerprint_weights([torch.zeros(3, 3, dtype=torch.int8)]) is None
    assert fingerprint_weights([None]) is None


def test_facts_are_independent_of_order():
    assert (
        digest_of_facts({"a": 1, "b": "x"})
        == digest_of_facts({"b": "x", "a": 1})
        != digest_of_facts({"a": 2, "b": "x"})
    )
