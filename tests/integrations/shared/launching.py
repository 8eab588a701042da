"""Scripts in two processes on a CPU, by ``accelerate launch``."""

import socket
import sys


def in_two_processes(*script: object) -> list[str]:
    """The command for a script and its arguments, on a port that is free now: old accelerates do not look for one."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    return [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1",
        "--num_processes", "2", "--mixed_precision", "no", "--dynamo_backend", "no",
        "--main_process_port", str(port), *map(str, script),
    ]  # fmt: skip
