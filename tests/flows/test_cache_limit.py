"""The cache directory at the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.flows.small import call, small


def test_doctor_says_what_the_cache_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from qrpo_core.inspection import doctor

    monkeypatch.setattr(doctor, "CHECKS", (doctor.check_cache,))
    monkeypatch.setenv("QRPO_CACHE", str(tmp_path))
    for place, count in (("rounded/a", 1500), ("artifacts/b/policy", 500), ("training/c/checkpoint-1", 42)):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "weights").write_bytes(b"x" * count)
    assert call("doctor") == 0
    said = capsys.readouterr().out
    assert f"2 kB of at most 20 GB of copies, 42 B of trainings that have not ended, in {tmp_path}" in said
    monkeypatch.setenv("QRPO_CACHE_GB", "a lot")
    assert call("doctor") == 0
    assert "QRPO_CACHE_GB: 'a lot' is not a number of gigabytes" in capsys.readouterr().out


def test_a_limit_of_the_cache_that_is_no_number_is_refused_before_anything_is_computed(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QRPO_CACHE_GB", "a lot")
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump(small(tiny_model, tmp_path / "store")))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "prefect"))
    before = set(tmp_path.rglob("*"))
    assert call("run", str(file)) == 2
    assert set(tmp_path.rglob("*")) == before
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "qrpo: 'a lot' is not a number of gigabytes [QRPO_CACHE_GB]: 0 or more"
