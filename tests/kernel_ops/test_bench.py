"""The benchmark measures what it says: its gate, its memory count, its effective work."""

import json
import runpy
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from p2o_kernels.lm_head.torch_path import TorchHead

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def test_the_gate_stops_a_wrong_gradient_and_a_missing_result(bench):
    case = bench.cases.make_case(bench.cases.SHAPES["tiny"], 64, 0.0, CPU, with_main_grad=False)
    ours = next(one for one in bench.providers.own_policy_providers(CPU) if one.name == "ours")

    def halved(case):
        outcome = ours.run(case)
        outcome.weight_grad_VD.mul_(0.5)
        return outcome

    def silent(case):
        return bench.providers.Outcome(logprobs_T=None)

    for run, is_right in ((ours.run, True), (halved, False), (silent, False)):
        provider = bench.providers.Provider(name="any", run=run)
        assert bench.measure.passes_gate(provider, bench.measure.errors_against_float64(provider, case)) == is_right


def truncating_product(hidden, weight, bits=24):
    """Return hidden @ weight.T as tensor cores add: `bits` of mantissa, toward zero, after every 16 products."""
    accumulator = torch.zeros(len(hidden), len(weight), dtype=torch.float64)
    for start in range(0, hidden.shape[1], 16):
        part = slice(start, start + 16)
        accumulator += hidden[:, part].double() @ weight[:, part].double().T
        mantissa, exponent = torch.frexp(accumulator)
        accumulator = torch.ldexp((mantissa * 2**bits).trunc(), exponent - bits)
    return accumulator


@pytest.mark.parametrize(("bits", "is_right"), [(24, True), (22, False), (8, False)])
def test_the_gate_passes_float32_sums_that_truncate_and_nothing_coarser(bench, monkeypatch, bits, is_right):
    # 8 bits are bfloat16 logits, 22 a sum that loses two bits of float32's 24.
    shape = bench.cases.Shape(hidden_size=2048, vocab_size=2000)
    case = bench.cases.make_case(shape, 64, 0.0, CPU, with_main_grad=False)
    case = replace(case, hidden_TD=case.hidden_TD.detach().bfloat16(), weight_VD=case.weight_VD.detach().bfloat16())

    def logprobs(bits):
        logits = truncating_product(case.hidden_TD, case.weight_VD, bits)
        return torch.log_softmax(logits, -1).gather(1, case.targets_T[:, None]).squeeze(1)

    # The device's own product truncates as well; ours adds the vocabulary's rows in the other order.
    monkeypatch.setattr(bench.measure, "product_logprobs", lambda *_: logprobs(24))
    reversed_case = replace(case, hidden_TD=case.hidden_TD.flip(1), weight_VD=case.weight_VD.flip(1))

    def run(case):
        logits = truncating_product(reversed_case.hidden_TD, reversed_case.weight_VD, bits)
        logprobs_TV = torch.log_softmax(logits, -1).float()
        return bench.providers.Outcome(logprobs_T=logprobs_TV.gather(1, case.targets_T[:, None]).squeeze(1))

    provider = bench.providers.Provider(name="any", run=run, max_logprob_error=None)
    assert bench.measure.passes_gate(provider, bench.measure.errors_against_float64(provider, case)) == is_right


def test_memory_is_counted_to_the_byte_beyond_the_gradients(bench):
    case = bench.cases.make_case(bench.cases.SHAPES["tiny"], 64, 0.0, CPU, with_main_grad=False)

    def run(case):
        temporary = torch.empty(1000, dtype=torch.uint8)
        del temporary
        gradient = torch.empty(640, dtype=torch.uint8)
        other = torch.empty(512, dtype=torch.uint8)
        del other
        return bench.providers.Outcome(logprobs_T=None, hidden_grad_TD=gradient)

    provider = bench.providers.Provider(name="any", run=run)
    assert bench.measure.extra_peak_bytes(provider, case, CPU) == 512


def test_our_memory_is_a_fraction_of_the_plain_path(bench):
    shape = bench.cases.Shape(hidden_size=16, vocab_size=2048)
    case = bench.cases.make_case(shape, 2048, 0.0, CPU, with_main_grad=False)
    case = replace(case, path=TorchHead(chunk_bytes=2**20))
    providers = {one.name: one for one in bench.providers.own_policy_providers(CPU)}
    plain, ours = (bench.measure.extra_peak_bytes(providers[name], case, CPU) for name in ("plain", "ours"))
    # The plain path holds logits and log-probs, 16 MiB each, and their gradient; ours one MiB chunk twice at most.
    assert plain > 2 * 4 * 2048 * 2048
    assert ours < plain / 8


def test_the_command_writes_rows_whose_rates_follow_from_their_times(bench, tmp_path, monkeypatch):
    command = "--op linear_policy_loss --shape tiny --tokens 1024 2048 --dead 0 0.5 --peers none --repeats 2"
    output = tmp_path / "result.json"
    arguments = [*command.split(), "--device", "cpu", "--json", str(output)]
    monkeypatch.setattr(sys, "argv", ["bench_kernels.py", *arguments])
    runpy.run_path(str(ROOT / "tools" / "bench_kernels.py"), run_name="__main__")
    result = json.loads(output.read_text())
    assert [(row["provider"], row["tokens"], row["dead_share"]) for row in result["rows"]] == [
        (name, tokens, dead) for tokens in (1024, 2048) for dead in (0, 0.5) for name in ("ours", "plain")
    ]
    for row in result["rows"]:
        assert row["effective_tflops"] == pytest.approx(6 * row["tokens"] * 64 * 1000 / row["median_ms"] / 1e9)
        assert row["share_of_matmul"] == pytest.approx(row["effective_tflops"] / result["matmul_tflops"])
        assert row["errors"]["weight_grad_relative"] < 1e-5
    assert result["environment"]["torch"] == version("torch")


def test_a_peer_built_for_other_versions_is_named_and_left_out(bench, tmp_path, monkeypatch):
    import bench.head

    (tmp_path / "liger_kernel").mkdir()
    (tmp_path / "liger_kernel" / "__init__.py").write_text("raise AttributeError('no such operator')")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.partition(".")[0] == "liger_kernel"]:
        monkeypatch.delitem(sys.modules, name)
    result = bench.head.bench_head(
        bench.cases.SHAPES["tiny"],
        CPU,
        is_scoring=False,
        token_counts=[64],
        dead_shares=[0.0],
        kernels=(),
        chosen_peers=["liger-grpo"],
        verl=None,
        repeats=1,
    )
    assert result["missing"] == {"liger-grpo": "AttributeError: no such operator"}
    assert [row["provider"] for row in result["rows"]] == ["ours", "plain"]


def test_peers_that_come_after_the_time_for_first_runs_are_left_out_and_named(bench, monkeypatch):
    import bench.head

    plain = bench.providers.Provider(name="peer", run=bench.providers._plain)
    monkeypatch.setattr(bench.head, "peers", lambda *_, **options: {"peer": lambda: plain})
    kept = []
    result = bench.head.bench_head(
        bench.cases.SHAPES["tiny"],
        CPU,
        is_scoring=False,
        token_counts=[64, 96],
        dead_shares=[0.0],
        kernels=(),
        chosen_peers=["all"],
        verl=None,
        repeats=1,
        peers_s=0.0,
        keep=kept.append,
    )
    assert [(row["provider"], row["median_ms"] is None) for row in result["rows"][:3]] == [
        ("ours", False),
        ("plain", False),
        ("peer", True),
    ]
    assert "left out" in result["rows"][2]["note"]
    # What was measured is handed out after each case.
    assert [len(each["rows"]) for each in kept] == [3, 6]


def test_the_readme_shows_the_committed_results_and_nothing_else(bench):
    text = bench.tables.README.read_text()
    for marker in bench.tables.MARKERS:
        shown = text.partition(f"<!-- results: {marker} -->\n")[2].partition("<!-- end of results -->")[0]
        tables = [bench.tables.table(json.loads(file.read_text())) for file in bench.tables.result_files(marker)]
        assert shown == ("\n\n".join(tables) + "\n" if tables else "(empty: no run yet)\n")


@pytest.mark.parametrize("place", [0, -1])
def test_advantages_that_are_no_numbers_are_not_timed(bench, monkeypatch, place):
    right = bench.advantage._run

    def poisoned(arguments, implementation):
        advantages_R = right(arguments, implementation)
        advantages_R[place] = torch.nan
        return advantages_R

    assert bench.advantage.bench_grouped_advantage([16], 1, CPU)[0]["max_error"] < 1e-5
    monkeypatch.setattr(bench.advantage, "_run", poisoned)
    with pytest.raises(RuntimeError, match=r"advantages are off by \[nan\]"):
        bench.advantage.bench_grouped_advantage([16], 1, CPU)
