"""The list of what the project is installed from, and the check of what is installed."""

from __future__ import annotations

import json
import re
import sys
from importlib.metadata import Distribution
from pathlib import Path

import pytest
from support.source import ROOT

from megatron.errors import ConfigError

sys.path.insert(0, str(ROOT / "tools"))

import sbom


def test_every_pinned_package_is_listed_with_what_it_requires(tmp_path: Path) -> None:
    assert sbom.main(["-o", str(tmp_path / "deep" / "sbom.json")]) == 0
    content = json.loads((tmp_path / "deep" / "sbom.json").read_text(encoding="utf-8"))
    assert (content["bomFormat"], content["specVersion"]) == ("CycloneDX", "1.6")
    assert re.fullmatch(
        r"urn:uuid:[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", content["serialNumber"]
    )
    pinned = sbom.read_constraints(ROOT / "constraints.txt")
    parts = {part["name"]: part for part in content["components"]}
    assert {name: part["version"] for name, part in parts.items()} == pinned
    for part in parts.values():
        assert part["purl"] == f"pkg:pypi/{part['name']}@{part['version']}"
        assert part["type"] == "library"
    references = {part["bom-ref"] for part in parts.values()}
    root = content["metadata"]["component"]["bom-ref"]
    tree = {entry["ref"]: entry["dependsOn"] for entry in content["dependencies"]}
    assert tree.keys() == references | {root}
    assert all(set(required) <= references for required in tree.values())
    assert parts["numpy"]["bom-ref"] in tree[root]
    assert parts["numpy"]["bom-ref"] in tree[parts["scipy"]["bom-ref"]]
    assert "BSD" in json.dumps(parts["numpy"]["licenses"])
    direct = {"name": "neomix:direct", "value": "true"}
    assert direct in parts["torch"]["properties"]
    assert direct not in parts["filelock"]["properties"]
    sbom.main(["-o", str(tmp_path / "again.json")])
    again = (tmp_path / "again.json").read_bytes()
    assert again == (tmp_path / "deep" / "sbom.json").read_bytes()


def package(folder: Path, name: str, version: str) -> Path:
    """Install a package of one file by hand."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (folder / f"{name}.py").write_text("x = 1\n")
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    digest = "sha256=sb8elWJfnWOyPRgSvyzmw10RVlC8X9KPVFpSbgwTxK0"
    (info / "RECORD").write_text(f"{name}.py,{digest},6\n{name}-{version}.dist-info/RECORD,,\n")
    return folder / f"{name}.py"


def test_what_differs_from_the_constraints_or_its_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import base64
    import hashlib

    file = package(tmp_path, "little", "1.0")
    digest = base64.urlsafe_b64encode(hashlib.sha256(file.read_bytes()).digest())
    record = tmp_path / "little-1.0.dist-info" / "RECORD"
    record.write_text(f"little.py,sha256={digest.rstrip(b'=').decode()},6\n")
    (tmp_path / "constraints.txt").write_text("# pins\nlittle==1.0\nabsent==2.0\n")
    monkeypatch.setattr(
        sbom, "distributions", lambda: [Distribution.at(tmp_path / "little-1.0.dist-info")]
    )
    words = ["--audit", "--constraints", str(tmp_path / "constraints.txt")]
    assert sbom.main(words) == 0
    told = capsys.readouterr().out
    assert "1 files compared with their packages' checksums; 0 problems" in told
    assert "not installed: absent" in told
    file.write_text("x = 2\n")
    assert sbom.main(words) == 1
    assert "little: little.py has been changed" in capsys.readouterr().out
    file.unlink()
    assert sbom.main(words) == 1
    assert "little.py is missing" in capsys.readouterr().out
    (tmp_path / "constraints.txt").write_text("little==1.1\n")
    assert sbom.main(words) == 1
    assert "little is 1.0, constraints.txt says 1.1" in capsys.readouterr().out


@pytest.mark.parametrize("line", ["numpy", "numpy>=1", "numpy==1.*"])
def test_a_line_that_pins_nothing_is_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / "c.txt").write_text(f"a==1\n{line}\n")
    with pytest.raises(ConfigError, match=r"c\.txt:2: .* no exact version"):
        sbom.read_constraints(tmp_path / "c.txt")
    with pytest.raises(ConfigError, match="cannot be read"):
        sbom.read_constraints(tmp_path / "none.txt")
