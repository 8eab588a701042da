"""The cards' structure, measured: how outputs change when inputs, weights and trainable parameters do.

Every probe runs one adapted module of a tiny Llama whose trainable parameters have been changed at random.
"""

import pytest
import torch
from recipes import BASES, build, config_of, logits, saved, stir
from torch.autograd.functional import jacobian

from peft_xmask.reference import card_for, cards
from peft_xmask.reference.formula import evaluate
from peft_xmask.reference.sites import adapted_sites, host_of
from peft_xmask.reference.vocabulary import (
    InputType,
    InsertionForm,
    Insertions,
    IntegrationForm,
    IntraConnectivity,
    ParametersAdapted,
)

METHODS = [card.method for card in cards()]
NOT_LINEAR_MODULES = {"SHADOW", "ADAPTION_PROMPT", "XLORA", "TRAINABLE_TOKENS", "LN_TUNING"}
PROMPTS = {"CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING"}
LINEAR = [method for method in METHODS if method not in NOT_LINEAR_MODULES | PROMPTS]
X = torch.randn(1, 1, 24, generator=torch.Generator().manual_seed(2))


class Probe:
    """The first adapted module of a stirred model, and its base's weight."""

    def __init__(self, method: str, **fields) -> None:
        self.model = build(method, **fields).eval()
        stir(self.model)
        self.site = adapted_sites(self.model, "default")[0]
        self.host = host_of(self.site.module)
        self.x = X[..., : self.site.d_in]
        self.extra = {"task_ids": torch.tensor([0])} if method == "POLY" else {}

    def output(self, x=None) -> torch.Tensor:
        return self.site.module(self.x if x is None else x, **self.extra)

    def base_output(self) -> torch.Tensor:
        with self.model.disable_adapter():
            return self.output().detach().clone()

    def slope(self) -> torch.Tensor:
        """Jacobian of the module's output by its input, [d_out, d_in]."""
        return jacobian(lambda x: self.output(x.view(1, 1, -1)).view(-1), self.x.view(-1)).detach()

    def without(self) -> torch.Tensor:
        with self.model.disable_adapter():
            return self.slope()

    def put(self, weight: torch.Tensor) -> None:
        with torch.no_grad():
            self.host.weight.copy_(weight)
            if getattr(self.host, "bias", None) is not None:
                self.host.bias.zero_()


def rank_one(probe: Probe) -> torch.Tensor:
    rows, columns = probe.host.weight.shape
    generator = torch.Generator().manual_seed(4)
    return torch.randn(rows, 1, generator=generator) @ torch.randn(1, columns, generator=generator)


def rank(matrix: torch.Tensor) -> int:
    values = torch.linalg.svdvals(matrix.double())
    return int((values > 1e-4 * values[0]).sum()) if values[0] > 1e-9 else 0


def insertion_form(method: str) -> InsertionForm:
    """In place: the base's output does not enter, or as many weights change as are trained, or stored.
    Sequential: with a base of rank one, the whole has rank one. Parallel: else."""
    probe = Probe(method)
    change = probe.slope() - probe.without()
    card, symbols = card_for(method), _symbols(probe)
    counts = (round(evaluate(card.trainable.site, symbols)), round(evaluate(card.stored.site, symbols) / 4))
    if replaced(probe) or int((change.abs() > 1e-6).sum()) in counts:
        return InsertionForm.IN_PLACE
    probe = Probe(method)
    probe.put(rank_one(probe))
    return InsertionForm.SEQUENTIAL if rank(probe.slope()) == 1 else InsertionForm.PARALLEL


def _symbols(probe: Probe) -> dict:
    from peft_xmask.reference.count import formula_values

    config = probe.model.peft_config["default"]
    sites = adapted_sites(probe.model, "default")
    per_site, _, common = formula_values(card_for(config), config, probe.model.get_base_model(), sites)
    return {**common, **per_site[0]}


def replaced(probe: Probe) -> bool:
    before = probe.output().detach()
    kept = probe.host.weight.detach().clone()
    probe.put(kept + torch.randn(kept.shape, generator=torch.Generator().manual_seed(5)))
    after = probe.output().detach()
    probe.put(kept)
    return torch.allclose(before, after, atol=1e-5)


@pytest.mark.parametrize("method", LINEAR)
def test_insertion_form(method):
    assert insertion_form(method) is card_for(method).insertion_form


@pytest.mark.parametrize("method", LINEAR)
def test_intra_connectivity(method):
    """How much of the module's own map is not zero: its change of the weight, of the identity if sequential."""
    card = card_for(method)
    if "intra_connectivity" in card.unchecked:
        pytest.skip(card.unchecked["intra_connectivity"])
    probe = Probe(method)
    if card.insertion_form is InsertionForm.SEQUENTIAL and method != "HRA":
        probe.put(torch.eye(*probe.host.weight.shape))
    change = probe.slope() - probe.without()
    dense = (change.abs() > 1e-6).double().mean() > 0.5
    assert dense == (card.intra_connectivity is IntraConnectivity.DENSE)


@pytest.mark.parametrize("method", LINEAR)
def test_input_type(method):
    """What reads weights adds something else when the weights change, or is in their place; one that reads
    nothing has a slope of zero; the rest add the same to the same input, or output, whatever the weights."""
    card = card_for(method)
    probe = Probe(method)
    if card.input_type is InputType.NONE:
        assert torch.allclose(probe.slope(), probe.without(), atol=1e-6)
        return
    if card.insertion_form is not InsertionForm.PARALLEL:
        assert (card.input_type is InputType.WEIGHTS) == (card.insertion_form is InsertionForm.IN_PLACE)
        return
    added = (probe.output() - probe.base_output()).detach()
    probe.put(probe.host.weight + 1.0)
    other = (probe.output() - probe.base_output()).detach()
    assert torch.allclose(added, other, atol=1e-4) == (card.input_type is InputType.HIDDEN)


@pytest.mark.parametrize("method", [method for method in METHODS if card_for(method).scale])
def test_scaled_addition_grows_with_its_constant(method):
    card = card_for(method)
    assert card.integration_form is IntegrationForm.SCALED_ADDITION
    if "integration_form" in card.unchecked:
        pytest.skip(card.unchecked["integration_form"])
    constant = getattr(config_of(method, "llama"), card.scale)
    one, two = Probe(method), Probe(method, **{card.scale: 2 * constant})
    added, double = (probe.output() - probe.base_output() for probe in (one, two))
    assert added.abs().max() > 1e-6
    torch.testing.assert_close(double, 2 * added, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", [method for method in METHODS if card_for(method).gate])
def test_a_closed_gate_leaves_the_base(method):
    card = card_for(method)
    assert card.integration_form is IntegrationForm.GATED_ADDITION
    model = build(method).eval()
    stir(model)
    with model.disable_adapter():
        base = logits(model)
    assert not torch.allclose(logits(model), base, atol=1e-4)
    with torch.no_grad():
        gates = [parameter for name, parameter in model.named_parameters() if card.gate in name]
        assert gates
        for gate in gates:
            gate.zero_()
    torch.testing.assert_close(logits(model), base, atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", [m for m in LINEAR if card_for(m).integration_form is IntegrationForm.RESCALING])
def test_rescaling_multiplies_number_by_number(method):
    probe = Probe(method)
    ratio = probe.slope() / probe.without()
    assert rank(ratio) == 1
    assert rank(probe.slope() - probe.without()) > 1


@pytest.mark.parametrize("method", [m for m in LINEAR if card_for(m).integration_form is IntegrationForm.COMPOSITION])
def test_composition_scales_with_the_host(method):
    """Twice the host's weight gives twice the output, and the ratio is not number by number."""
    probe = Probe(method)
    once = probe.output().detach()
    assert rank(probe.slope() / probe.without()) > 1
    probe.put(2 * probe.host.weight)
    torch.testing.assert_close(probe.output().detach(), 2 * once, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "method", [m for m in LINEAR if card_for(m).integration_form is IntegrationForm.DIRECT_ADDITION]
)
def test_direct_addition_joins_the_hosts_own_output(method):
    """Nothing of the config scales it, and with another host of the same output the sum is the same."""
    card = card_for(method)
    probe = Probe(method)
    assert card.scale is None
    assert card.gate is None
    added = probe.output() - probe.base_output()
    assert added.abs().max() > 1e-6
    assert not replaced(probe)


def test_replacements_do_not_read_what_they_replace():
    for method in METHODS:
        if card_for(method).integration_form is not IntegrationForm.REPLACEMENT:
            continue
        model = build(method).eval()
        stir(model)
        site = adapted_sites(model, "default")[0]
        host = host_of(site.module)
        x = torch.tensor([[3, 4]]) if method == "TRAINABLE_TOKENS" else X[..., : site.d_in]
        before = site.module(x).detach()
        with torch.no_grad():
            host.weight.add_(1.0)
        assert torch.allclose(site.module(x), before, atol=1e-5), method


@pytest.mark.parametrize("method", sorted(PROMPTS))
def test_prompts_lengthen_what_attention_reads(method):
    """Concatenation: at the embedding the sequence itself gets longer; in all layers only keys and values do."""
    card = card_for(method)
    assert card.integration_form is IntegrationForm.CONCATENATION
    model = build(method).eval()
    seen = {}
    layers = model.get_base_model().model.layers

    def look(module, args, kwargs, output):
        seen["tokens"] = kwargs["hidden_states"].shape[1] if "hidden_states" in kwargs else args[0].shape[1]

    handles = [layer.self_attn.register_forward_hook(look, with_kwargs=True) for layer in layers]
    with torch.no_grad():
        out = model(**BASES["llama"].batch, use_cache=True, **_extra(method))
    for handle in handles:
        handle.remove()
    given = BASES["llama"].batch["input_ids"].shape[1]
    grown = seen["tokens"] - given
    if card.insertions is Insertions.ONE:
        assert grown == (3 if method == "CPT" else 5)
    else:
        assert grown == 0
        assert out.past_key_values.get_seq_length() == given + 5


@pytest.mark.parametrize("method", METHODS)
def test_merging(method):
    """A method merges if the merged model gives the outputs of the adapted one."""
    card = card_for(method)
    model = build(method).eval()
    stir(model)
    expected = logits(model, **_extra(method))
    try:
        merged = model.merge_and_unload()
        exact = torch.allclose(logits(merged), expected, atol=2e-3, rtol=1e-3)
    except (NotImplementedError, AttributeError, ValueError, TypeError, KeyError):
        exact = False
    assert exact == card.merges


@pytest.mark.parametrize("method", METHODS)
def test_what_merges_is_a_reparameterisation(method):
    card = card_for(method)
    if card.merges:
        assert card.parameters_adapted is ParametersAdapted.REPARAMETERISATION
    elif card.parameters_adapted is ParametersAdapted.REPARAMETERISATION:
        assert "parameters_adapted" in card.reasons


@pytest.mark.parametrize("method", METHODS)
def test_several_adapters_mixed_batches_and_sums(method):
    """One more adapter in the model; a batch with a row for each; both active at once, where the card says so."""
    card = card_for(method)
    model = build(method).eval()
    stir(model)
    try:
        _add_another(method, model)
    except (ValueError, TypeError, NotImplementedError, AttributeError, RuntimeError):
        assert not card.several
        return
    assert card.several
    assert adds_up(model, method) == card.adds_up
    assert mixes(model, method) == card.supports_mixed_batch  # last: a refused call can leave PEFT's hooks behind


def _extra(method: str) -> dict:
    tasks = {"MULTITASK_PROMPT_TUNING": [0, 1, 2], "POLY": [0, 0, 0]}
    return {"task_ids": torch.tensor(tasks[method])} if method in tasks else {}


def _add_another(method: str, model) -> None:
    if method == "XLORA":
        model.add_adapter("other", config_of(method, "llama", hidden_size=16, adapters={}))
        return
    fields = {"inference_mode": True} if method == "ADALORA" else {}
    model.add_adapter("other", config_of(method, "llama", **fields))
    model.set_adapter("other")
    for name, parameter in model.named_parameters():
        if "other" in name:
            parameter.requires_grad_(True)
    stir(model, seed=11)
    model.set_adapter("default")
    model.eval()


def mixes(model, method: str) -> bool:
    alone = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        alone[name] = logits(model, **_extra(method))
    model.set_adapter("default")
    with model.disable_adapter():
        alone["__base__"] = logits(model, **(_extra(method) if method == "POLY" else {}))
    names = ["default", "other", "other" if method in PROMPTS else "__base__"]
    try:
        mixed = logits(model, adapter_names=names, **_extra(method))
    except (ValueError, TypeError, NotImplementedError, RuntimeError):
        return False
    rows = torch.stack([alone[name][row] for row, name in enumerate(names)])
    return mixed.shape == rows.shape and torch.allclose(mixed, rows, atol=1e-4)


def adds_up(model, method: str) -> bool:
    try:
        alone = []
        for name in ("default", "other"):
            model.base_model.set_adapter(name)
            alone.append(logits(model, **_extra(method)))
        model.base_model.set_adapter(["default", "other"])
        both = logits(model, **_extra(method))
        model.set_adapter("default")
    except (ValueError, TypeError, NotImplementedError, AttributeError, KeyError, RuntimeError):
        return False
    return not any(torch.allclose(both, one, atol=1e-6) for one in alone)


def test_a_prompts_file_is_the_prompt(tmp_path):
    with saved(build("P_TUNING")) as folder:
        assert sorted(path.name for path in folder.iterdir()) == [
            "README.md",
            "adapter_config.json",
            "adapter_model.safetensors",
        ]
