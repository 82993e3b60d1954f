import asyncio

import pytest

from slime.ray.current_weights import CurrentWeights, WeightFiles


def test_weights_in_files_are_found_at_once_and_nobody_is_asked_to_write() -> None:
    async def body() -> None:
        weights = CurrentWeights()
        weights.set(3, "here")
        assert await weights.files(timeout_s=1.0) == WeightFiles(3, "here")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(weights.wanted(), 0.05)

    asyncio.run(body())


def test_weights_in_no_file_are_written_once_for_all_who_wait() -> None:
    async def body() -> None:
        weights = CurrentWeights()
        weights.set(3, None)
        starts = asyncio.gather(weights.files(timeout_s=5.0), weights.files(timeout_s=5.0))
        assert await asyncio.wait_for(weights.wanted(), 1.0) == 3
        again = asyncio.ensure_future(weights.wanted())
        assert (await asyncio.wait({again}, timeout=0.05))[1] == {again}
        weights.written(3, WeightFiles(3, "there"))
        assert await starts == [WeightFiles(3, "there")] * 2
        assert await weights.files(timeout_s=1.0) == WeightFiles(3, "there")
        again.cancel()

    asyncio.run(body())


def test_an_older_version_that_arrives_late_is_asked_for_anew() -> None:
    async def body() -> None:
        weights = CurrentWeights()
        weights.set(3, None)
        start = asyncio.ensure_future(weights.files(timeout_s=5.0))
        assert await asyncio.wait_for(weights.wanted(), 1.0) == 3
        weights.set(4, None)
        weights.written(3, WeightFiles(3, "late"))
        assert await asyncio.wait_for(weights.wanted(), 1.0) == 4
        weights.written(4, WeightFiles(5, "trained meanwhile"))
        assert await start == WeightFiles(5, "trained meanwhile")

    asyncio.run(body())


def test_nobody_who_writes_is_an_error_after_the_deadline() -> None:
    async def body() -> None:
        weights = CurrentWeights()
        weights.set(1, None)
        with pytest.raises(TimeoutError):
            await weights.files(timeout_s=0.05)

    asyncio.run(body())
