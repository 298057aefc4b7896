"""What `p2o doctor` calls missing: the exit status of a job's preflight hangs on it."""

from importlib.metadata import PackageNotFoundError, version

import pytest
import torch

from megatron_p2o.cli import main
from megatron_p2o.machine.doctor import REQUIRED_ON_GPU, examine, kernel_findings, package_finding
from megatron_p2o.machine.findings import Finding, print_findings

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="describes a machine without a GPU")


def is_installed(name: str) -> bool:
    try:
        return version(name) != ""
    except PackageNotFoundError:
        return False


def missing(findings: list[Finding]) -> set[str]:
    return {finding.subject for finding in findings if finding.is_missing}


@needs_no_gpu
def test_a_machine_without_gpus_lacks_them_only_when_a_job_expects_some() -> None:
    assert missing(examine()) == set()
    assert missing(examine(num_gpus=8)) >= {"gpus"} | {name for name in REQUIRED_ON_GPU if not is_installed(name)}
    (finding,) = (finding for finding in examine(num_gpus=8) if finding.subject == "gpus")
    assert finding.finding.startswith("0 of 8 are visible")
    with pytest.raises((AssertionError, RuntimeError)) as refusal:
        torch.zeros(1, device="cuda")
    assert finding.finding.endswith(f"; torch says: {refusal.value}")


@needs_no_gpu
def test_an_optional_package_can_be_required() -> None:
    assert missing(examine(required=["transformer-engine"])) == {"transformer-engine"}


@needs_no_gpu
def test_versions_can_be_required_of_any_package() -> None:
    assert missing(examine(required=["pytest>=1", "torch>=2"])) == set()
    assert missing(examine(required=["pytest==0.1", "torch==2.0"])) == {"pytest", "torch"}
    with pytest.raises(ValueError, match="--require"):
        examine(required=["torch=2"])


@pytest.mark.parametrize(
    ("accepted", "is_missing"), [("", False), (None, False), (">=2", False), (">=99", True), (">=2,<2.1", True)]
)
def test_an_installed_package_must_have_an_accepted_version(accepted: str | None, is_missing: bool) -> None:
    finding = package_finding("torch", accepted)
    assert finding.is_missing == is_missing
    assert version("torch") in finding.finding


def test_a_package_that_is_not_there_is_missing_unless_runs_do_without_it() -> None:
    assert package_finding("no-such-package", ">=1") == Finding(
        subject="no-such-package", finding='pip install "no-such-package>=1"', is_missing=True
    )
    assert not package_finding("no-such-package", None).is_missing


@pytest.mark.parametrize(
    ("capability", "has_triton", "head", "other"),
    [
        (None, True, "torch on the CPU: no GPU is visible", "torch on the CPU"),
        ((9, 0), True, "triton on the GPU, a Hopper: bfloat16 models; float32 ones need head.kernel: torch", "triton"),
        (
            (8, 0),
            True,
            "triton on the GPU: written for compute capability 9.0, untried on 8.0; should it fail",
            "triton",
        ),
        ((9, 0), False, "none: CUDA tensors are refused without triton", "none: CUDA tensors are refused"),
    ],
    ids=["no GPU", "Hopper", "another GPU", "no triton"],
)
def test_every_fused_operation_has_a_line_with_its_path_and_the_reason(
    capability: tuple[int, int] | None, has_triton: bool, head: str, other: str
) -> None:
    findings = {one.subject: one.finding for one in kernel_findings(capability, has_triton=has_triton)}
    of_head = {"linear_policy_loss", "linear_logprob"}
    assert set(findings) == of_head | {"grouped_advantage", "active_token_index"}
    for name, finding in findings.items():
        assert finding.startswith(head if name in of_head else other)


def test_the_report_marks_what_is_missing() -> None:
    lines: list[str] = []
    findings = [Finding(subject="a", finding="1"), Finding(subject="bcd", finding="2", is_missing=True)]
    print_findings(findings, lines.append)
    assert lines == ["a    1", "bcd  MISSING 2", "1 of these are missing: see the lines marked MISSING"]
    print_findings(findings[:1], lines.append)
    assert lines[-1] == "nothing is missing"


@needs_no_gpu
def test_strict_turns_what_is_missing_into_the_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--strict"]) == 0
    assert main(["doctor", "--gpus", "8"]) == 0
    assert main(["doctor", "--strict", "--gpus", "8"]) == 1
    assert "MISSING 0 of 8" in capsys.readouterr().out
