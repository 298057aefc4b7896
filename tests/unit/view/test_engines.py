"""What engines wrote of themselves, as SGLang 0.5.21 writes it."""

from pathlib import Path

from megatron_p2o.view.engines import TAIL_BYTES, EngineState, engine_states

SECRETS = "[2026-11-28 23:54:21] server_args={'api_key': 'secret', 'token usage': 0.9}\n"
PREFILL = (
    "[2026-11-28 23:55:17 TP0] Prefill batch, #new-seq: 48, #new-token: 143, #cached-token: 854, token usage: 0.25, "
    "#running-req: 18, #queue-req: 3, #pending-token: 0, cpu graph: False, input throughput (token/s): 1503.90\n"
)
DECODE = (
    "[2026-11-28 23:55:16] Decode batch, #running-req: 191, #token: 4383, token usage: 0.07, cpu graph: False, "
    "gen throughput (token/s): 709.18, #queue-req: 0\n"
)


def test_the_last_batch_tells_of_requests_and_the_last_decoding_of_speed(tmp_path: Path) -> None:
    (tmp_path / "engine-2.log").write_text(SECRETS + "x" * TAIL_BYTES + "\n" + DECODE + PREFILL + "[2026-11-28 23:5")
    (tmp_path / "engine-10.log").write_text(SECRETS + DECODE)
    (tmp_path / "engine-0.log").write_text(SECRETS)
    assert engine_states(tmp_path) == [
        EngineState(name="engine-0"),
        EngineState(
            name="engine-2",
            time="2026-11-28 23:55:17",
            num_running=18,
            num_waiting=3,
            kv_share=0.25,
            tokens_per_s=709.18,
        ),
        EngineState(
            name="engine-10",
            time="2026-11-28 23:55:16",
            num_running=191,
            num_waiting=0,
            kv_share=0.07,
            tokens_per_s=709.18,
        ),
    ]


def test_a_log_that_cannot_be_read_or_holds_anything_tells_nothing(tmp_path: Path) -> None:
    (tmp_path / "engine-0.log").mkdir()
    (tmp_path / "engine-x<b>.log").write_bytes(b"\xff[2026-11-28 23:55:17] Decode batch, #running-req: <script>, a\n")
    states = engine_states(tmp_path)
    assert states[0] == EngineState(name="engine-0")
    assert all(state.num_running is None and state.kv_share is None for state in states)
    assert engine_states(tmp_path / "none") == []
