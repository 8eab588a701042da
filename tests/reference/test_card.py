"""Cards, formulas, and what they refuse."""

import dataclasses

import pytest
from peft import LoraConfig
from sympy import Min, ceiling, floor

from peft_xmask import XPEFTConfig
from peft_xmask.errors import ConfigError
from peft_xmask.reference import card_for, cards, register_card
from peft_xmask.reference.formula import evaluate, nearest, per_site, symbols
from peft_xmask.reference.vocabulary import PROPERTIES


def test_a_card_is_found_by_config_class_and_name():
    assert card_for(LoraConfig) is card_for(LoraConfig()) is card_for("lora") is card_for("LORA")
    assert card_for(XPEFTConfig()).method == "XPEFT"


def test_unknown_methods_are_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match="Methods with a card: ADALORA"):
        card_for("NOT_A_METHOD")
    with pytest.raises(ConfigError, match="Expected a PEFT config"):
        card_for(3)


def test_a_method_has_one_card():
    card = card_for("LORA")
    assert register_card(card) is card
    with pytest.raises(ConfigError, match="already"):
        register_card(dataclasses.replace(card, title="Other"))


def test_a_registered_type_without_a_card_is_told_what_to_do(monkeypatch):
    from peft_xmask.reference import card as module

    monkeypatch.delitem(module._CARDS, "LORA")
    with pytest.raises(ConfigError, match="register_card"):
        card_for(LoraConfig)


@pytest.mark.parametrize("card", cards(), ids=lambda card: card.method)
def test_every_property_has_a_value_and_a_reason(card):
    for name in PROPERTIES:
        assert card.text(name)
        assert card.reason(name)


def test_reasons_speak_of_fields_that_there_are():
    with pytest.raises(ConfigError, match="colour"):
        dataclasses.replace(card_for("LORA"), reasons={"colour": "blue"})


def test_formulas_print_and_evaluate():
    r, d_in, d_out = symbols("r d_in d_out")
    pair = r * (d_in + d_out)
    assert str(pair) == "r*(d_in + d_out)"
    assert evaluate(pair, {"r": 8, "d_in": 3, "d_out": 4}) == 56
    assert evaluate(floor(r / 2) + ceiling(r / 2) + Min(r, d_in), {"r": 5, "d_in": 4}) == 2 + 3 + 4


def test_floats_round_as_in_python():
    """A magnitude mask's density and PEFT's sparsities are floats: the formula has to round as the code does."""
    density, d_in, d_out = symbols("density d_in d_out")
    for width in range(1, 60):
        for share in (0.005, 0.1, 0.3, 0.5, 0.7):
            values = {"density": share, "d_in": width, "d_out": 10}
            assert evaluate(nearest(density * (d_in * d_out)), values) == round(share * (width * 10))
            assert evaluate(floor(d_in * d_out * (1 - density)), values) == int(width * 10 * (1 - share))


def test_a_formula_needs_a_value_for_each_symbol_that_is_not_multiplied_by_zero():
    use, r = symbols("use r")
    with pytest.raises(ConfigError, match="'r'"):
        evaluate(r, {})
    with pytest.raises(ConfigError, match="None"):
        evaluate(r, {"r": None})
    with pytest.raises(ConfigError, match="'r'"):
        evaluate(use * r, {"use": True})
    assert evaluate(use * r, {"use": False}) == 0


def test_totals_sum_over_sites_and_groups():
    d_in, d_out, number_of_sites = symbols("d_in d_out S")
    formula = per_site(d_in, group=d_out, once=number_of_sites)
    sites = [{"d_in": 2, "d_out": 3}, {"d_in": 4, "d_out": 3}]
    assert formula.total(sites, sites[:1], {"S": 2}) == 2 + 4 + 3 + 2
    assert (4 * formula).total(sites, sites[:1], {"S": 2}) == 44
    assert str(formula) == "d_in per site; d_out per group of sites; S once"


def test_loras_formula_by_hand():
    """A BERT-base shape, query and value: 12 blocks, 2 sites of 768 x 768, r = 8."""
    site = {"d_in": 768, "d_out": 768}
    values = {"r": 8, "use_dora": False, "lora_bias": False}
    assert card_for("LORA").trainable.total([site] * 24, [], values) == 294_912
