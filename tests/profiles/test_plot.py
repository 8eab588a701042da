"""What the pictures of a bank show, read from the figures themselves, and that they can be written."""

import sys

import numpy as np
import pytest
import torch

from peft_xmask.core.packing import pack_bits
from peft_xmask.errors import ConfigError, MissingExtraError
from peft_xmask.profiles import Profile, ProfileBank

pytest.importorskip("matplotlib", reason="the pictures need matplotlib")

from peft_xmask.bank.plot import mean_weights, plot_bytes, plot_map, plot_masks, plot_usage


@pytest.fixture
def two_groups(many_profiles) -> ProfileBank:
    """24 profiles: half of them near one mask, half near another."""
    bank = ProfileBank.from_model(many_profiles()).select([])
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(2, 2, 3, 20, generator=generator)
    gains = many_profiles().base_model.table.adapters["default"].form.pack(torch.randn(1, 120), torch.ones(1, 3))[1][0]
    for number in range(24):
        scores = centres[number % 2] + 0.5 * torch.randn(2, 3, 20, generator=generator)
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.topk(10).indices, True)
        bank.add(f"user-{number}", Profile(pack_bits(chosen), gains))
    return bank


def write(figure, tmp_path) -> None:
    for ending in ("png", "svg"):
        figure.savefig(tmp_path / f"picture.{ending}")
        assert (tmp_path / f"picture.{ending}").stat().st_size > 2000


def test_masks_are_drawn_as_they_are(bank, tmp_path):
    figure = plot_masks(bank, ["bob", "张伟"])
    images = [axes.get_images()[0] for axes in figure.axes]
    assert len(images) == 4
    for image, (name, side) in zip(images, [("bob", 0), ("bob", 1), ("张伟", 0), ("张伟", 1)], strict=True):
        assert np.array_equal(image.get_array(), bank[name].selected(bank.spec)[side].numpy())
    assert figure.axes[1].get_title() == "bob: up-projections"
    write(figure, tmp_path)
    with pytest.raises(KeyError, match="nobody"):
        plot_masks(bank, ["nobody"])


def test_the_mean_of_all_profiles(bank, tmp_path):
    expected = torch.stack([bank[name].selected(bank.spec) for name in bank]).double().mean(0)
    assert np.allclose(mean_weights(bank), expected)
    figure = plot_masks(bank)
    assert np.allclose(figure.axes[0].get_images()[0].get_array(), expected[0])
    write(figure, tmp_path)


def test_soft_masks(many_profiles, tmp_path):
    soft = ProfileBank.from_model(many_profiles(mask_type="soft"))
    assert np.allclose(mean_weights(soft).sum(-1), 1, atol=1e-3)
    for draw in (plot_masks, plot_usage, plot_map):
        write(draw(soft), tmp_path)


def test_a_histogram_counts_every_site_and_adapter(two_groups, tmp_path):
    figure = plot_usage(two_groups)
    counted = sum(np.histogram(side, bins=40)[0].sum() for side in mean_weights(two_groups))
    assert counted == 2 * 3 * 20
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.get_legend().get_texts()][2] == "chance: 0.5"
    write(figure, tmp_path)


def points(figure) -> dict[str, np.ndarray]:
    return {each.get_label(): np.asarray(each.get_offsets()) for each in figure.axes[0].collections}


def test_a_map_puts_like_masks_together(two_groups, tmp_path):
    values = {f"user-{number}": ("even", "odd")[number % 2] for number in range(23)}
    figure = plot_map(two_groups, values, column="kind")
    found = points(figure)
    assert [len(found[label]) for label in ("even", "odd", "no value")] == [12, 11, 1]
    between = np.linalg.norm(found["even"].mean(0) - found["odd"].mean(0))
    within = np.linalg.norm(found["even"] - found["even"].mean(0), axis=1).mean()
    assert between > 3 * within
    assert figure.axes[0].get_legend().get_title().get_text() == "kind"
    write(figure, tmp_path)


def test_values_may_be_numbers_or_many_words(two_groups, tmp_path):
    figure = plot_map(two_groups, {f"user-{number}": str(number / 2) for number in range(20)}, column="age")
    assert figure.axes[1].get_ylabel() == "age"
    write(figure, tmp_path)
    many = points(plot_map(two_groups, {f"user-{number}": f"word {number}" for number in range(24)}))
    assert len(many["15 others"]) == 15


def test_a_map_of_some_of_many_is_the_same_each_time(two_groups):
    first, again = (points(plot_map(two_groups, limit=9)) for _ in range(2))
    (label,) = first
    assert first[label].shape == (9, 2)
    assert np.array_equal(first[label], again[label])
    with pytest.raises(ConfigError, match="three profiles"):
        plot_map(two_groups.select(["user-1", "user-2"]))


def test_bytes_are_sorted_and_written_beside_the_bars(tmp_path):
    figure = plot_bytes({"LoRA": 1_186_328, "this bank": 336, "VeRA": 104_776}, ["this bank"])
    (axes,) = figure.axes
    assert [bar.get_width() for bar in axes.patches] == [1_186_328, 104_776, 336]
    assert [text.get_text() for text in axes.texts] == ["1,186,328 B  (3,531 x)", "104,776 B  (312 x)", "336 B"]
    assert axes.get_xscale() == "log"
    write(figure, tmp_path)
    for sizes in ({}, {"none": 0}):
        with pytest.raises(ConfigError, match="above zero"):
            plot_bytes(sizes)


def test_without_matplotlib_it_says_what_to_install(bank, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"peft_xmask\[plot\]"):
        plot_usage(bank)


def test_shares_of_many_profiles_make_no_comb(two_groups):
    """Each bin of the histogram holds equally many of the shares that are possible."""
    from peft_xmask.bank.plot import _whole_bins

    for count in (24, 200, 977):
        edges = _whole_bins(np.array([3 / count, (count - 2) / count]), count)
        possible = np.arange(3, count - 1) / count
        held = np.histogram(possible, edges)[0]
        assert len(set(held[:-1])) == 1
        assert held.sum() == len(possible)
    assert len(plot_usage(two_groups).axes) == 1


def test_a_point_of_the_map_can_be_named(two_groups, tmp_path):
    figure = plot_map(two_groups, names=["user-7"], limit=10)
    assert "user-7" in [text.get_text() for text in figure.axes[0].texts]
    write(figure, tmp_path)
    with pytest.raises(KeyError, match="nobody"):
        plot_map(two_groups, names=["nobody"])


def test_labels_cover_neither_each_other_nor_points():
    from matplotlib.figure import Figure

    from peft_xmask.core.labels import place_labels

    draw = np.random.default_rng(0)
    points = draw.normal(size=(25, 2))
    points[1] = points[0] + 1e-3
    figure = Figure(figsize=(8, 6), layout="constrained")
    axes = figure.add_subplot()
    axes.scatter(*points.T)
    axes.margins(0.2)
    assert place_labels(figure, axes, points, [f"method {n}" for n in range(25)]) == 25
    figure.draw_without_rendering()
    boxes = [text.get_window_extent().padded(-1) for text in axes.texts]
    for place, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:place])
        assert not any(box.contains(*axes.transData.transform(point)) for point in points)


def test_the_page_of_the_map_holds_every_name_and_cannot_be_broken_by_one(two_groups):
    from peft_xmask.bank.map_page import map_page

    two_groups.rename("user-0", "</script><b>")
    page = map_page(two_groups, {"user-1": "4.5"}, column="offset", names=["user-3"])
    assert "</script><b>" not in page
    assert all(f'"user-{number}"' in page for number in range(1, 24))
    assert "offset" in page
    with pytest.raises(ConfigError, match="at least three"):
        map_page(two_groups.select(["user-1"]))
