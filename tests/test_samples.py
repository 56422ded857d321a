"""samples/: every clip is in a manifest with its origin and licence, and all of it is small."""

import json

import pytest
from conftest import SAMPLES

from fastconformer.audio.files import audio_duration
from fastconformer.formats.manifest import read_manifest

MANIFESTS = sorted(SAMPLES.glob("*.jsonl"))
LICENCES = {"Apache-2.0", "public domain", "CC BY 3.0", "CC BY 4.0", "CC BY-SA 3.0", "CC BY-SA 4.0"}


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda path: path.name)
def test_manifests(manifest):
    clips, left_out = read_manifest(manifest)
    assert clips and not left_out
    for line in map(json.loads, manifest.read_text(encoding="utf-8").splitlines()):
        assert line["license"] in LICENCES and line["source"]
        length = audio_duration(manifest.parent / line["audio_filepath"])
        assert line.get("offset", 0) + line["duration"] <= length + 1e-3
        assert "offset" in line or abs(line["duration"] - length) <= 2e-3


def test_nothing_lies_there_without_a_licence():
    named = {"espeak.wav"}  # spoken by this project
    for manifest in MANIFESTS:
        lines = manifest.read_text(encoding="utf-8").splitlines()
        named |= {json.loads(line)["audio_filepath"] for line in lines}
    files = [p for p in SAMPLES.rglob("*") if p.is_file()]
    clips = {str(p.relative_to(SAMPLES)) for p in files if p.suffix not in (".jsonl", ".md")}
    assert clips == named
    readme = (SAMPLES / "README.md").read_text(encoding="utf-8")
    assert all(licence in readme for licence in LICENCES) and "espeak.wav" in readme
    assert sum(p.stat().st_size for p in files) < 2_500_000
