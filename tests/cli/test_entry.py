"""The command line without its extra says what to install."""

import subprocess
import sys

CODE = """
import sys
sys.modules["typer"] = None
from peft_xmask.__main__ import main
main()
"""


def test_without_typer_it_says_what_to_install():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1] == (
        'error: The command line needs `typer`, which is not installed. Install it with: pip install "peft_xmask[cli]"'
    )
