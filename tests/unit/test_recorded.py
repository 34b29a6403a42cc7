"""Recorded kernel graphs: the committed ones are sound, what is saved comes back, and a bad file says what is wrong."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.recorded import FOLDER, RecordingError, load, load_all, save
from opara_backend.scheduling.schedule import verify
from tests.gpu_profiles import tiny_recording

FILES = sorted(FOLDER.glob("*.json.gz"))


def rewritten(path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """The recording at `path` after `change` to its document."""
    document = json.loads(gzip.decompress(path.read_bytes()))
    change(document)
    path.write_bytes(gzip.compress(json.dumps(document).encode()))
    return path


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_committed_recordings_are_sound(path: Path) -> None:
    recording = load(path)
    assert path.name == f"{recording.name}.json.gz"
    assert recording.profile.device is not None
    assert all(kernel.duration > 0 for kernel in recording.profile.kernels)
    assert recording.measured[0].schedule.streams == 1, "one stream is measured first"
    for measured in recording.measured:
        verify(recording.graph, measured.schedule)
        assert measured.seconds > 0


def test_all_are_loaded_by_name() -> None:
    assert len(FILES) >= 13
    assert [f"{recording.name}.json.gz" for recording in load_all()] == [path.name for path in FILES]


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    recording = tiny_recording()
    path = save(recording, tmp_path / "new")
    assert path.name == "tiny-float16.json.gz"
    assert load(path) == recording
    assert load_all(tmp_path / "new") == (recording,)
    before = path.read_bytes()
    assert save(recording, tmp_path / "new").read_bytes() == before


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b'{"schema": 1}', id="not compressed"),
        pytest.param(gzip.compress(b'{"schema": 1}' * 100)[:-20], id="cut off"),
        pytest.param(gzip.compress(b"x" * 100)[:10] + b"\xff" * 20, id="damaged"),
        pytest.param(gzip.compress(b"{"), id="not JSON"),
        pytest.param(gzip.compress(b'"\xff"'), id="not text"),
    ],
)
def test_a_file_of_another_kind(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "other.json.gz"
    path.write_bytes(content)
    with pytest.raises(RecordingError, match=r"other\.json\.gz: not a compressed JSON file"):
        load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda d: d.update(schema=2), "schema 2 found, 1 accepted; record it again", id="schema"),
        pytest.param(lambda d: d.clear(), "schema None found", id="no schema"),
        pytest.param(lambda d: d.pop("about"), "'about'", id="no about"),
        pytest.param(lambda d: d.pop("graph"), "'graph'", id="no graph"),
        pytest.param(lambda d: d.pop("profile"), "'profile'", id="no profile"),
        pytest.param(lambda d: d.pop("measured"), "'measured'", id="no measured"),
        pytest.param(lambda d: d["graph"].pop("edges"), "missing or unknown fields: 'edges'", id="no edges"),
        pytest.param(lambda d: d["measured"][0].pop("seconds"), "'seconds'", id="no seconds"),
        pytest.param(lambda d: d["measured"][0].update(seconds="fast"), "'fast'", id="seconds of text"),
        pytest.param(lambda d: d["profile"]["device"].pop("sms"), "sms", id="no multiprocessors"),
        pytest.param(lambda d: d["profile"]["kernels"][0].update(colour=1), "colour", id="an unknown field"),
        pytest.param(
            lambda d: d["profile"]["kernels"].pop(), "2 kernels profiled, the graph has 3", id="short profile"
        ),
        pytest.param(
            lambda d: d["graph"]["kernels"][2]["reads"].append("nowhere"), "'nowhere'.*no buffer", id="illegal graph"
        ),
        pytest.param(
            lambda d: d["graph"]["edges"][0].update(src=2, dst=0), "goes backwards in program order", id="edge back"
        ),
        pytest.param(
            lambda d: d["profile"]["kernels"][0]["launches"][0].update(grid=[0, 1, 1]), "Launch.grid", id="no blocks"
        ),
    ],
)
def test_a_recording_that_is_wrong_says_what(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    path = rewritten(save(tiny_recording(), tmp_path), change)
    with pytest.raises(RecordingError, match=rf"tiny-float16\.json\.gz: .*{message}"):
        load(path)


def test_a_document_that_is_no_object(tmp_path: Path) -> None:
    path = tmp_path / "list.json.gz"
    path.write_bytes(gzip.compress(b"[]"))
    with pytest.raises(RecordingError, match="schema 'list' found"):
        load(path)
