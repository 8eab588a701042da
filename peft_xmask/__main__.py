"""``peft-xmask`` and ``python -m peft_xmask``: the command line, or what to install for it."""

import sys


def main() -> None:
    """Run the command line."""
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ImportError as error:
        message = f"error: The command line needs `{error.name}`, which is not installed. Install it with: "
        sys.stderr.write(f'{message}pip install "peft_xmask[cli]"\n')
        sys.exit(2)
    from .cli import main as run

    run()


if __name__ == "__main__":
    main()
