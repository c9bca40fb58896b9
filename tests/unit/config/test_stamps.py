"""A file that was put back, copied or only touched is the same one; any other is told by name."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from lightllmd.config import stamps
from lightllmd.config.stamps import differing, require_unchanged, stamp, touched
from lightllmd.errors import ModelChanged

CONTENT = b"weights" * 100


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(CONTENT)
    return path


def test_the_same_file_again_is_unchanged(file: Path, tmp_path: Path) -> None:
    before = [stamp(str(file)), stamp(str(tmp_path / "absent"))]
    assert not touched(before)
    shutil.copy(file, tmp_path / "backup")
    file.unlink()
    with pytest.raises(ModelChanged, match=r"model\.safetensors changed since the model was planned \(it is gone\)"):
        require_unchanged(before)
    shutil.copyfile(tmp_path / "backup", file)
    assert touched(before)
    require_unchanged(before)
    os.utime(file, (1, 1))
    require_unchanged(before)


@pytest.mark.parametrize(
    ("content", "how"), [(CONTENT[:-1] + b"S", "its content is another"), (CONTENT[:-1], "700 -> 699 bytes")]
)
def test_another_content_is_told_even_with_the_old_time(file: Path, content: bytes, how: str) -> None:
    before = stamp(str(file))
    file.write_bytes(content)
    os.utime(file, ns=(before.mtime_ns, before.mtime_ns))
    with pytest.raises(ModelChanged, match=how):
        require_unchanged([before])
    assert differing([before], [stamp(str(file))]) == [str(file)]


def test_a_file_that_came_or_became_something_else_is_told(file: Path, tmp_path: Path) -> None:
    came = stamp(str(tmp_path / "chat_template.jinja"))
    (tmp_path / "chat_template.jinja").write_text("{{ 1 }}")
    with pytest.raises(ModelChanged, match=r"chat_template\.jinja .*it was not there"):
        require_unchanged([came])
    before = stamp(str(file))
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(ModelChanged, match="it is a pipe"):
        require_unchanged([before])


def test_of_a_large_file_header_size_and_time_are_compared(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it would take too long at each start; so a copy of it is another file, until a reload."""
    monkeypatch.setattr(stamps, "WHOLE", 10)
    before = stamp(str(file))
    file.chmod(0o600)
    require_unchanged([before])
    os.utime(file, (1, 1))
    with pytest.raises(ModelChanged):
        require_unchanged([before])
    file.write_bytes(b"W" + CONTENT[1:])
    os.utime(file, ns=(before.mtime_ns, before.mtime_ns))
    with pytest.raises(ModelChanged):
        require_unchanged([before])
