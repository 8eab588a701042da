"""The command line as a whole."""

from peft_xmask import __version__


def test_version_and_help(cli_process):
    assert cli_process("--version").out.strip() == f"peft-xmask {__version__}"
    shown = cli_process("--help")
    assert shown.status == 0
    for command in ("demo", "train", "eval", "inspect", "pool", "bank"):
        assert command in shown.out


def test_mistyped_commands_are_one_line(cli):
    for arguments in (("trian",), ("train",), ("inspect",), ("pool", "build")):
        done = cli(*arguments)
        assert done.status == 2
        assert done.err.startswith("error:")
        assert done.err.count("\n") == 1
