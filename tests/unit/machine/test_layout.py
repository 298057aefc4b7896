"""The sizes of the layout that follow from the nodes of a launch."""

import pytest

from megatron_p2o.config.tree import ParallelConfig
from megatron_p2o.machine.layout import layout_line, with_layout
from megatron_p2o.testing.fakes import fake_config


@pytest.mark.parametrize(
    ("parallel", "num_nodes", "gpus_per_node", "data", "sequence"),
    [
        (ParallelConfig(), 1, 0, 1, False),
        (ParallelConfig(), 2, 0, 2, False),
        (ParallelConfig(tensor=2), 1, 0, 1, True),
        (ParallelConfig(tensor=2, context=2), 2, 0, 1, True),
        (ParallelConfig(), 1, 8, 8, False),
        (ParallelConfig(), 2, 8, 16, False),
        (ParallelConfig(tensor=8, pipeline=2), 4, 8, 2, True),
        (ParallelConfig(tensor=2, sequence=False), 1, 8, 4, False),
        (ParallelConfig(data=3), 1, 8, 3, False),
        (ParallelConfig(tensor=2, data=2, sequence=True), 3, 1, 2, True),
    ],
)
def test_replicas_fill_the_launch_and_what_is_given_stays(
    parallel: ParallelConfig, num_nodes: int, gpus_per_node: int, data: int, sequence: bool
) -> None:
    laid_out = with_layout(fake_config({"parallel": parallel}), num_nodes, gpus_per_node).parallel
    assert (laid_out.data, laid_out.sequence) == (data, sequence)
    assert (laid_out.tensor, laid_out.pipeline, laid_out.context) == (
        parallel.tensor,
        parallel.pipeline,
        parallel.context,
    )
    assert laid_out.for_processes(99) == laid_out, "what was derived is given"


@pytest.mark.parametrize(
    ("parallel", "num_nodes", "gpus_per_node", "message"),
    [
        (ParallelConfig(tensor=3), 1, 8, "parallel.tensor=3 .* = 3 ranks of one replica must divide the 8 processes"),
        (ParallelConfig(tensor=8, pipeline=2), 1, 8, "= 16 ranks of one replica must divide the 8 processes"),
        (ParallelConfig(context=2), 3, 0, "parallel.context=2 = 2 ranks of one replica must divide the 3 processes"),
    ],
)
def test_ranks_that_are_no_whole_number_of_replicas_are_refused(
    parallel: ParallelConfig, num_nodes: int, gpus_per_node: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        with_layout(fake_config({"parallel": parallel}), num_nodes, gpus_per_node)


def test_the_line_of_the_layout_says_what_was_derived_and_for_what() -> None:
    given = ParallelConfig(tensor=8, pipeline=2)
    assert layout_line(given, given.for_processes(32), 4, 8) == (
        "layout: tensor 8 x pipeline 2 x context 1 x data 2 = 32 ranks, sequence parallelism on; "
        "derived for 4 nodes with 8 GPUs: data and sequence"
    )
    given = ParallelConfig(data=1, sequence=False)
    assert layout_line(given, given.for_processes(1), 1, 0) == (
        "layout: tensor 1 x pipeline 1 x context 1 x data 1 = 1 ranks, sequence parallelism off"
    )
