"""The page made from the cards."""

from peft_xmask.reference.typology import PAGE, typology_page


def test_the_page_is_that_of_the_cards():
    """If this fails: python -m peft_xmask.reference.typology."""
    assert PAGE.read_text(encoding="utf-8") == typology_page()
