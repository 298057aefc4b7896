"""The memory in which a bucket of weights waits for the engines."""

import torch

from megatron_p2o.rollout.buckets.staging import StagingBuffer, laid_out


def test_a_staging_buffer_grows_for_a_large_tensor() -> None:
    buffer = StagingBuffer(0, 32)
    before = buffer.message(0, buffer.address, verify=False)
    buffer.clear(1000)
    ((_, entry, tensor),) = laid_out([("large", torch.arange(250, dtype=torch.float32))], 32)
    buffer.put(entry, tensor, verify=False)
    after = buffer.message(0, buffer.address, verify=False)
    assert after.address.num_bytes >= 1000 and after.address.buffer_id != before.address.buffer_id
    mapped = torch.from_file(after.address.path, shared=True, size=after.address.num_bytes, dtype=torch.uint8)
    assert torch.equal(after.entries[0].view(mapped), torch.arange(250, dtype=torch.float32))
    buffer.close()
