"""List what the project is installed from, and compare it with what is installed here.

``tools/sbom.py`` writes a CycloneDX document (https://cyclonedx.org, 1.6, JSON) of every package
that ``constraints.txt`` names: version, licence, what it requires, and whether the project asks
for it directly.  The same input gives the same bytes.  ``--audit`` checks this environment
instead: versions, and every installed file by the checksum that its package recorded.  Neither
needs a network.  Known vulnerabilities are a question for a service: pip-audit asks one.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import re
import sys
import tomllib
import uuid
from collections.abc import Sequence
from importlib.metadata import Distribution, PackagePath, distributions
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from megatron.errors import ConfigError, RunError, run_command  # noqa: E402

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_PREFIX = "License :: OSI Approved :: "


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the list, or check the environment; return 1 if something differs."""
    parser = argparse.ArgumentParser(
        prog="tools/sbom.py",
        description="List what the project is installed from (CycloneDX), or check it.",
        allow_abbrev=False,
    )
    parser.add_argument("-o", "--output", metavar="FILE", help="file to write (default: printed)")
    parser.add_argument("--constraints", default=str(ROOT / "constraints.txt"), metavar="FILE")
    parser.add_argument(
        "--audit", action="store_true", help="compare this environment with the constraints"
    )
    options = parser.parse_args(arguments)
    pinned = read_constraints(Path(options.constraints))
    installed = {normal(found.metadata["Name"]): found for found in distributions()}
    if options.audit:
        return _audit(pinned, installed)
    text = json.dumps(document(pinned, installed), indent=1, ensure_ascii=False) + "\n"
    if options.output is None:
        sys.stdout.write(text)
        return 0
    try:
        Path(options.output).parent.mkdir(parents=True, exist_ok=True)
        Path(options.output).write_text(text, encoding="utf-8")
    except OSError as error:
        raise RunError(f"{options.output}: cannot be written: {error.strerror}") from error
    print(options.output)
    return 0


def normal(name: str) -> str:
    """Return a package's name in its one spelling (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def read_constraints(file: Path) -> dict[str, str]:
    """Return the version of each package.

    Raises:
        ConfigError: the file cannot be read, or a line pins nothing.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from error
    pinned = {}
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        name, equals, version = text.partition(";")[0].strip().partition("==")
        if not equals or not version or "*" in version:
            raise ConfigError(f"{file}:{number}: '{text}' is no exact version (name==version)")
        pinned[normal(name)] = version
    return pinned


def requirements(texts: Sequence[str]) -> set[str]:
    """Return the names in requirements such as ``numpy>=1.26; extra == 'x'``."""
    return {normal(match.group()) for text in texts if (match := _NAME.match(text))}


def asked_for() -> set[str]:
    """Return the packages that the project itself asks for, extras included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project.get("optional-dependencies", {}).values()
    return requirements([*project["dependencies"], *(one for extra in extras for one in extra)])


def document(pinned: dict[str, str], installed: dict[str, Distribution]) -> dict[str, Any]:
    """Return the CycloneDX document of the packages."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    direct = asked_for() & pinned.keys()
    root = f"{project['name']}@{project['version']}"
    content: dict[str, Any] = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "component": {
                "type": "application",
                "bom-ref": root,
                "name": project["name"],
                "version": project["version"],
                "licenses": [{"license": {"id": project["license"]}}],
            }
        },
        "components": [
            _component(name, version, installed.get(name), direct=name in direct)
            for name, version in sorted(pinned.items())
        ],
        "dependencies": [
            {"ref": root, "dependsOn": sorted(_reference(name, pinned[name]) for name in direct)},
            *(_dependency(name, pinned, installed) for name in sorted(pinned)),
        ],
    }
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).digest()[:16]
    return {**content, "serialNumber": f"urn:uuid:{uuid.UUID(bytes=digest, version=4)}"}


def _reference(name: str, version: str) -> str:
    return f"pkg:pypi/{name}@{version}"


def _component(
    name: str, version: str, found: Distribution | None, *, direct: bool
) -> dict[str, Any]:
    component: dict[str, Any] = {
        "type": "library",
        "bom-ref": _reference(name, version),
        "name": name,
        "version": version,
        "purl": _reference(name, version),
        "scope": "required",
        "properties": [{"name": "neomix:direct", "value": str(direct).lower()}],
    }
    licence = None if found is None else _licence(found)
    if licence is not None:
        component["licenses"] = [licence]
    return component


def _licence(found: Distribution) -> dict[str, Any] | None:
    """Return what a package says of its licence; an expression where it gives one."""
    metadata = found.metadata
    if expressions := metadata.get_all("License-Expression"):
        return {"expression": expressions[0]}
    kinds = [one for one in metadata.get_all("Classifier") or () if one.startswith(_PREFIX)]
    if kinds:
        return {"license": {"name": ", ".join(one.removeprefix(_PREFIX) for one in kinds)}}
    lines = "".join(metadata.get_all("License") or ()).strip().splitlines()
    return {"license": {"name": lines[0][:100]}} if lines else None


def _dependency(
    name: str, pinned: dict[str, str], installed: dict[str, Distribution]
) -> dict[str, Any]:
    found = installed.get(name)
    required = [one for one in (found.requires or ()) if "extra ==" not in one] if found else []
    named = sorted((requirements(required) & pinned.keys()) - {name})
    return {
        "ref": _reference(name, pinned[name]),
        "dependsOn": [_reference(one, pinned[one]) for one in named],
    }


def _audit(pinned: dict[str, str], installed: dict[str, Distribution]) -> int:
    problems, checked, absent = [], 0, []
    for name, version in sorted(pinned.items()):
        found = installed.get(name)
        if found is None:
            absent.append(name)
            continue
        if found.version.partition("+")[0] != version:
            problems.append(f"{name} is {found.version}, constraints.txt says {version}")
        for file in found.files or ():
            problem = _changed(file)
            checked += file.hash is not None
            if problem:
                problems.append(f"{name}: {problem}")
    for problem in problems:
        print(problem)
    print(
        f"{len(pinned) - len(absent)} of {len(pinned)} packages are installed here; "
        f"{checked:,} files compared with their packages' checksums; {len(problems)} problems"
    )
    if absent:
        print(f"not installed: {', '.join(absent)}")
    print("known vulnerabilities: pip-audit -r constraints.txt (asks a service on the network)")
    return 1 if problems else 0


def _changed(file: PackagePath) -> str | None:
    if file.hash is None or file.hash.mode not in hashlib.algorithms_guaranteed:
        return None
    path = Path(str(file.locate()))
    try:
        content = path.read_bytes()
    except OSError:
        # pip removes compiled files, and a package's scripts may have been left out.
        return None if _left_out(file) else f"{file} is missing"
    digest = base64.urlsafe_b64encode(hashlib.new(file.hash.mode, content).digest())
    if digest.rstrip(b"=").decode() == file.hash.value:
        return None
    return f"{file} has been changed since it was installed"


def _left_out(file: PackagePath) -> bool:
    return file.suffix == ".pyc" or ".." in file.parts


if __name__ == "__main__":
    sys.exit(run_command(main))
