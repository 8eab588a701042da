"""Cards, formulas, and what they refuse."""

import dataclasses

import pytest
from peft import LoraConfig

from peft_xmask import XPEFTConfig
from peft_xmask.errors import ConfigError
from peft_xmask.reference import card_for, cards, register_card
from peft_xmask.reference.formula import Symbol, ceil, floor, per_site, smaller, times
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


def test_formulas_print_as_written_and_give_numbers():
    r, d_in, d_out = Symbol("r"), Symbol("d_in"), Symbol("d_out")
    pair = r * (d_in + d_out)
    assert str(pair) == "r*(d_in + d_out)"
    assert pair.value({"r": 8, "d_in": 3, "d_out": 4}) == 56
    assert str(1 - r / (d_in / d_out)) == "1 - r/(d_in/d_out)"
    assert str(r - (d_in - d_out)) == "r - (d_in - d_out)"
    assert pair.symbols() == {"r", "d_in", "d_out"}
    assert floor(r / 2).value({"r": 5}) == 2
    assert ceil(r / 2).value({"r": 5}) == 3
    assert smaller(r, d_in).value({"r": 5, "d_in": 4}) == 4


def test_a_formula_needs_its_symbols_unless_a_zero_spares_them():
    with pytest.raises(ConfigError, match="'r'"):
        Symbol("r").value({})
    with pytest.raises(ConfigError, match="None"):
        Symbol("r").value({"r": None})
    assert (Symbol("use") * Symbol("r")).value({"use": False}) == 0


def test_totals_sum_over_sites_and_groups():
    formula = per_site(Symbol("d_in"), group=Symbol("d_out"), once=Symbol("S"))
    sites = [{"d_in": 2, "d_out": 3}, {"d_in": 4, "d_out": 3}]
    assert formula.total(sites, sites[:1], {"S": 2}) == 2 + 4 + 3 + 2
    assert times(4, formula).total(sites, sites[:1], {"S": 2}) == 44
    assert str(formula) == "d_in per site; d_out per group of sites; S once"


def test_loras_formula_by_hand():
    """A BERT-base shape, query and value: 12 blocks, 2 sites of 768 x 768, r = 8."""
    site = {"d_in": 768, "d_out": 768}
    values = {"r": 8, "use_dora": False, "lora_bias": False}
    assert card_for("LORA").trained.total([site] * 24, [], values) == 294_912
