"""The examples of docs/hub.md push, so they run against the server and not with those of the other pages."""

import re
from pathlib import Path

BLOCK = re.compile(r"^```py\n(.*?)^```", re.MULTILINE | re.DOTALL)
PAGE = Path(__file__).parents[2] / "docs" / "hub.md"


def test_the_examples_run(hub, client, tmp_path):
    push, private = BLOCK.findall(PAGE.read_text())
    script = tmp_path / "page.py"
    script.write_text(push)
    client(script, home=tmp_path, token="token-of-ann")
    assert hub.repos["ann/my-pool"].private
    assert b'"pool": "ann/my-pool"' in hub.repos["ann/my-profile"].files("main")["adapter_config.json"]
    script.write_text(push.split("for task")[0] + private.replace('"hf_..."', '"token-of-ann"'))
    (tmp_path / "elsewhere").mkdir()
    client(script, home=tmp_path / "elsewhere")
