"""``python -m peft_xmask.cli``."""

from . import main

main()
