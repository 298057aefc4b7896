"""Settings of `sglang` are compared with the installed server before anything is started."""

import pytest

from megatron_p2o.rollout.servers.server_arguments import EnginePlace, ask_server, check_arguments, server_arguments
from megatron_p2o.testing.fakes import fake_config


def test_the_installed_server_names_what_it_does_not_take() -> None:
    wrong = {
        "no_such_argument": 1,
        "mem-fraction-statik": 0.5,
        "chunked_prefill_size": "many",
        "attention_backend": "dice",
        "sampling_backend": "dice",
        "log_requests": "on",
        "schedule_conservativeness": 2,
    }
    with pytest.raises(ValueError) as refused:
        check_arguments(fake_config({"sglang": wrong}))
    assert str(refused.value).split("; ") == [
        "sglang.no_such_argument is not an argument of the installed SGLang server",
        "sglang.mem_fraction_statik is not an argument of the installed SGLang server: did you mean "
        "sglang.mem_fraction_static?",
        "sglang.chunked_prefill_size=many has the wrong type: Expected `int | null`, got `str`",
        *str(refused.value).split("; ")[3:5],
        "sglang.log_requests=on has the wrong type: Expected `bool`, got `str`",
    ]
    for told, name in zip(str(refused.value).split("; ")[3:5], ("attention_backend", "sampling_backend"), strict=True):
        assert told.startswith(f"sglang.{name}=dice must be one of ")


@pytest.mark.parametrize("num_gpus", [0, 8])
def test_the_installed_server_takes_what_the_program_and_the_examples_set(num_gpus: int) -> None:
    config = fake_config({"sglang": {"mem_fraction_static": 0.7, "chunked-prefill-size": 64}})
    arguments = server_arguments(config, EnginePlace(index=0, node=0, slot=0), num_gpus)
    assert ask_server(arguments, timeout_s=300) == []
