"""The Kubernetes manifest: valid by Kubernetes' own schema, and the commands it runs are ours."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from megatron_p2o.cli import _parser as p2o_parser
from megatron_p2o.config.read import load_config
from megatron_p2o.machine.nodes import Nodes, nodes_from_options

ROOT = Path(__file__).parents[3]
MANIFEST = ROOT / "examples" / "kubernetes" / "p2o_qwen3_4b.yaml"
SCHEMA = json.loads((Path(__file__).parent / "kubernetes" / "schema-1.37.0.json").read_text())
OBJECTS: list[dict[str, Any]] = list(yaml.safe_load_all(MANIFEST.read_text()))
SERVICE, JOB = OBJECTS
POD = JOB["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]


def problems(given: dict[str, Any]) -> list[str]:
    names = {"Job": "io.k8s.api.batch.v1.Job", "Service": "io.k8s.api.core.v1.Service"}
    schema = {"$ref": f"#/$defs/{names[given['kind']]}", "$defs": SCHEMA["$defs"]}
    return [error.message for error in jsonschema.Draft202012Validator(schema).iter_errors(given)]


def test_every_object_is_valid() -> None:
    assert [given["kind"] for given in OBJECTS] == ["Service", "Job"]
    assert [problems(given) for given in OBJECTS] == [[], []]


def test_the_schema_refuses_what_kubernetes_would() -> None:
    misspelt = json.loads(json.dumps(JOB))
    misspelt["spec"]["template"]["spec"]["containers"][0]["volumeMount"] = []
    misspelt["spec"]["completions"] = "two"
    assert len(problems(misspelt)) == 2


def test_the_nodes_find_one_another_under_the_names_of_the_job() -> None:
    name = JOB["metadata"]["name"]
    assert POD["subdomain"] == SERVICE["metadata"]["name"] and SERVICE["spec"]["clusterIP"] == "None"
    assert SERVICE["spec"]["selector"] == {"job-name": name}, "the label that Kubernetes gives the pods of a job"
    assert JOB["spec"]["completions"] == JOB["spec"]["parallelism"] == int(environment()["NUM_NODES"])
    assert f"--head {name}-0.{SERVICE['metadata']['name']}:" in CONTAINER["args"][0]


def environment() -> dict[str, str]:
    plain = {entry["name"]: entry["value"] for entry in CONTAINER["env"] if "value" in entry}
    fields = {entry["name"]: "10.0.0.7" for entry in CONTAINER["env"] if "valueFrom" in entry}
    return {**plain, **fields, "JOB_COMPLETION_INDEX": "1"}


def test_a_pod_checks_its_node_and_trains_as_the_node_of_its_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = tmp_path / "called"
    stub = tmp_path / "p2o"
    stub.write_text(f'#!/bin/bash\nprintf "%s\\0" "$@" >> {called}; printf "\\n" >> {called}\n')
    stub.chmod(0o755)
    given = {**environment(), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run([*CONTAINER["command"], *CONTAINER["args"]], env=given, cwd=ROOT, check=True, timeout=300)
    doctor, train = (line.split("\0")[:-1] for line in called.read_text().splitlines())
    assert doctor[0] == "doctor" and "--strict" in doctor and train[0] == "train"
    options = p2o_parser().parse_args(train)
    nodes = nodes_from_options(options.num_nodes, options.node_rank, options.head)
    address = "p2o-qwen3-4b-0.p2o-qwen3-4b"
    launch_id = f"{address}:29500"
    assert nodes == Nodes(count=2, rank=1, head_address=address, head_port=29500, launch_id=launch_id)
    monkeypatch.chdir(ROOT)
    config = load_config(options.config, options.overrides)
    assert config.rollout.num_engines == 16, "one for each GPU"
    assert config.evolution.reflection.base_url == "https://host/v1"
    assert config.run.name == "p2o_qwen3_4b"


def test_a_key_comes_from_a_secret_and_wrong_settings_are_not_tried_again() -> None:
    secrets = [entry for entry in CONTAINER["env"] if "secretKeyRef" in entry.get("valueFrom", {})]
    assert [entry["name"] for entry in secrets] == ["P2O_REFLECTION_API_KEY"]
    refused, evicted = JOB["spec"]["podFailurePolicy"]["rules"]
    assert (refused["action"], refused["onExitCodes"]["values"]) == ("FailJob", [2])
    assert refused["onExitCodes"]["containerName"] == CONTAINER["name"]
    assert evicted["action"] == "Ignore"
    assert POD["restartPolicy"] == "Never", "a failure policy asks for it"
