"""The Kubernetes manifests: valid, of one piece, and about this program, whose own is each path, port, key, verb and
metric that they name."""

from __future__ import annotations

import importlib.util
import json
import re
import tomllib
from pathlib import Path
from typing import Any, cast

import pytest
import yaml

from kubernetes_manifests import (
    CHECKOUT,
    KUBERNETES,
    OVERLAYS,
    Resource,
    configuration,
    container_of,
    of_kind,
    pod_templates,
    rendered,
    settings,
)
from lightllmctl.__main__ import cli as ctl
from lightllmd.api.dialects import probes
from lightllmd.config import cli
from lightllmd.config.parameters import Config
from lightllmd.observe.metrics import EngineMetrics

KUBERNETES_VERSION = "1.34.0"
# Kinds that operators bring along; their own schemas are not here, their pods are checked as pods.
OPERATORS = {"ServiceMonitor", "LeaderWorkerSet"}

KEYS = "/etc/lightllmd-keys"

each_overlay = pytest.mark.parametrize("overlay", OVERLAYS)


def config_of(resources: list[Resource], folder: Path) -> Config:
    """As a pod's daemon reads it: the file, and the container's words."""
    file = folder / "lightllmd.toml"
    file.write_text(configuration(resources))
    [template, *_] = pod_templates(resources)
    words = container_of(template)["args"]
    assert words[:2] == ["--config", "/etc/lightllmd/lightllmd.toml"]
    for name in ("keys.toml", "metrics"):  # of the Secret
        (folder / name).write_text("a-key-of-more-than-enough-characters\n")
    words = [word.replace(KEYS, str(folder)) for word in words]
    return cli.parse(["--check", str(file), "--offline", *words[2:]]).config


def routes() -> dict[str, set[str]]:
    """Methods of the routes about the daemon, by path."""
    found: dict[str, set[str]] = {}
    for route in probes.router(cast(Any, None), "").routes:
        found.setdefault(cast(Any, route).path, set()).update(cast(Any, route).methods)
    return found


@each_overlay
def test_resources_have_the_shape_that_the_api_server_takes(overlay: str) -> None:
    if importlib.util.find_spec("kubernetes_validate") is None:
        pytest.skip("needs the package kubernetes-validate")
    import kubernetes_validate

    for resource in rendered(overlay):
        if resource["kind"] not in OPERATORS:
            kubernetes_validate.validate(resource, KUBERNETES_VERSION, strict=True)
    for template in pod_templates(rendered(overlay)):
        pod = {"apiVersion": "v1", "kind": "Pod", **template}
        kubernetes_validate.validate(pod, KUBERNETES_VERSION, strict=True)


@each_overlay
def test_the_daemon_takes_the_configuration(overlay: str, tmp_path: Path) -> None:
    config = config_of(rendered(overlay), tmp_path)
    assert config.params.host == "0.0.0.0"


@each_overlay
def test_probes_and_scrapes_ask_for_routes_that_there_are_on_the_port_that_is_listened_on(
    overlay: str, tmp_path: Path
) -> None:
    resources = rendered(overlay)
    port = config_of(resources, tmp_path).params.port
    for template in pod_templates(resources):
        container = container_of(template)
        names = {one["name"]: one["containerPort"] for one in container["ports"]}
        assert port in names.values()
        for probe in ("startupProbe", "readinessProbe"):
            asked = container[probe]["httpGet"]
            assert "GET" in routes()[asked["path"]], probe
            assert names[asked["port"]] == port, probe
        for service in of_kind(resources, "Service"):
            assert {names[one["targetPort"]] for one in service["spec"]["ports"]} == {port}
    for monitor in of_kind(resources, "ServiceMonitor"):
        [service] = of_kind(resources, "Service")
        for endpoint in monitor["spec"]["endpoints"]:
            assert "GET" in routes()[endpoint["path"]]
            assert endpoint["port"] in {one["name"] for one in service["spec"]["ports"]}


@each_overlay
def test_liveness_asks_the_supervisor_by_a_verb_that_there_is(overlay: str) -> None:
    for template in pod_templates(rendered(overlay)):
        program, verb = container_of(template)["livenessProbe"]["exec"]["command"]
        assert program == "lightllmctl"
        assert verb in ctl.commands


@each_overlay
def test_a_pod_may_drain_as_long_as_the_daemon_does(overlay: str, tmp_path: Path) -> None:
    resources = rendered(overlay)
    supervisor = config_of(resources, tmp_path).supervisor
    for template in pod_templates(resources):
        program, seconds = container_of(template)["lifecycle"]["preStop"]["exec"]["command"]
        assert program == "sleep"
        ends = float(seconds) + supervisor.drain_timeout + supervisor.stop_timeout + supervisor.abort_grace
        assert template["spec"]["terminationGracePeriodSeconds"] >= ends + 5


@each_overlay
def test_nothing_but_loading_may_take_longer_than_the_probes_allow(overlay: str, tmp_path: Path) -> None:
    """A worker that hangs is found and replaced by the supervisor long before a kubelet would end the pod."""
    resources = rendered(overlay)
    supervisor = config_of(resources, tmp_path).supervisor
    for template in pod_templates(resources):
        container = container_of(template)
        startup, liveness = container["startupProbe"], container["livenessProbe"]
        assert startup["periodSeconds"] * startup["failureThreshold"] >= 2 * supervisor.boot_timeout
        assert liveness["periodSeconds"] * liveness["failureThreshold"] >= 60  # a supervisor on a busy machine


@each_overlay
def test_pods_have_no_privilege_and_write_to_volumes_alone(overlay: str) -> None:
    """What the pod security standard "restricted" asks for, and a read-only root."""
    for template in pod_templates(rendered(overlay)):
        spec, container = template["spec"], container_of(template)
        assert spec["securityContext"]["runAsNonRoot"]
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["automountServiceAccountToken"] is False
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert {"hostNetwork", "hostPID", "hostIPC"}.isdisjoint(spec)
        assert not [volume for volume in spec["volumes"] if "hostPath" in volume]
        environment = {one["name"]: one.get("value") for one in container["env"]}
        mounts = {one["mountPath"]: one.get("readOnly", False) for one in container["volumeMounts"]}
        for variable in ("RUNTIME_DIRECTORY", "STATE_DIRECTORY", "CACHE_DIRECTORY", "HOME"):
            assert mounts[environment[variable]] is False, variable


@each_overlay
def test_what_resources_name_of_each_other_is_there(overlay: str) -> None:
    resources = rendered(overlay)
    names = {(one["kind"], one["metadata"]["name"]) for one in resources}
    for template in pod_templates(resources):
        spec, container = template["spec"], container_of(template)
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
        for volume in volumes.values():
            if "configMap" in volume:
                assert ("ConfigMap", volume["configMap"]["name"]) in names
            if "persistentVolumeClaim" in volume:
                assert ("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]) in names
        labels = template["metadata"]["labels"]
        selectors = [one["spec"]["selector"] for one in of_kind(resources, "Service")]
        for kind in ("PodDisruptionBudget", "Deployment"):
            selectors += [one["spec"]["selector"]["matchLabels"] for one in of_kind(resources, kind)]
        for selector in selectors:
            assert selector
            assert selector.items() <= labels.items()
    for monitor in of_kind(resources, "ServiceMonitor"):
        [service] = of_kind(resources, "Service")
        assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    for scaler in of_kind(resources, "HorizontalPodAutoscaler"):
        target = scaler["spec"]["scaleTargetRef"]
        assert (target["kind"], target["name"]) in names


def test_keys_are_read_from_where_the_secret_is_mounted(tmp_path: Path) -> None:
    resources = rendered("gpu")
    http = config_of(resources, tmp_path).http
    [template] = pod_templates(resources)
    [secret] = [volume for volume in template["spec"]["volumes"] if "secret" in volume]
    [mount] = [one for one in container_of(template)["volumeMounts"] if one["name"] == secret["name"]]
    assert mount["readOnly"]
    assert secret["secret"]["defaultMode"] & 0o007 == 0
    [monitor] = of_kind(resources, "ServiceMonitor")
    [endpoint] = monitor["spec"]["endpoints"]
    credentials = endpoint["authorization"]["credentials"]
    assert credentials["name"] == secret["secret"]["secretName"]
    assert mount["mountPath"] == KEYS
    assert http.metrics_key == str(tmp_path / credentials["key"])
    assert http.api_keys_file == str(tmp_path / "keys.toml")


def test_the_autoscaler_follows_gauges_that_are_exported_and_that_the_adapter_hands_on() -> None:
    [scaler] = of_kind(rendered("gpu"), "HorizontalPodAutoscaler")
    followed = {one["pods"]["metric"]["name"] for one in scaler["spec"]["metrics"]}
    exported = {metric.name: metric.type for metric in EngineMetrics().registry.collect()}
    assert {exported.get(name) for name in followed} == {"gauge"}
    rules = yaml.safe_load((KUBERNETES / "components/autoscaling/adapter-values.yaml").read_text())["rules"]["custom"]
    for rule in rules:
        assert re.match(r"\w+", rule["seriesQuery"])[0] == rule["name"]["matches"]
    assert followed <= {rule["name"]["matches"] for rule in rules}


@each_overlay
def test_a_gpu_pod_has_one_for_each_rank_and_shared_memory(overlay: str, tmp_path: Path) -> None:
    resources = rendered(overlay)
    config = config_of(resources, tmp_path)
    for template in pod_templates(resources):
        container = container_of(template)
        limits = container["resources"]["limits"]
        if "nvidia.com/gpu" not in limits:
            assert settings(resources)["model_dir"].startswith("package:")
            continue
        assert int(limits["nvidia.com/gpu"]) == config.params.tp * config.engine.replicas
        assert container["resources"]["requests"] == limits
        [shm] = [one["name"] for one in container["volumeMounts"] if one["mountPath"] == "/dev/shm"]
        [volume] = [one for one in template["spec"]["volumes"] if one["name"] == shm]
        assert volume["emptyDir"]["medium"] == "Memory"


@each_overlay
def test_the_image_is_what_the_pods_expect(overlay: str, tmp_path: Path) -> None:
    lines = (CHECKOUT / "packaging" / "Containerfile").read_text().replace("\\\n", " ").splitlines()
    steps = [line.partition(" ")[::2] for line in lines if re.match("[A-Z]+ ", line)]
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    for step, words in steps:
        if step == "COPY":
            assert all((CHECKOUT / source).exists() for source in words.split()[:-1]), words
    step = dict(steps)
    [program] = json.loads(step["ENTRYPOINT"])
    assert program in project["scripts"]
    [template] = pod_templates(rendered(overlay))
    user = template["spec"]["securityContext"]
    assert step["USER"] == f"{user['runAsUser']}:{user['runAsGroup']}"
    container = container_of(template)
    assert container["image"] == f"lightllmd:{project['version']}"
    assert container["args"][:2] == json.loads(step["CMD"])
    variables = dict(word.split("=", 1) for word in step["ENV"].split())
    assert {one["name"]: one["value"] for one in container["env"]}.items() <= variables.items()
    assert int(step["EXPOSE"]) == config_of(rendered(overlay), tmp_path).params.port
    assert container["livenessProbe"]["exec"]["command"][0] in project["scripts"]
