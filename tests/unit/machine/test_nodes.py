"""Which nodes a run spans, how its ranks are laid out on them, and that they start from one and the same settings."""

import os
import socket
import threading
from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path

import psutil
import pytest

from megatron_p2o.config.read import load_config
from megatron_p2o.config.tree import (
    Config,
    DataConfig,
    EvolutionConfig,
    GradingConfig,
    LoggingConfig,
    ModelConfig,
    ParallelConfig,
    ReflectionConfig,
    RunConfig,
    TaskConfig,
    one_task,
)
from megatron_p2o.machine.nodes import Nodes, first_host, nodes_from_options, nodes_of_slurm
from megatron_p2o.processes import SECRET_NAMES_VARIABLE, child_environment
from megatron_p2o.run.launch import agent_settings, ranks_per_node, share_settings, this_machine
from megatron_p2o.run.ranks.environment import (
    conductor_secrets,
    interface_to,
    prepare_environment,
    prepare_gpus,
    prepare_network,
    withheld_secrets,
)

STEP = {
    "SLURM_JOB_ID": "12345",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_NODES": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_NODEID": "2",
    "SLURM_STEP_NODELIST": "gpu[017-020]",
}
TWO_RANKS = ParallelConfig(data=2, timeout_s=20)
HEAD = Nodes(count=2, rank=0, head_address="head", head_port=20001, launch_id="7.0-restart-1")


def config(directory: Path, parallel: ParallelConfig = TWO_RANKS) -> Config:
    return Config(
        run=RunConfig(name="first", directory=str(directory)),
        model=ModelConfig(path="model"),
        data=DataConfig(train=one_task("train.jsonl")),
        parallel=parallel,
    )


@pytest.mark.parametrize(
    ("node_list", "first"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("gpu[017-020,3]", "gpu017"),
        ("gpu[3,017-020]", "gpu3"),
        ("rack[1-2]-node[07-09,12],login", "rack1-node07"),
        ("gpu-b200-[010-011]", "gpu-b200-010"),
    ],
)
def test_first_host_of_a_node_list(node_list: str, first: str) -> None:
    assert first_host(node_list) == first


def test_srun_says_where_a_node_stands() -> None:
    nodes = nodes_of_slurm(STEP)
    assert nodes == Nodes(count=4, rank=2, head_address="gpu017", head_port=22345, launch_id="12345.0-restart-0")
    assert nodes_of_slurm({**STEP, "P2O_HEAD_ADDRESS": "10.0.0.17"}) == replace(nodes, head_address="10.0.0.17")


def test_a_requeued_job_is_another_launch_at_the_same_port() -> None:
    first, second = nodes_of_slurm(STEP), nodes_of_slurm({**STEP, "SLURM_RESTART_COUNT": "1"})
    assert first and second and first.launch_id != second.launch_id and first.head_port == second.head_port


@pytest.mark.parametrize("job_id", ["1", "9999", "10000", "987654321"])
def test_ports_stay_below_those_of_outgoing_connections(job_id: str) -> None:
    nodes = nodes_of_slurm({**STEP, "SLURM_JOB_ID": job_id})
    assert nodes and 1024 < nodes.head_port < 32768


def test_an_allocation_without_srun_and_a_step_on_one_node_are_a_single_machine() -> None:
    allocation = {"SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "4", "SLURM_NNODES": "4", "SLURM_NODEID": "0"}
    assert nodes_of_slurm(allocation) is None
    assert nodes_of_slurm({**STEP, "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NUM_TASKS": "8"}) is None


def test_several_tasks_on_a_node_are_refused() -> None:
    with pytest.raises(ValueError, match=r"8 tasks on 4 nodes.*--ntasks-per-node=1"):
        nodes_of_slurm({**STEP, "SLURM_STEP_NUM_TASKS": "8"})


def test_nodes_by_hand() -> None:
    nodes = nodes_from_options(2, 1, "10.0.0.1:29500")
    assert (nodes.count, nodes.rank, nodes.head_address, nodes.head_port) == (2, 1, "10.0.0.1", 29500)


@pytest.mark.parametrize(
    ("num_nodes", "node_rank", "head", "named"),
    [
        (2, 2, "a:1", "--node-rank=2"),
        (0, 0, "a:1", "--node-rank=0"),
        (2, 0, "", "--head="),
        (2, 0, "a", "--head=a"),
        (2, 0, "a:0", "--head=a:0"),
        (2, 0, ":29500", "--head=:29500"),
    ],
)
def test_contradictory_options_are_named(num_nodes: int, node_rank: int, head: str, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        nodes_from_options(num_nodes, node_rank, head)


def test_ranks_divide_over_the_nodes(tmp_path: Path) -> None:
    four = config(tmp_path, ParallelConfig(tensor=2, data=2))
    assert [ranks_per_node(four, replace(HEAD, count=count)) for count in (1, 2, 4)] == [4, 2, 1]
    with pytest.raises(
        ValueError,
        match=r"parallel.tensor=2 x parallel.pipeline=1 x parallel.context=1 x parallel.data=2 = 4 .* 3 nodes",
    ):
        ranks_per_node(four, replace(HEAD, count=3))


def test_rank_0_is_given_the_keys_of_reward_functions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    judge = GradingConfig(function="judge", arguments={"api_key_env": "JUDGE_LOGIN"})
    own_reward = GradingConfig(function="own.py:reward", arguments={"token_env": "TOKEN"})
    own = TaskConfig(file="own.jsonl", grading=own_reward)
    tasks = {"haiku": TaskConfig(file="haiku.jsonl", grading=judge), "own": own}
    settings = replace(config(tmp_path), data=DataConfig(train=tasks), evolution=EvolutionConfig(enabled=False))
    for name in ("JUDGE_LOGIN", "TOKEN", "P2O_JUDGE_API_KEY"):
        monkeypatch.setenv(name, "0123456789")
    monkeypatch.setattr(os, "environ", os.environ.copy())  # what is set below is forgotten
    prepare_environment(settings)
    with withheld_secrets() as withheld:
        assert withheld.keys() >= {"JUDGE_LOGIN", "TOKEN", "P2O_JUDGE_API_KEY"}
    assert set(conductor_secrets(settings)) >= {"JUDGE_LOGIN", "TOKEN", "P2O_JUDGE_API_KEY", "HTTPS_PROXY"}
    alone = replace(settings, data=DataConfig(train={"own": own}))
    assert "TOKEN" in conductor_secrets(alone) and "HTTPS_PROXY" not in conductor_secrets(alone)


def test_rank_0_alone_is_given_the_keys_of_a_sink_of_ones_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    logging = LoggingConfig(sinks={"own:sink": {"api_key_env": "AIM_LOGIN", "url_env": "AIM_TOKEN"}})
    settings = replace(config(tmp_path), logging=logging)
    for name in ("AIM_LOGIN", "AIM_TOKEN"):
        monkeypatch.setenv(name, "0123456789")
    monkeypatch.setattr(os, "environ", os.environ.copy())  # what is set below is forgotten
    prepare_environment(settings)
    with withheld_secrets() as withheld:
        assert withheld.keys() >= {"AIM_LOGIN", "AIM_TOKEN"}
    assert set(conductor_secrets(settings)) >= {"AIM_LOGIN", "AIM_TOKEN"}


def test_rank_0_alone_is_given_the_secrets_that_it_needs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    teacher = ReflectionConfig(backend="openai", base_url="https://host/v1", model="m", api_key_env="TEACHER_LOGIN")
    settings = replace(config(tmp_path), evolution=EvolutionConfig(reflection=teacher))
    secrets = dict.fromkeys(("TEACHER_LOGIN", "WANDB_API_KEY", "HF_TOKEN"), "0123456789")
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(SECRET_NAMES_VARIABLE, "OTHER")
    monkeypatch.setattr(os, "environ", os.environ.copy())  # what is set below is forgotten
    prepare_environment(settings)
    assert set(os.environ[SECRET_NAMES_VARIABLE].split(",")) == {"OTHER", "TEACHER_LOGIN"}
    with withheld_secrets() as withheld:
        assert withheld.items() >= secrets.items() and not secrets.keys() & os.environ.keys()
        assert not secrets.keys() & child_environment().keys()
    assert secrets.items() <= os.environ.items()

    assert secrets.keys() & set(conductor_secrets(settings)) == {"TEACHER_LOGIN"}
    writer = ReflectionConfig(backend="own.py:writer", arguments={"api_key_env": "WRITER"})
    own = replace(settings, evolution=EvolutionConfig(reflection=writer))
    prepare_environment(own)
    assert "WRITER" in os.environ[SECRET_NAMES_VARIABLE].split(",")
    assert "WRITER" in conductor_secrets(own) and not secrets.keys() & set(conductor_secrets(own))
    watched = replace(config(tmp_path), logging=LoggingConfig(wandb_project="ours"))
    assert secrets.keys() & set(conductor_secrets(watched)) == {"WANDB_API_KEY"}
    on_a_space = replace(config(tmp_path), logging=LoggingConfig(trackio_project="ours", mlflow_experiment="ours"))
    assert set(conductor_secrets(on_a_space)) >= {"HF_TOKEN", "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_URI"}
    assert "WANDB_API_KEY" not in conductor_secrets(on_a_space)
    assert not {"P2O_JUDGE_API_KEY", "HTTPS_PROXY"} & set(conductor_secrets(config(tmp_path))), "math has no judge"
    environments = {local: {"RANK": str(local + 2)} for local in range(2)}
    agent_settings(2, HEAD, 20, secrets).logs_specs.reify(environments)
    assert [len(environment.keys() & secrets) for environment in environments.values()] == [0, 0]
    environments = {local: {"RANK": str(local)} for local in range(2)}
    agent_settings(2, HEAD, 20, secrets).logs_specs.reify(environments)
    assert [len(environment.keys() & secrets) for environment in environments.values()] == [3, 0]


@pytest.mark.parametrize(
    ("parallel", "chosen", "expected"),
    [
        (ParallelConfig(data=8), None, None),
        (ParallelConfig(tensor=2), None, "1"),
        (ParallelConfig(context=2), None, "1"),
        (ParallelConfig(tensor=2), "8", "8"),
    ],
)
def test_kernels_start_in_order_where_layers_communicate(
    parallel: ParallelConfig, chosen: str | None, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "CUDA_DEVICE_MAX_CONNECTIONS"
    monkeypatch.setenv(name, chosen or "")
    if chosen is None:
        monkeypatch.delenv(name)
    prepare_gpus(parallel)
    assert os.environ.get(name) == expected


def test_the_other_nodes_wait_for_the_heads_settings(tmp_path: Path) -> None:
    settings = config(tmp_path)
    head = threading.Timer(0.2, share_settings, (settings, tmp_path / "first", HEAD))
    head.start()
    path = share_settings(settings, tmp_path / "first", replace(HEAD, rank=1))
    head.join()
    found = load_config(path)
    assert replace(found, model=replace(found.model, template_date=None)) == settings
    date.fromisoformat(found.model.template_date or "none")


def test_a_run_keeps_the_date_of_its_first_start_on_every_node_unless_given_one(tmp_path: Path) -> None:
    def started(settings: Config, *, rank: int = 0, launch_id: str = "8.0") -> str | None:
        nodes = replace(HEAD, rank=rank, launch_id=launch_id)
        return load_config(share_settings(settings, tmp_path / "first", nodes)).model.template_date

    settings = config(tmp_path)
    first = replace(settings, model=replace(settings.model, template_date="2001-02-03"))
    assert started(first) == "2001-02-03"
    assert started(settings, launch_id="9.0") == "2001-02-03"
    assert started(settings, launch_id="9.0", rank=1) == "2001-02-03"
    assert started(replace(first, model=replace(first.model, template_date="2002-02-03"))) == "2002-02-03"
    (tmp_path / "first" / "config.yaml").write_text("model: [")
    today = started(settings)
    assert today is not None
    assert abs(date.fromisoformat(today) - date.today()) <= timedelta(days=1)


@pytest.mark.parametrize("what_is_there", ["nothing", "other settings", "an earlier start"])
def test_a_node_that_does_not_see_the_heads_settings_says_so(what_is_there: str, tmp_path: Path) -> None:
    settings = config(tmp_path, ParallelConfig(data=2, timeout_s=0.1))
    if what_is_there == "other settings":
        share_settings(replace(settings, preset="reference"), tmp_path / "first", HEAD)
    elif what_is_there == "an earlier start":
        share_settings(settings, tmp_path / "first", replace(HEAD, launch_id="7.0-restart-0"))
    with pytest.raises(
        ValueError, match=r"node 1 of 2\) waited.*run.directory must be a filesystem that all nodes share"
    ):
        share_settings(settings, tmp_path / "first", replace(HEAD, rank=1))


def test_gloo_is_told_the_interface_that_leads_to_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    addresses = [
        (name, known.address)
        for name, all_known in psutil.net_if_addrs().items()
        for known in all_known
        if known.family == socket.AF_INET and not known.address.startswith("127.")
    ]
    assert interface_to("127.0.0.1") is None and interface_to("no-such-host.invalid") is None
    if not addresses:
        pytest.skip("this machine has no network but loopback")
    name, address = addresses[0]
    assert interface_to(address) == name
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")  # so that what is set below is forgotten
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    prepare_network(replace(HEAD, head_address=address))
    assert os.environ["GLOO_SOCKET_IFNAME"] == name
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "chosen")
    prepare_network(replace(HEAD, head_address=address))
    assert os.environ["GLOO_SOCKET_IFNAME"] == "chosen"


def test_a_single_machine_stays_away_from_its_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth0")
    prepare_network(this_machine())
    assert (os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"]) == ("lo", "=lo")
