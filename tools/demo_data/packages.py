"""Read the packages that the demo data is made of, without unpacking them to disk."""

import hashlib
import json
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SOURCES = {
    "iconify-json-noto-1.2.9.tgz": "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
    "iconify-json-twemoji-1.2.5.tgz": "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
    "iconify-json-fluent-emoji-flat-1.2.6.tgz": "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
    "iconify-json-emojione-1.2.3.tgz": "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e",
    "iconify-json-fxemoji-1.2.2.tgz": "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef",
    "emojibase-data-17.0.0.tgz": "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
    "openclipart-png_1%3a0.18+dfsg-19_all.deb": "f07f1545a2970c2cf3fa339bc2405da1a95cf2b1827bfa05bf73eb1c20291c02",
    "openclipart-svg_1%3a0.18+dfsg-19_all.deb": "989712d90d57dfa3230049f553bb43b76c30ee4d4b8c5f6e106e33f7db5cbdc5",
}
"""Package file -> sha256."""


def verify_sources(folder: Path) -> None:
    for name, expected in SOURCES.items():
        path = folder / name
        if not path.is_file():
            raise SystemExit(f"{path} is missing; `build_demo_data.py --help` says how to fetch the sources")
        actual = hashlib.sha256(path.read_bytes()).hexdigest()
        if actual != expected:
            raise SystemExit(f"{path} has sha256 {actual}, not {expected}: another version of the package?")


def read_npm_json(sources: Path, package: str, member: str) -> Any:
    """One JSON file of an npm package; an absent one is an empty object."""
    [archive] = [sources / name for name in SOURCES if name.startswith(package)]
    with tarfile.open(archive) as tar:
        if f"package/{member}" not in tar.getnames():
            return {}
        file = tar.extractfile(f"package/{member}")
        assert file is not None
        return json.load(file)


def read_deb(archive: Path, suffix: str) -> Iterator[tuple[str, bytes]]:
    """(path below the package's picture folder without its suffix, bytes) of each file that ends in `suffix`."""
    command = ["dpkg-deb", "--fsys-tarfile", str(archive)]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE) as process,
        tarfile.open(fileobj=process.stdout, mode="r|") as tar,
    ):
        for member in tar:
            # a link in a stream cannot be extracted
            file = tar.extractfile(member) if member.isfile() else None
            if file is not None and member.name.endswith(suffix):
                path = member.name.split(f"/openclipart/{suffix[1:]}/")[1].removesuffix(suffix)
                yield path, file.read()
