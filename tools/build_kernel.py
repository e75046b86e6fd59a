"""Compile capsnb/web/kernel.c to WebAssembly and embed it in kernel.js.  Needs clang and lld (Debian's packages)."""

import base64
import hashlib
import subprocess
import sys
import tempfile
from pathlib import Path

WEB = Path(__file__).parents[1] / "capsnb" / "web"
SOURCE = WEB / "kernel.c"
# One page of memory, nearly all of it free: the stack is not used.
FLAGS = "--target=wasm32 -msimd128 -O3 -ffreestanding -nostdlib -Wl,--no-entry,--strip-all,-z,stack-size=1024".split()

TEXT = """\
// Made by tools/build_kernel.py from kernel.c; make it again after every change there.
export const source = "{source}"; // SHA-256 of kernel.c
export const wasm = Uint8Array.from(atob("{code}"), (character) => character.charCodeAt(0));
"""


def fingerprint() -> str:
    """The SHA-256 of kernel.c, which kernel.js repeats: a test compares the two."""
    return hashlib.sha256(SOURCE.read_text("utf-8").encode()).hexdigest()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "kernel.wasm"
        subprocess.run(["clang", *FLAGS, "-o", str(out), str(SOURCE)], check=True)
        code = base64.b64encode(out.read_bytes()).decode()
    (WEB / "kernel.js").write_text(TEXT.format(source=fingerprint(), code=code), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
