"""compare() on a tiny model: real measurements, of which only what is certain is asserted."""

import csv
import html
import io
import os
import re
import shutil
import subprocess

import pytest
import torch
from recipes import build_base, config_of

from peft_xmask.errors import ConfigError
from peft_xmask.reference import compare

METHODS = ("LORA", "XPEFT", "MAGNITUDE_MASK", "PREFIX_TUNING", "IA3")


@pytest.fixture(scope="module")
def base():
    return build_base("llama")


@pytest.fixture(scope="module")
def result(base, tmp_path_factory):
    from peft import get_peft_model

    folder = tmp_path_factory.mktemp("adapters") / "mine"
    get_peft_model(build_base("llama"), config_of("BOTTLENECK_ADAPTER", "llama")).save_pretrained(folder)
    configs = [config_of(method, "llama") for method in METHODS]
    misfit = config_of("ROAD", "llama", group_size=64)
    return compare(base, [*configs, config_of("LORA", "llama", r=6), folder, misfit], repeats=2)


def rows(result):
    return {row.name: row for row in result.rows}


def test_the_base_comes_first_and_every_candidate_has_a_row(result):
    assert [row.name for row in result.rows] == ["base", *METHODS, "LORA 2", "mine", "ROAD"]


def test_numbers_and_bytes_are_those_of_the_formulas(result):
    found = rows(result)
    assert found["LORA"].trainable_parameters == 3 * 2 * (32 + 24)
    assert found["LORA"].stored_bytes == 4 * found["LORA"].trainable_parameters
    assert found["LORA 2"].stored_bytes == 2 * found["LORA"].stored_bytes
    assert found["XPEFT"].stored_bytes == 2 * (2 * 2 + 2)
    assert found["mine"].method == "BOTTLENECK_ADAPTER"
    assert all(row.file_bytes > row.stored_bytes for row in result.rows if row.file_bytes)


def test_flops_of_lora_are_its_two_products(result):
    found = rows(result)
    extra = found["LORA"].flops_per_token - found["base"].flops_per_token
    assert extra == 2 * found["LORA"].trainable_parameters
    assert found["IA3"].flops_per_token == found["base"].flops_per_token


def test_everything_is_measured_for_what_fits(result):
    for row in result.rows:
        if row.error is None:
            assert row.inference_ratio.low <= row.inference_ratio.middle <= row.inference_ratio.high
            assert row.training_ratio.low > 0
            assert row.peak_bytes > 0
        if row.method and row.error is None:
            assert row.load_seconds > 0
            assert row.switch_seconds > 0
    assert rows(result)["base"].training_ratio.high == 1.0
    assert rows(result)["LORA"].peak_bytes < rows(result)["base"].peak_bytes


def test_a_method_that_does_not_fit_says_why(result):
    row = rows(result)["ROAD"]
    assert "group_size" in row.error
    assert row.stored_bytes is None


def test_the_base_is_not_changed(base, result):
    fresh = build_base("llama")
    for (name, kept), (_, new) in zip(base.named_parameters(), fresh.named_parameters(), strict=True):
        assert torch.equal(kept, new), name
        assert kept.requires_grad
        assert kept.grad is None


def test_progress_reaches_its_total(base):
    seen = []
    compare(base, [config_of("IA3", "llama")], repeats=1, progress=lambda done, of: seen.append((done, of)))
    assert seen[-1] == (3, 3)
    assert seen == sorted(seen)


def test_nothing_to_compare_is_refused(base):
    with pytest.raises(ConfigError, match="found 0"):
        compare(base, [])


def test_tables_hold_every_row(result):
    lines = result.to_markdown().splitlines()
    assert len(lines) == 2 + len(result.rows)
    records = list(csv.DictReader(io.StringIO(result.to_csv())))
    assert [record["name"] for record in records] == [row.name for row in result.rows]
    assert float(records[1]["training_ratio_low"]) == result.rows[1].training_ratio.low
    frame = result.to_pandas()
    assert list(frame["name"]) == [row.name for row in result.rows]
    assert frame["stored_bytes"].iloc[1] == result.rows[1].stored_bytes


def test_the_page_needs_nothing_else_and_escapes_what_it_shows(result):
    page = result.to_html()
    assert not re.search(r"(src|href)=|@import|url\(", page)
    measured = [row for row in result.rows if row.error is None]
    assert page.count("<tr>") == 1 + len(measured)
    assert all(html.escape(row.error) in page for row in result.rows if row.error is not None)
    assert "What the columns mean" in page
    assert "width=device-width" in page


def test_a_plot_is_a_picture(result, tmp_path):
    result.plot(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
CLICK = """<script>
const names = () => [...document.querySelectorAll("tbody tr")].map(row => row.cells[0].textContent);
const press = index => document.querySelectorAll("th button")[index].click();
const seen = [];
press(2); seen.push(names()); press(2); seen.push(names());
const box = document.querySelector(".scroll");
const wide = document.documentElement.scrollWidth > innerWidth || box.scrollWidth > box.clientWidth;
document.body.dataset.seen = JSON.stringify({orders: seen, wide});
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian's package chromium)")
@pytest.mark.parametrize("width", [1200, 500])
def test_the_page_sorts_and_fits_in_a_browser(result, tmp_path, width):
    """A title clicked twice: rows in the order of their bytes, then the other way; nothing scrolls sideways."""
    import json

    page = tmp_path / "page.html"
    page.write_text(result.to_html().replace("</body>", CLICK + "</body>"), encoding="utf-8")
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900", "--dump-dom"]
    env = {**os.environ, "HOME": str(tmp_path)}
    done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120, check=True, env=env)
    seen = json.loads(html.unescape(re.search(r'data-seen="([^"]*)"', done.stdout).group(1)))
    stored = {row.name: row.stored_bytes for row in result.rows}
    up, down = ([stored[name] for name in order if stored[name] is not None] for order in seen["orders"])
    assert up == sorted(up)
    assert down == sorted(down, reverse=True)
    assert all(stored[order[-1]] is None for order in seen["orders"])  # what is not known stays last
    assert not seen["wide"]
