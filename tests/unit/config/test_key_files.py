"""A table of named keys: what it may say, and each fault with its line, field and value."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightllmd.config import keys
from lightllmd.config.diff import diff
from lightllmd.config.keys import ApiKey, KeysInvalid
from lightllmd.config.load import load
from lightllmd.errors import ConfigInvalid

HASH = keys.hashed("sk-one")
OTHER = keys.hashed("sk-two")
FULL = f"""\
# ours
[keys.alice]
sha256 = "{HASH.upper()}"
expires = 2027-01-01T02:00:00+02:00
admin = true
requests_per_minute = 60
tokens_per_minute = 100_000
max_concurrent = 4
weight = 2.5

[keys."bob@example.org"]
sha256 = "{OTHER}"
"""


def write(folder: Path, text: str) -> str:
    file = folder / "keys.toml"
    file.write_text(text)
    file.chmod(0o640)
    return str(file)


def test_a_table_says_all_that_a_key_may(tmp_path: Path) -> None:
    alice, bob = keys.read(write(tmp_path, FULL))
    assert alice == ApiKey(
        name="alice",
        sha256=HASH,
        expires=1798761600.0,
        admin=True,
        requests_per_minute=60,
        tokens_per_minute=100_000,
        max_concurrent=4,
        weight=2.5,
    )
    assert bob == ApiKey(name="bob@example.org", sha256=OTHER)
    assert (alice.limited, bob.limited, bob.admin) == (True, False, False)


FAULTS = {
    "not a hash": ('[keys.a]\nsha256 = "sk-one"\n', 2, "keys.a.sha256", "64 hexadecimal digits"),
    "no hash": ("[keys.a]\nadmin = true\n", 1, "keys.a", "sha256 is missing"),
    "a misspelt field": (f'[keys.a]\nsha256 = "{HASH}"\nexpire = 1\n', 3, "keys.a.expire", "nearest: expires"),
    "a wrong type": (f'[keys.a]\nsha256 = "{HASH}"\nadmin = "yes"\n', 3, "keys.a.admin", '"yes" is a string'),
    "out of bounds": (f'[keys.a]\nsha256 = "{HASH}"\nmax_concurrent = -1\n', 3, "keys.a.max_concurrent", "-1 is out"),
    "no weight": (f'[keys.a]\nsha256 = "{HASH}"\nweight = 0\n', 3, "keys.a.weight", "> 0"),
    "a moment as text": (
        f'[keys.a]\nsha256 = "{HASH}"\nexpires = "2027-01-01"\n',
        3,
        "keys.a.expires",
        "without quotes",
    ),
    "a moment of no zone": (
        f'[keys.a]\nsha256 = "{HASH}"\nexpires = 2027-01-01T00:00:00\n',
        3,
        "keys.a.expires",
        "2027-01-01T00:00:00",
    ),
    "a name that is none": (f'[keys."a b"]\nsha256 = "{HASH}"\n', 1, "keys.a b", "no name of a key"),
    "one key, two names": (
        f'[keys.a]\nsha256 = "{HASH}"\n[keys.b]\nsha256 = "{HASH}"\n',
        4,
        "keys.b.sha256",
        'is the key of "a" already',
    ),
    "another table": (f'[keys.a]\nsha256 = "{HASH}"\n[users.b]\nx = 1\n', 3, "users", "unknown table"),
    "no table": (f'[keys]\na = "{HASH}"\n', 2, "keys.a", "expected a table"),
    "no TOML": ("[keys.a\n", 1, "", "TOML syntax"),
}


@pytest.mark.parametrize(("text", "line", "key", "part"), FAULTS.values(), ids=FAULTS)
def test_a_fault_is_told_with_file_line_field_and_value(
    tmp_path: Path, text: str, line: int, key: str, part: str
) -> None:
    file = write(tmp_path, text)
    with pytest.raises(ConfigInvalid) as refused:
        load(None, {"engine.backend": "fake", "http.api_keys_file": file})
    (problem,) = refused.value.problems
    assert (problem.file, problem.line, problem.key) == (file, line, key)
    assert part in problem.message


def test_all_faults_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(KeysInvalid) as refused:
        keys.read(write(tmp_path, '[keys.a]\nsha256 = ""\nadmin = 1\n[keys.b]\nweight = "x"\n'))
    assert [problem.key for problem in refused.value.problems] == [
        "keys.a.sha256",
        "keys.a.admin",
        "keys.b.weight",
        "keys.b",
    ]


def test_a_table_without_keys_lets_nobody_in_and_says_so(tmp_path: Path) -> None:
    """The last key that is revoked is refused, too."""
    flags = {"engine.backend": "fake", "http.api_keys_file": write(tmp_path, "[keys]\n")}
    config = load(None, flags)
    assert config.keys.requests == []
    assert "no client may enter" in config.warnings[0]


def test_a_changed_field_is_a_change_that_tells_no_hash(tmp_path: Path) -> None:
    flags = {"engine.backend": "fake", "http.api_keys_file": write(tmp_path, FULL)}
    old = load(None, flags)
    write(tmp_path, FULL.replace("weight = 2.5", "weight = 1"))
    [change] = diff(old, load(None, flags))
    assert (change.old, change.new, change.reload) == ("2 keys", "2 keys (0 new, 0 gone, 1 changed)", "live")


def test_keys_that_every_user_may_write_are_refused(tmp_path: Path) -> None:
    file = write(tmp_path, FULL)
    Path(file).chmod(0o642)
    with pytest.raises(ConfigInvalid, match=r"http\.api_keys_file: every user of this host may write keys into"):
        load(None, {"engine.backend": "fake", "http.api_keys_file": file})
