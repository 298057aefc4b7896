"""What a process asks of the kernel, asked by a real one, and what its children inherit."""

import os
import subprocess
import sys

import pytest

from megatron_p2o.processes import SECRET_NAMES_VARIABLE, child_environment

RAISE_FROM_64 = """
import resource
from megatron_p2o.processes import allow_many_files
most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (64, most))
files = [open("/dev/null") for _ in range(40)]
print(allow_many_files(), allow_many_files(), resource.getrlimit(resource.RLIMIT_NOFILE)[0], most)
files += [open("/dev/null") for _ in range(100)]
"""


def test_more_files_can_be_open_than_the_shell_allowed() -> None:
    outcome = subprocess.run(
        [sys.executable, "-c", RAISE_FROM_64], check=True, capture_output=True, text=True, timeout=300
    )
    first, second, allowed, most = map(int, outcome.stdout.split())
    assert first == second == allowed == (65536 if most == -1 else min(65536, most))


def test_a_child_whose_parent_ended_while_it_started_ends_too() -> None:
    program = (
        "import sys; from megatron_p2o.processes import end_with_parent; end_with_parent(int(sys.argv[1])); print(1)"
    )
    outcomes = [
        subprocess.run([sys.executable, "-c", program, str(parent)], capture_output=True, text=True, timeout=300)
        for parent in (os.getpid(), os.getppid())
    ]
    assert [(each.returncode, each.stdout) for each in outcomes] == [(0, "1\n"), (1, "")]


@pytest.mark.parametrize(
    "name",
    [
        *("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "P2O_REFLECTION_API_KEY", "OPENAI_API_KEY"),
        *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE", "GH_TOKEN", "SLURM_JWT"),
        *("GOOGLE_APPLICATION_CREDENTIALS", "AZURE_CLIENT_SECRET", "PGPASSWORD", "MYSQL_PWD", "SSH_AUTH_SOCK"),
        *("DOCKER_AUTH_CONFIG", "DB_PASSWD", "NGC_APIKEY", "signing_key", "KEY_FILE"),
        *("GITHUB_PAT", "HF_TOKEN_READ", "OPENAI_API_KEY_PROD", "API_KEY_2", "TOKEN1", "PRIVATE_KEY_PEM", "BEARER"),
        *("AZURE_STORAGE_CONNECTION_STRING", "SLACK_WEBHOOK", "KUBECONFIG"),
    ],
)
def test_a_child_is_given_a_secret_only_by_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "0123456789abcdef")
    assert name not in child_environment()
    assert child_environment([name])[name] == "0123456789abcdef"


def test_a_child_is_given_everything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    ordinary = {
        **{"PWD": "/home/someone", "OLDPWD": "/home/someone", "XAUTHORITY": "/home/someone/.Xauthority"},
        **{"CUDA_VISIBLE_DEVICES": "0,1,2,3,4", "NCCL_IB_PKEY": "0x0123456789", "NCCL_SOCKET_IFNAME": "ib0,ib1,ib2"},
        **{"SLURM_JOB_ID": "12345678", "SLURM_STEP_NODELIST": "gpu[017-020]", "HF_HOME": "/scratch/hf"},
        **{"TOKENIZERS_PARALLELISM": "false", "SGLANG_MAX_NEW_TOKENS": "16384", "LD_LIBRARY_PATH": "/usr/lib"},
        **{"SGLANG_USE_AITER_FP8_PER_TOKEN": "true_true", "SGLANG_LOG_DECODE_GRAPH_KEY": "true"},
        **{"https_proxy": "http://proxy:3128", "WANDB_MODE": "offline_", "P2O_NODE_ADDRESS": "10.0.0.17"},
    }
    for name, value in ordinary.items():
        monkeypatch.setenv(name, value)
    assert ordinary.items() <= child_environment().items()


def test_secrets_hide_in_addresses_and_under_names_that_settings_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://user:word@proxy:3128")
    monkeypatch.setenv("DATABASE", "postgres://me:word@host/db")
    monkeypatch.setenv("TEACHER_LOGIN", "0123456789abcdef")
    assert "TEACHER_LOGIN" in child_environment()
    monkeypatch.setenv(SECRET_NAMES_VARIABLE, "OTHER,TEACHER_LOGIN")
    assert not {"https_proxy", "DATABASE", "TEACHER_LOGIN"} & child_environment().keys()
    assert {"https_proxy", "TEACHER_LOGIN"} < child_environment(["https_proxy", "TEACHER_LOGIN"]).keys()
