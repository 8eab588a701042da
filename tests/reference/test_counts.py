"""Every card's formulas against real models: trainable parameters, bytes on disk, and the modules touched."""

import pytest
from peft import PEFT_TYPE_TO_CONFIG_MAPPING
from recipes import BASES, DoesNotFitError, build, build_base, saved

from peft_xmask.reference import card_for, cards
from peft_xmask.reference.count import expected_bytes, expected_parameters, stored_bytes, trainable_parameters
from peft_xmask.reference.sites import adapted_sites, blocks_of, workspace_of
from peft_xmask.reference.vocabulary import Insertions, ParameterSharing

METHODS = [card.method for card in cards()]


@pytest.mark.parametrize("method", sorted(str(kind.value) for kind in PEFT_TYPE_TO_CONFIG_MAPPING))
def test_every_method_of_the_installed_peft_has_a_card(method):
    assert card_for(method).method == method


@pytest.mark.parametrize("base", list(BASES))
@pytest.mark.parametrize("method", METHODS)
def test_formulas_give_the_numbers_trained_and_the_bytes_saved(method, base):
    try:
        model = build(method, base)
    except DoesNotFitError as refusal:
        if base == "llama":
            raise
        pytest.skip(f"PEFT: {refusal}")
    assert expected_parameters(model) == trainable_parameters(model)
    with saved(model) as folder:
        assert expected_bytes(model) == stored_bytes(folder)


@pytest.mark.parametrize("method", METHODS)
def test_the_workspace_is_the_modules_touched(method):
    card = card_for(method)
    model = build(method)
    touched = [site.name for site in adapted_sites(model, "default")]
    if model.peft_config["default"].is_prompt_learning:
        assert not touched
        return
    expected = [name for name, _ in build_base("llama").named_modules() if set(workspace_of(name)) & card.workspace]
    if card.insertions is Insertions.SOME_LAYERS:
        expected = expected[-1:]
    assert sorted(touched) == sorted(expected)


@pytest.mark.parametrize("method", METHODS)
def test_the_number_of_insertions_is_that_of_the_blocks_touched(method):
    card = card_for(method)
    model = build(method, layers=3) if method != "XLORA" else build(method)
    if model.peft_config["default"].is_prompt_learning:
        pytest.skip("prompts touch no module; see test_probes")
    blocks = blocks_of(model.get_base_model())
    touched = {site.layer for site in adapted_sites(model, "default")} - {None}
    expected = {Insertions.ONE: 0, Insertions.SOME_LAYERS: 1, Insertions.ALL_LAYERS: len(blocks)}
    assert len(touched) == expected[card.insertions]


@pytest.mark.parametrize("method", METHODS)
def test_sharing_is_what_a_further_block_costs(method):
    """Numbers that sites share are not there again for one more block; sites that share nothing cost the same each."""
    card = card_for(method)
    if "parameter_sharing" in card.unchecked or method == "XLORA":
        pytest.skip(card.unchecked.get("parameter_sharing", "one router, counted by its formula"))
    two, three = (build(method, layers=layers) for layers in (2, 3))
    with saved(two) as folder:
        bytes_of_two = stored_bytes(folder)
    with saved(three) as folder:
        bytes_of_three = stored_bytes(folder)
    numbers = trainable_parameters(two), trainable_parameters(three)
    if card.parameter_sharing is ParameterSharing.TIED:
        assert numbers[0] == numbers[1]
    elif card.parameter_sharing is ParameterSharing.SHARED:
        assert bytes_of_three * 2 < bytes_of_two * 3 or numbers[1] * 2 < numbers[0] * 3
    elif card.insertions is Insertions.ALL_LAYERS and method != "LN_TUNING":  # one norm stands behind the blocks
        assert numbers[1] * 2 == numbers[0] * 3


@pytest.mark.parametrize(
    ("method", "fields"),
    [
        ("WEIGHT_ADAPTER", {"target": "bias", "adapter_bias": True}),
        ("WEIGHT_ADAPTER", {"target": "both", "adapter_bias": True, "storage_dtype": "bfloat16"}),
        ("MAGNITUDE_MASK", {"include_bias": True, "density": 0.2, "storage_dtype": "float16"}),
        ("XPEFT", {"mask_type": "soft", "num_profiles": 3}),
        ("XPEFT", {"learn_gain": False, "num_adapters": 17}),
        ("BOTTLENECK_ADAPTER", {"insertion_form": "parallel", "use_bias": False}),
        ("LORA", {"use_dora": True}),
        ("LORA", {"lora_bias": True}),
        ("GLORA", {"config_A_B": "vector", "config_C": "none", "config_D_E": "vector"}),
        ("GLORA", {"config_A_B": "constant", "config_C": "vector", "config_D_E": "none"}),
        ("DEFT", {"para": True}),
        ("GRALORA", {"r": 8, "hybrid_r": 4}),
        ("LOKR", {"r": 1}),
        ("OSF", {"effective_rank": 5}),
        ("PEANUT", {"depth": 2, "r": 4}),
        ("POLY", {"n_tasks": 3, "n_skills": 2}),
        ("ROAD", {"variant": "road_4"}),
        ("SUPERTUNING", {"save_precomputed_indices": False}),
        ("TINYLORA", {"save_projection": False}),
        ("VERA", {"save_projection": False}),
        ("MULTITASK_PROMPT_TUNING", {"num_ranks": 2}),
        ("CARTRIDGE", {"num_frozen_tokens": 2}),
        ("SHADOW", {"update_hidden_size": 5, "shadow_num_hidden_layers": 2}),
    ],
    ids=str,
)
def test_formulas_hold_for_other_fields_than_the_defaults(method, fields):
    model = build(method, "llama" if method == "SHADOW" else "bert", **fields)
    assert expected_parameters(model) == trainable_parameters(model)
    with saved(model) as folder:
        assert expected_bytes(model) == stored_bytes(folder)
