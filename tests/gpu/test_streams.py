"""Streams and the host, on GPUs."""

import pytest

from tests.gpu import streams

CHECKS = (
    streams.check_long_kernel_before,
    streams.check_another_stream,
    streams.check_freed_and_overwritten,
    streams.check_buffers_outlive_other_streams,
)


@pytest.mark.parametrize("name", streams.NAMES)
@pytest.mark.parametrize("check", CHECKS)
def test_streams(everyone, agreed, check, name):
    agreed(lambda: check(everyone, name))


@pytest.mark.parametrize("name", streams.NATIVE)
def test_the_host_does_not_wait(everyone, agreed, name):
    agreed(lambda: streams.check_host_does_not_wait(everyone, name))


@pytest.mark.parametrize("name", streams.COLLECTIVES)
def test_the_handle_is_dropped(everyone, agreed, name):
    agreed(lambda: streams.check_handle_dropped(everyone, name))


@pytest.mark.filterwarnings("ignore:.*AccumulateGrad.*:UserWarning")  # whose stream is another one: it is what we ask
@pytest.mark.parametrize("bucket_mb", [25.0, 1e-6])
def test_gradients_from_several_streams(everyone, agreed, bucket_mb):
    agreed(lambda: streams.check_gradients_from_several_streams(everyone, bucket_mb))


# The last one, since a failure here has broken the group.
@pytest.mark.parametrize("name", streams.NATIVE)
def test_with_a_limit_the_host_waits(everyone, agreed, name):
    agreed(lambda: streams.check_host_waits_with_a_limit(everyone, name))
