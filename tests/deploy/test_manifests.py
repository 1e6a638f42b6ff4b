"""The Kubernetes manifests of docs/deploy: valid by Kubernetes' own schemas, and what they launch is valid by ours."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from jaxserve.config import Config, load_config
from tests.e2e.server import ROOT

jsonschema = pytest.importorskip("jsonschema")
kubernetes_validate = pytest.importorskip("kubernetes_validate")

FOLDER = ROOT / "docs" / "deploy"
VERSIONS = ("1.31", "1.34")


def fields(required: str = "", **properties: Any) -> dict[str, Any]:
    """A JSON schema of an object that has these fields and no others."""
    return {"type": "object", "properties": properties, "required": required.split(), "additionalProperties": False}


TEXT, FLAG, COUNT, OBJECT = ({"type": kind} for kind in ("string", "boolean", "integer", "object"))
TEXTS = {"type": "object", "additionalProperties": TEXT}
# What ray.io/v1 has around the pod templates, written from KubeRay's API types of about 1.1; later ones only add to it.
# No package brings its own schemas, which repeat those of pods in 1 MB.
RAY_SERVICE = fields(
    "serveConfigV2 rayClusterConfig",
    serveConfigV2=TEXT,
    serveService=OBJECT,
    rayClusterConfig=fields(
        "headGroupSpec",
        rayVersion=TEXT,
        enableInTreeAutoscaling=FLAG,
        autoscalerOptions=OBJECT,
        headServiceAnnotations=TEXTS,
        suspend=FLAG,
        headGroupSpec=fields(
            "rayStartParams template",
            serviceType=TEXT,
            headService=OBJECT,
            enableIngress=FLAG,
            rayStartParams=TEXTS,
            template=OBJECT,
        ),
        workerGroupSpecs={
            "type": "array",
            "items": fields(
                "groupName minReplicas maxReplicas rayStartParams template",
                groupName=TEXT,
                replicas=COUNT,
                minReplicas=COUNT,
                maxReplicas=COUNT,
                numOfHosts=COUNT,
                rayStartParams=TEXTS,
                template=OBJECT,
                scaleStrategy=OBJECT,
            ),
        },
    ),
)


def resources(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


def of_kind(name: str, kind: str) -> dict[str, Any]:
    (resource,) = (resource for resource in resources(name) if resource["kind"] == kind)
    return resource


def launch_config(name: str, folder: Path) -> tuple[Path, Config]:
    """The launch file in a manifest's ConfigMap, and the config that it is."""
    path = folder / "launch.yaml"
    path.write_text(of_kind(name, "ConfigMap")["data"]["launch.yaml"])
    return path, load_config(path, environ={})


def pod_templates() -> list[dict[str, Any]]:
    cluster = of_kind("kuberay.yaml", "RayService")["spec"]["rayClusterConfig"]
    return [cluster["headGroupSpec"]["template"], *(group["template"] for group in cluster["workerGroupSpecs"])]


@pytest.mark.parametrize("version", VERSIONS)
def test_the_manifests_are_valid_by_kubernetes_schemas(version):
    plain = [*resources("kubernetes.yaml"), of_kind("kuberay.yaml", "ConfigMap")]
    pods = [
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **template} for template in pod_templates()
    ]
    for resource in (*plain, *pods):
        kubernetes_validate.validate(resource, version, strict=True)


def test_the_schemas_find_a_misspelt_field():
    deployment = of_kind("kubernetes.yaml", "Deployment")
    deployment["spec"]["template"]["spec"]["container"] = []
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, VERSIONS[0], strict=True)


def test_the_ray_service_has_the_fields_of_kuberays_api():
    service = of_kind("kuberay.yaml", "RayService")
    assert service.keys() == {"apiVersion", "kind", "metadata", "spec"} and service["apiVersion"] == "ray.io/v1"
    jsonschema.validate(service["spec"], RAY_SERVICE)
    service["spec"]["rayClusterConfig"]["headGroupSpec"]["rayStartParams"] = {"num-cpus": 0}
    with pytest.raises(jsonschema.ValidationError, match="0 is not of type 'string'"):
        jsonschema.validate(service["spec"], RAY_SERVICE)


def test_one_engine_is_one_pod_with_the_devices_that_it_asks_for(tmp_path):
    pytest.importorskip("ray.serve", exc_type=ImportError)
    from jaxserve.deploy.resources import check_they_fit, replica_resources

    config = launch_config("kubernetes.yaml", tmp_path)[1]
    engines = of_kind("kubernetes.yaml", "StatefulSet")["spec"]
    (container,) = engines["template"]["spec"]["containers"]
    flags = dict(flag.removeprefix("--num-").split("=") for flag in container["command"] if flag.startswith("--num-"))
    node = {"CPU": float(flags["cpus"]), "GPU": float(flags["gpus"])}
    assert node["GPU"] == float(container["resources"]["limits"]["nvidia.com/gpu"])
    assert replica_resources(config).most_on(node) == 1
    assert engines["replicas"] == config.deploy.first_replicas
    check_they_fit(config, [node] * engines["replicas"])


def test_the_head_serves_at_the_port_that_its_service_sends_to(tmp_path):
    path, config = launch_config("kubernetes.yaml", tmp_path)
    (container,) = of_kind("kubernetes.yaml", "Deployment")["spec"]["template"]["spec"]["containers"]
    last = shlex.split(container["args"][0].split("&&")[-1])
    assert last == ["exec", "jaxserve", "deploy", f"/etc/jaxserve/{path.name}"]
    assert container["ports"] == [{"name": "http", "containerPort": config.server.port}]
    assert config.server.host == "0.0.0.0"
    pod = of_kind("kubernetes.yaml", "Deployment")["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] > config.server.shutdown_timeout_s


def test_what_kuberay_is_told_to_import_builds_the_application(tmp_path):
    pytest.importorskip("ray.serve", exc_type=ImportError)
    from ray.serve.schema import ServeDeploySchema

    service = of_kind("kuberay.yaml", "RayService")["spec"]
    (application,) = ServeDeploySchema.model_validate(yaml.safe_load(service["serveConfigV2"])).applications
    path, config = launch_config("kuberay.yaml", tmp_path)
    assert application.args == {"config": f"/etc/jaxserve/{path.name}"}
    module, _, name = application.import_path.partition(":")
    (group,) = service["rayClusterConfig"]["workerGroupSpecs"]
    assert (group["replicas"], group["maxReplicas"]) == (config.deploy.first_replicas, config.deploy.max_replicas)
    assert (module, name) == ("jaxserve.deploy.application", "build")
    from jaxserve.deploy import application as built

    assert getattr(built, name)({"config": str(path)}) is not None
