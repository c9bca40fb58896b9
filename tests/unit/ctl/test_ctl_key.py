"""lightllmctl key: the file holds hashes, is changed all at once, and a key is told once."""

from __future__ import annotations

import json
import os
import stat
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from lightllmd.config import key_editing, keys
from lightllmd.config.keys import ApiKey
from lightllmd.errors import ConfigInvalid


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.toml"


def test_a_key_is_told_once_and_its_hash_is_kept(ctl, file: Path) -> None:
    made = ctl("key", "add", "alice", "--file", str(file))
    secret = made.out.strip()
    assert (made.code, made.out.count("\n"), len(secret)) == (0, 1, 46)
    assert "a running daemon takes it up within seconds" in made.err
    [key] = keys.read(str(file))
    assert key == ApiKey(name="alice", sha256=keys.hashed(secret))
    assert secret not in file.read_text()
    assert secret not in ctl("key", "list", "--file", str(file)).out
    assert stat.S_IMODE(file.stat().st_mode) == 0o640


def test_limits_and_expiry_are_written_as_the_daemon_reads_them(ctl, file: Path) -> None:
    options = ["--expires", "30d", "--admin", "--requests-per-minute", "60", "--tokens-per-minute", "90000"]
    options += ["--max-concurrent", "4", "--weight", "2.5", "--file", str(file)]
    assert ctl("key", "add", "b.ob@example.org", *options).code == 0
    [key] = keys.read(str(file))
    assert key.expires is not None
    assert abs(key.expires - time.time() - 30 * 86400) < 60
    assert (key.admin, key.requests_per_minute, key.tokens_per_minute, key.max_concurrent, key.weight) == (
        True,
        60,
        90000,
        4,
        2.5,
    )
    [listed] = json.loads(ctl("key", "list", "--json", "--file", str(file)).out)["keys"]
    assert (listed["name"], listed["expired"], listed["tokens_per_minute"]) == ("b.ob@example.org", False, 90000)
    table = ctl("key", "list", "--file", str(file)).out.splitlines()
    assert table[0].split()[:3] == ["NAME", "EXPIRES", "ADMIN"]
    assert "90,000" in table[1]


WRITTEN = f"""\
# what others wrote stays
[keys.first]  # his
sha256 = "{keys.hashed("1")}"

# about the second
[keys.second]
sha256 = "{keys.hashed("2")}"
admin = true

[keys.third]
sha256 = "{keys.hashed("3")}"
"""


def test_a_revoked_key_goes_and_all_else_stays(ctl, file: Path) -> None:
    file.write_text(WRITTEN)
    file.chmod(0o600)
    assert ctl("key", "revoke", "second", "--file", str(file)).code == 0
    assert [key.name for key in keys.read(str(file))] == ["first", "third"]
    assert file.read_text() == WRITTEN.replace(f'[keys.second]\nsha256 = "{keys.hashed("2")}"\nadmin = true\n\n', "")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert ctl("key", "revoke", "first", "--file", str(file)).code == 0
    assert ctl("key", "revoke", "third", "--file", str(file)).code == 0
    assert keys.read(str(file)) == []  # a table without keys, which admits no client
    assert ctl("key", "add", "fourth", "--file", str(file)).code == 0
    assert [key.name for key in keys.read(str(file))] == ["fourth"]


@pytest.mark.parametrize(
    ("text", "arguments", "code", "part"),
    [
        (WRITTEN, ["add", "first"], 6, "keys.first: there is such a key already"),
        (WRITTEN, ["revoke", "fourth"], 6, "keys.fourth: there is no such key; known: first, second, third"),
        (f'[keys]\na = {{sha256 = "{"0" * 64}"}}\n[keys.b]\nsha256 = 1\n', ["add", "c"], 6, "keys.b.sha256: 1 is"),
        ("sk-one\n", ["add", "a"], 6, "is a list of keys"),
        (None, ["revoke", "a"], 6, "there is no such key; known: none"),
        (None, ["add", "a b"], 2, "is no name of a key"),
        (None, ["add", "a", "--expires", "2001-01-01T00:00:00Z"], 2, "is past"),
        (None, ["add", "a", "--expires", "2101-01-01T00:00:00"], 2, "no time zone"),
        (None, ["add", "a", "--expires", "soon"], 2, "no duration"),
        (None, ["add", "a", "--weight", "0"], 2, "0"),
    ],
)
def test_what_cant_be_done_changes_nothing(
    ctl, file: Path, text: str | None, arguments: list[str], code: int, part: str
) -> None:
    if text is not None:
        file.write_text(text)
    refused = ctl("key", *arguments, "--file", str(file))
    assert (refused.code, refused.out) == (code, "")
    assert part in refused.err
    assert (file.read_text() if text is not None else file.exists()) == (text or False)
    assert os.listdir(file.parent) == (["keys.toml"] if text is not None else [])


def test_an_entry_in_one_line_is_taken_out(file: Path) -> None:
    file.write_text(f'[keys]\na = {{sha256 = "{keys.hashed("a")}"}}\nb = {{sha256 = "{keys.hashed("b")}"}}\n')
    key_editing.revoke(str(file), "a")
    assert [key.name for key in keys.read(str(file))] == ["b"]


def test_a_link_stays_a_link(file: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    file.symlink_to(tmp_path / "real" / "keys")
    key_editing.add(str(file), ApiKey(name="a", sha256=keys.hashed("a")))
    assert file.is_symlink()
    assert [key.name for key in keys.read(str(file))] == ["a"]


def test_keys_that_are_added_at_the_same_time_are_all_there(file: Path) -> None:
    def add(number: int) -> None:
        key_editing.add(str(file), ApiKey(name=f"k{number}", sha256=keys.hashed(str(number))))

    threads = [threading.Thread(target=add, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {key.name for key in keys.read(str(file))} == {f"k{number}" for number in range(20)}


def test_a_folder_that_cant_be_written_is_told(file: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigInvalid, match="its folder does not exist"):
        key_editing.add(str(tmp_path / "none" / "keys"), ApiKey(name="a", sha256=keys.hashed("a")))


def test_the_file_is_the_running_daemons_and_a_reload_follows(ctl, daemon, file: Path) -> None:
    daemon.get("/v1/config", {"http": {"api_keys_file": str(file)}})
    job = {"id": 1, "verb": "reload", "phase": "done", "outcome": "done", "message": "in force: http.api_keys_file"}
    daemon.post("/v1/reload", job)
    done = ctl("key", "add", "alice", "--reload")
    assert [key.name for key in keys.read(str(file))] == ["alice"]
    assert ("POST", "/v1/reload") in [seen[:2] for seen in daemon.seen]
    assert done.out.startswith("sk-")
    daemon.get("/v1/config", {"http": {"api_keys_file": ""}})
    refused = ctl("key", "list")
    assert refused.code == 1
    assert "no [http] api_keys_file" in refused.err


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_a_file_that_root_makes_may_be_read_by_the_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = {"lightllmd": SimpleNamespace(gr_gid=12345)}
    monkeypatch.setattr(key_editing.grp, "getgrnam", groups.__getitem__)
    for folder_group, group in ((0, 12345), (54321, 54321)):
        folder = tmp_path / str(folder_group)
        folder.mkdir()
        os.chown(folder, 0, folder_group)
        key_editing.add(str(folder / "keys"), ApiKey(name="a", sha256=keys.hashed("a")))
        assert (folder / "keys").stat().st_gid == group
    monkeypatch.setattr(key_editing.grp, "getgrnam", {}.__getitem__)
    key_editing.add(str(tmp_path / "keys"), ApiKey(name="a", sha256=keys.hashed("a")))
    assert (tmp_path / "keys").stat().st_gid == tmp_path.stat().st_gid
