"""Writes deploy/requirements.lock: every package that the image installs, pinned and with its hash.

    python deploy/lock.py     # asks pip what `.[tpu,otlp]` needs here: on x86-64 Linux, with the Python of the image

PyTorch is left out: its CPU build has another index and a file of its own, torch-cpu.lock.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
SEPARATE = {"torch"}
HEADER = """\
# What deploy/Dockerfile installs beside PyTorch, for x86-64 Linux and Python {python}. Written by deploy/lock.py.
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        options = ["--dry-run", "--ignore-installed", "--only-binary", ":all:", "--quiet", "--report", str(report)]
        subprocess.run([sys.executable, "-m", "pip", "install", *options, f"{HERE.parent}[tpu,otlp]"], check=True)
        packages = json.loads(report.read_text())["install"]
    lines = [line(one) for one in packages if "archive_info" in one["download_info"]]
    python = ".".join(map(str, sys.version_info[:2]))
    text = HEADER.format(python=python) + "".join(sorted(filter(None, lines), key=str.lower))
    (HERE / "requirements.lock").write_text(text)


def line(package: dict) -> str | None:
    """None for what is locked elsewhere."""
    name, version = package["metadata"]["name"], package["metadata"]["version"]
    if name in SEPARATE:
        return None
    return f"{name}=={version} --hash=sha256:{package['download_info']['archive_info']['hashes']['sha256']}\n"


if __name__ == "__main__":
    main()
