"""The Kubernetes manifests as kustomize renders them, and a pod of theirs as processes on this machine."""

from __future__ import annotations

import functools
import os
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

CHECKOUT = Path(__file__).resolve().parents[1]
KUBERNETES = CHECKOUT / "packaging" / "kubernetes"
OVERLAYS = sorted(folder.name for folder in (KUBERNETES / "overlays").iterdir())

Resource = dict[str, Any]


@functools.cache
def _builder() -> tuple[str, ...] | None:
    """What builds a kustomization; None where this machine has nothing."""
    if shutil.which("kustomize"):
        return ("kustomize", "build")
    return ("kubectl", "kustomize") if shutil.which("kubectl") else None


@functools.cache
def _text(overlay: str) -> str:
    builder = _builder()
    if builder is None:
        pytest.skip("needs kustomize or kubectl")
    done = subprocess.run(
        [*builder, str(KUBERNETES / "overlays" / overlay)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def rendered(overlay: str) -> list[Resource]:
    """All that `kubectl apply -k` of the overlay would send."""
    return list(yaml.safe_load_all(_text(overlay)))


def of_kind(resources: list[Resource], kind: str) -> list[Resource]:
    return [one for one in resources if one["kind"] == kind]


def pod_templates(resources: list[Resource]) -> Iterator[Resource]:
    """Of everything that makes pods."""
    for one in resources:
        if one["kind"] in ("Deployment", "StatefulSet"):
            yield one["spec"]["template"]


def container_of(template: Resource) -> Resource:
    """The only one of such a pod."""
    [container] = template["spec"]["containers"]
    return container


def configuration(resources: list[Resource]) -> str:
    """The text of the file that the pods read."""
    [config] = of_kind(resources, "ConfigMap")
    return config["data"]["lightllmd.toml"]


def settings(resources: list[Resource]) -> dict[str, Any]:
    return tomllib.loads(configuration(resources))


# --- a pod here -----------------------------------------------------------------------------------------------------


def pod_command(template: Resource, files: dict[str, Path], root: Path, *flags: str) -> list[str]:
    """Words that run a pod's container as its security context says: its user, no privilege, the daemon as process 1,
    nothing to write to but the volumes that are so. Needs root.

    `files`: by volume, a folder to show instead of it. `root`: an empty folder, where the container's root is mounted
    for these processes alone. `flags`: behind the container's own words.
    """
    spec, container = template["spec"], container_of(template)
    lines = [
        "set -e",
        "mount --make-rprivate /",
        f"mount -t tmpfs root {root}",
        f"cd {root}",
        "mkdir dev proc etc run var",
        "for name in bin lib lib64 sbin usr opt srv home work; do",
        '  [ -L "/$name" ] && ln -s "$(readlink "/$name")" "$name"',
        '  [ -d "/$name" ] && [ ! -L "/$name" ] && mkdir "$name" && mount --rbind "/$name" "$name"',
        "  true",
        "done",
        "for name in passwd group ld.so.cache nsswitch.conf hosts localtime ssl alternatives; do",
        '  [ -d "/etc/$name" ] && mkdir "etc/$name"',
        '  [ -f "/etc/$name" ] && : > "etc/$name"',
        '  [ ! -e "/etc/$name" ] || mount --bind "/etc/$name" "etc/$name"',
        "done",
        "mount --rbind /dev dev",
        "mount -t proc proc proc",
    ]
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    for mount in sorted(container["volumeMounts"], key=lambda mount: mount["mountPath"]):
        place, volume = mount["mountPath"].lstrip("/"), volumes[mount["name"]]
        lines.append(f"mkdir -p {place}")
        if mount["name"] in files:
            lines.append(f"mount --bind {files[mount['name']]} {place}")
        elif "emptyDir" in volume and place != "dev/shm":
            lines.append(f"mount -t tmpfs -o size={_bytes(volume['emptyDir']['sizeLimit'])},mode=0777 volume {place}")
    # Where this program and its Python are, also if that is in a folder that a volume covers.
    for needed in dict.fromkeys([str(CHECKOUT), sys.prefix, sys.base_prefix]):
        lines.append(f"[ -d .{needed} ] || {{ mkdir -p .{needed}; mount --rbind {needed} .{needed}; }}")
    assert container["securityContext"]["readOnlyRootFilesystem"]
    lines.append("mount -o remount,ro,bind . .")
    user = {**spec["securityContext"], **container["securityContext"]}
    environment = {one["name"]: one["value"] for one in container["env"]} | {"PATH": os.environ["PATH"]}
    words = ["env", "-i", *(f"{name}={value}" for name, value in environment.items())]
    words += ["setpriv", f"--reuid={user['runAsUser']}", f"--regid={user['runAsGroup']}", f"--groups={user['fsGroup']}"]
    assert user["capabilities"] == {"drop": ["ALL"]}
    assert user["allowPrivilegeEscalation"] is False
    words += ["--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"]
    words += [sys.executable, "-m", "lightllmd", *container["args"], *flags]
    lines.append(f"exec chroot . {shlex.join(words)}")
    return ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", "\n".join(lines)]


def _bytes(quantity: str) -> int:
    return int(quantity.removesuffix("Gi")) << 30
