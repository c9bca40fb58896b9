"""The manual pages: complete, and as roff wants them."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from debian_package import CHECKOUT
from lightllmctl.__main__ import cli as ctl
from lightllmd import errors
from lightllmd.config import features, models
from lightllmd.config.parameters import Config
from lightllmd.config.setting import Reload, fields, tables

NAMES = ("lightllmd.8", "lightllmctl.1", "lightllmd.toml.5")


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("man")
    subprocess.run([sys.executable, CHECKOUT / "packaging/man/build.py", folder], check=True, timeout=60)
    return folder


def rendered(page: Path) -> str:
    """As a wide terminal shows it, without bold and underline."""
    if shutil.which("groff") is None:
        pytest.skip("needs groff")
    command = ["groff", "-man", "-Tutf8", "-P-cbou", "-rLL=300n", page]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("checker", [("groff", "-ww", "-man", "-Tutf8", "-z"), ("mandoc", "-Tlint", "-Wwarning")])
def test_a_page_gives_no_warning(pages: Path, name: str, checker: tuple[str, ...]) -> None:
    if shutil.which(checker[0]) is None:
        pytest.skip(f"needs {checker[0]}")
    done = subprocess.run([*checker, pages / name], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_every_setting_is_in_the_manual(pages: Path) -> None:
    text = rendered(pages / "lightllmd.toml.5")
    for field in fields(Config):
        assert re.search(rf"^ +{field.name}( = |$)", text, re.MULTILINE), field.key
    headings = [f"[{table}]" for table in tables(Config)] + [f"[{models.TABLE}.NAME]"]
    for heading in headings:
        assert re.search(rf"^{re.escape(heading)}$", text, re.MULTILINE), heading
    for kind in typing.get_args(Reload):
        assert re.search(rf"^ +{kind}( |$)", text, re.MULTILINE), kind


def test_the_table_of_features_is_in_the_manual(pages: Path) -> None:
    _, _, text = rendered(pages / "lightllmd.toml.5").partition("FEATURES OF GENERATION")
    table = features.table()
    for letter, name, cells in table.rows:
        marks = (("+" if cell.works else "-") + str(cell.remark or "") for cell in cells)
        assert re.search(rf"^ +{letter}  {name} *{' +'.join(map(re.escape, marks))}$", text, re.MULTILINE), name
    for number, remark in enumerate(table.remarks, 1):
        assert re.search(rf"^ +{number} +{re.escape(remark)}$", text, re.MULTILINE), remark


def verbs(group: click.Group, prefix: str = "") -> Iterator[tuple[str, click.Command]]:
    for name, command in group.commands.items():
        if not command.hidden:
            yield prefix + name, command
        if isinstance(command, click.Group):
            yield from verbs(command, f"{prefix}{name} ")


def test_every_verb_and_option_is_in_the_manual(pages: Path) -> None:
    text = rendered(pages / "lightllmctl.1")
    for name, command in verbs(ctl):
        assert re.search(rf"^   {name}( |$)", text, re.MULTILINE), name
        for option in command.params:
            if isinstance(option, click.Option) and not option.hidden:
                assert option.opts[-1] in text, (name, option.opts)


def test_every_exit_code_of_lightllmctl_is_in_the_manual(pages: Path) -> None:
    _, _, status = rendered(pages / "lightllmctl.1").partition("EXIT STATUS")
    for name, code in vars(errors).items():
        if name.startswith("CTL_"):
            assert re.search(rf"^ +{code} +[A-Z]", status, re.MULTILINE), name


def test_every_exit_code_of_the_daemon_is_in_the_manual(pages: Path) -> None:
    _, _, status = rendered(pages / "lightllmd.8").partition("EXIT STATUS")
    status, _, _ = status.partition("ENVIRONMENT")
    for name, code in vars(errors).items():
        if name.startswith("EXIT_") and name not in ("EXIT_OUT_OF_MEMORY", "EXIT_RANK_GONE"):  # a worker's
            assert re.search(rf"^ +{code} +[A-Z]", status, re.MULTILINE), name


@pytest.mark.parametrize(
    ("page", "folder"), [("lightllmd.8", "lightllmd"), ("lightllmctl.1", "lightllmctl")], ids=["daemon", "ctl"]
)
def test_every_variable_that_is_read_is_in_the_manual(pages: Path, page: str, folder: str) -> None:
    reads = re.compile(r"""environ(?:ment)?(?:\.get\(|\[)"([A-Z_]+)"(?!\] =)""")
    read = {name for file in (CHECKOUT / folder).rglob("*.py") for name in reads.findall(file.read_text())}
    assert read
    _, _, text = rendered(pages / page).partition("ENVIRONMENT")
    assert {name for name in read if not re.search(rf"\b{name}\b", text)} == set()


def test_text_comes_out_as_it_went_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(CHECKOUT / "packaging/man")
    from roff import Page, prose

    hard = [
        "a back\\slash, 'quotes', \"more\" and a hat ^ or tilde ~",
        ".dot first, --flag-name, an ellipsis … and 1 ≤ 2",
        "`lightllmctl reload` is in lightllmctl(1). See there.",
    ]
    page = Page("name", 1, "2026-01-01", "source", "manual")
    page.section("TEXT")
    for one in hard:
        page.paragraph(prose(one))
    page.code(".first = 'x'\n\\n stays")
    (tmp_path / "page").write_text(page.text(), encoding="ascii")
    text = rendered(tmp_path / "page")
    for one in hard:
        assert one.replace("`l", "l").replace("d` ", "d ").replace(". See", ".  See") in text
    assert re.search(r"^ +\.first = 'x'\n +\\n stays$", text, re.MULTILINE)
