"""Writes the locks of both images: every package that they install, pinned and with its hash.

    python deploy/lock.py         # deploy/requirements.lock: what `.[tpu,otlp,gcs,hf]` needs
    python deploy/lock.py ray     # deploy/ray/requirements.lock: what the extra `ray` needs beside the first

It asks pip what that is here: on x86-64 Linux, with the Python of the image. PyTorch is left out: its CPU build has
another index and a file of its own, torch-cpu.lock.
"""

import json
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

HERE = Path(__file__).parent
FIRST = HERE / "requirements.lock"
SEPARATE = {"torch"}
HEADER = """\
# What {image} installs beside {beside}, for x86-64 Linux and Python {python}. Written by deploy/lock.py.
"""


def main() -> None:
    if sys.argv[1:] == ["ray"]:
        locked = FIRST.read_text()
        pinned = {name.lower() for name in re.findall(r"^([\w.-]+)==", locked, flags=re.M)}
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
            constraints.write(re.sub(r" --hash=\S+", "", locked))
            constraints.flush()
            packages = needed(*extra("ray"), "--constraint", constraints.name)
        packages = [one for one in packages if one["metadata"]["name"].lower() not in pinned]
        write(HERE / "ray" / "requirements.lock", packages, image="deploy/ray/Dockerfile", beside="the first image")
    else:
        write(FIRST, needed(f"{HERE.parent}[tpu,otlp,gcs,hf]"), image="deploy/Dockerfile", beside="PyTorch")


def extra(name: str) -> list[str]:
    """What one of the package's extras asks for."""
    return tomllib.loads((HERE.parent / "pyproject.toml").read_text())["project"]["optional-dependencies"][name]


def needed(*words: str) -> list[dict]:
    """What pip would install."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        options = ["--dry-run", "--ignore-installed", "--only-binary", ":all:", "--quiet", "--report", str(report)]
        subprocess.run([sys.executable, "-m", "pip", "install", *options, *words], check=True)
        return json.loads(report.read_text())["install"]


def write(path: Path, packages: list[dict], **words: str) -> None:
    lines = [line(one) for one in packages if "archive_info" in one["download_info"]]
    text = HEADER.format(python=".".join(map(str, sys.version_info[:2])), **words)
    path.write_text(text + "".join(sorted(filter(None, lines), key=str.lower)))


def line(package: dict) -> str | None:
    """None for what is locked elsewhere."""
    name, version = package["metadata"]["name"], package["metadata"]["version"]
    if name in SEPARATE:
        return None
    return f"{name}=={version} --hash=sha256:{package['download_info']['archive_info']['hashes']['sha256']}\n"


if __name__ == "__main__":
    main()
