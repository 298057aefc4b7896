"""Which addresses lead to this machine: no proxy stands before them, and no key is shown elsewhere."""

from megatron_p2o.endpoints.bounded_client import is_loopback_url


def test_addresses_of_this_machine_are_known() -> None:
    assert [is_loopback_url(f"http://{host}:80/v1") for host in ("localhost", "127.0.0.9", "[::1]")] == [True] * 3
    assert not is_loopback_url("https://host.example/v1") and not is_loopback_url("http://10.0.0.1")
